"""study.html: verdicts, effects, tuning and registration, and below them the report on the arms' runs."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from prerl_lightning.report import compare
from prerl_lightning.report.compare import Group
from prerl_lightning.report.html import NONE, table, tag
from prerl_lightning.report.page import page_of, vega
from prerl_lightning.report.runs import Run
from prerl_lightning.report.words import figure
from prerl_lightning.study.design import Claim, Measure, Study, canonical
from prerl_lightning.study.forest import Bar, forest
from prerl_lightning.study.measures import source
from prerl_lightning.study.record import Record, standing
from prerl_lightning.study.verdicts import Side, Verdict, judge


def write_page(
    path: Path, study: Study, record: Record, sides: Mapping[str, Side], verdicts: Sequence[Verdict]
) -> None:
    """``sides``: by arm. Without a finished run there is nothing to draw, and no page."""
    groups = [
        Group(name, tuple(side.runs.values()), compare.settings(next(iter(side.runs.values()))))
        for name, side in sides.items()
        if side.runs
    ]
    if not groups:
        return
    any_run = groups[0].runs[0]
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in ("supported", "refuted", "undecided")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    lead = (
        f"{len(verdicts)} claim{'s' if len(verdicts) != 1 else ''}: {said}. {len(study.arms)} arms, "
        f"{len(study.seeds)} seeds. The intervals hold together at 95 %: each is at {100 * study.level:.4g} %."
    )
    missing = [
        f"{name} seed {seed} is missing: {why}" for name, side in sides.items() for seed, why in side.absent.items()
    ]
    sections = [
        ("verdicts", "Verdicts", _verdicts(study, record, verdicts, any_run)),
        ("ratios", "Steps to accuracy, by arm", _ratios(study, groups, sides, any_run)),
        ("tuning", "Tuning", _tuning(record)),
        ("registration", "Registration", _registration(record)),
    ]
    head = {"title": escape(study.name), "lead": tag("p", escape(lead), class_="lead")}
    html = page_of(groups, notes=missing, head=head, first=[one for one in sections if one[2]])
    path.write_text(html, encoding="utf-8")


def check_figures() -> None:
    """Raises InputError where the page's scripts are missing."""
    vega()


def _verdicts(study: Study, record: Record, verdicts: Sequence[Verdict], run: Run) -> str:
    bars = [
        Bar(v.claim.name, v.effect, v.low, v.high, v.claim.margin, v.claim.effect == "ratio", not v.claim.more,
            {"ratio": 1.0, "difference": 0.0}.get(v.claim.effect), v.verdict)
        for v in verdicts
    ]  # fmt: skip
    rows = [
        [
            escape(v.claim.name) + tag("small", escape(v.claim.says)),
            _state(v.verdict) + tag("small", escape(v.why)),
            tag("b", figure(v.effect)) + tag("small", f"[{figure(v.low)}, {figure(v.high)}]"),
            f"{'above' if v.claim.more else 'below'} {figure(v.claim.margin)}",
            escape(_what(v)),
            f"{sum(one.effect is not None for one in v.seeds)} of {len(study.seeds)}",
            f"{v.problems} problems" + tag("small", f"{100 * v.of_problems:.0f} % of its variance")
            if v.problems
            else "nothing else",
            escape(" and ".join(map(str, v.censored[: 2 if v.claim.against else 1])) if any(v.censored) else NONE),
            escape("; ".join(filter(None, [record.standing(f"claim {v.claim.name}"), unequal(study, v.claim)]))),
        ]
        for v in verdicts
    ]
    columns = ["claim", "verdict", "effect", "expected", "measure", "pairs of seeds", "interval over seeds and",
               "never reach it", "registration"]  # fmt: skip
    sources = "; ".join(dict.fromkeys(source(run, v.claim.measure) for v in verdicts))
    caption = "Each claim, the effect with its interval, and what was expected"
    note = (
        "Supported: all of the interval lies beyond the margin, on the side expected. Refuted: all of it lies on the "
        "other side, so that the effect is smaller than claimed, which need not be none. Else undecided. Seeds are "
        "paired; the interval is Student's t over them (ratios in logs), its variance widened by that over resampled "
        f"held-out problems, at 1 \u2212 0.05 / {len(verdicts)} for each claim (Bonferroni). Of steps to an accuracy, "
        "a ratio is the other arm's steps over the arm's: 2 is twice as soon. A run that never gets there counts as "
        "its last step."
    )
    figures = tag("div", forest(bars, "Effect of each claim around its margin, each on its own scale",
                                ("refutes", "supports"), sources), class_="figures")  # fmt: skip
    return table(columns, rows, caption, sources) + figures + tag("p", escape(note), class_="note") + _by_seed(verdicts)


