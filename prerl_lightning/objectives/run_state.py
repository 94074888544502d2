"""What a module knows of the run that it is in: its place among the lives, what was measured, what is owed."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from prerl_lightning.errors import InputError, RunError
from prerl_lightning.objectives import lives
from prerl_lightning.objectives.evaluations import Evaluations
from prerl_lightning.objectives.interruptions import Interruptions
from prerl_lightning.objectives.stops import Stops
from prerl_lightning.objectives.until import Ending
from prerl_lightning.objectives.validations import Validations
from prerl_lightning.types import Rollout


class Row:
    """What a step or an evaluation has measured, until the loggers get it.

    Not by Lightning's ``log``, which goes on repeating the last value of what a step did not measure, and counts steps
    otherwise in training and at a validation. What monitors and bars look at is given to both.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, trainer: L.Trainer) -> None:
        """Raises RunError where it cannot be written."""
        values, self.values = self.values, {}
        try:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
                logger.save()
        except OSError as error:  # a run that nobody sees is not worth its time
            name = type(logger).__name__
            if isinstance(logger, CSVLogger):
                name = "metrics.csv"
                logger.experiment.metrics.clear()  # else Lightning fails once more, as it closes it, and hides this
            raise RunError(
                f"Step {trainer.global_step}: the row of {name} could not be written ({error}). "
                "Checkpoints are as they were: make room, and --ckpt_path last goes on."
            ) from error


class RunState(L.LightningModule):
    """Beside `BaseObjective` a base of `PolicyModule`, whose arguments are the objective's alone.

    Attributes:
        successors: of the host, in order.
        lives: the objective's title and first step, all of the run's.
        planned_lives: by the configuration; `objectives.lives.end_life` may end one ahead of it.
        life: this module's place among them, from 1.
        first_step: of this life, in optimizer steps of the run.
        end_step: likewise; None: the run's end.
        ending: what may end this life ahead of it.
        endings: of the host: why which life, by its number, ended ahead of its time; None: its `Until` has not had it.
        has_trained: in a fit of this process.
        agreed: this life's weights were seen to be those that the engine samples from.
        rollout: for callbacks, this rank's last one.
        whole_rollout: that of all ranks (`gathered`).
        watched_seconds: that callbacks took for it.
    """

    def __init__(self) -> None:
        super().__init__()
        # in tuples, because a LightningModule as an attribute would be registered as a submodule
        self._host: tuple[Any] = (self,)
        self._acting: tuple[Any] = (self,)
        self.successors: tuple[Any, ...] = ()
        self.lives: list[tuple[str, int]] = [(type(self).__name__, 0)]
        self.planned_lives = self.lives
        self.life, self.first_step = 1, 0
        self.end_step: int | None = None
        self.ending: Ending | None = None
        self.endings: dict[int, str | None] = {}
        self.agreed = self.warned_of_mismatch = self.has_trained = False
        self.rollout: Rollout | None = None
        self.whole_rollout: Rollout | None = None
        self.watched_seconds = self._started = 0.0
        self.row = Row()
        self.evaluations = Evaluations()
        self.validations = Validations()
        self.interruptions = Interruptions()
        self.stops = Stops()

    def record(self, metrics: Mapping[str, float]) -> None:
        """Into the row that the loggers get at the end of this step or evaluation; it may end the life."""
        self.row.values |= metrics
        lives.observe(self._host[0], metrics)

    def record_of(self, who: str, metrics: Mapping[str, float]) -> None:
        """`record` for what a run's own callbacks have measured.

        Args:
            who: gave them, for the message.

        Raises:
            InputError: they are no numbers by their columns' names, or a name is taken.
        """
        numbers = isinstance(metrics, Mapping) and all(isinstance(x, Real | Tensor) for x in metrics.values())
        if not numbers:
            raise InputError(f"{who}: it measured {repr(metrics)[:60]}, and must give numbers by their columns' names.")
        if taken := [name for name in metrics if name in self.row.values]:
            raise InputError(f"{who}: {taken[0]} is in this step's row already. Give it another name.")
        self.record({name: float(value) for name, value in metrics.items()})

    def due(self, every_n_steps: int) -> bool:
        """Whether something is to be done after this step: the run's first, each n-th, and the last of each life; with
        0 never."""
        assert self.rollout is not None
        step, before = self.trainer.global_step, self.rollout.policy_version  # a batch may make several steps
        if every_n_steps <= 0:
            return False
        ends = [*(first for _, first in self.lives[1:]), self.trainer.max_steps]
        passed = before == 0 or step // every_n_steps > before // every_n_steps
        return passed or any(before < end <= step for end in ends)
