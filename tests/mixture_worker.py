"""Rollouts of a mixture with refilling, on one rank or several, with an engine of plain words.

python mixture_worker.py MODEL OUT PORT RANK     # one of two
"""

import sys
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from plain_engine import PlainEngine

from prerl_lightning.data import Mixture, PromptFormat, RolloutDataModule, Source
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.rewards import WeightedSum
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Sampling

P, G = 6, 2


def odd(prompt, response, ground_truth, extra):
    return float(len(response) % 2)


def long(prompt, response, ground_truth, extra):
    """Told the limit of its set, and shown what it asks for."""
    assert len(extra["token_ids"]) == extra["tokens"] <= extra["max_new_tokens"] == 5
    assert len(extra["raw"]) >= len(response)
    return float(extra["tokens"] > 2)


long.sees_tokens = True  # type: ignore[attr-defined]


def module(refill=2):
    """Twice as many prompts of the second set, which has a format, a reward and a length of its own."""
    other = Source(
        ArithmeticProblems("train", 9, seed=1),
        format=PromptFormat(template="{prompt}{prompt}"),
        reward=WeightedSum({"long": long, "odd": odd}, [1.0, 0.0]),
        max_new_tokens=5,
    )
    return RolloutDataModule(
        train=Mixture({"sums": ArithmeticProblems("train", 40), "two": other}, {"sums": 1, "two": 2}),
        reward=odd,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=G, max_new_tokens=3),
        engine=PlainEngine(),
        prompts_per_step=P,
        refill=refill,
        seed=7,
    )


def rollouts(model, steps, rank=0, ranks=1, refill=2, state=None):
    """Of the first so many steps, or of those behind a loader's ``state``: each as plain values, and the last state."""
    data = module(refill)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, num_devices=ranks, num_nodes=1)
    data._load(SimpleNamespace(model_name=model), data.trainer)
    data._start_pools()
    data.engine.start(model, 0, None)
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    found, batches = [], iter(loader)
    first = loader.cursor
    for step in range(first, first + steps):
        data.engine.policy_version = step
        rollout = gathered(data.rollout(next(batches), step))
        refilled = rollout.refill and {**asdict(rollout.refill), "seconds": 0.0}
        statistics = {k: v for k, v in rollout_statistics(rollout).items() if not k.startswith("time/")}
        responses = [r.tolist() for r in (rollout.sequences[i] for i in range(len(rollout)))]
        asked = [(p.source, p.row, p.token_ids) for p in rollout.prompts]
        rewards = [rollout.rewards.tolist(), rollout.group_ids.tolist()]
        found.append({"prompts": asked, "responses": responses, "rewards": rewards, "refill": refilled, **statistics})
    return found, loader.state_dict()


if __name__ == "__main__":
    model, out, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    torch.save(rollouts(model, 3, rank, 2)[0], f"{out}/{rank}.pt")
