"""The LightningModule behind every objective.

An objective is a list of `Term`s (objectives/update.py): which log-prob, which advantage, which responses contribute.
Optimisation is manual, since Lightning's automatic mode knows one backward pass a step.

In a run of several lives (callbacks/reincarnation.py) the module given to the Trainer, the host, stays there to the
end, and hands its `training_step` to the module that is alive, its `acting` module. Of the three forms of
reincarnation in a running Trainer this is the one that touches none of Lightning's private attributes: the loop, the
logger's axis, the checkpoints, DDP's wrapper and FSDP2's shards belong to the host and never change. What it costs:
of a successor only `training_step` and what that calls is used, not its other Lightning hooks, which are refused.
"""

import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.metrics.evaluation import EvaluationMetric
from prerl_lightning.metrics.utilisation import TrainingFlops, peak_flops
from prerl_lightning.objectives import agreement, checks, lives, memory
from prerl_lightning.objectives.interruptions import Interruptions
from prerl_lightning.objectives.losses import Aggregation, KLEstimator
from prerl_lightning.objectives.schedule import Schedule, learning_rate_factor
from prerl_lightning.objectives.stops import Stops
from prerl_lightning.objectives.update import Term, Update, gathered
from prerl_lightning.objectives.validations import Validations
from prerl_lightning.policy.model import Policy, load_config, load_tokenizer, prefix_token
from prerl_lightning.policy.reference import Reference
from prerl_lightning.rollout.engine import Engine
from prerl_lightning.rollout.sampler import Group
from prerl_lightning.types import Prompt, Rollout
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)

CPU_PACK_TOKENS = 2048


