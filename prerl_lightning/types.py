"""The records that travel between the stages of a step, in one direction:

    Problem -> Prompt -> Response -> Rollout -> MicroBatch (policy.packing)

All are frozen. P prompts, G responses a prompt, N = P * G sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Message = Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """One row of a problem set, before tokenisation.

    Args:
        row: the row's number in its source, named in messages about it.
        prompt: plain text, or chat messages (``{"role": ..., "content": ...}``).
        ground_truth: what the reward compares with.
        extra: any further columns, handed to the reward as they are.
    """

    row: int
    prompt: str | Sequence[Message]
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A problem that is ready for the engine: ``text`` is what ``token_ids`` decode to."""

    row: int
    token_ids: tuple[int, ...]
    text: str
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Args:
        token_ids: (T,), the end-of-text token included where the response ended by itself.
        log_probs: (T,), of each token under the distribution that it was drawn from (temperature applied).
        text: decoded, without special tokens; a stop string is cut off.
        truncated: the length limit ended it.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    truncated: bool


@dataclass(frozen=True)
class Rollout:
    """What one rank sampled for its P prompts: N = P * G responses, group after group.

    Args:
        prompts: (P,)
        group_ids: (N,) int, the position in ``prompts`` of each response's prompt.
        responses: (N,)
        rewards: (N,) float64.
        policy_version: optimizer steps behind the weights that sampled it.
        temperature: of sampling; the trainer's logits are divided by it too.
        timeouts: responses whose verification took too long; they count as 0 in ``rewards``.
        errors: responses whose verification failed; likewise.
        seconds: wall-clock time by stage.
    """

    prompts: tuple[Prompt, ...]
    group_ids: torch.Tensor
    responses: tuple[Response, ...]
    rewards: torch.Tensor
    policy_version: int
    temperature: float
    timeouts: int = 0
    errors: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> torch.Tensor:
        """(N,) response tokens."""
        return torch.tensor([len(r.token_ids) for r in self.responses], dtype=torch.long)
