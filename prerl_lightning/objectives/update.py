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
from torch.nn.parallel import DistributedDataParallel

from prerl_lightning import ranks
from prerl_lightning.budget import KEYS_PER_TOKEN
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
from prerl_lightning.types import Prompt, Rollout, Sequences
from prerl_lightning.watchdog import watchdog

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)


def gathered(rollout: Rollout) -> Rollout:
    """The rollouts of all ranks as one, rank after rank; texts stay behind. The same on all ranks. Collective."""
    if ranks.world_size() == 1:
        return rollout
    own = (
        [(p.row, p.token_ids) for p in rollout.prompts],
        *(rollout.group_ids, rollout.tokens, rollout.log_probs, rollout.lengths, rollout.truncated, rollout.rewards),
        (rollout.timeouts, rollout.errors, rollout.answered),
    )
    prompts: list[Prompt] = []
    parts = ranks.gather([own])
    group_ids = []
    for contexts, groups, *_ in parts:
        group_ids.append(groups + len(prompts))
        prompts += [Prompt(row, ids, "", "") for row, ids in contexts]
    tokens, log_probs, lengths, truncated, rewards = (torch.cat([part[i] for part in parts]) for i in range(2, 7))
    timeouts, errors, answered = (sum(part[7][i] for part in parts) for i in range(3))
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
    )


@dataclass(frozen=True)
class Term:
    """One term of an objective: ``coefficient`` * aggregated token loss. The first one carries the KL penalty, if any,
    which ``coefficient`` does not multiply."""

    space: Space
    normalisation: Normalisation
    contributing: Contributing
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False)
class Work:
    """A term applied to a rollout of N responses and T response tokens.

    Args:
        contributing: (N,) bool, what the denominator counts.
        selected: (N,) bool, what has a gradient, and so is forwarded, by one rank or another.
        own: (N,) bool, what of it this rank forwards.
        advantages: (N,) on the device.
        weights: (N,) of each response's tokens, before division by the denominator; on the device.
        old: (T,) log-probs at sampling; None: the current ones are. This and the next two on the device, and of this
            rank's own responses alone.
        reference: (T,) log-probs of the reference; None: no KL penalty.
        correction: (T,) importance weights; None: they follow from this term's own log-probs.
    """

    term: Term
    contributing: Tensor
    selected: Tensor
    own: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    reference: Tensor | None
    correction: Tensor | None