def _state(verdict: str) -> str:
    style = {"supported": "finished", "refuted": "failed", "undecided": "unknown"}[verdict]
    return tag("span", verdict, class_=f"state {style}")


def _what(v: Verdict) -> str:
    claim = v.claim
    names = claim.arm if claim.against is None else f"{claim.arm} against {claim.against}"
    goal = f", accuracy {figure(v.target)}" if v.target is not None else ""
    return f"{'' if claim.effect == 'value' else f'{claim.effect} of '}{claim.measure}{goal}: {names}"


def _by_seed(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [escape(v.claim.name), str(one.seed), figure(one.arm), figure(one.against), figure(one.effect)]
        for v in verdicts
        for one in v.seeds
    ]
    inner = table(
        ["claim", "seed", "arm", "against", "effect"], rows, "The figures of each seed", "study.json: verdicts"
    )
    return tag("details", tag("summary", "By seed") + inner)


def unequal(study: Study, claim: Claim) -> str:
    """What a claim's reader has to know of how its arms were tuned; nothing where equally."""
    if claim.against is None or study.tuning is None:
        return ""
    mine, other = (len(study.points(name)) for name in (claim.arm, claim.against))
    return "" if mine == other else f"tuned unequally: {claim.arm} at {mine} points, {claim.against} at {other}"


def _ratios(study: Study, groups: Sequence[Group], sides: Mapping[str, Side], run: Run) -> str:
    """Of every arm to the baseline, whatever was claimed; none of it is corrected for their number."""
    base = compare.baseline(groups)
    bars = []
    for group in groups:
        for share in compare.SHARES if group is not base else ():
            what = Measure("steps_to_accuracy", {"share": share})
            claim = Claim("", "", what, group.name, base.name, "ratio", True, 1.0, "")
            both = sides[group.name], sides[base.name]
            seeds = [seed for seed in study.seeds if all(seed in side.runs for side in both)]
            v = judge(claim, 0.95, seeds, Side(both[0].runs, {}), Side(both[1].runs, {}))
            never = f", {v.censored[0]} never" if v.censored[0] else ""
            label = f"{group.name}, {100 * share:.0f} % ({figure(v.target)}){never}"
            bars.append(Bar(label, v.effect, v.low, v.high, 1.0, log=True))
    if not bars:
        return ""
    title = f"Steps of {base.name} over each arm's, to 50, 80 and 95 % of {base.name}'s gain; 95 % intervals"
    note = "Not registered and not corrected for their number. "
    note += f"Baseline: {base.name}, {compare.why_baseline(groups, base)}."
    drawn = forest(bars, title, ("later", "sooner"), source(run, Measure("steps_to_accuracy", {})), shared=True)
    return tag("div", drawn, class_="figures") + tag("p", escape(note), class_="note")


def _tuning(record: Record) -> str:
    found = record.data.get("tuning")
    if not found:
        return ""
    rows = [
        [
            escape(arm),
            escape(", ".join(f"{k} {v}" for k, v in point["settings"].items())),
            tag("b", figure(point["mean"])) if point["settings"] == given["chosen"] else figure(point["mean"]),
            " ".join(figure(v) for v in point["values"]),
            "chosen" if point["settings"] == given["chosen"] else "",
        ]
        for arm, given in found["arms"].items()
        for point in given["points"]
    ]
    counts = ", ".join(f"{arm} {len(given['points']) or 'not tuned'}" for arm, given in found["arms"].items())
    seeds = ", ".join(map(str, found["seeds"]))
    caption = f"Points of each arm's grid by {found['measure']}, on seeds {seeds} apart from those compared: {counts}"
    equal = len({len(given["points"]) for given in found["arms"].values()}) == 1
    note = "" if equal else tag("p", "The arms were not tuned at the same number of points.", class_="note")
    return table(["arm", "point", "mean", "by seed", ""], rows, caption, "study.json: tuning, runs") + note


def _registration(record: Record) -> str:
    entries = record.data["registration"]
    rows = [
        [escape(name), escape(standing(entry)), tag("code", entry["sha256"][:12])] for name, entry in entries.items()
    ]
    inner = table(["what", "standing", "SHA-256"], rows, "What was written down when", "study.json: registration")
    old = [
        [escape(one["what"]), escape(f"{one['time'][:16].replace('T', ' ')} UTC"), str(one["runs_finished"]),
         tag("code", escape(canonical(one["before"]["said"])[:300]))]
        for one in record.data["history"]
    ]  # fmt: skip
    if old:
        head = ["what", "when", "runs finished then", "before"]
        inner += table(head, old, "What it replaced", "study.json: history")
    return inner
