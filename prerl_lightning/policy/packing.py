"""From a rollout's responses to the forward passes of the policy: no model in sight.

A micro-batch is a pack (all its tokens in one row, no padding) or, for models that packed attention does not cover,
right-padded rows sorted by length. In a pack the responses of a group may share one pass over their prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prerl_lightning.policy.attention import AttentionPlan, Segment, plan_attention

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
            ``targets`` and ``sequence`` one for each of the N response tokens, response after response.
        targets: (N,) the response tokens.
        sequence: (N,) the number of each token's response within the rollout.
        positions: (1, T) of a pack's tokens in their sequences; None: 0 to L, right-padded rows.
        plan: of a pack's attention.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequence: Tensor
    positions: Tensor | None = None
    plan: AttentionPlan | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, plan=self.plan.to(device) if self.plan is not None else None)


@dataclass(frozen=True)
class Family:
    """Responses behind one context (prompt, or the prefix of log p(y)), forwarded in one micro-batch.

    Args:
        context: token ids.
        responses: (number in the rollout, token ids) of each, with at least one token.
        shared: one pass over the context for all of them.
    """

    context: tuple[int, ...]
    responses: tuple[tuple[int, tuple[int, ...]], ...]
    shared: bool = False

    @property
    def n_tokens(self) -> int:
        """Input tokens in a pack; the last token of a response is never an input."""
        contexts = 1 if self.shared else len(self.responses)
        return contexts * len(self.context) + sum(len(ids) - 1 for _, ids in self.responses)

    @property
    def width(self) -> int:
        return len(self.context) + max(len(ids) for _, ids in self.responses) - 1


def families(
    contexts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    numbers: Sequence[int],
    share: bool,
    max_tokens: int,
) -> list[Family]:
    """One family a response, or, where sharing pays, one for all neighbours with the same context.

    Args:
        contexts: token ids in front of each response: the prompt for log p(y given x); for log p(y) one prefix token,
            positions from 0 (arXiv 2604.14142, section 3).
        responses: token ids of each; those without tokens are left out.
        numbers: of each response in the rollout.
        share: share where it pays; False: never.
        max_tokens: a family of more is split; a single response of more stays whole.
    """
    made: list[Family] = []
    for context, ids, number in zip(contexts, responses, numbers, strict=True):
        if not ids:
            continue
        one = Family(tuple(context), ((number, tuple(ids)),))
        last = made[-1] if made else None
        if share and last and last.context == one.context and last.n_tokens + len(ids) - 1 <= max_tokens:
            made[-1] = replace(last, responses=last.responses + one.responses, shared=True)
        else:
            made.append(one)
    found = []
    for family in made:
        saved = len(family.context) * (len(family.responses) - 1)
        if saved >= max(SHARE_MIN_TOKENS, SHARE_MIN_PART * (family.n_tokens + saved)):
            found.append(family)
        else:
            found += [Family(family.context, (r,)) for r in family.responses]
    return found


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
    made: Sequence[Family], max_tokens: int, max_responses: int | None = None, packed: bool = True
) -> list[MicroBatch]:
    """Cut families, the largest first, into micro-batches of at most ``max_tokens`` input tokens, padding included.

    A family that alone is larger, or has more than ``max_responses``, gets a micro-batch of its own.
    """
    sizes = [(f.n_tokens if packed else f.width, len(f.responses), f) for f in made]
    batches: list[list[Family]] = []
    tokens: list[int] = []  # of each micro-batch, and its responses
    responses: list[int] = []
    for size, n, family in sorted(sizes, key=lambda s: -s[0]):
        # into the first pack that has room; rows of about one width stay together, each as wide as the first
        first = 0 if packed else max(0, len(batches) - 1)
        for i in range(first, len(batches)):
            more = size if packed else n * batches[i][0].width
            if tokens[i] + more <= max_tokens and (max_responses is None or responses[i] + n <= max_responses):
                break
        else:
            i, more = len(batches), size * (1 if packed else n)
            batches.append([])
            tokens.append(0)
            responses.append(0)
        batches[i].append(family)
        tokens[i] += more
        responses[i] += n
    return [_pack(batch) if packed else _pad(batch) for batch in batches]


def _pack(batch: Sequence[Family]) -> MicroBatch:
    ids: list[int] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    predictors, targets, sequence = [], [], []

    def add(tokens: Sequence[int], first_position: int, parent: Segment | None) -> Segment:
        segment = Segment(len(ids), len(tokens), parent)
        ids.extend(tokens)
        positions.append(torch.arange(first_position, first_position + len(tokens)))
        if tokens:
            segments.append(segment)
        return segment

    for family in batch:
        prompt = add(family.context, 0, None) if family.shared else None
        for number, response in family.responses:
            if prompt is not None:
                # the prompt's last token predicts the first response token
                own = add(response[:-1], prompt.length, prompt)
                first = torch.tensor([prompt.start + prompt.length - 1])
                predictors += [first, torch.arange(own.start, own.start + own.length)]
            else:
                own = add([*family.context, *response[:-1]], 0, None)
                predictors.append(torch.arange(own.start + len(family.context) - 1, own.start + own.length))
            targets.append(torch.tensor(response))
            sequence.append(torch.full((len(response),), number))
    return MicroBatch(
        torch.tensor(ids)[None],
        torch.cat(predictors),
        torch.cat(targets),
        torch.cat(sequence),
        torch.cat(positions)[None],
        plan_attention(segments),
    )


def _pad(batch: Sequence[Family]) -> MicroBatch:
    """A causal model never looks to the right, so right padding needs no attention mask."""
    width = max(f.width for f in batch)
    rows = [(f.context, number, ids) for f in batch for number, ids in f.responses]
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    predictors, targets, sequence = [], [], []
    for b, (context, number, response) in enumerate(rows):
        end = len(context) + len(response) - 1
        input_ids[b, :end] = torch.tensor([*context, *response[:-1]])
        predictors.append(torch.arange(b * width + len(context) - 1, b * width + end))
        targets.append(torch.tensor(response))
        sequence.append(torch.full((len(response),), number))
    return MicroBatch(input_ids, torch.cat(predictors), torch.cat(targets), torch.cat(sequence))


def idle_micro_batch() -> MicroBatch:
    """The smallest forward pass: what a rank runs, times zero, while another still has work (collectives must
    match)."""
    zero = torch.zeros(1, dtype=torch.long)
    return MicroBatch(zero[None], zero, zero, zero)