class Update:
    """Optimise ``module`` on ``rollout``, the whole one of all ranks; `run` does it and returns the metrics, which are
    equal on all ranks."""

    def __init__(self, module: "PolicyModule", rollout: Rollout) -> None:
        self.sound = torch.ones(len(rollout), dtype=torch.bool)  # (N,) whose log-probs by the engine are finite
        if not (finite := rollout.log_probs.isfinite()).all():
            number = torch.arange(len(rollout)).repeat_interleave(rollout.lengths)
            self.sound[number[~finite]] = False
            rollout = replace(rollout, log_probs=torch.where(finite, rollout.log_probs, 0.0))
        self.module, self.rollout = module, rollout
        self.policy = module.live_policy
        self.device = module.compute_device
        self.world_size, self.rank = ranks.world_size(), ranks.rank()
        self.chunks = torch.arange(len(rollout.prompts)).tensor_split(module.minibatches)
        self.packed = module.packing and self.policy.can_pack
        self.kernel = self.policy.attention_kernel(self.device)
        self.max_tokens = module.pack_tokens
        # memory is reckoned with so many keys; on a CPU it is not the matter
        self.max_keys = None if self.device.type == "cpu" else KEYS_PER_TOKEN * self.max_tokens
        self.lengths = rollout.lengths
        self.engine_log_probs = rollout.log_probs.to(self.device)
        self.sums = Sums(self.device)
        self.last: dict[str, float] = {}
        self.seconds = {"forward_backward": 0.0, "optimizer": 0.0}

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        m, rollout = self.module, self.rollout
        statistics = rollout_statistics(rollout)
        if unsound := int((~self.sound).sum()):
            log.warning(
                "Step %d: the engine gave %d responses log-probs that are not finite; they are left out of the loss.",
                *(m.trainer.global_step, unsound),
            )
        statistics["rollout/not_finite"] = float(unsound)
        self.seconds["statistics"] = time.perf_counter() - start
        works = [self._work(term) for term in m.terms]
        first = torch.isin(rollout.group_ids, self.chunks[0])  # later ones see weights that did not sample
        if m.mismatch_samples and not any(w.term.space == "post-train" and (w.selected & first).any() for w in works):
            self._measure_mismatch()
        for epoch in range(m.epochs):
            for number, prompts in enumerate(self.chunks):
                in_minibatch = torch.isin(rollout.group_ids, prompts)
                jobs = self.backward(works, in_minibatch, on_policy=epoch == 0 and number == 0)
                self._step(jobs)
        metrics = {**statistics, **self.sums.reduced(), **self.last}
        self.seconds["forward_backward"] += time.perf_counter() - start - sum(self.seconds.values())
        return metrics

    # ------------------------------------------------------------------ what to compute

    def _work(self, term: Term) -> Work:
        m = self.module
        advantages = group_advantages(self.rollout.rewards, self.rollout.group_ids, term.normalisation)
        contributing = contributing_responses(advantages, term.contributing)
        contributing &= self.sound & (self.lengths > 0)
        kl = m.kl_coefficient > 0 and term is m.terms[0]  # one penalty a loss
        selected = contributing if kl else contributing & (advantages != 0)
        own = self.share(term.space, selected)
        many_updates = m.minibatches * m.epochs > 1
        old = self.log_probs(term.space, own) if many_updates else None
        reference = None
        if kl:
            with m.anchored_reference().in_place(self.policy):
                reference = self.log_probs(term.space, own)
        correction = None
        if m.importance_sampling != "none" and (term.space == "pre-train" or old is not None):
            # the ratio is one of log p(y given x) at sampling
            trainer = old if term.space == "post-train" else self.log_probs("post-train", own)
            assert trainer is not None
            number = torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(self.device)
            correction = self._correction(trainer, self.engine_log_probs, number)
        self.sums.add("rollout/contributing", int(own.sum()))
        self.sums.add("rollout/contributing_tokens", int(self.lengths[own].sum()))
        weights = losses.sequence_weights(self.lengths, contributing, m.aggregation)
        own_advantages, own_weights = (x.float().to(self.device) for x in (advantages, weights))
        return Work(term, contributing, selected, own, own_advantages, own_weights, old, reference, correction)

    def _correction(self, trainer: Tensor, engine: Tensor, sequence: Tensor) -> Tensor:
        """(T,) importance weights of tokens of whole responses."""
        m = self.module
        assert m.importance_sampling != "none"
        return losses.importance_weights(
            trainer, engine, sequence, len(self.lengths), m.importance_sampling, m.importance_cap
        )

    def _families(self, space: Space, selected: Tensor) -> list[Family]:
        m, rollout = self.module, self.rollout
        share = self.packed and self.policy.can_share and m.share_prompts and m.micro_batch_size is None
        contexts, context_of = rollout.contexts, rollout.group_ids.tolist()
        if space == "pre-train":
            contexts, context_of, share = Sequences.of([(m.prefix_id,)]), [0] * len(rollout), False
        numbers = selected.nonzero().flatten().tolist()
        return families(contexts, context_of, rollout.sequences, numbers, share, self.max_tokens, self.max_keys)

    def _micro_batches(self, space: Space, selected: Tensor) -> list[MicroBatch]:
        made = self._families(space, selected)
        sequences, most = self.rollout.sequences, self.module.micro_batch_size
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

    def _padded(self, jobs: list[Any], idle: Any) -> list[Any]:
        """With idle jobs up to the largest number of jobs on any rank: collectives must match."""
        most = int(ranks.all_reduce(torch.tensor(len(jobs)), dist.ReduceOp.MAX))
        return jobs + [idle] * (most - len(jobs))

    # ------------------------------------------------------------------ forward and backward

    def _forward(self, batch: MicroBatch, entropy: bool = False) -> Tensor:
        """(T,) log-probs of a micro-batch on the device; their entropies, where asked for, are counted."""
        watchdog.move()
        log_probs, entropies = self.policy(batch, self.rollout.temperature, entropy)
        if entropies is not None:
            self.sums.add("optim/entropy", entropies.sum(), len(entropies))
        return log_probs

    def _idle_forward(self) -> Tensor:
        return self._forward(idle_micro_batch().to(self.device))

    @torch.no_grad()
    def log_probs(self, space: Space, selected: Tensor, entropy: bool = False) -> Tensor:
        """(T,) log-probs on the device, without gradient, of the tokens of the selected (N,) responses; 0 of others."""
        found = torch.zeros_like(self.engine_log_probs)
        for batch in self._padded(self._micro_batches(space, selected), None):
            if batch is None:
                self._idle_forward()
            else:
                on_device = batch.to(self.device)
                found[on_device.source] = self._forward(on_device, entropy).float()
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
                loss = self._loss(*job, on_policy) if job else self._idle_forward().sum() * 0.0
                # DDP and FSDP2 average gradients over ranks, and the denominator has counted all of them already
                m.backward_pass(loss * self.world_size)
        return len(jobs)

    def _loss(self, batch: MicroBatch, work: Work, denominator: float, on_policy: bool) -> Tensor:
        """No shape in here depends on values on the device: the host runs ahead of it."""
        m = self.module
        self._count_work(batch)
        batch = batch.to(self.device)
        log_probs = self._forward(batch, m.entropy and work.term.space == "post-train")
        n_tokens, sequence, source = len(log_probs), batch.sequence, batch.source
        current = log_probs.detach()
        old = current if work.old is None else work.old[source]
        tokens = losses.clipped_surrogate(
            log_probs, old, work.advantages[sequence], m.clip_low, m.clip_high, m.clip_dual
        )
        loss = tokens.loss
        engine = self.engine_log_probs[source]
        if m.importance_sampling != "none":
            correction = work.correction
            loss = loss * (self._correction(current, engine, sequence) if correction is None else correction[source])
        loss = loss * work.term.coefficient
        if work.reference is not None:
            kl = losses.kl_penalty(log_probs, work.reference[source], m.kl_estimator)
            loss = loss + m.kl_coefficient * kl
            self.sums.add("optim/reference_kl", kl.detach().sum(), n_tokens)
        coefficient = m.loss_coefficient / denominator
        loss = (loss * work.weights[sequence]).sum() * coefficient

        self.sums.add("optim/loss", loss.detach())
        self.sums.add("optim/clipped", tokens.clipped.sum(), n_tokens)
        self.sums.add("optim/dual_clipped", tokens.dual_clipped.sum(), n_tokens)
        self.sums.add("optim/approx_kl", tokens.approx_kl.sum(), n_tokens)
        if on_policy and work.term.space == "post-train":
            self._add_mismatch(current, engine)
        return loss

    def _gradient_sync(self, last: bool) -> Any:
        """DDP reduces gradients with the last micro-batch only."""
        wrapped = self.module.trainer.strategy.model if self.module.is_attached else None
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def _step(self, n_jobs: int) -> None:
        """Clip and step. Without gradients, or with non-finite ones, the step counts and changes nothing, neither
        weights nor moments: torch's optimizers pass over parameters whose ``grad`` is None."""
        m = self.module
        optimizer = cast(Any, m.host.optimizers())
        lr = m.lr_at(m.trainer.global_step - m.first_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        skipped, finite = n_jobs == 0, True
        if not skipped:
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            norm = ranks.full(total)
            self.last["optim/grad_norm"] = float(norm)
            if not torch.isfinite(norm):
                log.warning(
                    "Step %d: the gradient norm is %s; the step is skipped.", m.trainer.global_step, float(norm)
                )
                self.policy.zero_grad(set_to_none=True)
                skipped, finite = True, False
            elif 0 < m.gradient_clip < norm:
                torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), m.gradient_clip, total)
        start = time.perf_counter()  # reading the norm has waited for the device
        optimizer.step()
        self.policy.zero_grad(set_to_none=True)  # not needed any more, and as large as the weights through a rollout
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else its time would be counted as the passes'
        self.seconds["optimizer"] += time.perf_counter() - start
        self.last["optim/lr"] = lr
        self.last["optim/skipped"] = self.last.get("optim/skipped", 0.0) + skipped
        self.last["optim/non_finite"] = self.last.get("optim/non_finite", 0.0) + (not finite)

    # ------------------------------------------------------------------ what is measured

    def _measure_mismatch(self) -> None:
        """Where no loss computes log p(y given x), compare engine and trainer on a few responses."""
        m = self.module
        some = torch.zeros(len(self.lengths), dtype=torch.bool)
        usable = (self.sound & (self.lengths > 0)).nonzero().flatten()
        some[usable[: m.mismatch_samples][self.rank :: self.world_size]] = True
        trainer = self.log_probs("post-train", some, m.entropy)
        tokens = some.repeat_interleave(self.lengths).nonzero().flatten().to(self.device)
        self._add_mismatch(trainer[tokens], self.engine_log_probs[tokens])

    def _add_mismatch(self, trainer: Tensor, engine: Tensor) -> None:
        """Engine against trainer, weights equal: mean |difference|, and KL(engine || trainer) by k3."""
        difference = trainer - engine
        self.sums.add("mismatch/log_prob_difference", difference.abs().sum(), len(difference))
        self.sums.add("mismatch/kl", (difference.exp() - 1 - difference).sum(), len(difference))

    def _count_work(self, batch: MicroBatch) -> None:
        attended = attended_tokens(batch)
        self.sums.add("train/tokens", len(attended))
        self.sums.add("train/flops", self.module.host.training_flops(attended, len(batch.targets)))
