"""Responses and their verdicts: the engine samples, the reward's workers verify what is finished meanwhile."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from prerl_lightning.rewards.pool import Item, RewardPool, Verdict
from prerl_lightning.rewards.score import sees_tokens
from prerl_lightning.rollout.engine import Engine, OnGroup, Sampling
from prerl_lightning.rollout.text import decode
from prerl_lightning.types import Prompt, Response


@dataclass(frozen=True)
class Group:
    """What was sampled for one prompt: G responses and their verdicts."""

    prompt: Prompt
    responses: tuple[Response, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Way:
    """How a set's prompts are sampled from and their responses verified.

    Args:
        tokenizer: for a reward that sees tokens.
    """

    sampling: Sampling
    pool: RewardPool
    tokenizer: Any = None


def sample(
    engine: Engine,
    ways: Sequence[Way],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    greedy: bool = False,
    seconds: dict[str, float] | None = None,
) -> list[Group]:
    """One `Group` for each prompt, in order.

    Args:
        ways: (P,); prompts that are sampled alike are sampled together.
        seconds: gets ``rollout``, until the last response is there, and ``reward``, from then to the last verdict.

    Raises:
        InputError: too many verifications failed (`RewardPool.collect`).
    """
    start = time.perf_counter()
    responses: list[list[Response]] = [[] for _ in prompts]
    items: list[list[Item]] = [[] for _ in prompts]
    futures: list[list[Future[Verdict]]] = [[] for _ in prompts]

    def verify(i: int, group: list[Response]) -> None:
        responses[i], way = group, ways[i]
        raw: Sequence[str | None] = [None] * len(group)
        if sees_tokens(way.pool.reward):
            raw = decode(way.tokenizer, prompts[i].token_ids, [r.token_ids for r in group], special=True)
        items[i] = [item(prompts[i], r, way.sampling, text) for r, text in zip(group, raw, strict=True)]
        futures[i] = way.pool.submit(items[i])

    for places in _alike([way.sampling for way in ways]):
        asked = [prompts[i].token_ids for i in places]
        on_group = partial(_at, places, verify)
        engine.generate(asked, ways[places[0]].sampling, [seeds[i] for i in places], greedy, on_group)
    sampled = time.perf_counter()
    verdicts: list[Sequence[Verdict]] = [()] * len(prompts)
    for places in _alike([way.pool for way in ways]):
        of_pool = [(i, n) for i in places for n in range(len(items[i]))]
        pool = ways[places[0]].pool
        found = iter(pool.collect([items[i][n] for i, n in of_pool], [futures[i][n] for i, n in of_pool]))
        for i in places:
            verdicts[i] = [*islice(found, len(items[i]))]
    if seconds is not None:
        seconds |= {"rollout": sampled - start, "reward": time.perf_counter() - sampled}
    return [Group(p, tuple(r), tuple(v)) for p, r, v in zip(prompts, responses, verdicts, strict=True)]


def _alike(values: Sequence[Any]) -> list[list[int]]:
    """Places of equal values, in the order of their first."""
    places: list[list[int]] = []
    for i, value in enumerate(values):
        known = next((those for those in places if values[those[0]] == value), None)
        if known is None:
            places.append([i])
        else:
            known.append(i)
    return places


def _at(places: Sequence[int], verify: OnGroup, i: int, group: list[Response]) -> None:
    verify(places[i], group)


def sample_for_evaluation(
    engine: Engine, way: Way, prompts: Sequence[Prompt], k: int, greedy: bool, seed: Any
) -> tuple[list[Group], list[Group]]:
    """k samples of each prompt, and its greedy response where asked for.

    The seeds depend on ``seed`` and the prompt's row alone, so evaluations of different steps draw with the same luck.
    """
    ways = [replace(way, sampling=replace(way.sampling, group_size=k))] * len(prompts)
    seeds = [mixed_seed(seed, "val", p.row) for p in prompts]
    return sample(engine, ways, prompts, seeds), sample(engine, ways, prompts, seeds, greedy=True) if greedy else []


def item(prompt: Prompt, response: Response, sampling: Sampling, raw: str | None = None) -> Item:
    """A response for the verifier; ``raw``: its text with special tokens, for one that sees tokens."""
    tokens = {"tokens": len(response.token_ids), "max_new_tokens": sampling.max_new_tokens}
    extra = {**prompt.extra, "truncated": response.truncated, **tokens}
    if raw is not None:
        extra |= {"token_ids": response.token_ids.tolist(), "raw": raw}
    return Item(prompt.text, response.text, prompt.ground_truth, extra, prompt.row)


def mixed_seed(*parts: Any) -> int:
    """63 well-mixed bits: the engine gives response i of a group the seed + i, so seeds must lie far apart."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