class PolicyModule(L.LightningModule):
    """Base of all objectives; a subclass says its `terms`.

    Args:
        model: Hugging Face folder or hub id, or ``embedded`` for the tiny model of the package. The successor in a
            PolicyReincarnation leaves it out: it takes over the policy.
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
        kl_estimator: ``k1`` or ``k3``.
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
        gradient_checkpointing: recompute activations in the backward pass, in all lives; None: on a GPU where packs of
            a good size do not fit otherwise, on a CPU not.
        peak_flops: FLOP/s of one device, for train/mfu; None: from a table of NVIDIA's (metrics/utilisation.py).
        attn_implementation: of transformers, e.g. ``sdpa`` or ``flash_attention_2``; None: its own choice.
    """

    terms: tuple[Term, ...] = ()

    # of all objectives' options: the least value that is meant, and the value that it has to be above
    LEAST: ClassVar = {
        **{"lr": 0, "warmup_steps": 0, "gradient_clip": 0, "clip_low": 0, "clip_high": 0, "kl_coefficient": 0},
        **{"mismatch_samples": 0, "minibatches": 1, "epochs": 1, "max_tokens_per_microbatch": 1, "micro_batch_size": 1},
    }
    ABOVE: ClassVar = {"loss_coefficient": 0, "clip_dual": 1, "importance_cap": 1, "peak_flops": 0, "mismatch_bound": 0}

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
        aggregation: Aggregation = "token-mean",
        gradient_clip: float = 1.0,
        minibatches: int = 1,
        epochs: int = 1,
        kl_coefficient: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        importance_sampling: Literal["none", "token", "sequence-mask"] = "none",
        importance_cap: float = 2.0,
        mismatch_samples: int = 8,
        mismatch_bound: float | None = None,
        entropy: bool = False,
        max_tokens_per_microbatch: int | None = None,
        micro_batch_size: int | None = None,
        packing: bool = True,
        share_prompts: bool = True,
        chunked_head: bool = True,
        gradient_checkpointing: bool | None = None,
        peak_flops: float | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._model = model
        self.prefix = _prefix(prefix)
        self.lr, self.optimizer, self.lr_schedule, self.warmup_steps = lr, optimizer, lr_schedule, warmup_steps
        self.decay_norms_and_biases = decay_norms_and_biases
        self.loss_coefficient, self.aggregation = loss_coefficient, aggregation
        self.clip_low, self.clip_high, self.clip_dual = clip_low, clip_high, clip_dual
        self.gradient_clip = gradient_clip
        self.minibatches, self.epochs = minibatches, epochs
        self.kl_coefficient, self.kl_estimator = kl_coefficient, kl_estimator
        self.importance_sampling, self.importance_cap = importance_sampling, importance_cap
        self.mismatch_samples, self.mismatch_bound, self.entropy = mismatch_samples, mismatch_bound, entropy
        self.max_tokens_per_microbatch, self.micro_batch_size = max_tokens_per_microbatch, micro_batch_size
        self.packing, self.share_prompts, self.chunked_head = packing, share_prompts, chunked_head
        self.peak_flops = peak_flops
        self.gradient_checkpointing, self.attn_implementation = gradient_checkpointing, attn_implementation
        check_bounds(self, type(self).__name__, self.LEAST, self.ABOVE)

        self.policy: Policy | None = None
        self.reference: Reference | None = None
        self.evaluations: dict[str, EvaluationMetric] = {}  # by held-out set; no submodules, they have no weights
        self.validations = Validations()
        self.interruptions = Interruptions()
        self.stops = Stops()
        # for callbacks: this rank's last rollout, the one of all ranks (`gathered`), and the seconds they took
        self.rollout: Rollout | None = None
        self.whole_rollout: Rollout | None = None
        self.watched_seconds = 0.0
        self._started = 0.0
        self._row: dict[str, float] = {}
        self._prefix_id: int | None = None
        self._pack_tokens = CPU_PACK_TOKENS  # where max_tokens_per_microbatch does not say
        # in tuples, because a LightningModule as an attribute would be registered as a submodule
        self._host: tuple[PolicyModule] = (self,)
        self._acting: tuple[PolicyModule] = (self,)
        self.successors: tuple[PolicyModule, ...] = ()  # of the host, in order
        self.lives: list[tuple[str, int]] = [(type(self).__name__, 0)]  # objective and first step, all of the run's
        self.planned_lives = self.lives  # by the configuration; `objectives.lives.end_life` may end one ahead of it
        self.life = 1  # this module's place among them, from 1
        self.first_step = 0  # of this life, in optimizer steps of the run
        self.end_step: int | None = None  # None: the run's end
        self.warned_of_mismatch = False
        self.agreed = False  # this life's weights were seen to be those that the engine samples from

    # ------------------------------------------------------------------ lives

    @property
    def host(self) -> "PolicyModule":
        return self._host[0]

    @property
    def acting(self) -> "PolicyModule":
        return self._acting[0]

    def hand_over(self, successor: "PolicyModule") -> None:
        """From now on ``successor`` trains this host's policy, which the two share by reference."""
        successor._model = self._model
        successor.policy = self.policy
        successor.trainer = self.trainer
        successor._host = (self,)
        self._acting = (successor,)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        reference = self.acting.reference
        checkpoint["lives"] = {
            "schedule": [list(life) for life in self.planned_lives],
            "began": [first for _, first in self.lives],
            "alive": self.acting.life,
            "reference": reference.state_dict(self.live_policy) if reference is not None else None,
        }
        self.validations.on_save_checkpoint(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            return
        found = checkpoint.get("lives", {"schedule": None})
        if found["schedule"] != [list(life) for life in self.planned_lives]:
            raise InputError(
                f"The checkpoint's lives are {_describe(found['schedule'])}, the configuration's "
                f"{_describe(self.planned_lives)}. Resume with the configuration it was made with (config.yaml beside "
                "its run), or start a new run from its exported model folder."
            )
        lives.arrange([self, *self.successors], found["began"])
        if found["alive"] == 1:
            self.restore_reference(found["reference"])
        self.validations.on_load_checkpoint(self.trainer, checkpoint)

    def restore_reference(self, state: dict[str, Tensor] | None) -> None:
        if state is not None:
            self.anchored_reference().load_state_dict(self.live_policy, state)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer collects what the module it holds logs."""
        super(PolicyModule, self.host).log(*args, **kwargs)

    # ------------------------------------------------------------------ what is logged

    def record(self, metrics: Mapping[str, float]) -> None:
        """Into the row that the loggers get at the end of this step or evaluation.

        Not by Lightning's ``log``, which goes on repeating the last value of what a step did not measure, and counts
        steps otherwise in training and at a validation. What monitors and bars look at is given to both.
        """
        self._row |= metrics

    def due(self, every_n_steps: int) -> bool:
        """Whether something is to be done after this step: the run's first, each n-th, and the last of each life; with
        0 never."""
        assert self.rollout is not None
        step, before = self.trainer.global_step, self.rollout.policy_version  # a batch may make several steps
        if every_n_steps <= 0:
            return False
        ends = [*(first for _, first in self.lives[1:]), self.trainer.max_steps]
        passed = before == 0 or step // every_n_steps > before // every_n_steps
        return passed or any(before < end <= step for end in ends)

    def _write_row(self) -> None:
        row, self._row = self._row, {}
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.trainer.global_step)
            logger.save()

    def on_train_batch_end(self, *_: Any) -> None:
        """Callbacks have recorded theirs by now, in steps too whose own figures ``log_every_n_steps`` leaves out."""
        if self._row:
            self.record({"optim/step": self.trainer.global_step, "time/watchers": self.watched_seconds})
            self._write_row()
        self.interruptions.agree(self.trainer)

    # ------------------------------------------------------------------ the policy and its optimizer

    @property
    def model_name(self) -> str:
        if self._model is None:
            raise InputError(
                "model.init_args.model: missing. Give it a Hugging Face folder or hub id, or 'embedded' for the tiny "
                "model of the package."
            )
        return self._model

    @property
    def live_policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    @property
    def prefix_id(self) -> int:
        """The token id in front of y in log p(y)."""
        if self._prefix_id is None:
            self._prefix_id = prefix_token(load_tokenizer(self.model_name), self.prefix)
        return self._prefix_id

    def configure_model(self) -> None:
        if self.policy is None:
            # Lightning's warning of modules in eval mode: here they are meant to be
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            self.policy = Policy.from_pretrained(
                self.model_name,
                attn_implementation=self.attn_implementation,
                gradient_checkpointing=bool(self.gradient_checkpointing),
                chunked_head=self.chunked_head,
                longest=self.data.engine.max_model_len(load_config(self.model_name)) if self.is_attached else None,
            )

    @property
    def compute_device(self) -> torch.device:
        """Where forward passes run."""
        if self.is_attached:
            return cast(Any, self.trainer.strategy).root_device
        return next(self.live_policy.parameters()).device

    @property
    def pack_tokens(self) -> int:
        """Input tokens of one forward pass, padding included."""
        return self.max_tokens_per_microbatch or self.host._pack_tokens

    def check_run(self, data: RolloutDataModule, trainer: L.Trainer) -> None:
        """See `objectives.checks`; the data module calls it before anything is read or started."""
        checks.check_run(self, data, trainer)

    def check_prefixes(self) -> None:
        """Raises InputError where a life in pre-train space has no token to start log p(y) from."""
        for module in (self, *self.successors):
            if module.prefix is not None or any(term.space == "pre-train" for term in module.terms):
                prefix_token(load_tokenizer(self.model_name), module.prefix)

    def plan_memory(self, engine: Engine, device: torch.device, longest: int) -> None:
        """See `objectives.memory.plan`; called before anything large is loaded."""
        pack = memory.plan(self, engine, device, longest)
        if pack is not None:
            self._pack_tokens, self.gradient_checkpointing = pack.tokens, pack.checkpointing

    @cached_property
    def training_flops(self) -> TrainingFlops:
        return TrainingFlops(self.live_policy)

    def configure_optimizers(self) -> Optimizer:
        return self.acting.make_optimizer()

    def make_optimizer(self) -> Optimizer:
        """Over two groups in all lives, what has several dimensions and what has one, so that a checkpoint's optimizer
        fits whichever life's."""
        parameters = list(self.live_policy.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1]},
        ]
        if not self.decay_norms_and_biases:
            groups[1]["weight_decay"] = 0.0
        return self.optimizer(cast(Iterable, [group for group in groups if group["params"]]))

    def _take_settings(self) -> None:
        """A checkpoint brings its optimizer's settings back with the state; those of the configuration hold."""
        fresh = self.acting.make_optimizer().param_groups
        for group, new in zip(self.trainer.optimizers[0].param_groups, fresh, strict=True):
            group.update({key: value for key, value in new.items() if key != "params"})

    def lr_at(self, step_of_life: int) -> float:
        end = self.end_step if self.end_step is not None else self.trainer.max_steps
        total = end - self.first_step if end > 0 else None
        return self.lr * learning_rate_factor(self.lr_schedule, step_of_life, self.warmup_steps, total)

    def anchored_reference(self) -> Reference:
        """The weights at the start of this life, kept from the first call on, which is its first step."""
        if self.reference is None:
            self.reference = Reference(self.live_policy)
        return self.reference

    @property
    def is_attached(self) -> bool:
        return self._trainer is not None

    def backward_pass(self, loss: Tensor) -> None:
        """Through the Trainer's precision plugin and strategy, where there is a Trainer."""
        if self.is_attached:
            self.manual_backward(loss)
        else:
            loss.backward()

    # ------------------------------------------------------------------ training

    @property
    def data(self) -> RolloutDataModule:
        data = cast(Any, self.trainer).datamodule
        if not isinstance(data, RolloutDataModule):
            raise TypeError(f"{type(self).__name__} needs trainer.fit(..., datamodule=RolloutDataModule(...)).")
        return data

    def on_fit_start(self) -> None:
        # an engine that outlived an earlier fit of this process knows other weights by the same version numbers
        self.data.engine.policy_version = None
        for module in (self, *self.successors):
            module.agreed = False
        self.interruptions.on_fit_start(self.trainer)
        self.stops.on_fit_start(self.trainer)
        self._started = time.perf_counter()

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path:
            self._take_settings()
        self.interruptions.on_train_start()
        self.validations.on_train_start(self.trainer)

    def on_train_epoch_end(self) -> None:
        self.validations.on_train_epoch_end(self.trainer)

    def training_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        if self.acting is not self:
            return self.acting.training_step(batch, batch_idx)
        start = time.perf_counter()
        version = self.trainer.global_step
        watchdog.mark("weights", version)
        seconds = {"update_weights": self.sync()}
        watchdog.mark("rollout", version)
        rollout = self.data.rollout(batch, version)
        self.data.engine.sleep()
        seconds |= rollout.seconds
        self.host.rollout, self.host.watched_seconds = rollout, 0.0
        watchdog.mark("update", version)
        metrics, train_seconds = self.update(rollout)
        watchdog.mark("measurements", version)
        seconds |= train_seconds
        whole = time.perf_counter() - start
        seconds |= {"other": whole - sum(seconds.values()), "step": whole}
        seconds["since_start"] = time.perf_counter() - self.host._started
        metrics |= {f"time/{k}": v for k, v in seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / seconds["rollout"]
        metrics["train/tokens_per_second"] = metrics["train/tokens"] / seconds["forward_backward"]
        flops_per_second = metrics.pop("train/flops") / seconds["forward_backward"]
        if peak := self.peak_flops or peak_flops(self.compute_device):
            metrics["train/mfu"] = flops_per_second / (peak * self.trainer.world_size)
        metrics["life"] = self.life
        agreement.warn(self, metrics)
        for key, value in metrics.items():
            self.log(key, float(value), batch_size=1, logger=False)
        if self.host.due(self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            self.host.record(metrics)
        self.validations.after_step(self.trainer)
        return None

    def sync(self) -> float:
        """Give the engine the present weights, unless it has them; returns the seconds that took."""
        seconds = self.data.sync(self.live_policy, self.trainer.global_step)
        if not self.acting.agreed:
            agreement.check(self.acting)
            self.acting.agreed = True
        return seconds

    def update(self, rollout: Rollout) -> tuple[dict[str, float], dict[str, float]]:
        """Optimise on one rollout, ``minibatches`` * ``epochs`` optimizer steps; returns metrics, and seconds by stage.

        Raises:
            RuntimeError: the rollout was sampled from other weights than the policy's present ones.
        """
        if rollout.policy_version != self.trainer.global_step:
            raise RuntimeError(
                f"The rollout was sampled by policy version {rollout.policy_version}, the policy is at "
                f"{self.trainer.global_step}: training is strictly on-policy."
            )
        self.host.whole_rollout = gathered(rollout)
        update = Update(self, self.host.whole_rollout)
        return update.run(), update.seconds

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.data.engine.policy_version = None
            self.agreed = False
        watchdog.mark("validation", self.trainer.global_step)
        self.sync()

    def on_test_start(self) -> None:
        self.on_validation_start()

    def validation_step(
        self, batch: Sequence[Prompt], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Group]]:
        """The groups, for callbacks: ``samples``, and ``greedy`` ones, which may be none. Of the first held-out set
        alone: what watches a run would take another set's problems for its."""
        key = list(self.data.held_out)[dataloader_idx]
        samples, greedy = self.data.evaluate(batch, key)
        self.evaluations.setdefault(key, EvaluationMetric()).update(samples, greedy, self.data.val_samples)
        return {"samples": samples, "greedy": greedy} if dataloader_idx == 0 else {"samples": [], "greedy": []}

    def test_step(self, batch: Sequence[Prompt], batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Group]]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.trainer.state.fn == "fit":
            self.interruptions.agree(self.trainer)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        evaluations, self.evaluations = self.evaluations, {}
        if self.trainer.sanity_checking:  # of some batches, and of no step
            return
        for key, evaluation in evaluations.items():
            for name, value in evaluation.compute().items():
                logged = f"{stage}{key.removeprefix('val')}/{name}"
                self.log(logged, value, batch_size=1, logger=False)  # the same on all ranks
                self.record({logged: value})
        self.validations.step = self.trainer.global_step
        self.record({f"{stage}/step": self.trainer.global_step})
        self._write_row()


def _prefix(prefix: str | int | None) -> str | int | None:
    if isinstance(prefix, str) and prefix.isdecimal():
        return int(prefix)
    quoted = isinstance(prefix, str) and len(prefix) > 2 and prefix[0] == prefix[-1] == '"'
    return prefix[1:-1] if isinstance(prefix, str) and quoted else prefix


def _describe(lives: Sequence[Sequence[Any]] | None) -> str:
    if not lives:
        return "none (it is not one of ours)"
    return ", then ".join(f"{name} from step {step}" for name, step in lives)
