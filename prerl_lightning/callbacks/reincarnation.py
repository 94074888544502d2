"""DSRL: policy reincarnation. One policy, several lives in one run, each with an objective of its own.

Source: arXiv 2604.14142, section 5. Their code counts steps from 1, so their ``N = 20`` is ``at_step: 19`` here.
"""

import logging
from typing import Any, Literal

import lightning as L

from prerl_lightning.arguments import check_call
from prerl_lightning.errors import InputError
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.until import KEY, Until

log = logging.getLogger(__name__)


class PolicyReincarnation(L.Callback):
    """After ``at_step`` optimizer steps of the run, or sooner by ``until``, ``successor`` goes on with the policy's
    weights.

    The run goes on: the loop, the logger's axis, the checkpoints, the order of prompts. For more than two lives give
    several of these callbacks. A checkpoint remembers its life, and resumes in it; see `PolicyModule` for what of a
    successor is used.

    Args:
        at_step: optimizer steps of the run that the life before ends with, with ``until`` at the latest: its
            ``lr_schedule`` runs to there, and is cut off by a sooner end. The last of a rollout's, of which that life
            takes minibatches x epochs; with ``until`` it may lie beyond ``trainer.max_steps``.
        successor: the next objective. It leaves ``model`` out.
        optimizer: ``carry`` keeps the optimizer's state (Adam's moments), under the successor's settings; ``reset``
            starts with an empty one.
        merge: fold LoRA's adapters into the model, whose outputs stay, and begin new ones; for ``optimizer: reset``,
            since a state is of the old ones.
        until: ends the life before ahead of ``at_step``, by a metric: ``{metric: rollout/pass@8, worse_by: 0.1}``.
    """

    def __init__(
        self,
        at_step: int,
        successor: PolicyModule,
        optimizer: Literal["carry", "reset"] = "carry",
        until: Until | None = None,
        merge: bool = False,
    ) -> None:
        check_call(PolicyReincarnation.__init__, locals(), "PolicyReincarnation")
        if at_step < 1:
            raise InputError(f"PolicyReincarnation.at_step: {at_step} must be at least 1.")
        if until is not None and until.not_before >= at_step:
            raise InputError(
                f"{KEY}.not_before: {until.not_before} is not before at_step ({at_step}), which "
                "ends the life in any case. Lower it, or raise at_step."
            )
        if merge and optimizer == "carry":
            raise InputError(
                "PolicyReincarnation.merge: the optimizer's state is of the old adapters. Write optimizer: reset."
            )
        self.merge = merge
        self.at_step, self.successor, self.optimizer, self.until = at_step, successor, optimizer, until

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}.{self.at_step}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyModule):
            raise InputError(
                f"PolicyReincarnation needs an objective of prerl_lightning, not {type(pl_module).__name__}."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.successor.trainer = trainer

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.successor.first_step and pl_module.acting.life < self.successor.life:
            before = pl_module.acting
            if self.merge and (adapters := pl_module.live_policy.adapters) is not None:
                adapters.fold()
            self.switch(trainer, pl_module, carry=self.optimizer == "carry")
            log.info(
                "Step %d: the policy of %s is reborn as %s (life %d, optimizer state: %s).",
                *(trainer.global_step, before.title, self.successor.title, self.successor.life),
                self.optimizer,
            )
            if before.ending is not None and not before.ending.recent:
                log.warning(
                    "%s: %s was not measured in the life of %s, which so ended by at_step.",
                    *(KEY, before.ending.until.metric, before.title),
                )

    def switch(self, trainer: L.Trainer, host: PolicyModule, carry: bool) -> None:
        """Make the successor the acting module, with an optimizer of its own over the same parameters."""
        host.acting.let_go()
        host.hand_over(self.successor)
        if trainer.strategy.optimizers:  # while a checkpoint is restored there may be none yet
            optimizer = self.successor.make_optimizer()
            if carry:
                optimizer.state = trainer.strategy.optimizers[0].state
            trainer.strategy.optimizers = [optimizer]

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume in the life of the checkpoint: before the optimizers are made (single device, DDP), or, under FSDP2,
        after they have been made and loaded."""
        lives = checkpoint["lives"]
        if trainer.state.fn == "fit" and lives["alive"] == self.successor.life:
            self.switch(trainer, pl_module, carry=True)
            self.successor.restore_life(lives)
