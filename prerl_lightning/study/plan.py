"""The runs that a study needs: those of tuning, and, once its points are chosen, those that are compared."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from prerl_lightning.study.design import Settings, Study, arguments, identity
from prerl_lightning.study.measures import measure
from prerl_lightning.study.schedule import Planned, Status, status
from prerl_lightning.study.verdicts import Side

ROOT = Path("runs") / "study"


class Plan:
    """Of one study, below ``root``. What is finished is read once."""

    def __init__(self, study: Study, root: Path = ROOT) -> None:
        self.study, self.root = study, root
        self._finished: dict[Path, Status] = {}

    def status(self, run: Planned) -> Status:
        found = self._finished.get(run.folder) or status(run.folder)
        if found.finished:
            self._finished[run.folder] = found
        return found

    def run(self, arm: str, point: int | None, seed: int, *more: Settings) -> Planned:
        """Where one of the same identity already is, be it of another arm, point or study."""
        of_arm = self.study.arms[arm]
        key = identity(of_arm, seed, *more)
        name = f"{arm}{'' if point is None else f'-point-{point + 1}'}-seed-{seed}-{key}"
        own = self.root / self.study.name / name
        folder = own if own.exists() else next(iter(sorted(self.root.glob(f"*/*-{key}"))), own)
        return Planned(arm, point, seed, (*arguments(of_arm, *more), f"--seed_everything={seed}"), folder)

    def of_point(self, arm: str, point: int) -> list[Planned]:
        tuning = self.study.tuning
        assert tuning is not None
        return [self.run(arm, point, seed, tuning.settings, tuning.points[arm][point]) for seed in tuning.seeds]

    def tuning(self) -> list[Planned]:
        return [
            run for arm in self.study.arms for i in range(len(self.study.points(arm))) for run in self.of_point(arm, i)
        ]

    def compared(self) -> dict[str, list[Planned]]:
        """By arm; none where no point of it can be chosen yet."""
        found: dict[str, list[Planned]] = {}
        for arm in self.study.arms:
            chosen = self.chosen(arm)
            seeds = self.study.seeds if chosen is not None else ()
            found[arm] = [self.run(arm, None, seed, chosen or {}) for seed in seeds]
        return found

    def all(self) -> Iterator[Planned]:
        yield from self.tuning()
        for runs in self.compared().values():
            yield from runs

    def chosen(self, arm: str) -> Settings | None:
        """Of the best of the arm's points that have all of their runs, the first of equal ones; {}: the arm is not
        tuned; None: no point has them."""
        points = self.study.points(arm)
        known = [(m, -i) for i, of_seeds in enumerate(self.values(arm)) if (m := mean(of_seeds)) is not None]
        return points[-max(known)[1]] if known else None if points else {}

    def values(self, arm: str) -> list[list[float | None]]:
        """The tuning measure by point and tuning seed; None: no finished run has it."""
        return [
            [self._value(run) for run in self.of_point(arm, i)] for i in range(len(self.study.points(arm)))
        ]  # fmt: skip

    def _value(self, run: Planned) -> float | None:
        found = self.status(run)
        assert self.study.tuning is not None
        if not found.finished or found.run is None:
            return None
        value = float(measure(found.run, self.study.tuning.measure, np.ones((1, 1))).values[0])
        return None if np.isnan(value) else value

    def sides(self) -> Mapping[str, Side]:
        """By arm, its finished runs, and why the others are absent."""
        return {arm: self._side(runs) for arm, runs in self.compared().items()}

    def _side(self, runs: Sequence[Planned]) -> Side:
        found = {run.seed: self.status(run) for run in runs}
        finished = {seed: one.run for seed, one in found.items() if one.finished and one.run is not None}
        why = {seed: found[seed].said if seed in found else "no tuning point was chosen" for seed in self.study.seeds}
        return Side(finished, {seed: said for seed, said in why.items() if seed not in finished})


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
