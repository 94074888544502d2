"""A term of an objective: one choice along each axis.

| axis | says | where |
| --- | --- | --- |
| space | which log-prob: of the response behind its prompt, or alone | |
| advantage | what a reward is compared with | advantages.py |
| contributing, truncated, all_equal | which responses are counted | advantages.py |
| surrogate | the loss of a token | surrogates.py |
| weight | what it is multiplied by | token_weights.py |
| aggregation | how token losses become one | aggregations.py |
| coefficient | how much of the objective, and when | coefficients.py |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prerl_lightning.arguments import check_kinds
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.objectives.advantages import (
    NORMALISATIONS,
    Advantage,
    Contributing,
    GroupStd,
    Normalisation,
    all_equal,
    contributing_responses,
)
from prerl_lightning.objectives.aggregations import OF_NAME, Aggregation
from prerl_lightning.objectives.coefficients import Coefficient
from prerl_lightning.objectives.settings import LossSettings
from prerl_lightning.objectives.surrogates import PPOClip, Surrogate, Tokens
from prerl_lightning.objectives.token_weights import Weight
from prerl_lightning.policy.packing import Space
from prerl_lightning.types import Rollout


@dataclass(frozen=True)
class Term:
    """One term of an objective: ``coefficient`` * aggregated token loss. The first one carries the KL penalty and the
    entropy bonus, if any, which neither ``coefficient`` nor ``weight`` multiplies.

    Args:
        space: ``post-train``: log p(y given x), ``pre-train``: log p(y).
        advantage: `GroupStd`, `GroupMean`, `LeaveOneOut`, `BatchStd`, `SignedReward`, `LENS`, `ConstantBaseline`, or
            a class of your own derived from `Advantage`; None: `GroupStd`.
        contributing: ``all``, ``positive`` or ``negative``, by the sign of the advantage.
        coefficient: a number, or `Linear`, `Cosine` or `Exponential` over the optimizer steps of the life.
        surrogate: `PPOClip`, `GSPO`, `CISPO`, `SAPO`, `DPPO`, `PolicyGradient`; None: `PPOClip` with the objective's
            ``clip_low``, ``clip_high`` and ``clip_dual``, of which other surrogates know nothing.
        aggregation: `TokenMean`, `SeqMeanTokenMean`, `ConstantLength`; None: the objective's.
        weight: a function from `Tokens` to (T,) factors by its import path, `BySign` or `Confidence`; None: 1.
        truncated: whether responses that the length limit has ended contribute. Their rewards are in the baseline
            either way.
        all_equal: whether groups in which all rewards are equal contribute. By a group's baseline they have no
            gradient, and are in the denominator alone.
        normalisation: ``std`` or ``mean``, an older spelling of ``advantage``: `GroupStd` or `GroupMean`.
    """

    space: Space
    advantage: Advantage | None = None
    contributing: Contributing = "all"
    coefficient: Coefficient | float = 1.0
    surrogate: Surrogate | None = None
    aggregation: Aggregation | None = None
    weight: Weight | Callable[..., Any] | None = None
    truncated: bool = True
    all_equal: bool = True
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        check_kinds(self, "terms")  # here, as it stands in the body of an objective's class
        if self.normalisation is not None:
            if self.advantage is not None:
                raise InputError("terms.normalisation: it is another word for terms.advantage. Leave it out.")
            object.__setattr__(self, "advantage", NORMALISATIONS[self.normalisation])
            object.__setattr__(self, "normalisation", None)
        if not isinstance(self.coefficient, Coefficient):
            check_bounds(self, "terms", {"coefficient": 0})

    @property
    def title(self) -> str:
        """In a few words, what differs between the published objectives: pre-train GroupMean negative."""
        chosen = (self.advantage or GroupStd(), self.surrogate, self.aggregation, self.weight)
        parts = ["pre-train"] if self.space == "pre-train" else []
        parts += [getattr(one, "__name__", type(one).__name__) for one in chosen if one is not None]
        return " ".join([*parts, *([self.contributing] if self.contributing != "all" else [])])

    def advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """(N,) float64."""
        advantage = self.advantage or GroupStd()
        return self._shaped(advantage, advantage.of_rollout(rewards, rollout), rewards, "a response")

    def weights(self, tokens: Tokens) -> Tensor | None:
        """(T,) factors of token losses, without a gradient; None: 1."""
        if self.weight is None:
            return None
        return self._shaped(self.weight, self.weight(tokens), tokens.log_probs, "a token").detach()

    @staticmethod
    def _shaped(axis: Any, found: Any, like: Tensor, each: str) -> Tensor:
        """Raises InputError where what an axis gave is not a number each."""
        if not isinstance(found, Tensor) or found.shape != like.shape:
            name, given = getattr(axis, "__name__", type(axis).__name__), tuple(getattr(found, "shape", ()))
            raise InputError(
                f"{name} gave {f'a tensor of shape {given}' if isinstance(found, Tensor) else repr(found)[:60]}, where "
                f"a number {each} is wanted: a tensor of shape {tuple(like.shape)}."
            )
        return found

    @property
    def of_groups(self) -> bool:
        """Whether a group of one would teach nothing."""
        return (self.advantage or GroupStd()).of_groups

    def counted(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """(N,) bool: the responses in the denominator, those without a token too."""
        found = contributing_responses(advantages, self.contributing)
        if not self.truncated:
            found &= ~rollout.truncated
        if not self.all_equal:
            found &= ~all_equal(rollout.signals, rollout.group_ids)
        return found

    def coefficient_at(self, step: int) -> float:
        """At an optimizer step of the life, from 0."""
        return self.coefficient(step) if isinstance(self.coefficient, Coefficient) else self.coefficient

    def surrogate_by(self, loss: LossSettings) -> Surrogate:
        return self.surrogate or PPOClip(loss.clip_low, loss.clip_high, loss.clip_dual)

    def aggregation_by(self, loss: LossSettings) -> Aggregation:
        return self.aggregation or OF_NAME[loss.aggregation]
