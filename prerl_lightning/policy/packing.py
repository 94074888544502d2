"""From a rollout's responses to the forward passes of the policy: no model in sight.

A micro-batch is a pack (all its tokens in one row, no padding) or, for models that packed attention does not cover,
right-padded rows sorted by length. In a pack the responses of a group may share one pass over their prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prerl_lightning.policy.attention import AttentionPlan, Kernel, Segment, moved, plan_attention
from prerl_lightning.types import Sequences

Space = Literal["post-train", "pre-train"]

# Sharing costs attention calls of its own and a mask, so it has to save so many tokens, and this part of a family's.
# On 2 CPU cores it was 3 times faster at 159 prompt and 21 answer tokens (saves 0.8), and even at 10 and 25 (0.25).
SHARE_MIN_TOKENS, SHARE_MIN_PART = 64, 0.1


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass, and where in it the response tokens are predicted.

    Args:
        input_ids: (B, L); (1, T) for a pack.
        predictors: positions in the flattened ``input_ids`` whose hidden state predicts a response token; like
            ``targets``, ``sequence`` and ``source`` one for each of the N response tokens, response after response.
        targets: (N,) the response tokens.
        sequence: (N,) the number of each token's response within the rollout.
        source: (N,) the place of each token among all response tokens of the rollout.
        positions: (1, T) of a pack's tokens in their sequences; None: 0 to L, right-padded rows.
        plan: of a pack's attention.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequence: Tensor
    source: Tensor
    positions: Tensor | None = None
    plan: AttentionPlan | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        return moved(self, device)


@dataclass(frozen=True, eq=False)
class Family:
    """Responses behind one context (prompt, or the prefix of log p(y)), forwarded in one micro-batch.

    Args:
        context: (C,) token ids.
        numbers: of the responses among the rollout's.
        lengths: tokens of each, at least one.
        shared: one pass over the context for all of them.
    """

    context: np.ndarray
    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    shared: bool = False

    @property
    def n_tokens(self) -> int:
        """Input tokens in a pack; the last token of a response is never an input."""
        contexts = 1 if self.shared else len(self.numbers)
        return contexts * len(self.context) + sum(self.lengths) - len(self.lengths)

    @property
    def n_keys(self) -> int:
        """Keys that attention reads in a pack: each response has its own copy of a shared context's."""
        copies = len(self.numbers) * len(self.context) if self.shared else 0
        return self.n_tokens + copies

    @property
    def width(self) -> int:
        return len(self.context) + max(self.lengths) - 1


def families(
    contexts: Sequences,
    context_of: Sequence[int],
    responses: Sequences,
    numbers: Sequence[int],
    share: bool,
    max_tokens: int,
    max_keys: int | None = None,
) -> list[Family]:
    """One family a response, or, where sharing pays, one for all neighbours with the same context.

    Args:
        contexts: token ids in front of responses: the prompts for log p(y given x); for log p(y) one prefix token,
            positions from 0 (arXiv 2604.14142, section 3).
        context_of: which of them stands in front of each response of the rollout.
        responses: the rollout's.
        numbers: which of them to take; those without tokens are left out.
        share: share where it pays; False: never.
        max_tokens: a family of more is split; a single response of more stays whole.
        max_keys: likewise of `Family.n_keys`; None: as many as there are.
    """

    def fits(family: Family) -> bool:
        return family.n_tokens <= max_tokens and (max_keys is None or family.n_keys <= max_keys)

    lengths = np.diff(responses.offsets).tolist()
    made: list[Family] = []
    owner = -1  # the last family's context
    for number in numbers:
        length, of = lengths[number], int(context_of[number])
        if not length:
            continue
        last = made[-1] if made else None
        if share and last is not None and owner == of and fits(_with(last, number, length)):
            made[-1] = _with(last, number, length)
        else:
            made.append(Family(contexts[of], (number,), (length,)))
        owner = of
    found = []
    for family in made:
        saved = len(family.context) * (len(family.numbers) - 1)
        if saved >= max(SHARE_MIN_TOKENS, SHARE_MIN_PART * (family.n_tokens + saved)):
            found.append(family)
        else:
            each = zip(family.numbers, family.lengths, strict=True)
            found += [Family(family.context, (n,), (length,)) for n, length in each]
    return found


def _with(family: Family, number: int, length: int) -> Family:
    return replace(family, numbers=(*family.numbers, number), lengths=(*family.lengths, length), shared=True)


def balanced(made: Sequence[Family], n_ranks: int) -> list[list[Family]]:
    """Families by rank, the largest first to whoever has the fewest tokens so far."""
    shares: list[list[Family]] = [[] for _ in range(n_ranks)]
    tokens = [0] * n_ranks
    for family in sorted(made, key=lambda f: -f.n_tokens):
        rank = tokens.index(min(tokens))
        shares[rank].append(family)
        tokens[rank] += family.n_tokens
    return shares


