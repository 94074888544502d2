"""An objective's arguments in groups, as the parts of a step need them.

`PolicyModule` says what each means and has their defaults: it takes them one by one, for YAML and for subclasses, and
makes the groups once.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning.pytorch.cli import OptimizerCallable

from prerl_lightning.errors import check_bounds
from prerl_lightning.objectives.aggregations import AggregationName
from prerl_lightning.objectives.entropy import TargetEntropy
from prerl_lightning.objectives.losses import KLEstimator
from prerl_lightning.objectives.schedule import Schedule

ImportanceSampling = Literal["none", "token", "sequence-mask"]


@dataclass(frozen=True)
class Settings:
    """``LEAST``: of each argument the least value that is meant; ``ABOVE``: the value that it has to be above;
    ``MOST``: the largest."""

    LEAST: ClassVar[dict[str, float]] = {}
    ABOVE: ClassVar[dict[str, float]] = {}
    MOST: ClassVar[dict[str, float]] = {}

    def check(self, key: str) -> None:
        """Raises InputError, with the argument's name behind ``key``."""
        check_bounds(self, key, self.LEAST, self.ABOVE, self.MOST)


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    lr: float
    optimizer: OptimizerCallable
    decay_norms_and_biases: bool
    lr_schedule: Schedule
    warmup_steps: int
    gradient_clip: float

    LEAST = {"lr": 0, "warmup_steps": 0, "gradient_clip": 0}  # noqa: RUF012  (a ClassVar of the base)


@dataclass(frozen=True)
class LossSettings(Settings):
    loss_coefficient: float
    clip_low: float
    clip_high: float
    clip_dual: float
    aggregation: AggregationName
    kl_coefficient: float
    kl_estimator: KLEstimator
    importance_sampling: ImportanceSampling
    importance_cap: float
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coefficient: TargetEntropy | float = 0.0

    LEAST = {"clip_low": 0, "clip_high": 0, "kl_coefficient": 0}  # noqa: RUF012
    ABOVE = {"loss_coefficient": 0, "clip_dual": 1, "importance_cap": 1}  # noqa: RUF012

    def check(self, key: str) -> None:
        super().check(key)
        if not isinstance(self.entropy_coefficient, TargetEntropy):
            check_bounds(self, key, {"entropy_coefficient": 0})


@dataclass(frozen=True)
class BatchSettings(Settings):
    minibatches: int
    epochs: int
    max_tokens_per_microbatch: int | None
    micro_batch_size: int | None
    packing: bool
    share_prompts: bool

    LEAST = {"minibatches": 1, "epochs": 1, "max_tokens_per_microbatch": 1, "micro_batch_size": 1}  # noqa: RUF012

    @property
    def steps(self) -> int:
        """Optimizer steps of a rollout."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class MeasureSettings(Settings):
    mismatch_samples: int
    mismatch_bound: float | None
    entropy: bool
    peak_flops: float | None

    LEAST = {"mismatch_samples": 0}  # noqa: RUF012
    ABOVE = {"mismatch_bound": 0, "peak_flops": 0}  # noqa: RUF012
