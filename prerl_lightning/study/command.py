"""``prerl study STUDY.yaml``: the runs that its claims need, and a verdict for each claim.

    prerl study configs/study/paper_claims.yaml --dry_run     # checks it; what would be made and recorded
    prerl study configs/study/paper_claims.yaml

The same command goes on where it was stopped or killed, makes failed runs again, and takes finished ones as they are.
runs/study/NAME/ then has study.json, study.html and a folder a run.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prerl_lightning import shipped
from prerl_lightning.errors import ArgumentParser
from prerl_lightning.report.words import figure
from prerl_lightning.study.check import check_claims, facts
from prerl_lightning.study.design import Study, arguments, read_study
from prerl_lightning.study.page import check_figures, unequal, write_page
from prerl_lightning.study.plan import Plan, mean
from prerl_lightning.study.record import Record
from prerl_lightning.study.schedule import Planned, make, slots
from prerl_lightning.study.verdicts import Verdict, judge

log = logging.getLogger(__name__)


def _arguments() -> ArgumentParser:
    parser = ArgumentParser("prerl study", description="Runs arms over seeds and judges the claims of a YAML file.")
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--dry_run", action="store_true", help="check and list, without a run or a file")
    parser.add_argument("--no_runs", action="store_true", help="start no run: study.json and the page of what there is")
    return parser


def study(args: Sequence[str]) -> list[Verdict]:
    """Run the command; returns the verdicts in the order of the claims.

    Raises:
        InputError: anything in the file, or in an arm's configuration, before the first run starts.
    """
    own = _arguments().parse_args(args)
    design = read_study(Path(shipped.path(own.study)))
    places = slots(design.jobs)
    plan = Plan(design)
    record = Record(plan.root / design.name / "study.json")
    check_figures()
    if record.data.get("checked") != design.digest:  # also with nothing to run: its claims are registered
        commands = _commands(design)
        log.info("%s: parsing %d configurations as prerl fit does: some seconds", design.name, len(commands))
        check_claims(design, facts(commands))
        record.data["checked"] = design.digest
    recorded = record.register(design, _finished(plan), own.dry_run)
    if own.dry_run:
        _list(plan, record, recorded)
        return []
    record.write(name=design.name, file=str(design.file))

    def ended(_: Planned) -> None:
        record.finish(_finished(plan))
        record.write(runs=_run_rows(plan))

    for phase in () if own.no_runs else (plan.tuning, lambda: list(plan.all())):  # what is compared follows tuning
        todo = list({run.folder: run for run in reversed(phase()) if not plan.status(run).finished}.values())[::-1]
        if todo:
            log.info("%s: %d run%s to make", design.name, len(todo), "s" if len(todo) > 1 else "")
        make(todo, places, ended)
    sides = plan.sides()
    verdicts = [
        judge(c, design.level, design.seeds, sides[c.arm], sides[c.against] if c.against else None)
        for c in design.claims
    ]
    record.finish(_finished(plan))
    rows = [_verdict_row(v) for v in verdicts]
    record.write(runs=_run_rows(plan), tuning=_tuning_rows(plan), level=design.level, verdicts=rows)
    page = record.path.with_suffix(".html")
    write_page(page, design, record, sides, verdicts)
    print(table(design, verdicts, record))
    print(f"{page if any(side.runs for side in sides.values()) else 'No page yet'}; {record.path}")
    missing = [f"{run}: {found.said}" for run in plan.all() if not (found := plan.status(run)).finished]
    if missing:
        print("\n".join([f"{len(missing)} runs are missing, which the same command makes:", *missing]))
    return verdicts


def _commands(design: Study) -> dict[str, list[str]]:
    """Of each arm and each point of its grid, by its place in the file."""
    found = {f"arms.{name}": arguments(arm) for name, arm in design.arms.items()}
    if design.tuning:
        for arm, points in design.tuning.points.items():
            for point in points:
                said = ", ".join(f"{key} {value}" for key, value in point.items())
                found[f"tuning.grid.{arm} ({said})"] = arguments(design.arms[arm], design.tuning.settings, point)
    return found


def _finished(plan: Plan) -> list[str]:
    return [str(run.folder) for run in plan.all() if plan.status(run).finished]


def _run_rows(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for run in plan.all():
        found = plan.status(run)
        row = {"arm": run.arm, "point": run.point, "seed": run.seed, "folder": str(run.folder), "status": found.state}
        rows.append(row | {"version": str(found.run.folder) if found.run else None, "said": found.said})
    return rows


def _tuning_rows(plan: Plan) -> dict[str, Any] | None:
    tuning = plan.study.tuning
    if tuning is None:
        return None
    arms = {}
    for arm in plan.study.arms:
        points = [
            {"settings": dict(point), "values": of_seeds, "mean": mean(of_seeds)}
            for point, of_seeds in zip(plan.study.points(arm), plan.values(arm), strict=True)
        ]
        arms[arm] = {"points": points, "chosen": plan.chosen(arm)}
    return {"seeds": list(tuning.seeds), "measure": str(tuning.measure), "arms": arms}


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    claim, row = verdict.claim, asdict(verdict)
    row |= {"claim": claim.name, "measure": str(claim.measure), "arm": claim.arm, "against": claim.against}
    return row | {"effect_is": claim.effect, "expected": "more" if claim.more else "less", "margin": claim.margin}


def table(design: Study, verdicts: Sequence[Verdict], record: Record) -> str:
    """One paragraph a claim, for the terminal."""
    lines = []
    for v in verdicts:
        notes = [v.why, record.standing(f"claim {v.claim.name}"), unequal(design, v.claim)]
        lines.append(f"{v.verdict.upper():<10} {v.claim.name}: {v.claim.says}")
        lines += [f"           {in_words(v)}", f"           {'; '.join(filter(None, notes))}"]
    return "\n".join(lines)


def in_words(v: Verdict) -> str:
    """The effect with its interval, and what it is of."""
    claim = v.claim
    kind = "" if claim.effect == "value" else f"{claim.effect} "
    between = f" [{figure(v.low)}, {figure(v.high)}]" if v.low is not None else ""
    n = sum(one.effect is not None for one in v.seeds)
    of = f"{n} seed{'s' if n != 1 else ''}, {f'{v.problems} problems' if v.problems else 'over seeds alone'}"
    goal = f" to {figure(v.target)}" if v.target is not None and "share" in claim.measure.options else ""
    names = _with_mean(claim.arm, [one.arm for one in v.seeds])
    if claim.against is not None:
        names += f" against {_with_mean(claim.against, [one.against for one in v.seeds])}"
    never = [f"{count} of {name}" for count, name in zip(v.censored, (claim.arm, claim.against), strict=True) if count]
    return (
        f"{claim.measure}{goal}, {names}: {kind}{figure(v.effect)}{between} at {100 * v.level:.4g} % ({of}); "
        f"expected {'above' if claim.more else 'below'} {figure(claim.margin)}"
        + (f"; {' and '.join(never)} never reach it" if never else "")
    )


def _with_mean(arm: str, values: list[float | None]) -> str:
    """Over the seeds that have a value."""
    known = [value for value in values if value is not None]
    return f"{arm} ({figure(mean(known))})" if known else arm


def _list(plan: Plan, record: Record, recorded: Sequence[str]) -> None:
    """What would be done, for --dry_run. ``recorded``: what `Record.register` returned."""
    for run in {run.folder: run for run in plan.all()}.values():
        found = plan.status(run)
        what = {"finished": "is there", "unfinished": "goes on", "none": "to make"}[found.state]
        print(f"{what:<9} {run}: {run.folder}" + ("" if found.state == "none" else f" ({found.said})"))
    for arm, runs in plan.compared().items():
        if not runs:
            print(f"to choose {arm}: its {len(plan.study.seeds)} compared runs follow the tuning")

    def standing(what: str) -> str:
        return f"{'would be recorded: ' if what in recorded else ''}{record.standing(what)}"

    for claim in plan.study.claims:
        print(f"claim     {claim.name}: {claim.says} ({standing(f'claim {claim.name}')})")
    print(f"design    arms, seeds and tuning ({standing('design')})")
    for what in recorded:
        if what not in record.data["registration"]:
            print(f"removed   {what}")