def micro_batches(
    made: Sequence[Family],
    responses: Sequences,
    max_tokens: int,
    max_responses: int | None = None,
    packed: bool = True,
    kernel: Kernel = "sdpa",
    max_keys: int | None = None,
) -> list[MicroBatch]:
    """Cut families, the largest first, into micro-batches of at most ``max_tokens`` input tokens, padding included.

    A family that alone is larger, or has more than ``max_responses``, gets a micro-batch of its own.

    Args:
        responses: the rollout's.
        kernel: that packs are planned for.
        max_keys: of a pack (`Family.n_keys`), where memory was reckoned with so many; None: as many as there are.
    """
    sizes = [(f.n_tokens if packed else f.width, len(f.numbers), f) for f in made]
    batches: list[list[Family]] = []
    tokens: list[int] = []  # of each micro-batch, its keys, and its responses
    keys: list[int] = []
    counts: list[int] = []
    for size, n, family in sorted(sizes, key=lambda s: -s[0]):
        # into the first pack that has room; rows of about one width stay together, each as wide as the first
        first = 0 if packed else max(0, len(batches) - 1)
        for i in range(first, len(batches)):
            more = size if packed else n * batches[i][0].width
            fits = tokens[i] + more <= max_tokens and (max_responses is None or counts[i] + n <= max_responses)
            if fits and (max_keys is None or keys[i] + family.n_keys <= max_keys):
                break
        else:
            i, more = len(batches), size * (1 if packed else n)
            batches.append([])
            tokens.append(0)
            keys.append(0)
            counts.append(0)
        batches[i].append(family)
        tokens[i] += more
        keys[i] += family.n_keys
        counts[i] += n
    return [_pack(batch, responses, kernel) if packed else _pad(batch, responses) for batch in batches]


def _pack(batch: Sequence[Family], responses: Sequences, kernel: Kernel) -> MicroBatch:
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    predictors: list[np.ndarray] = []
    end = 0

    def add(parts: Sequence[np.ndarray], first_position: int, parent: Segment | None) -> Segment:
        nonlocal end
        segment = Segment(end, sum(map(len, parts)), parent)
        ids.extend(parts)
        positions.append(np.arange(first_position, first_position + segment.length))
        if segment.length:
            segments.append(segment)
        end += segment.length
        return segment

    for family in batch:
        prompt = add([family.context], 0, None) if family.shared else None
        for number in family.numbers:
            inputs = responses[number][:-1]
            if prompt is not None:
                # the prompt's last token predicts the first response token
                own = add([inputs], prompt.length, prompt)
                predictors.append(np.array([prompt.start + prompt.length - 1]))
                predictors.append(np.arange(own.start, own.start + own.length))
            else:
                own = add([family.context, inputs], 0, None)
                predictors.append(np.arange(own.start + len(family.context) - 1, own.start + own.length))
    return MicroBatch(
        _long(np.concatenate(ids))[None],
        _long(np.concatenate(predictors)),
        *_targets(batch, responses),
        _long(np.concatenate(positions))[None],
        plan_attention(segments, kernel),
    )


def _pad(batch: Sequence[Family], responses: Sequences) -> MicroBatch:
    """A causal model never looks to the right, so right padding needs no attention mask."""
    width = max(f.width for f in batch)
    rows = [(f.context, number) for f in batch for number in f.numbers]
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    predictors = []
    for b, (context, number) in enumerate(rows):
        response = responses[number]
        end = len(context) + len(response) - 1
        input_ids[b, : len(context)] = context
        input_ids[b, len(context) : end] = response[:-1]
        predictors.append(np.arange(b * width + len(context) - 1, b * width + end))
    return MicroBatch(torch.from_numpy(input_ids), _long(np.concatenate(predictors)), *_targets(batch, responses))


def _targets(batch: Sequence[Family], responses: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """``targets``, ``sequence`` and ``source`` of a micro-batch."""
    numbers = np.array([n for f in batch for n in f.numbers])
    starts, ends = responses.offsets[numbers], responses.offsets[numbers + 1]
    source = np.concatenate([np.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    return _long(responses.tokens[source]), _long(numbers.repeat(ends - starts)), _long(source)


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def idle_micro_batch() -> MicroBatch:
    """The smallest forward pass: what a rank runs, times zero, while another still has work (collectives must
    match)."""
    zero = torch.zeros(1, dtype=torch.long)
    return MicroBatch(zero[None], zero, zero, zero, zero)
