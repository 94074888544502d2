"""``prerl compare``: two evaluations, problem by problem.

prerl compare evaluations/a evaluations/b
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.evaluate import Record, read_results, scores
from prerl_lightning.metrics.evaluation import per_problem
from prerl_lightning.metrics.intervals import difference


def compare(args: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """b - a for each measure of each set that both folders have, over the problems that both have, as
    `metrics.intervals.difference` has it: with its interval, an exact p at few problems, and what they can show."""
    parser = ArgumentParser("prerl compare", description="Differences of two evaluations, b - a.")
    parser.add_argument("a", type=Path, help="folder of prerl evaluate")
    parser.add_argument("b", type=Path)
    own = parser.parse_args(args)
    for folder in (own.a, own.b):
        if not folder.is_dir():
            raise InputError(f"prerl compare: {folder}: no such folder.")
    names = sorted({p.name for p in own.a.glob("*.jsonl")} & {p.name for p in own.b.glob("*.jsonl")})
    if not names:
        raise InputError(f"prerl compare: {own.a} and {own.b} have no set in common.")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        sides = [
            {(r["row"], r["ground_truth"]): r for r in read_results(folder / name)[1]} for folder in (own.a, own.b)
        ]
        common = sorted(sides[0].keys() & sides[1].keys())
        if not common:
            raise InputError(f"prerl compare: no problem of {name} is in both folders.")
        a, b = (_measured([side[key] for key in common]) for side in sides)
        key = Path(name).stem
        found[key] = {m: difference(a[m], b[m]) for m in a if m in b}
        print(f"{key}: {len(common)} problems in both ({len(sides[0])} and {len(sides[1])})")
        for measure, d in found[key].items():
            small = d["smallest"]
            shows = f"shows {small:.3f} and more" if math.isfinite(small) else "too few problems to show any difference"
            print(
                f"  {measure:10} {d['a']:.3f} -> {d['b']:.3f}  {d['difference']:+.3f} "
                f"[{d['low']:+.3f}, {d['high']:+.3f}]  p = {d['p']:.3f}  {shows}"
            )
    print(
        "p: two-sided, by flipping signs. What a set shows: such a difference has p < 0.05 in four of five comparisons."
    )
    return found


def _measured(records: Sequence[Record]) -> dict[str, Tensor]:
    rewards, answers, greedy = scores(records)
    values = per_problem(rewards, answers)
    return values | ({"greedy": greedy} if len(greedy) == len(records) else {})
