"""Two evaluations, problem by problem."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prerl_lightning.errors import InputError
from prerl_lightning.evaluation.files import Record, common_sets, read_results
from prerl_lightning.evaluation.measures import scores
from prerl_lightning.metrics.evaluation import per_problem
from prerl_lightning.metrics.intervals import difference


@dataclass(frozen=True)
class Comparison:
    """Of one set.

    Args:
        problems: in both folders; the differences are of these.
        of_a: how many a has.
        of_b: how many b has.
        measures: of each measure that both have, b - a as `metrics.intervals.difference` has it: ``a``, ``b``,
            ``difference`` with its interval ``low`` to ``high``, ``p``, and ``smallest``, what such a set can show.
    """

    problems: int
    of_a: int
    of_b: int
    measures: dict[str, dict[str, float]]


def compare(a: str | Path, b: str | Path) -> dict[str, Comparison]:
    """Of two folders of `evaluate`, by the names of the sets that both have.

    Raises:
        InputError: a folder is missing, or they have no set or no problem in common.
    """
    return {Path(name).stem: _compared(Path(a, name), Path(b, name)) for name in common_sets(a, b)}


def _compared(a: Path, b: Path) -> Comparison:
    sides = [{(r["row"], r["ground_truth"]): r for r in read_results(file)[1]} for file in (a, b)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        raise InputError(f"prerl compare: no problem of {a.name} is in both folders.")
    of_a, of_b = (_per_problem([side[key] for key in common]) for side in sides)
    found = {name: difference(of_a[name], of_b[name]) for name in of_a if name in of_b}
    return Comparison(len(common), len(sides[0]), len(sides[1]), found)


def _per_problem(records: Sequence[Record]) -> dict[str, Tensor]:
    rewards, answers, greedy = scores(records)
    values = per_problem(rewards, answers)
    return values | ({"greedy": greedy} if len(greedy) == len(records) else {})
