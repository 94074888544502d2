"""From a rollout's responses to micro-batches: pure, no model in sight."""

from collections.abc import Sequence
from typing import Literal

import torch

from prerl_lightning.policy.model import MicroBatch

Space = Literal["post-train", "pre-train"]


def sequence_rows(
    prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], space: Space, prefix_id: int
) -> list[tuple[list[int], int]]:
    """The model's input of each response, and how many of its tokens stand before the response.

    ``"post-train"``: prompt + response, for log p(y given x). ``"pre-train"``: one prefix token + response, for
    log p(y), positions from 0 (METHOD: arXiv 2604.14142, section 3). The last response token is never an input.
    """
    rows = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        context = list(prompt) if space == "post-train" else [prefix_id]
        rows.append((context + list(response), len(context)))
    return rows


def micro_batches(
    rows: Sequence[tuple[Sequence[int], int]],
    numbers: Sequence[int],
    max_tokens: int,
    max_sequences: int | None = None,
) -> list[MicroBatch]:
    """Sort by length and cut into right-padded micro-batches of at most ``max_tokens`` padded tokens.

    Args:
        rows: (input tokens with the whole response, tokens before the response) of each response.
        numbers: each response's number in the rollout, kept in `MicroBatch.sequence`.
        max_sequences: at most so many rows in one micro-batch.

    A row longer than ``max_tokens`` gets a micro-batch of its own. Responses without tokens are left out.
    """
    order = sorted((i for i, (ids, start) in enumerate(rows) if len(ids) > start), key=lambda i: -len(rows[i][0]))
    batches: list[list[int]] = []
    for i in order:
        current = batches[-1] if batches else []
        longest = len(rows[current[0]][0]) if current else 0
        fits = current and (len(current) + 1) * longest <= max_tokens
        if fits and (max_sequences is None or len(current) < max_sequences):
            current.append(i)
        else:
            batches.append([i])
    return [_pad([rows[i] for i in batch], [numbers[i] for i in batch]) for batch in batches]


def _pad(rows: Sequence[tuple[Sequence[int], int]], numbers: Sequence[int]) -> MicroBatch:
    width = max(len(ids) for ids, _ in rows) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    predictors, targets, sequence = [], [], []
    for b, ((ids, start), number) in enumerate(zip(rows, numbers, strict=True)):
        tokens = torch.tensor(ids)
        input_ids[b, : len(ids) - 1] = tokens[:-1]
        predictors.append(torch.arange(b * width + start - 1, b * width + len(ids) - 1))
        targets.append(tokens[start:])
        sequence.append(torch.full((len(ids) - start,), number))
    return MicroBatch(input_ids, torch.cat(predictors), torch.cat(targets), torch.cat(sequence))


def idle_micro_batch() -> MicroBatch:
    """The smallest forward pass: what a rank runs, times zero, while another still has work (collectives must
    match)."""
    zero = torch.zeros(1, dtype=torch.long)
    return MicroBatch(zero[None], zero, zero, zero)
