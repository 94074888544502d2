"""The LightningModule behind every objective: what Lightning calls, in the order of a run.

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
from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, cast

import lightning as L
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from prerl_lightning.compat import all_callbacks, logs_every
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.utilisation import peak_flops, rates
from prerl_lightning.objectives import agreement, checks, lives, memory
from prerl_lightning.objectives.evaluations import Evaluations
from prerl_lightning.objectives.objective import BaseObjective
from prerl_lightning.objectives.optimizer import learning_rates, take_settings
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.objectives.run_state import RunState
from prerl_lightning.objectives.update import Update
from prerl_lightning.policy.model import Policy, load_config, prefix_token
from prerl_lightning.rollout.engine import Engine
from prerl_lightning.rollout.sampler import Group
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.types import Prompt, Rollout
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)


class PolicyModule(BaseObjective, RunState):
    """Base of all objectives, whose arguments are `BaseObjective`'s; a subclass says its `terms`."""

    # ------------------------------------------------------------------ before a run

    def check_run(self, data: RolloutDataModule, trainer: L.Trainer) -> None:
        """See `objectives.checks`; the data module calls it before anything is read or started."""
        checks.check_run(self, data, trainer)

    def check_prefixes(self, tokenizer: PreTrainedTokenizerBase, fits: L.Trainer | None) -> None:
        """Raises InputError where there is no token to start log p(y) from, in a life in pre-train space, or where a
        callback of ``fits`` measures it: its ``prefix_mend`` is the way out."""
        callbacks = [] if fits is None else all_callbacks(fits)
        mend = next((mend for callback in callbacks if (mend := getattr(callback, "prefix_mend", ""))), "")
        for module in (self, *self.successors):
            if module.prefix is not None or module._in_pretrain_space:
                prefix_token(tokenizer, module.prefix)
            elif mend:
                try:
                    prefix_token(tokenizer, None)
                except InputError as error:
                    raise InputError(f"{error} {mend}") from None

    def plan_memory(self, engine: Engine, device: torch.device, longest: int) -> None:
        """See `objectives.memory.plan`; called before anything large is loaded."""
        pack = memory.plan(self, engine, device, longest)
        if pack is not None:
            self._pack_tokens, self.gradient_checkpointing = pack.tokens, pack.checkpointing

    # ------------------------------------------------------------------ the policy and its optimizer

    def configure_model(self) -> None:
        if self.policy is None:
            # Lightning's warning of modules in eval mode: here they are meant to be
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            self.policy = self.load_policy()
            self.strict_loading = self.lora is None  # the base is in no checkpoint

    def load_policy(self, whole: bool = False) -> Policy:
        """As the run begins with it, on the CPU; sharded already where the strategy shards, unless ``whole``."""
        strategy: Any = self.trainer.strategy if self.is_attached else None
        return Policy.from_pretrained(
            self.model_name,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing or 0,
            chunked_head=self.chunked_head,
            lora=self.lora,
            longest=self.data.engine.max_model_len(load_config(self.model_name)) if self.is_attached else None,
            sharding=strategy if isinstance(strategy, FSDP2Strategy) and not whole else None,
        )

    def configure_optimizers(self) -> Optimizer:
        return self.acting.make_optimizer()

    @property
    def is_attached(self) -> bool:
        return self._trainer is not None

    @property
    def compute_device(self) -> torch.device:
        return cast(Any, self.trainer.strategy).root_device if self.is_attached else super().compute_device

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
        if self.has_trained and self.trainer.is_global_zero and not self.trainer.ckpt_path:
            log.warning(
                "%s has been trained in this process, and goes on from there. One that is made anew begins with the "
                "weights of %s.",
                *(type(self).__name__, self.model_name),
            )
        self.has_trained = True
        self.interruptions.on_fit_start(self.trainer)
        self.stops.on_fit_start(self.trainer)
        self._started = time.perf_counter()

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path:
            take_settings(self.trainer.optimizers[0], self.acting.make_optimizer())
        self.interruptions.on_train_start()
        self.validations.on_train_start(self.trainer)

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
        peak = self.measuring.peak_flops or peak_flops(self.compute_device)
        metrics |= rates(metrics, seconds, peak and peak * self.trainer.world_size)
        del metrics["train/flops"]
        metrics["life"] = self.life
        agreement.warn(self, metrics)
        for key, value in metrics.items():
            self.log(key, float(value), batch_size=1, logger=False)
        lives.observe(self.host, metrics)  # of each step, and first: the last one of a life is due
        if self.host.due(logs_every(self.trainer)):
            self.host.row.values |= metrics
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
        version = self.trainer.global_step
        if rollout.policy_version != version:
            raise RuntimeError(
                f"The rollout was sampled by policy version {rollout.policy_version}, the policy is at "
                f"{version}: training is strictly on-policy."
            )
        self.host.whole_rollout = gathered(rollout)
        update = self.make_update(self.host.whole_rollout)
        metrics = update.run(self.host.optimizers(), self._learning_rates(version), self.optimization.gradient_clip)
        if self.loss.entropy_coefficient:
            metrics["optim/entropy_coefficient"] = update.entropy_coefficient
        self.follow_entropy(self.host.whole_rollout)
        return metrics, update.seconds

    def make_update(self, rollout: Rollout, **how: Any) -> Update:
        """With a Trainer through its precision plugin and strategy."""
        if self.is_attached:
            wrapped = self.trainer.strategy.model
            no_sync = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext
            step = self.trainer.global_step - self.first_step
            how = {"life_step": step, "backward": self.manual_backward, "no_sync": no_sync} | how
        return super().make_update(rollout, **how)

    def _learning_rates(self, version: int) -> list[float]:
        """Of the optimizer steps on a rollout, of which ``version`` is the first."""
        end = self.end_step if self.end_step is not None else self.trainer.max_steps
        total = end - self.first_step if end > 0 else None
        first = version - self.first_step
        return learning_rates(self.optimization, range(first, first + self.batching.steps), total)

    def on_train_batch_end(self, *_: Any) -> None:
        """Callbacks have recorded theirs by now, in steps too whose own figures ``log_every_n_steps`` leaves out."""
        if self.row.values:
            self.record({"optim/step": self.trainer.global_step, "time/watchers": self.watched_seconds})
            if "time/since_start" in self.row.values:  # with what they have taken
                self.row.values["time/since_start"] += self.watched_seconds
            self.row.write(self.trainer)
        self.interruptions.agree(self.trainer)

    def on_train_epoch_end(self) -> None:
        self.validations.on_train_epoch_end(self.trainer)

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
        self.evaluations.add(key, samples, greedy, self.data.samples_of(key)[0])
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
        evaluations, self.evaluations = self.evaluations, Evaluations()
        if self.trainer.sanity_checking:  # of some batches, and of no step
            return
        for name, value in (found := evaluations.measures(stage)).items():
            self.log(name, value, batch_size=1, logger=False)  # the same on all ranks
        self.validations.step = self.trainer.global_step
        self.record({**found, f"{stage}/step": self.trainer.global_step})
        self.row.write(self.trainer)

    # ------------------------------------------------------------------ what is logged

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """The Trainer collects what the module it holds logs. What a callback logs of a training step goes into the
        step's row: Lightning would write another, of the step before."""
        plain = isinstance(value, Real | torch.Tensor) and not args and not options.get("on_epoch")
        if plain and self.is_attached and self.trainer.training and options.get("logger") is not False:
            self.host.record({name: float(value)})
            options["logger"] = False
        super(PolicyModule, self.host).log(name, value, *args, **options)

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
        successor.policy, successor._pack_tokens = self.policy, self._pack_tokens
        successor.trainer = self.trainer
        successor._host = (self,)
        self._acting = (successor,)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lives"] = lives.state(self, getattr(self.trainer.strategy, "sharded_checkpoints", False))
        if (adapters := self.live_policy.adapters) is not None:
            checkpoint["lora"] = adapters.state_dict()
        self.validations.on_save_checkpoint(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (adapters := self.live_policy.adapters) is not None:
            adapters.load_state_dict(checkpoint["lora"], str(self.trainer.ckpt_path))
        if self.trainer.state.fn == "fit":
            lives.resume(self, checkpoint.get("lives", {"schedule": None}))
            self.validations.on_load_checkpoint(self.trainer, checkpoint)
