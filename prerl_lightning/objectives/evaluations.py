"""What an evaluation of the held-out sets has found, batch by batch; `validations` says when there is one."""

from collections.abc import Sequence

from prerl_lightning.metrics.held_out import EvaluationMetric
from prerl_lightning.rollout.sampler import Group


class Evaluations:
    def __init__(self) -> None:
        self._of_set: dict[str, EvaluationMetric] = {}  # by its key; no submodules, they have no weights

    def add(self, key: str, samples: Sequence[Group], greedy: Sequence[Group], k: int) -> None:
        self._of_set.setdefault(key, EvaluationMetric()).update(samples, greedy, k)

    def measures(self, stage: str) -> dict[str, float]:
        """Under the names that loggers get: STAGE/avg@k, and STAGE/NAME/avg@k of a further set. Collective."""
        return {
            f"{stage}{key.removeprefix('val')}/{name}": value
            for key, evaluation in self._of_set.items()
            for name, value in evaluation.compute().items()
        }
