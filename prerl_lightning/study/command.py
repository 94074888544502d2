"""``prerl study STUDY.yaml``: the runs that its claims need, and a verdict for each claim.

    prerl study configs/study/paper_claims.yaml --dry_run     # which runs there are and which are missing
    prerl study configs/study/paper_claims.yaml

The same command goes on where it was stopped or killed, makes failed runs again, and takes finished ones as they are.
runs/study/NAME/ then has study.json, study.html and a folder a run.
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prerl_lightning.report.words import figure
from prerl_lightning.study.check import check_claims, facts
from prerl_lightning.study.design import Settings, Study, arguments, read_study
from prerl_lightning.study.measures import measure
from prerl_lightning.study.page import check_figures, unequal, write_page
from prerl_lightning.study.record import Record
from prerl_lightning.study.schedule import Planned, Status, make, planned, slots, status
from prerl_lightning.study.verdicts import Side, Verdict, judge

log = logging.getLogger(__name__)

ROOT = Path("runs") / "study"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "prerl study", allow_abbrev=False, description="Runs arms over seeds and judges the claims of a YAML file."
    )
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--dry_run", action="store_true", help="list runs and claims; nothing is run or written")
    parser.add_argument("--no_runs", action="store_true", help="start no run: study.json and the page of what there is")
    return parser


def study(args: Sequence[str]) -> list[Verdict]:
    """Run the command; returns the verdicts in the order of the claims.

    Raises:
        InputError: anything in the file, or in an arm's configuration, before the first run starts.
    """
    own = _arguments().parse_args(args)
    design = read_study(Path(own.study))
    places = slots(design.jobs)
    record = Record(ROOT / design.name / "study.json")
    if own.dry_run:
        _list(design, record)
        return []
    check_figures()
    tuning, compared = list(_tuning_runs(design)), _compared_runs(design)
    known = {run: status(run.folder) for run in [*tuning, *(r for runs in compared.values() for r in runs)]}
    complete = all(compared.values()) and all(found.finished for found in known.values())
    if not own.no_runs and not complete and record.data.get("checked") != design.digest:
        check_claims(design, facts(_commands(design)))
        record.data["checked"] = design.digest
    record.register(design, _finished(known))
    record.write(name=design.name, file=str(design.file))

    def ended(run: Planned) -> None:
        known[run] = status(run.folder)
        record.finish(_finished(known))
        record.write(runs=_run_rows(known))

    if not own.no_runs:
        for runs in (lambda: tuning, lambda: [run for arm in _compared_runs(design).values() for run in arm]):
            todo = [run for run in dict.fromkeys(runs()) if not status(run.folder).finished]
            if todo:
                log.info("%s: %d run%s to make", design.name, len(todo), "s" if len(todo) > 1 else "")
            make(_once(todo), places, ended)
    compared = _compared_runs(design)
    wanted = [*tuning, *(run for runs in compared.values() for run in runs)]
    known = {run: known[run] if run in known and known[run].finished else status(run.folder) for run in wanted}
    sides = {name: _side(design, compared[name], known) for name in design.arms}
    verdicts = [
        judge(c, design.level, design.seeds, sides[c.arm], sides[c.against] if c.against else None)
        for c in design.claims
    ]
    record.finish(_finished(known))
    record.write(
        runs=_run_rows(known),
        tuning=_tuning_rows(design),
        level=design.level,
        verdicts=[_verdict_row(v) for v in verdicts],
    )
    page = record.path.with_suffix(".html")
    write_page(page, design, record, sides, verdicts)
    print(table(design, verdicts, record))
    print(f"{page} and {record.path}")
    failed = [f"{run}: {found.said}" for run, found in known.items() if not found.finished]
    if failed:
        print(
            "\n".join([f"{len(failed)} of {len(known)} runs are missing; the same command tries them again:", *failed])
        )
    return verdicts


def _side(design: Study, runs: Sequence[Planned], known: Mapping[Planned, Status]) -> Side:
    """An arm's finished runs, and why the others are absent."""
    found = {run.seed: known[run] for run in runs}
    finished = {seed: one.run for seed, one in found.items() if one.finished and one.run is not None}
    absent = {seed: found[seed].said if seed in found else "no tuning point was chosen"
              for seed in design.seeds if seed not in finished}  # fmt: skip
    return Side(finished, absent)


def _tuning_runs(design: Study) -> Iterator[Planned]:
    if design.tuning:
        for arm, points in design.tuning.points.items():
            for i in range(len(points)):
                yield from _of_point(design, arm, i)


def _of_point(design: Study, arm: str, point: int) -> list[Planned]:
    assert design.tuning is not None
    settings = (design.tuning.settings, design.tuning.points[arm][point])
    return [planned(design, arm, point, seed, *settings, root=ROOT) for seed in design.tuning.seeds]


def _compared_runs(design: Study) -> dict[str, list[Planned]]:
    """By arm; none where tuning has not chosen yet."""
    found: dict[str, list[Planned]] = {}
    for arm in design.arms:
        chosen = chosen_settings(design, arm)
        seeds = design.seeds if chosen is not None else ()
        found[arm] = [planned(design, arm, None, seed, chosen or {}, root=ROOT) for seed in seeds]
    return found


