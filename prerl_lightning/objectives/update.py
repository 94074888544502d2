"""One rollout's worth of optimisation.

    rollout -> advantages -> contributing responses -> micro-batches -> token log-probs -> token losses -> step

The loss of a minibatch is sum(weight * token loss) / denominator, and the denominator counts the tokens (or
responses) of all micro-batches on all ranks: the gradient does not depend on how the work is cut. Only responses with
a gradient are forwarded (`Passes`). Nothing here knows of Lightning: what a step needs is given to `Update`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prerl_lightning import ranks
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.metrics.utilisation import TrainingFlops, attended_tokens
from prerl_lightning.objectives import losses
from prerl_lightning.objectives.passes import Passes
from prerl_lightning.objectives.settings import LossSettings
from prerl_lightning.objectives.surrogates import Tokens
from prerl_lightning.objectives.term import Term
from prerl_lightning.policy.packing import MicroBatch
from prerl_lightning.policy.reference import Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Work:
    """A term applied to a rollout of N responses and T response tokens.

    Args:
        contributing: (N,) bool, what the denominator counts.
        selected: (N,) bool, what has a gradient, and so is forwarded, by one rank or another.
        own: (N,) bool, what of it this rank forwards.
        advantages: (T,) of each token, on the device.
        weights: (N,) of each response's tokens, before division by the denominator; on the device.
        coefficients: of the term at each of the rollout's optimizer steps.
        old: (T,) log-probs at sampling; None: the current ones are. This and the next two on the device, and of this
            rank's own responses alone.
        reference: (T,) log-probs of the reference; None: no KL penalty in the loss.
        correction: (T,) importance weights; None: they follow from this term's own log-probs.
        entropy_coefficient: of the entropy bonus.
    """

    term: Term
    contributing: Tensor
    selected: Tensor
    own: Tensor
    advantages: Tensor
    weights: Tensor
    coefficients: Sequence[float]
    old: Tensor | None
    reference: Tensor | None
    correction: Tensor | None
    entropy_coefficient: float

    def idle_at(self, step: int) -> bool:
        """Whether this optimizer step of the rollout multiplies all of it by 0."""
        return not (self.coefficients[step] or self.reference is not None or self.entropy_coefficient)


class Update:
    """Optimise a policy on a rollout: `run` does it and returns the metrics, which are equal on all ranks.

    Args:
        passes: over the rollout.
        terms: the objective's.
        loss: see `PolicyModule`, as for ``mismatch_samples`` and ``entropy``.
        reference: of the KL penalty, in the first term's loss or in the rewards; None: no penalty.
        entropy_coefficient: of the entropy bonus, in the first term's loss.
        life_step: optimizer steps of the life before this rollout's, for coefficients that follow a schedule.
        backward: of a loss.
        no_sync: a context in which a backward pass does not reduce gradients over ranks: DDP's.

    Attributes:
        seconds: by stage.
    """

    def __init__(
        self,
        passes: Passes,
        terms: Sequence[Term],
        loss: LossSettings,
        *,
        reference: Reference | None = None,
        entropy_coefficient: float = 0.0,
        life_step: int = 0,
        mismatch_samples: int = 0,
        entropy: bool = False,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.passes, self.terms, self.loss, self.reference = passes, terms, loss, reference
        self.space = terms[0].space  # of the KL penalty
        self.entropy_coefficient, self.life_step = entropy_coefficient, life_step
        self.mismatch_samples, self.entropy = mismatch_samples, entropy
        self.run_backward, self.no_sync = backward, no_sync
        self.policy, self.rollout, self.lengths = passes.policy, passes.rollout, passes.lengths
        self.device, self.sums = passes.device, passes.sums
        self.lengths_on_device = self.lengths.to(self.device)
        self.of_response = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)  # (T,) each token's
        self.flops = TrainingFlops(passes.policy)
        self.last: dict[str, float] = {}
        self.seconds = {"forward_backward": 0.0, "optimizer": 0.0}

    def run(self, optimizer: Any, lrs: Sequence[float], gradient_clip: float = 0.0) -> dict[str, float]:
        """An optimizer step a minibatch, in each epoch.

        Args:
            optimizer: torch's, or Lightning's around it.
            lrs: learning rates, one an optimizer step.
            gradient_clip: by global norm; 0: off.
        """
        start = time.perf_counter()
        rollout, chunks, sound = self.rollout, self.passes.chunks, self.passes.sound
        statistics = rollout_statistics(rollout)
        if unsound := int((~sound).sum()):
            log.warning(
                "Step %d: the engine gave %d responses log-probs that are not finite; they are left out of the loss.",
                *(rollout.policy_version, unsound),
            )
        statistics["rollout/not_finite"] = float(unsound)
        self.seconds["statistics"] = time.perf_counter() - start
        works = [self.work(term) for term in self.terms]
        first = torch.isin(rollout.group_ids, chunks[0])  # later ones see weights that did not sample
        if self.mismatch_samples and not any(
            w.term.space == "post-train" and (w.selected & first).any() and not w.idle_at(0) for w in works
        ):
            self._measure_mismatch()
        for step, lr in zip(range(self.passes.batching.steps), lrs, strict=True):
            in_minibatch = torch.isin(rollout.group_ids, chunks[step % len(chunks)])
            jobs = self.backward(works, in_minibatch, on_policy=step == 0, step=step)
            self._step(rollout.policy_version + step, jobs, optimizer, lr, gradient_clip)
        metrics = {**statistics, **self.sums.reduced(), **self.last}
        self.seconds["forward_backward"] += time.perf_counter() - start - sum(self.seconds.values())
        return metrics

    # ------------------------------------------------------------------ what to compute

    @cached_property
    def penalties(self) -> Tensor:
        """(T,) float64, of each token where the KL penalty is in the reward: ``kl_coefficient`` * (log p - log q) (k1),
        p as it sampled; else 0."""
        passes, space = self.passes, self.space
        if self.reference is None or self.loss.kl_in != "reward":
            return torch.zeros(len(self.of_response), dtype=torch.float64)
        own = passes.share(space, passes.sound & (self.lengths > 0))
        policy = passes.log_probs(space, own)
        with self.reference.in_place(self.policy):
            apart = policy - passes.log_probs(space, own)  # 0 of what other ranks forward
        self.sums.add("optim/reference_kl", apart.sum(), int(self.lengths[own].sum()))
        return self.loss.kl_coefficient * ranks.all_reduce(apart.double().cpu())

    @cached_property
    def rewards(self) -> Tensor:
        """(N,) float64, of which advantages are made: the rollout's, less its `penalties`."""
        return self.rollout.signals.double().index_add(0, self.of_response, -self.penalties)

    def of_tokens(self, advantages: Tensor) -> Tensor:
        """(T,) float64 of each token, from the (N,) of responses."""
        return advantages[self.of_response]

    def work(self, term: Term) -> Work:
        passes, loss = self.passes, self.loss
        advantages = term.advantages(self.rewards, self.rollout)
        of_tokens = self.of_tokens(advantages)
        contributing = term.counted(advantages, self.rollout)
        contributing &= passes.sound & (self.lengths > 0)
        steps = range(self.life_step, self.life_step + passes.batching.steps)
        coefficients = [term.coefficient_at(step) for step in steps]
        first = term is self.terms[0]  # one penalty and one bonus a loss
        kl = first and self.reference is not None and loss.kl_in == "loss"
        entropy_coefficient = self.entropy_coefficient if first else 0.0
        selected = contributing
        if not kl and not entropy_coefficient:
            taught = torch.zeros(len(advantages)).index_add_(0, self.of_response, (of_tokens != 0).float()) > 0
            selected = contributing & taught & any(coefficients)
        own = passes.share(term.space, selected)
        many_updates = passes.batching.steps > 1
        old = passes.log_probs(term.space, own) if many_updates else None
        reference = None
        if kl:
            assert self.reference is not None
            with self.reference.in_place(self.policy):
                reference = passes.log_probs(term.space, own)
        correction = None
        if loss.importance_sampling != "none" and (term.space == "pre-train" or old is not None):
            # the ratio is one of log p(y given x) at sampling
            trainer = old if term.space == "post-train" else passes.log_probs("post-train", own)
            assert trainer is not None
            correction = self._correction(trainer, passes.engine_log_probs, self.of_response.to(self.device))
        self.sums.add("rollout/contributing", int(own.sum()))
        self.sums.add("rollout/contributing_tokens", int(self.lengths[own].sum()))
        weights = term.aggregation_by(loss).weights(self.lengths)
        return Work(
            *(term, contributing, selected, own, of_tokens.to(self.device), weights.to(self.device), coefficients),
            *(old, reference, correction, entropy_coefficient),
        )

    def _correction(self, trainer: Tensor, engine: Tensor, sequence: Tensor) -> Tensor:
        """(T,) importance weights of tokens of whole responses."""
        kind, cap = self.loss.importance_sampling, self.loss.importance_cap
        assert kind != "none"
        return losses.importance_weights(trainer, engine, sequence, len(self.lengths), kind, cap)

    # ------------------------------------------------------------------ forward and backward

    def backward(self, works: Sequence[Work], in_minibatch: Tensor, on_policy: bool, step: int = 0) -> int:
        """Leave the minibatch's gradient in the parameters; returns the number of passes, 0: nothing contributes.

        Args:
            step: among the optimizer steps of the rollout.
        """
        jobs: list[tuple[MicroBatch, Work, float, float] | None] = []
        for work in works:
            if work.idle_at(step):
                continue
            counted = self.lengths[work.contributing & in_minibatch]
            denominator = work.term.aggregation_by(self.loss).denominator(counted)
            batches = self.passes.micro_batches(work.term.space, work.own & in_minibatch)
            jobs += [(batch, work, denominator, work.coefficients[step]) for batch in batches]
        jobs = self.passes.padded(jobs)
        self.policy.zero_grad(set_to_none=True)
        for i, job in enumerate(jobs):
            with nullcontext() if i == len(jobs) - 1 else self.no_sync():
                loss = self.loss_of(*job, on_policy) if job else self.passes.idle().sum() * 0.0
                # DDP and FSDP2 average gradients over ranks, and the denominator has counted all of them already
                self.run_backward(loss * self.passes.world_size)
        return len(jobs)

    def loss_of(self, batch: MicroBatch, work: Work, denominator: float, coefficient: float, on_policy: bool) -> Tensor:
        """No shape in here depends on values on the device: the host runs ahead of it."""
        settings, term = self.loss, work.term
        self._count_work(batch)
        batch = batch.to(self.device)
        measured = term.space == "post-train" and (self.entropy or bool(work.entropy_coefficient))
        log_probs, entropies = self.passes.forward(batch, measured or bool(work.entropy_coefficient))
        n_tokens, sequence, source = len(log_probs), batch.sequence, batch.source
        current = log_probs.detach()
        old = current if work.old is None else work.old[source]
        tokens = Tokens(log_probs, old, work.advantages[source].to(current), sequence, self.lengths_on_device)
        found = term.surrogate_by(settings)(tokens)
        loss = found.loss
        engine = self.passes.engine_log_probs[source]
        if settings.importance_sampling != "none":
            correction = work.correction
            loss = loss * (self._correction(current, engine, sequence) if correction is None else correction[source])
        if (factors := term.weights(tokens)) is not None:
            loss = loss * factors
        loss = loss * coefficient
        if work.reference is not None:
            kl = losses.kl_penalty(log_probs, work.reference[source], settings.kl_estimator)
            loss = loss + settings.kl_coefficient * kl
            self.sums.add("optim/reference_kl", kl.detach().sum(), n_tokens)
        if entropies is not None:
            if work.entropy_coefficient:
                loss = loss - work.entropy_coefficient * entropies
            if measured:
                self.sums.add("optim/entropy", entropies.detach().sum(), n_tokens)
        scale = settings.loss_coefficient / denominator
        loss = (loss * work.weights[sequence].to(current)).sum() * scale

        self.sums.add("optim/loss", loss.detach())
        self.sums.add("optim/clipped", found.clipped.sum(), n_tokens)
        self.sums.add("optim/dual_clipped", found.dual_clipped.sum(), n_tokens)
        self.sums.add("optim/approx_kl", found.approx_kl.sum(), n_tokens)
        if on_policy and term.space == "post-train":
            self._add_mismatch(current, engine)
        return loss

    def _step(self, step: int, n_jobs: int, optimizer: Any, lr: float, gradient_clip: float) -> None:
        """Clip and step. Without gradients, or with non-finite ones, the step counts and changes nothing, neither
        weights nor moments: torch's optimizers pass over parameters whose ``grad`` is None."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        skipped, finite = n_jobs == 0, True
        if not skipped:
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            norm = ranks.full(total)
            self.last["optim/grad_norm"] = float(norm)
            if not torch.isfinite(norm):
                log.warning("Step %d: the gradient norm is %s; the step is skipped.", step, float(norm))
                self.policy.zero_grad(set_to_none=True)
                skipped, finite = True, False
            elif 0 < gradient_clip < norm:
                torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), gradient_clip, total)
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
        passes = self.passes
        some = torch.zeros(len(self.lengths), dtype=torch.bool)
        usable = (passes.sound & (self.lengths > 0)).nonzero().flatten()
        some[usable[: self.mismatch_samples][passes.rank :: passes.world_size]] = True
        trainer = passes.log_probs("post-train", some, self.entropy)
        tokens = some.repeat_interleave(self.lengths).nonzero().flatten().to(self.device)
        self._add_mismatch(trainer[tokens], passes.engine_log_probs[tokens])

    def _add_mismatch(self, trainer: Tensor, engine: Tensor) -> None:
        """Engine against trainer, weights equal: mean |difference|, and KL(engine || trainer) by k3."""
        difference = trainer - engine
        self.sums.add("mismatch/log_prob_difference", difference.abs().sum(), len(difference))
        self.sums.add("mismatch/kl", (difference.exp() - 1 - difference).sum(), len(difference))

    def _count_work(self, batch: MicroBatch) -> None:
        attended = attended_tokens(batch)
        self.sums.add("train/tokens", len(attended))
        self.sums.add("train/flops", self.flops(attended, len(batch.targets)))
