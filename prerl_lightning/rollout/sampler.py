"""Responses and their verdicts: the engine samples, the reward's workers verify what is finished meanwhile."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from prerl_lightning.rewards.pool import Item, RewardPool, Verdict
from prerl_lightning.rollout.engine import Engine, Sampling
from prerl_lightning.types import Prompt, Response


@dataclass(frozen=True)
class Group:
    """What was sampled for one prompt: G responses and their verdicts."""

    prompt: Prompt
    responses: tuple[Response, ...]
    verdicts: tuple[Verdict, ...]


def sample(
    engine: Engine,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    greedy: bool = False,
    seconds: dict[str, float] | None = None,
) -> list[Group]:
    """One `Group` for each prompt, in order.

    Args:
        seconds: gets ``rollout``, until the last response is there, and ``reward``, from then to the last verdict.

    Raises:
        InputError: too many verifications failed (`RewardPool.collect`).
    """
    start = time.perf_counter()
    items: list[list[Item]] = [[] for _ in prompts]
    futures: list[list[Future[Verdict]]] = [[] for _ in prompts]

    def verify(i: int, responses: list[Response]) -> None:
        items[i] = [item(prompts[i], r.text, r.truncated, len(r.token_ids), sampling) for r in responses]
        futures[i] = pool.submit(items[i])

    responses = engine.generate([p.token_ids for p in prompts], sampling, seeds, greedy, verify)
    sampled = time.perf_counter()
    verdicts = pool.collect([i for group in items for i in group], [f for group in futures for f in group])
    if seconds is not None:
        seconds |= {"rollout": sampled - start, "reward": time.perf_counter() - sampled}
    groups, done = [], 0
    for prompt, group in zip(prompts, responses, strict=True):
        groups.append(Group(prompt, tuple(group), tuple(verdicts[done : done + len(group)])))
        done += len(group)
    return groups


def sample_for_evaluation(
    engine: Engine, pool: RewardPool, prompts: Sequence[Prompt], sampling: Sampling, k: int, greedy: bool, seed: Any
) -> tuple[list[Group], list[Group]]:
    """k samples of each prompt, and its greedy response where asked for.

    The seeds depend on ``seed`` and the prompt's row alone, so evaluations of different steps draw with the same luck.
    """
    sampling = replace(sampling, group_size=k)
    seeds = [mixed_seed(seed, "val", p.row) for p in prompts]
    samples = sample(engine, pool, prompts, sampling, seeds)
    return samples, sample(engine, pool, prompts, sampling, seeds, greedy=True) if greedy else []


def item(prompt: Prompt, text: str, truncated: bool, tokens: int, sampling: Sampling) -> Item:
    """A response for the verifier."""
    extra = {**prompt.extra, "truncated": truncated, "tokens": tokens, "max_new_tokens": sampling.max_new_tokens}
    return Item(prompt.text, text, prompt.ground_truth, extra, prompt.row)


def mixed_seed(*parts: Any) -> int:
    """63 well-mixed bits: the engine gives response i of a group the seed + i, so seeds must lie far apart."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
