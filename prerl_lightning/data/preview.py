"""What a run is about to train on, shown once before the engine starts: most mistakes with data are visible there."""

import logging
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError
from prerl_lightning.rewards.pool import RewardPool, Verdict
from prerl_lightning.rewards.score import sees_tokens
from prerl_lightning.rollout.engine import Sampling
from prerl_lightning.rollout.sampler import item
from prerl_lightning.terminal import last_part
from prerl_lightning.types import Prompt, Response

log = logging.getLogger(__name__)

TRIED = 64  # truths of a set that the verifier is asked about
EXPECTED = 0.9  # that they earn on average
CHARACTERS = 1500


def show_first(key: str, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """The first prompt, special tokens and all, and its truth."""
    text, half = str(tokenizer.decode(list(prompts[0].token_ids))), CHARACTERS // 2
    if len(text) > CHARACTERS:
        end = last_part(text, half)
        text = f"{text[:half]} [... {len(text) - half - len(end)} characters] {end}"
    log.info(
        "%s: %d problems. What the model sees of the first: %r. Its truth: %r.",
        *(key, len(prompts), text, prompts[0].ground_truth),
    )


def check_truths(
    key: str, problems: ProblemSet, prompts: Sequence[Prompt], pool: RewardPool, sampling: Sampling
) -> float | None:
    """The mean reward of a sample of the set's own truths, each in the best of the set's forms of a response; None
    where it has none. Warns below 0.9; raises InputError where the reward fails on each of them."""
    number = min(TRIED, len(prompts))
    some = [prompts[i * len(prompts) // number] for i in range(number)]
    forms = [problems.forms(prompt.ground_truth) for prompt in some]
    if not any(forms):
        return None
    seen = sees_tokens(pool.reward)
    tries = [
        [item(p, Response(np.zeros(1), np.zeros(1), f, False), sampling, f if seen else None) for f in them]
        for p, them in zip(some, forms, strict=True)
    ]
    waiting = [pool.submit(items) for items in tries]
    best: list[tuple[Verdict, str]] = []
    broken = True
    for futures, them in zip(waiting, forms, strict=True):
        verdicts = [future.result() for future in futures]
        broken = broken and all(verdict.failure == "error" for verdict in verdicts)
        best.append(max(zip(verdicts, them, strict=True), key=lambda pair: pair[0].score))
    mean = sum(verdict.score for verdict, _ in best) / number
    log.info(
        "%s: the reward of the first truth, in %r: %g; of %d truths likewise: %.3g on average.",
        *(key, best[0][1], best[0][0].score, number, mean),
    )
    if mean < EXPECTED:
        i = min(range(number), key=lambda i: best[i][0].score)
        verdict = best[i][0]
        if broken:
            raise InputError(
                f"{key}: the reward fails on each of {number} truths of the set. The first, row {some[0].row}, truth "
                f"{some[0].ground_truth[:200]!r}: {best[0][0].message}. What it can make nothing of is worth 0."
            )
        why = f" ({verdict.failure}: {verdict.message})" if verdict.failure else ""
        log.warning(
            "%s: the set's own truths earn %.3g on average, by themselves and in a box: wrong columns, or a verifier "
            "of another kind of answer? The worst: row %d, truth %r, reward %g%s. If a truth is no answer here, write "
            "data.verification.try_truths: false.",
            *(key, mean, some[i].row, some[i].ground_truth[:200], verdict.score, why),
        )
    return mean