def chosen_settings(design: Study, arm: str) -> Settings | None:
    """Of the arm's best point; {}: it is not tuned; None: no point has all of its runs yet."""
    points = design.points(arm)
    if not points:
        return {}
    means = [_mean(values) for values in _point_values(design, arm)]
    known = [(mean, -i) for i, mean in enumerate(means) if mean is not None]
    return points[-max(known)[1]] if known else None


def _point_values(design: Study, arm: str) -> list[list[float | None]]:
    """The tuning measure by point and tuning seed; None: no finished run has it."""
    assert design.tuning is not None
    found: list[list[float | None]] = []
    for i in range(len(design.points(arm))):
        values: list[float | None] = []
        for run in _of_point(design, arm, i):
            at = status(run.folder)
            value = (
                measure(at.run, design.tuning.measure, np.ones((1, 1))).values[0] if at.finished and at.run else None
            )
            values.append(None if value is None or np.isnan(value) else float(value))
        found.append(values)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _once(runs: Sequence[Planned]) -> list[Planned]:
    """Arms or points that come to the same run share it."""
    return list({run.folder: run for run in reversed(runs)}.values())[::-1]


def _commands(design: Study) -> dict[str, list[str]]:
    """Of each arm and each point of its grid, by its place in the file."""
    found = {f"arms.{name}": arguments(arm) for name, arm in design.arms.items()}
    if design.tuning:
        for arm, points in design.tuning.points.items():
            for point in points:
                said = ", ".join(f"{key} {value}" for key, value in point.items())
                found[f"tuning.grid.{arm} ({said})"] = arguments(design.arms[arm], design.tuning.settings, point)
    return found


def _finished(known: Mapping[Planned, Status]) -> list[str]:
    return [str(run.folder) for run, found in known.items() if found.finished]


def _run_rows(known: Mapping[Planned, Status]) -> list[dict[str, Any]]:
    return [
        {
            "arm": run.arm, "point": run.point, "seed": run.seed, "folder": str(run.folder),
            "version": str(found.run.folder) if found.run else None, "status": found.state, "said": found.said,
        }
        for run, found in known.items()
    ]  # fmt: skip


def _tuning_rows(design: Study) -> dict[str, Any] | None:
    if design.tuning is None:
        return None
    arms = {}
    for arm in design.arms:
        values = _point_values(design, arm) if design.points(arm) else []
        rows = [
            {"settings": dict(point), "values": of_seeds, "mean": _mean(of_seeds)}
            for point, of_seeds in zip(design.points(arm), values, strict=True)
        ]
        arms[arm] = {"points": rows, "chosen": chosen_settings(design, arm)}
    return {"seeds": list(design.tuning.seeds), "measure": str(design.tuning.measure), "arms": arms}


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    row = asdict(verdict)
    row["claim"] = claim.name
    row["measure"] = str(claim.measure)
    return row | {"arm": claim.arm, "against": claim.against, "of": claim.effect, "margin": claim.margin}


def table(design: Study, verdicts: Sequence[Verdict], record: Record) -> str:
    """One paragraph a claim, for the terminal."""
    lines = []
    for v in verdicts:
        lines += [f"{v.verdict.upper():<10} {v.claim.name}: {v.claim.says}", f"           {in_words(v)}"]
        notes = [v.why, record.standing(f"claim {v.claim.name}"), unequal(design, v.claim)]
        lines.append(f"           {'; '.join(filter(None, notes))}")
    return "\n".join(lines)


def in_words(v: Verdict) -> str:
    """The effect with its interval, and what it is of."""
    claim = v.claim
    kind = {"ratio": "ratio ", "difference": "difference ", "value": ""}[claim.effect]
    between = f" [{figure(v.low)}, {figure(v.high)}]" if v.low is not None else ""
    n = sum(one.effect is not None for one in v.seeds)
    of = f"{n} seed{'s' if n != 1 else ''}, " + (f"{v.problems} problems" if v.problems else "over seeds alone")
    goal = f" to {figure(v.target)}" if v.target is not None and "share" in claim.measure.options else ""
    names = claim.arm if claim.against is None else f"{claim.arm} against {claim.against}"
    never = sum(v.censored)
    return (
        f"{claim.measure}{goal}, {names}: {kind}{figure(v.effect)}{between} at {100 * v.level:.4g} % ({of}); "
        f"expected {'above' if claim.more else 'below'} {figure(claim.margin)}"
        + (f"; {v.censored[0]} of {claim.arm} and {v.censored[1]} of {claim.against} never reach it" if never else "")
    )


def _list(design: Study, record: Record) -> None:
    """What would be done, for --dry_run."""
    tuning, compared = list(_tuning_runs(design)), _compared_runs(design)
    for run in _once([*tuning, *(run for runs in compared.values() for run in runs)]):
        found = status(run.folder)
        what = {"finished": "is there", "unfinished": "goes on", "none": "to make"}[found.state]
        print(f"{what:<9} {run}: {run.folder}" + ("" if found.state == "none" else f" ({found.said})"))
    for arm, runs in compared.items():
        if not runs:
            print(f"to choose {arm}: its {len(design.seeds)} compared runs follow the tuning")
    for claim in design.claims:
        entry = record.data["registration"].get(f"claim {claim.name}")
        print(f"claim     {claim.name}: {claim.says} ({record.standing(f'claim {claim.name}') if entry else 'new'})")
