"""The records that travel between the stages of a step, in one direction:

    Problem -> Prompt -> Response -> Rollout -> MicroBatch (policy.packing)

All are frozen. P prompts, G responses a prompt, N = P * G sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # problem sets and their names are read without it
    from torch import Tensor

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
    """A problem that is ready for the engine: ``text`` is what ``token_ids`` decode to, ``source`` the name of its set
    where there are several to train on."""

    row: int
    token_ids: tuple[int, ...]
    text: str
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled response.

    Args:
        token_ids: (T,) int32, the end-of-text token included where the response ended by itself.
        log_probs: (T,) float32, of each token under the distribution that it was drawn from (temperature applied).
        text: decoded, without special tokens but for the tags of a thought; a stop string is cut off.
        truncated: the length limit ended it.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    text: str
    truncated: bool

    def __post_init__(self) -> None:
        """Any sequence of numbers will do; an array of its type is kept as it is, and not copied."""
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int32))
        object.__setattr__(self, "log_probs", np.asarray(self.log_probs, dtype=np.float32))


@dataclass(frozen=True, eq=False)
class Sequences:
    """N token sequences, one behind the other: a rollout of the paper has 2.4 million tokens, far too many for Python
    numbers.

    Args:
        tokens: (T,) int32.
        offsets: (N + 1,) int64, where each begins, and T.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | np.ndarray]) -> "Sequences":
        arrays = [np.asarray(s, dtype=np.int32) for s in sequences]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """A view."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class Refill:
    """Groups that were sampled, had no signal and gave way to others' (data/rollouts.py).

    Args:
        rounds: behind the first.
        groups: given up.
        tokens: of theirs.
        rewards: the sum of theirs.
        timeouts: as in `Rollout`, where they are counted in.
        errors: likewise.
        seconds: wall-clock time of all rounds.
    """

    rounds: int = 0
    groups: int = 0
    tokens: int = 0
    rewards: float = 0.0
    timeouts: int = 0
    errors: int = 0
    seconds: float = 0.0

    @classmethod
    def of_ranks(cls, parts: Sequence["Refill"]) -> "Refill":
        """Together; each has made as many rounds."""
        summed = {
            name: sum(getattr(part, name) for part in parts) for name in ("groups", "tokens", "timeouts", "errors")
        }
        return cls(
            rounds=parts[0].rounds,
            rewards=sum(part.rewards for part in parts),
            seconds=max(part.seconds for part in parts),
            **summed,
        )


@dataclass(frozen=True, eq=False)
class Rollout:
    """What one rank sampled for its P prompts: N = P * G responses, group after group, T tokens in all.

    Args:
        prompts: (P,)
        group_ids: (N,) int, the position in ``prompts`` of each response's prompt.
        tokens: (T,) int32, of all responses, one behind the other.
        log_probs: (T,) float32, the engine's, of each token.
        lengths: (N,) int64, tokens of each response.
        truncated: (N,) bool.
        texts: (N,); none in the rollout of several ranks.
        rewards: (N,) float64.
        normalised: (N,) float64, what advantages are of instead of ``rewards``; None: the same (`WeightedSum`).
        parts: by name the rewards that ``rewards`` are sums of, (N,) float64 each, nan where a response has none.
        policy_version: optimizer steps behind the weights that sampled it.
        temperature: of sampling; the trainer's logits are divided by it too.
        timeouts: responses whose verification took too long; they count as 0 in ``rewards``.
        errors: responses whose verification failed; likewise.
        answered: responses in which the verifier read an answer; 0 too where it does not say.
        refill: what was sampled and given up for it; None: refilling is off.
        seconds: wall-clock time by stage.
    """

    prompts: tuple[Prompt, ...]
    group_ids: "Tensor"
    tokens: "Tensor"
    log_probs: "Tensor"
    lengths: "Tensor"
    truncated: "Tensor"
    texts: tuple[str, ...]
    rewards: "Tensor"
    policy_version: int
    temperature: float
    timeouts: int = 0
    errors: int = 0
    answered: int = 0
    normalised: "Tensor | None" = None
    parts: "Mapping[str, Tensor]" = field(default_factory=dict)
    refill: "Refill | None" = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Sequence[Prompt], responses: Sequence[Response], **rest: Any) -> "Rollout":
        """From the records of single responses; ``rest``: the other fields."""
        import torch

        sequences = Sequences.of([r.token_ids for r in responses])
        log_probs = [r.log_probs for r in responses]
        return cls(
            prompts=tuple(prompts),
            tokens=torch.from_numpy(sequences.tokens),
            log_probs=torch.from_numpy(np.concatenate(log_probs) if log_probs else np.empty(0, dtype=np.float32)),
            lengths=torch.from_numpy(np.diff(sequences.offsets)),
            truncated=torch.tensor([r.truncated for r in responses], dtype=torch.bool),
            texts=tuple(r.text for r in responses),
            **rest,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def signals(self) -> "Tensor":
        """(N,) what advantages are of."""
        return self.rewards if self.normalised is None else self.normalised

    @cached_property
    def sequences(self) -> Sequences:
        """The responses' tokens, sharing memory with ``tokens``."""
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.lengths.numpy(), out=offsets[1:])
        return Sequences(self.tokens.numpy(), offsets)

    @cached_property
    def contexts(self) -> Sequences:
        """The prompts' tokens."""
        return Sequences.of([p.token_ids for p in self.prompts])

    @cached_property
    def responses(self) -> tuple[Response, ...]:
        """One by one, as views."""
        ids, bounds, log_probs = self.sequences, self.sequences.offsets.tolist(), self.log_probs.numpy()
        texts = self.texts or ("",) * len(self)
        cut = self.truncated.tolist()
        return tuple(
            Response(ids.tokens[a:b], log_probs[a:b], text, t)
            for a, b, text, t in zip(bounds, bounds[1:], texts, cut, strict=False)
        )
