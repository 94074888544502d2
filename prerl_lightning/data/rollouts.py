"""From sampled groups to a rollout; groups without signal give way to those of further prompts."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from prerl_lightning import ranks
from prerl_lightning.rewards.judging import Failure
from prerl_lightning.rewards.pool import RewardPool, Verdict
from prerl_lightning.rewards.shaping import WeightedSum
from prerl_lightning.rollout.sampler import Group
from prerl_lightning.types import Prompt, Refill, Rollout


def as_rollout(
    groups: Sequence[Group], pools: Sequence[RewardPool], group_size: int, given_up: Refill | None, **rest: Any
) -> Rollout:
    """
    Args:
        groups: (P,)
        pools: (P,) that judged them.
        given_up: for some of them; what failed of it is counted, too.
        rest: further fields.
    """
    verdicts = [v for group in groups for v in group.verdicts]
    lost = given_up or Refill()
    names = dict.fromkeys(name for v in verdicts for name in v.parts)
    parts = {name: [v.parts.get(name, torch.nan) for v in verdicts] for name in names}
    compared = [s for group, pool in zip(groups, pools, strict=True) for s in signals(group.verdicts, pool)]
    own = any(_normalises(pool) for pool in pools)
    return Rollout.of(
        [group.prompt for group in groups],
        [r for group in groups for r in group.responses],
        group_ids=torch.arange(len(groups)).repeat_interleave(group_size),
        rewards=torch.tensor([v.score for v in verdicts], dtype=torch.float64),
        normalised=torch.tensor(compared, dtype=torch.float64) if own else None,
        parts={name: torch.tensor(scores, dtype=torch.float64) for name, scores in parts.items()},
        timeouts=_failed(verdicts, "timeout") + lost.timeouts,
        errors=_failed(verdicts, "error") + lost.errors,
        answered=sum(v.answer is not None for v in verdicts),
        refill=given_up,
        **rest,
    )


def signals(verdicts: Sequence[Verdict], pool: RewardPool) -> list[float]:
    """(G,) what the advantages of a group are of."""
    if _normalises(pool):
        return pool.reward.signals([v.parts for v in verdicts])  # type: ignore[attr-defined]
    return [v.score for v in verdicts]


def _failed(verdicts: Sequence[Verdict], how: Failure) -> int:
    return sum(v.failure == how for v in verdicts)


def _normalises(pool: RewardPool) -> bool:
    return isinstance(pool.reward, WeightedSum) and pool.reward.normalise


def refill(
    groups: list[Group],
    silent: Callable[[Group], bool],
    further: Mapping[str, Iterator[Prompt]],
    rounds: int,
    sample: Callable[[int, Sequence[int], Sequence[Prompt]], list[Group]],
) -> Refill:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) up to a budget: in each round the silent groups of all
    ranks give way, place by place, to groups of further prompts of the same set. Collective. What is sampled depends on
    the places among all ranks' prompts and on nothing of this rank's, so that one rank and several, and a resume, get
    the same.

    Args:
        groups: this rank's, as many as any other's; changed in place.
        silent: whether a group has no signal.
        further: by set, prompts of which none is used yet; the same on all ranks.
        sample: (round, places in ``groups``, their prompts) -> their groups.
    """
    start, turn, given_up = time.perf_counter(), 0, list[Group]()
    first = ranks.rank() * len(groups)
    while turn < rounds:
        there = ranks.gather([(first + i, group.prompt.source) for i, group in enumerate(groups) if silent(group)])
        drawn = {place: prompt for place, source in there for prompt in islice(further[source], 1)}
        if not drawn:  # none is silent, or there are no more
            break
        turn += 1
        own = {place - first: prompt for place, prompt in drawn.items() if 0 <= place - first < len(groups)}
        for i, group in zip(own, sample(turn, [*own], [*own.values()]), strict=True):
            given_up.append(groups[i])
            groups[i] = group
    verdicts = [v for group in given_up for v in group.verdicts]
    return Refill(
        rounds=turn,
        groups=len(given_up),
        tokens=sum(len(r.token_ids) for group in given_up for r in group.responses),
        rewards=sum(v.score for v in verdicts),
        timeouts=_failed(verdicts, "timeout"),
        errors=_failed(verdicts, "error"),
        seconds=time.perf_counter() - start,
    )
