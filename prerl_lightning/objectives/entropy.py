"""Entropy control: a coefficient of the entropy bonus that follows the policy's entropy."""

from dataclasses import dataclass

from prerl_lightning.errors import check_bounds
from prerl_lightning.types import Rollout


@dataclass(frozen=True)
class TargetEntropy:
    """A bonus only while the policy's entropy is at or below ``target``, with a coefficient that grows by ``step`` a
    rollout as long as it is, and shrinks by it otherwise: after adaptive entropy control in Skywork-OR1 (arXiv
    2505.22312). It begins a life at 0 and stays within 0 and ``most``.

    Args:
        target: nats a token; above 0. The policy's is estimated by a rollout's mean -log p of the sampled tokens,
            rollout/entropy.
        step: above 0.
        most: above 0.
    """

    target: float
    step: float = 1e-3
    most: float = 0.1

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, above={"target": 0, "step": 0, "most": 0})

    def applied(self, coefficient: float, entropy: float) -> float:
        """What the bonus of a rollout of this ``entropy`` is multiplied by."""
        return coefficient if entropy <= self.target else 0.0

    def following(self, coefficient: float, entropy: float) -> float:
        """The coefficient of the next rollout."""
        moved = coefficient + (self.step if entropy <= self.target else -self.step)
        return min(max(moved, 0.0), self.most)


def sampled_entropy(rollout: Rollout) -> float:
    """Nats a token: the mean of -log p of the sampled tokens, by the engine; infinite where there are none."""
    finite = rollout.log_probs[rollout.log_probs.isfinite()]
    return -float(finite.double().mean()) if len(finite) else float("inf")
