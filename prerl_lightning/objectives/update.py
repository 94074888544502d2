"""One rollout's worth of optimisation.

    rollout -> advantages -> contributing responses -> micro-batches -> token log-probs -> token losses -> step

The loss of a minibatch is sum(weight * token loss) / denominator, and the denominator counts the tokens (or
responses) of all micro-batches on all ranks: the gradient does not depend on how the work is cut. Only responses with
a gradient are forwarded. All ranks know the whole rollout (`gathered`) and share what is to be forwarded by its tokens,
whoever sampled it; they run equally many passes, with idle ones where one has less work or none.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.metrics.sums import Sums
from prerl_lightning.metrics.utilisation import attended_tokens
from prerl_lightning.objectives import losses
from prerl_lightning.objectives.advantages import Contributing, Normalisation, contributing_responses, group_advantages
from prerl_lightning.policy.packing import (
    Family,
    MicroBatch,
    Space,
    balanced,
    families,
    idle_micro_batch,
    micro_batches,
)
from prerl_lightning.types import Prompt, Response, Rollout

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)


def of_all_ranks(rows: list[Any]) -> list[Any]:
    """Those of each rank, one behind the other. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def gathered(rollout: Rollout) -> Rollout:
    """The rollouts of all ranks as one, rank after rank; texts stay behind. The same on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rollout
    own = (
        [(p.row, p.token_ids) for p in rollout.prompts],
        rollout.group_ids,
        rollout.rewards,
        rollout.lengths,
        torch.tensor([t for r in rollout.responses for t in r.token_ids], dtype=torch.int32),
        torch.tensor([x for r in rollout.responses for x in r.log_probs]),
        [r.truncated for r in rollout.responses],
        (rollout.timeouts, rollout.errors),
    )
    prompts: list[Prompt] = []
    group_ids, rewards, responses = [], [], []
    timeouts = errors = 0
    for contexts, groups, values, lengths, ids, log_probs, truncated, failed in of_all_ranks([own]):
        timeouts, errors = timeouts + failed[0], errors + failed[1]
        group_ids.append(groups + len(prompts))
        rewards.append(values)
        prompts += [Prompt(row, ids, "", "") for row, ids in contexts]
        cuts = lengths.tolist()
        for i, x, t in zip(ids.split(cuts), log_probs.split(cuts), truncated, strict=True):
            responses.append(Response(tuple(i.tolist()), tuple(x.tolist()), "", t))
    return replace(
        rollout,
        prompts=tuple(prompts),
        group_ids=torch.cat(group_ids),
        responses=tuple(responses),
        rewards=torch.cat(rewards),
        timeouts=timeouts,
        errors=errors,
    )


@dataclass(frozen=True)
class Term:
    """One term of an objective: ``coefficient`` * aggregated token loss."""

    space: Space
    normalisation: Normalisation
    contributing: Contributing
    coefficient: float = 1.0


@dataclass(frozen=True)
class Work:
    """A term applied to a rollout.

    Args:
        advantages: (N,) float64.
        contributing: (N,) bool, what the denominator counts.
        selected: (N,) bool, what has a gradient, and so is forwarded, by one rank or another.
        own: (N,) bool, what of it this rank forwards.
        weights: (N,) of each response's tokens, before division by the denominator.
        old: (T_i,) log-probs at sampling by response number; None: the current ones are.
        reference: (T_i,) log-probs of the reference; None: no KL penalty.
        correction: (T_i,) importance weights; None: they follow from this term's own log-probs.
    """

    term: Term
    advantages: Tensor
    contributing: Tensor
    selected: Tensor
    own: Tensor
    weights: Tensor
    old: dict[int, Tensor] | None
    reference: dict[int, Tensor] | None
    correction: dict[int, Tensor] | None


class Update:
    """Optimise ``module`` on ``rollout``, the whole one of all ranks; `run` does it and returns the metrics, which are
    equal on all ranks."""

    def __init__(self, module: "PolicyModule", rollout: Rollout) -> None:
        self.module, self.rollout = module, rollout
        self.policy = module.live_policy
        self.device = next(self.policy.parameters()).device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.chunks = torch.arange(len(rollout.prompts)).tensor_split(module.minibatches)
        self.packed = module.packing and self.policy.can_pack
        self.max_tokens = module.max_tokens_per_microbatch or (2048 if self.device.type == "cpu" else 16384)
        self.lengths = rollout.lengths
        self.engine_log_probs = {i: torch.tensor(r.log_probs) for i, r in enumerate(rollout.responses)}
        self.sums = Sums(self.device)
        self.last: dict[str, float] = {}
        self.seconds = {"forward_backward": 0.0, "optimizer": 0.0}

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        m, rollout = self.module, self.rollout
        statistics = rollout_statistics(rollout)
        self.seconds["statistics"] = time.perf_counter() - start
        works = [self._work(term) for term in m.terms]
        if m.mismatch_samples and not any(w.term.space == "post-train" and w.selected.any() for w in works):
            self._measure_mismatch()
        for epoch in range(m.epochs):
            for number, prompts in enumerate(self.chunks):
                in_minibatch = torch.isin(rollout.group_ids, prompts)
                jobs = self.backward(works, in_minibatch, on_policy=epoch == 0 and number == 0)
                self._step(jobs)
        metrics = {**statistics, **self.sums.reduced(self.all_reduce), **self.last}
        self.seconds["forward_backward"] += time.perf_counter() - start - sum(self.seconds.values())
        return metrics

    # ------------------------------------------------------------------ what to compute

    def _work(self, term: Term) -> Work:
        m = self.module
        advantages = group_advantages(self.rollout.rewards, self.rollout.group_ids, term.normalisation)
        contributing = contributing_responses(advantages, term.contributing) & (self.lengths > 0)
        selected = contributing if m.kl_coefficient > 0 else contributing & (advantages != 0)
        own = self.share(term.space, selected)
        many_updates = m.minibatches * m.epochs > 1
        old = self.log_probs(term.space, own) if many_updates else None
        reference = None
        if m.kl_coefficient > 0:
            with m.anchored_reference().in_place(self.policy):
                reference = self.log_probs(term.space, own)
        correction = None
        if m.importance_sampling != "none" and (term.space == "pre-train" or old is not None):
            # the ratio is one of log p(y given x) at sampling
            trainer = old if term.space == "post-train" else self.log_probs("post-train", own)
            correction = self._corrections(trainer or {})
        self.sums.add("rollout/contributing", int(own.sum()))
        self.sums.add("rollout/contributing_tokens", int(self.lengths[own].sum()))
        weights = losses.sequence_weights(self.lengths, contributing, m.aggregation)
        return Work(term, advantages, contributing, selected, own, weights, old, reference, correction)

    def _corrections(self, trainer: dict[int, Tensor]) -> dict[int, Tensor]:
        """Importance weights (T_i,) from the trainer's log-probs, by response number."""
        m = self.module
        assert m.importance_sampling != "none"
        return {
            i: losses.importance_weights(p, self.engine_log_probs[i].to(p), m.importance_sampling, m.importance_cap)
            for i, p in trainer.items()
        }

    def _families(self, space: Space, selected: Tensor) -> list[Family]:
        m, rollout = self.module, self.rollout
        numbers = selected.nonzero().flatten().tolist()
        share = self.packed and self.policy.can_share and m.share_prompts and m.micro_batch_size is None
        if space == "post-train":
            contexts = [rollout.prompts[int(rollout.group_ids[i])].token_ids for i in numbers]
        else:
            contexts, share = [(m.prefix_id,)] * len(numbers), False
        responses = [rollout.responses[i].token_ids for i in numbers]
        return families(contexts, responses, numbers, share, self.max_tokens)

    def _micro_batches(self, space: Space, selected: Tensor) -> list[MicroBatch]:
        m = self.module
        made = self._families(space, selected)
        return micro_batches(made, self.max_tokens, m.micro_batch_size, self.packed)

    def share(self, space: Space, selected: Tensor) -> Tensor:
        """(N,) bool: this rank's share of the selected responses; within each minibatch the ranks' tokens are about
        equal. A response stays with its rank for the whole update, and so do its old log-probs."""
        if self.world_size == 1:
            return selected
        own = torch.zeros_like(selected)
        for prompts in self.chunks:
            made = self._families(space, selected & torch.isin(self.rollout.group_ids, prompts))
            for family in balanced(made, self.world_size)[self.rank]:
                own[[number for number, _ in family.responses]] = True
        return own

    def _padded(self, jobs: list[Any], idle: Any) -> list[Any]:
        """With idle jobs up to the largest number of jobs on any rank: collectives must match."""
        most = int(self.all_reduce(torch.tensor([len(jobs)], dtype=torch.float64), dist.ReduceOp.MAX))
        return jobs + [idle] * (most - len(jobs))

    # ------------------------------------------------------------------ forward and backward

    def _forward(self, batch: MicroBatch, entropy: bool = False) -> Tensor:
        """(T,) log-probs; their entropies, where asked for, are counted."""
        log_probs, entropies = self.policy(batch.to(self.device), self.rollout.temperature, entropy)
        if entropies is not None:
            self.sums.add("optim/entropy", entropies.sum(), len(entropies))
        return log_probs

    @torch.no_grad()
    def log_probs(self, space: Space, selected: Tensor, entropy: bool = False) -> dict[int, Tensor]:
        """Token log-probs (T_i,) of the selected (N,) responses by number, without gradient."""
        found: dict[int, Tensor] = {}
        for batch in self._padded(self._micro_batches(space, selected), None):
            log_probs = self._forward(batch, entropy) if batch else self._forward(idle_micro_batch())
            if batch is not None:
                found |= _by_response(log_probs, batch.sequence)
        return found

    def backward(self, works: list[Work], in_minibatch: Tensor, on_policy: bool) -> int:
        """Leave the minibatch's gradient in the parameters; returns the number of passes, 0: nothing contributes."""
        m = self.module
        jobs: list[tuple[MicroBatch, Work, float] | None] = []
        for work in works:
            denominator = losses.denominator(self.lengths, work.contributing & in_minibatch, m.aggregation)
            batches = self._micro_batches(work.term.space, work.own & in_minibatch)
            jobs += [(batch, work, denominator) for batch in batches]
        jobs = self._padded(jobs, None)
        self.policy.zero_grad(set_to_none=True)
        for i, job in enumerate(jobs):
            with self._gradient_sync(last=i == len(jobs) - 1):
                loss = self._loss(*job, on_policy) if job else self._forward(idle_micro_batch()).sum() * 0.0
                # DDP and FSDP2 average gradients over ranks, and the denominator has counted all of them already
                m.backward_pass(loss * self.world_size)
        return len(jobs)

    def _loss(self, batch: MicroBatch, work: Work, denominator: float, on_policy: bool) -> Tensor:
        m = self.module
        log_probs = self._forward(batch, m.entropy and work.term.space == "post-train")
        n_tokens, sequence = len(log_probs), batch.sequence
        current = log_probs.detach()
        old = current if work.old is None else _tokens(work.old, sequence, current)
        tokens = losses.clipped_surrogate(
            log_probs, old, work.advantages[sequence].to(current), m.clip_low, m.clip_high, m.clip_dual
        )
        loss = tokens.loss
        if m.importance_sampling != "none":
            correction = work.correction
            if correction is None:
                correction = self._corrections(_by_response(current, sequence))
            loss = loss * _tokens(correction, sequence, current)
        if work.reference is not None:
            kl = losses.kl_penalty(log_probs, _tokens(work.reference, sequence, current), m.kl_estimator)
            loss = loss + m.kl_coefficient * kl
            self.sums.add("optim/reference_kl", kl.detach().sum(), n_tokens)
        coefficient = work.term.coefficient * m.loss_coefficient / denominator
        loss = (loss * work.weights[sequence].to(current)).sum() * coefficient

        self._count_work(batch)
        self.sums.add("optim/loss", loss.detach())
        self.sums.add("optim/clipped", tokens.clipped.sum(), n_tokens)
        self.sums.add("optim/dual_clipped", tokens.dual_clipped.sum(), n_tokens)
        self.sums.add("optim/approx_kl", tokens.approx_kl.sum(), n_tokens)
        if on_policy and work.term.space == "post-train":
            self._add_mismatch(current, _tokens(self.engine_log_probs, sequence, current))
        return loss

    def _gradient_sync(self, last: bool) -> Any:
        """DDP reduces gradients with the last micro-batch only."""
        wrapped = self.module.trainer.strategy.model if self.module.is_attached else None
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def _step(self, n_jobs: int) -> None:
        """Clip and step. Without gradients, or with non-finite ones, the step counts and changes nothing: torch's
        optimizers pass over parameters whose ``grad`` is None."""
        m = self.module
        optimizer = cast(Any, m.host.optimizers())
        lr = m.lr_at(m.trainer.global_step - m.first_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        skipped = n_jobs == 0
        if not skipped:
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            norm = total.full_tensor() if isinstance(total, DTensor) else total
            self.last["optim/grad_norm"] = float(norm)
            if not torch.isfinite(norm):
                log.warning("Step %d: the gradient norm is %s; the step is skipped.", m.trainer.global_step, norm)
                self.policy.zero_grad(set_to_none=True)
                skipped = True
            elif 0 < m.gradient_clip < norm:
                torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), m.gradient_clip, total)
        start = time.perf_counter()  # reading the norm has waited for the device
        optimizer.step()
        self.seconds["optimizer"] += time.perf_counter() - start
        self.last["optim/lr"] = lr
        self.last["optim/skipped"] = self.last.get("optim/skipped", 0.0) + skipped

    # ------------------------------------------------------------------ what is measured

    def _measure_mismatch(self) -> None:
        """Where no loss computes log p(y given x), compare engine and trainer on a few responses."""
        m = self.module
        some = torch.zeros(len(self.rollout.responses), dtype=torch.bool)
        some[self.lengths.nonzero().flatten()[: m.mismatch_samples][self.rank :: self.world_size]] = True
        for i, log_probs in self.log_probs("post-train", some, m.entropy).items():
            self._add_mismatch(log_probs, self.engine_log_probs[i].to(log_probs))

    def _add_mismatch(self, trainer: Tensor, engine: Tensor) -> None:
        """Engine against trainer, weights equal: mean |difference|, and KL(engine || trainer) by k3."""
        difference = trainer - engine
        self.sums.add("mismatch/log_prob_difference", difference.abs().sum(), len(difference))
        self.sums.add("mismatch/kl", (difference.exp() - 1 - difference).sum(), len(difference))

    def _count_work(self, batch: MicroBatch) -> None:
        attended = attended_tokens(batch)
        self.sums.add("train/tokens", len(attended))
        self.sums.add("train/flops", self.module.host.training_flops(attended, len(batch.targets)))

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor, op)
        return tensor.cpu()


def _by_response(values: Tensor, sequence: Tensor) -> dict[int, Tensor]:
    """(T_i,) values by response number from the (T,) ones of a micro-batch."""
    numbers, counts = sequence.unique_consecutive(return_counts=True)
    return dict(zip(numbers.tolist(), values.split(counts.tolist()), strict=True))


def _tokens(by_response: dict[int, Tensor], sequence: Tensor, like: Tensor) -> Tensor:
    """(T,) values of a micro-batch's tokens from (T_i,) ones kept by response number."""
    return torch.cat([by_response[i].to(like) for i in sequence.unique_consecutive().tolist()])
