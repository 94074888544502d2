from dataclasses import replace
from typing import Any, Literal, cast

from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.objectives.advantages import ConstantBaseline
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.update import Update
from prerl_lightning.objectives.values import Critic, ValuedUpdate, ValueSettings
from prerl_lightning.policy.value import ValueModel
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.types import Rollout


class PPO(PolicyModule):
    """Proximal policy optimisation (arXiv 1707.06347): log p(y given x), all responses contribute, and each token's
    advantage is by GAE (arXiv 1506.02438) with the values that a second model gives the text in front of the tokens.

    The reward comes with the last token, which ends the episode, cut off or not; the KL penalty of ``kl_in: reward``
    with each token. No groups are compared: ``group_size: 1`` will do. The value model is made where this life begins,
    is resumed with it, and is no part of what is exported. It has run on CPUs alone: on no GPU yet.

    Args:
        value_body: ``own``: the value model has a body of its own, of the model's folder, which takes as much memory as
            the policy with its optimizer and its passes once more; ``policy``: it is a linear head on the policy's
            hidden states, which the value loss leaves as they are.
        value_lr: learning rate of the value model, constant; its optimizer, clip by norm and weight decay are of the
            policy's kind.
        value_clip: values move at most so far from those at sampling before they lose their gradient; None: no bound.
        value_warmup_steps: optimizer steps of this life, of whole rollouts, in which the value model alone learns.
        gamma: discount of a token, 0 to 1.
        gae_lambda: 0: a token's advantage is by the next value alone; 1: by the reward to come.
        whiten: advantages less their mean and over their std, over all tokens of the rollout.
        kwargs: as for every objective.
    """

    terms = (Term(space="post-train", advantage=ConstantBaseline(), contributing="all"),)
    update_kind = ValuedUpdate

    def __init__(
        self,
        value_body: Literal["own", "policy"] = "own",
        value_lr: float = 1e-5,
        value_clip: float | None = 0.2,
        value_warmup_steps: int = 0,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        whiten: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.value_body, self.value_lr = value_body, value_lr
        self.values = ValueSettings(value_warmup_steps, value_clip, gamma, gae_lambda, whiten)
        check_bounds(self, type(self).__name__, {"value_lr": 0})
        self.values.check(type(self).__name__)
        if value_warmup_steps % (steps := self.batching.steps):
            raise InputError(
                f"{type(self).__name__}.value_warmup_steps: {value_warmup_steps} end within a rollout's {steps} "
                f"optimizer steps (minibatches x epochs). Write a multiple of {steps}."
            )
        self._critic: Critic | None = None
        self._saved: dict[str, Any] | None = None  # a checkpoint's value model, until it is made

    def critic(self) -> Critic:
        """Made by the first call, in the first step of this life or of a resumed run: only then is the policy in its
        place."""
        if self._critic is None:
            own = self.value_body == "own"
            model = ValueModel(cast(PolicyModule, self.host).load_policy(whole=True) if own else self.live_policy, own)
            strategy = self.trainer.strategy if self.is_attached else None
            if own and isinstance(strategy, FSDP2Strategy):
                strategy.shard(model.body)
            else:
                model.module.to(self.compute_device)
            self._critic = Critic(model, replace(self.optimization, lr=self.value_lr))
            if self._saved is not None:
                self._critic.load_state_dict(self._saved)
                self._saved = None
        return self._critic

    def make_update(self, rollout: Rollout, **how: Any) -> Update:
        return super().make_update(rollout, critic=self.critic(), values=self.values, **how)

    # ------------------------------------------------------------------ beside weights and optimizer

    @property
    def bodies(self) -> int:  # type: ignore[override]
        return int(self.value_body == "own")

    def life_state(self, sharded: bool = False) -> dict[str, Any]:
        return super().life_state(sharded) | {
            "value": self._critic.state_dict() if self._critic is not None else self._saved
        }

    def restore_life(self, state: dict[str, Any]) -> None:
        super().restore_life(state)
        if "value" not in state:
            raise InputError(
                "--ckpt_path: the checkpoint has no value model, without which this life cannot go on: an objective "
                f"of the same name, {type(self).__name__}, wrote it. Start a new run from its exported model folder."
            )
        self._critic, self._saved = None, state["value"]

    def let_go(self) -> None:
        super().let_go()
        self._critic = self._saved = None
