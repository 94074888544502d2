"""Forward passes over a rollout: what this rank computes of it, and in which micro-batches.

All ranks know the whole rollout (`gathered`) and share what is to be forwarded by its tokens, whoever sampled it; they
run equally many passes, with idle ones where one has less work or none.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prerl_lightning import ranks
from prerl_lightning.budget import KEYS_PER_TOKEN
from prerl_lightning.metrics.sums import Sums
from prerl_lightning.objectives.settings import BatchSettings
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import (
    Family,
    MicroBatch,
    Space,
    balanced,
    families,
    idle_micro_batch,
    micro_batches,
)
from prerl_lightning.types import Prompt, Refill, Rollout, Sequences
from prerl_lightning.watchdog import watchdog

CPU_PACK_TOKENS = 2048  # where nothing else is said


def gathered(rollout: Rollout) -> Rollout:
    """The rollouts of all ranks as one, rank after rank; texts stay behind. The same on all ranks. Collective."""
    if ranks.world_size() == 1:
        return rollout
    own = (
        [(p.row, p.token_ids, p.source) for p in rollout.prompts],
        *(rollout.group_ids, rollout.tokens, rollout.log_probs, rollout.lengths, rollout.truncated, rollout.rewards),
        (rollout.timeouts, rollout.errors, rollout.answered),
        *(rollout.signals, rollout.parts, rollout.refill),
    )
    prompts: list[Prompt] = []
    parts = ranks.gather([own])
    group_ids = []
    for contexts, groups, *_ in parts:
        group_ids.append(groups + len(prompts))
        prompts += [Prompt(row, ids, "", "", source=source) for row, ids, source in contexts]
    tokens, log_probs, lengths, truncated, rewards = (torch.cat([part[i] for part in parts]) for i in range(2, 7))
    timeouts, errors, answered = (sum(part[7][i] for part in parts) for i in range(3))
    of_names = {name: torch.full_like(rewards, torch.nan) for part in parts for name in part[9]}
    ends = torch.tensor([len(part[6]) for part in parts]).cumsum(0).tolist()
    for part, end in zip(parts, ends, strict=True):
        for name, scores in part[9].items():
            of_names[name][end - len(scores) : end] = scores
    return replace(
        rollout,
        prompts=tuple(prompts),
        group_ids=torch.cat(group_ids),
        tokens=tokens,
        log_probs=log_probs,
        lengths=lengths,
        truncated=truncated,
        texts=(),
        rewards=rewards,
        timeouts=timeouts,
        errors=errors,
        answered=answered,
        normalised=torch.cat([part[8] for part in parts]),
        parts=of_names,
        refill=rollout.refill and Refill.of_ranks([part[10] for part in parts]),
    )


class Passes:
    """Over ``rollout``, the whole one of all ranks: N responses of T tokens.

    Args:
        device: where passes run; None: where the policy's parameters are.
        prefix_id: the token in front of y in log p(y); None: only log p(y given x) will be asked for.

    Attributes:
        sound: (N,) bool, whose log-probs by the engine are finite; ``rollout`` has 0 for those that are not.
        engine_log_probs: (T,) on the device.
        sums: of what all passes count.
    """

    def __init__(
        self,
        rollout: Rollout,
        policy: Policy,
        batching: BatchSettings,
        device: torch.device | None = None,
        prefix_id: int | None = None,
    ) -> None:
        self.sound = torch.ones(len(rollout), dtype=torch.bool)
        if not (finite := rollout.log_probs.isfinite()).all():
            number = torch.arange(len(rollout)).repeat_interleave(rollout.lengths)
            self.sound[number[~finite]] = False
            rollout = replace(rollout, log_probs=torch.where(finite, rollout.log_probs, 0.0))
        self.rollout, self.policy, self.batching, self.prefix_id = rollout, policy, batching, prefix_id
        self.device = device if device is not None else policy.device
        self.world_size, self.rank = ranks.world_size(), ranks.rank()
        self.chunks = torch.arange(len(rollout.prompts)).tensor_split(batching.minibatches)
        self.packed = batching.packing and policy.can_pack
        self.kernel = policy.attention_kernel(self.device)
        self.max_tokens = batching.max_tokens_per_microbatch or CPU_PACK_TOKENS
        # memory is reckoned with so many keys; on a CPU it is not the matter
        self.max_keys = None if self.device.type == "cpu" else KEYS_PER_TOKEN * self.max_tokens
        self.lengths = rollout.lengths
        self.engine_log_probs = rollout.log_probs.to(self.device)
        self.dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)  # of log-probs
        self.sums = Sums(self.device)

    def _families(self, space: Space, selected: Tensor) -> list[Family]:
        batching, rollout = self.batching, self.rollout
        share = self.packed and self.policy.can_share and batching.share_prompts and batching.micro_batch_size is None
        contexts, context_of = rollout.contexts, rollout.group_ids.tolist()
        if space == "pre-train":
            assert self.prefix_id is not None
            contexts, context_of, share = Sequences.of([(self.prefix_id,)]), [0] * len(rollout), False
        numbers = selected.nonzero().flatten().tolist()
        return families(contexts, context_of, rollout.sequences, numbers, share, self.max_tokens, self.max_keys)

    def micro_batches(self, space: Space, selected: Tensor) -> list[MicroBatch]:
        """Of the selected (N,) responses."""
        made = self._families(space, selected)
        sequences, most = self.rollout.sequences, self.batching.micro_batch_size
        return micro_batches(made, sequences, self.max_tokens, most, self.packed, self.kernel, self.max_keys)

    def share(self, space: Space, selected: Tensor) -> Tensor:
        """(N,) bool: this rank's share of the selected responses; within each minibatch the ranks' tokens are about
        equal. A response stays with its rank for the whole update, and so do its old log-probs."""
        if self.world_size == 1:
            return selected
        own = torch.zeros_like(selected)
        for prompts in self.chunks:
            made = self._families(space, selected & torch.isin(self.rollout.group_ids, prompts))
            for family in balanced(made, self.world_size)[self.rank]:
                own[list(family.numbers)] = True
        return own

    def padded(self, jobs: list[Any]) -> list[Any]:
        """With None, for an idle pass, up to the largest number of jobs on any rank: collectives must match."""
        most = int(ranks.all_reduce(torch.tensor(len(jobs)), dist.ReduceOp.MAX))
        return jobs + [None] * (most - len(jobs))

    def forward(self, batch: MicroBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(T,) log-probs of a micro-batch on the device, and, where asked for, the entropies of their distributions."""
        watchdog.move()
        return self.policy(batch, self.rollout.temperature, entropy)

    def idle(self) -> Tensor:
        return self.forward(idle_micro_batch().to(self.device))[0]

    @torch.no_grad()
    def log_probs(self, space: Space, selected: Tensor, entropy: bool = False) -> Tensor:
        """(T,) log-probs on the device, without gradient, of the tokens of the selected (N,) responses; 0 of others.
        Their entropies, where asked for, are counted."""
        found = torch.zeros_like(self.engine_log_probs, dtype=self.dtype)
        for batch in self.padded(self.micro_batches(space, selected)):
            if batch is None:
                self.idle()
            else:
                on_device = batch.to(self.device)
                log_probs, entropies = self.forward(on_device, entropy)
                found[on_device.source] = log_probs.to(self.dtype)
                if entropies is not None:
                    self.sums.add("optim/entropy", entropies.sum(), len(entropies))
        return found
