"""What every objective is given, and what trains a policy by it. Nothing in here needs a Trainer.

An objective is a list of `Term`s (objectives/term.py): which log-prob, which advantage, which responses contribute ...
"""

import os
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import AdamW, Optimizer

from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.objectives.aggregations import AggregationName
from prerl_lightning.objectives.entropy import TargetEntropy, sampled_entropy
from prerl_lightning.objectives.losses import KLEstimator
from prerl_lightning.objectives.optimizer import make_optimizer
from prerl_lightning.objectives.passes import CPU_PACK_TOKENS, Passes
from prerl_lightning.objectives.schedule import Schedule
from prerl_lightning.objectives.settings import (
    BatchSettings,
    ImportanceSampling,
    LossSettings,
    MeasureSettings,
    OptimizerSettings,
)
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.update import Update
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy, given_prefix, load_tokenizer, prefix_token
from prerl_lightning.policy.reference import Reference
from prerl_lightning.types import Rollout


class BaseObjective(L.LightningModule):
    """A base of `PolicyModule`, which adds what Lightning calls; a subclass of that says its `terms`.

    Args:
        model: Hugging Face folder or hub id, or a tiny model of the package: ``embedded`` (0.9 M parameters, countdown
            puzzles) or ``embedded-sums``. The successor in a PolicyReincarnation leaves it out: it takes over the
            policy.
        lora: train low-rank adapters alone, e.g. ``{rank: 16}``, over the model as it is; None: all its weights. A
            successor leaves it out, too.
        prefix: the token that log p(y) starts from, by its id or its text; default: the tokenizer's BOS, else the first
            token of its chat format (``<|im_start|>`` for Qwen). Digits are an id everywhere, since a command line
            cannot tell 5 from "5"; double quotes within the text, ``'"5"'`` or ``'"#"'``, make text of anything.
        lr: peak learning rate of this life; it overrides one given to ``optimizer``.
        optimizer: its class, and arguments other than lr. A step in which nothing contributes leaves its state (Adam's
            moments and step count) and the weights as they are, weight decay included, and counts all the same.
        decay_norms_and_biases: whether the optimizer's weight decay takes in what has one dimension: norms' scales and
            biases. False is the practice of Hugging Face's trainers.
        lr_schedule: over the optimizer steps of this life: ``constant``, or a ``linear`` or ``cosine`` decay to zero
            at its end.
        warmup_steps: of linear warm-up.
        loss_coefficient: multiplies the loss; under Adam it matters through ``eps`` and ``gradient_clip``.
        clip_low: the ratio is clipped below at 1 - this.
        clip_high: and above at 1 + this.
        clip_dual: bound of the loss over -advantage, for negative advantages.
        aggregation: ``token-mean`` or ``seq-mean-token-mean``.
        gradient_clip: by global norm; 0: off.
        minibatches: optimizer steps that a rollout is split into, by prompts. ``at_step``, ``trainer.max_steps`` and
            every ``every_n_..._steps`` count optimizer steps, ``trainer.val_check_interval`` rollouts.
        epochs: passes over a rollout.
        kl_coefficient: of a KL penalty to a frozen reference, the weights at the start of this life; 0: no reference
            is kept. Added once, with the objective's first term: of that term's log-probs, over the responses that it
            counts (for NSR-PreRL the negatives' log p(y), for MixedRL all responses' log p(y given x)), and over its
            denominator.
        kl_estimator: in the loss, ``k1``, ``k2`` or ``k3``; see `losses.kl_penalty` for what the gradient of each is.
        kl_in: ``loss``, or ``reward`` as in PPO for language models: a response's reward is less by ``kl_coefficient``
            times the sum of its tokens' log p - log q, in the space of the first term, before any term's advantages.
        entropy_coefficient: of a bonus for the entropy of the next token's distribution, in nats, exact and with its
            gradient: a number, or `TargetEntropy`, which follows the policy's. Added once, as the KL penalty is.
        importance_sampling: correction for the engine's log-probs differing from the trainer's: ``none``, ``token``
            (ratio truncated at ``importance_cap``), or ``sequence-mask`` (responses beyond the cap have no gradient,
            but stay in the denominator: the others do not weigh more for it).
        importance_cap: > 1.
        mismatch_samples: an objective in pre-train space never computes log p(y given x); so many responses a step
            are forwarded without gradient to compare engine and trainer. 0: none.
        mismatch_bound: nats a token that engine and trainer may differ by on average: beyond it the run stops where
            it or a life begins (objectives/agreement.py), and is warned of later; None: 0.01 where both compute in
            fp32, else 0.2.
        entropy: log optim/entropy: of the next token's distribution in nats, over the response tokens that a step
            forwards behind their prompts.
        max_tokens_per_microbatch: input tokens of one forward pass, padding included; None: on a GPU up to 16,384, by
            the model's shape and the memory there is (budget.py), on a CPU 2,048.
        micro_batch_size: at most so many responses in one forward pass; None: no such limit.
        packing: forward many responses as one row of tokens without padding, where the model's attention allows it.
        share_prompts: in a pack, the responses of a group share one pass over their prompt where that pays.
        chunked_head: token log-probs without a tokens x vocabulary tensor; False: by the model's own logits, all at
            once.
        gradient_checkpointing: recompute activations in the backward pass, in all lives; a number: those of every
            second layer, third ..., which takes that share of the time, and of the memory away; None: on a GPU where
            packs of a good size do not fit otherwise, on a CPU not.
        peak_flops: FLOP/s of one device, for train/mfu; None: from a table of NVIDIA's (metrics/utilisation.py).
        attn_implementation: of transformers, e.g. ``sdpa`` or ``flash_attention_2``; None: its own choice.
    """

    terms: tuple[Term, ...] = ()
    update_kind: type[Update] = Update

    def __init__(
        self,
        model: str | None = None,
        prefix: str | int | None = None,
        lr: float = 1e-6,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, weight_decay=0.0, fused=True),
        decay_norms_and_biases: bool = False,
        lr_schedule: Schedule = "constant",
        warmup_steps: int = 0,
        loss_coefficient: float = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        clip_dual: float = 10.0,
        aggregation: AggregationName = "token-mean",
        gradient_clip: float = 1.0,
        minibatches: int = 1,
        epochs: int = 1,
        kl_coefficient: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in: Literal["loss", "reward"] = "loss",
        entropy_coefficient: TargetEntropy | float = 0.0,
        importance_sampling: ImportanceSampling = "none",
        importance_cap: float = 2.0,
        mismatch_samples: int = 8,
        mismatch_bound: float | None = None,
        entropy: bool = False,
        max_tokens_per_microbatch: int | None = None,
        micro_batch_size: int | None = None,
        packing: bool = True,
        share_prompts: bool = True,
        chunked_head: bool = True,
        gradient_checkpointing: bool | int | None = None,
        peak_flops: float | None = None,
        attn_implementation: str | None = None,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._model = str(model) if isinstance(model, os.PathLike) else model
        self.prefix = given_prefix(prefix)
        self.chunked_head, self.gradient_checkpointing = chunked_head, gradient_checkpointing
        self.attn_implementation, self.lora = attn_implementation, lora
        self.optimization = OptimizerSettings(
            lr, optimizer, decay_norms_and_biases, lr_schedule, warmup_steps, gradient_clip
        )
        self.loss = LossSettings(
            *(loss_coefficient, clip_low, clip_high, clip_dual, aggregation),
            *(kl_coefficient, kl_estimator, importance_sampling, importance_cap),
            kl_in=kl_in,
            entropy_coefficient=entropy_coefficient,
        )
        self.batching = BatchSettings(
            minibatches, epochs, max_tokens_per_microbatch, micro_batch_size, packing, share_prompts
        )
        self.measuring = MeasureSettings(mismatch_samples, mismatch_bound, entropy, peak_flops)
        check_bounds(self, type(self).__name__, {"gradient_checkpointing": 0})
        for settings in (self.optimization, self.loss, self.batching, self.measuring):
            settings.check(type(self).__name__)

        self.policy: Policy | None = None
        self.reference: Reference | None = None
        self.entropy_state = 0.0  # the coefficient that a `TargetEntropy` has come to
        self._pack_tokens = CPU_PACK_TOKENS  # where max_tokens_per_microbatch does not say

    @property
    def model_name(self) -> str:
        if self._model is None:
            raise InputError(
                "model.init_args.model: missing. Give it a Hugging Face folder or hub id, or 'embedded' for the tiny "
                "model of the package."
            )
        return self._model

    @property
    def title(self) -> str:
        """What the objective is called in a run's lines, its records and its report."""
        return type(self).__name__

    @property
    def live_policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    @cached_property
    def prefix_id(self) -> int:
        """The token id in front of y in log p(y)."""
        return prefix_token(load_tokenizer(self.model_name), self.prefix)

    @property
    def _in_pretrain_space(self) -> bool:
        return any(term.space == "pre-train" for term in self.terms)

    def make_optimizer(self) -> Optimizer:
        return make_optimizer(self.live_policy, self.optimization)

    @property
    def compute_device(self) -> torch.device:
        """Where forward passes run."""
        return self.live_policy.device

    @property
    def pack_tokens(self) -> int:
        """Input tokens of one forward pass, padding included."""
        return self.batching.max_tokens_per_microbatch or self._pack_tokens

    def make_passes(self, rollout: Rollout, prefix_id: int | None = None) -> Passes:
        """Over a rollout of all ranks. ``prefix_id``: for log p(y) where no term is in pre-train space."""
        if prefix_id is None and self._in_pretrain_space:
            prefix_id = self.prefix_id
        batching = replace(self.batching, max_tokens_per_microbatch=self.pack_tokens)
        return Passes(rollout, self.live_policy, batching, self.compute_device, prefix_id)

    def make_update(self, rollout: Rollout, **how: Any) -> Update:
        """Of the policy on a rollout of all ranks; ``how``: `Update`'s ``life_step``, ``backward`` and ``no_sync``, and
        what an `update_kind` of one's own takes beside."""
        return self.update_kind(
            self.make_passes(rollout),
            self.terms,
            self.loss,
            reference=self.anchored_reference() if self.loss.kl_coefficient > 0 else None,
            entropy_coefficient=self.entropy_coefficient(rollout),
            mismatch_samples=self.measuring.mismatch_samples,
            entropy=self.measuring.entropy,
            **how,
        )

    def entropy_coefficient(self, rollout: Rollout) -> float:
        control = self.loss.entropy_coefficient
        if isinstance(control, TargetEntropy):
            return control.applied(self.entropy_state, sampled_entropy(rollout))
        return control

    def follow_entropy(self, rollout: Rollout) -> None:
        """Behind the rollout's update."""
        if isinstance(control := self.loss.entropy_coefficient, TargetEntropy):
            self.entropy_state = control.following(self.entropy_state, sampled_entropy(rollout))

    def anchored_reference(self) -> Reference:
        """The weights at the start of this life, kept from the first call on, which is its first step."""
        if self.reference is None:
            self.reference = Reference(self.live_policy)
        return self.reference

    # ------------------------------------------------------------------ beside weights and optimizer

    @property
    def copies(self) -> int:
        """Of the trained weights, that this life keeps beside the policy, in memory and in a checkpoint."""
        return int(self.loss.kl_coefficient > 0)

    bodies = 0  # models of the policy's size, trained whole with Adam, beside the policy

    def life_state(self, sharded: bool = False) -> dict[str, Any]:
        """For a checkpoint, its reference ``sharded`` as the policy is, or whole. Collective where a life keeps one."""
        reference = self.reference
        return {
            "entropy_coefficient": self.entropy_state,
            "reference": reference.state_dict(self.live_policy, sharded) if reference is not None else None,
        }

    def restore_life(self, state: dict[str, Any]) -> None:
        """Of a checkpoint of this life. Raises InputError where it is of another one's."""
        self.entropy_state = state.get("entropy_coefficient", 0.0)
        if state["reference"] is not None:
            self.anchored_reference().load_state_dict(self.live_policy, state["reference"])

    def let_go(self) -> None:
        """Of what only this life needed, which is over."""
        self.reference = None
