"""What an objective with a value model has beside others: that and its optimizer, and an `Update` that learns both.

The value model is none of the Trainer's: it is made with the first step of its life, saved with it (`life_state`), and
gone behind it, so that weights, optimizer and checkpoints of all lives are the policy's alone.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prerl_lightning import ranks
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.utilisation import attended_tokens
from prerl_lightning.objectives.advantages import EPSILON, generalised_advantages
from prerl_lightning.objectives.losses import clipped_value_loss
from prerl_lightning.objectives.optimizer import make_optimizer
from prerl_lightning.objectives.settings import OptimizerSettings, Settings
from prerl_lightning.objectives.update import Update
from prerl_lightning.policy.packing import idle_micro_batch
from prerl_lightning.policy.value import ValueModel
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueSettings(Settings):
    """Arguments of `PPO`, which says what each is."""

    value_warmup_steps: int
    value_clip: float | None
    gamma: float
    gae_lambda: float
    whiten: bool

    LEAST = {"value_warmup_steps": 0, "gamma": 0, "gae_lambda": 0}  # noqa: RUF012
    ABOVE = {"value_clip": 0}  # noqa: RUF012
    MOST = {"gamma": 1, "gae_lambda": 1}  # noqa: RUF012


class Critic:
    """A value model and what trains it; on the device, and sharded where it is to be.

    Args:
        optimization: of the value model; its learning rate is constant.
    """

    def __init__(self, model: ValueModel, optimization: OptimizerSettings) -> None:
        self.model, self.optimization = model, optimization
        self.optimizer = make_optimizer(model.module, optimization)

    def step(self) -> float:
        """On the gradients of this rank, which FSDP2 alone has averaged yet; returns their global norm. Nothing changes
        where that is not finite."""
        parameters = self.model.parameters().values()
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            if ranks.world_size() > 1 and not isinstance(gradient, DTensor):
                gradient.copy_(ranks.all_reduce(gradient) / ranks.world_size())
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(ranks.full(total))
        if math.isfinite(norm):
            if 0 < self.optimization.gradient_clip < norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.optimization.gradient_clip, total)
            for group in self.optimizer.param_groups:
                group["lr"] = self.optimization.lr
            self.optimizer.step()
        self.model.module.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Full tensors on the CPU, of the first rank alone; collective."""
        found: dict[str, Any] = {"weights": self.model.parameters(), "moments": self.optimizer.state_dict()["state"]}
        return _whole(found, keep=ranks.rank() == 0)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError where it is of another value model."""
        own = self.model.parameters()
        if state["weights"].keys() != own.keys():
            raise InputError(
                "model.init_args.value_body: the checkpoint's value model is another, with a body where this one has "
                "none or without. Resume with the value_body it was made with."
            )
        for name, p in own.items():
            p.copy_(ranks.held_as(state["weights"][name], p))
        numbered = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            number: {k: ranks.held_as(v, p) if v.shape == p.shape else v for k, v in state["moments"][number].items()}
            for number, p in enumerate(numbered)
            if number in state["moments"]
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _whole(tree: Any, keep: bool) -> Any:
    if isinstance(tree, dict):
        return {key: _whole(value, keep) for key, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    full = ranks.full(tree.detach())
    return full.cpu().clone() if keep else None


class ValuedUpdate(Update):
    """An `Update` whose advantages are those of tokens by GAE, and which learns their values, a step of the value
    model in front of each of the policy's.

    Args:
        critic: of the values.
        values: how they are learned and used.
    """

    def __init__(self, *args: Any, critic: Critic, values: ValueSettings, **how: Any) -> None:
        super().__init__(*args, **how)
        self.critic, self.values = critic, values
        self.counted = self.passes.sound & (self.lengths > 0)
        self.own = self.passes.share("post-train", self.counted)
        if self.life_step < values.value_warmup_steps:
            self.terms = ()  # the policy learns nothing from this rollout

    @cached_property
    def old_values(self) -> Tensor:
        """(T,) float64 on the CPU, by the value model as it was at sampling; 0 of responses that are not counted."""
        found = torch.zeros(len(self.of_response), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in self._batches(self.own):
                values = self.critic.model(batch or self._idle())
                if batch is not None:
                    found[batch.source] = values.double()
        return ranks.all_reduce(found.cpu())

    @cached_property
    def advantages(self) -> Tensor:
        """(T,) float64, before they are whitened. The reward comes with a response's last token, the KL penalty with
        each."""
        rewards, some = -self.penalties, self.lengths > 0
        rewards[(self.lengths.cumsum(0) - 1)[some]] += self.rollout.signals.double()[some]
        gamma, gae_lambda = self.values.gamma, self.values.gae_lambda
        return generalised_advantages(rewards, self.old_values, self.lengths, gamma, gae_lambda)

    @cached_property
    def returns(self) -> Tensor:
        """(T,) float64, what values are to become."""
        returns = self.advantages + self.old_values
        counted = self.counted[self.of_response]
        self.last["value/mean"] = float(self.old_values[counted].mean())
        spread = float(returns[counted].var(correction=0))
        if spread:
            left = float(self.advantages[counted].var(correction=0))
            self.last["value/explained_variance"] = 1 - left / spread
        return returns

    def of_tokens(self, advantages: Tensor) -> Tensor:
        if not self.values.whiten:
            return self.advantages
        counted = self.advantages[self.counted[self.of_response]]
        return (self.advantages - counted.mean()) / (counted.std(correction=0) + EPSILON)

    def backward(self, works: Any, in_minibatch: Tensor, on_policy: bool, step: int = 0) -> int:
        self.learn(in_minibatch)
        return super().backward(works, in_minibatch, on_policy, step)

    def learn(self, in_minibatch: Tensor) -> None:
        """A step of the value model, on the mean over all tokens of the minibatch, all ranks'."""
        tokens = int(self.lengths[self.counted & in_minibatch].sum())
        if not tokens:
            return
        old, returns = (values.to(self.device) for values in (self.old_values, self.returns))
        self.critic.model.module.zero_grad(set_to_none=True)
        for batch in self._batches(self.own & in_minibatch, passes=3 if self.critic.model.own else 1):
            values = self.critic.model(batch or self._idle())
            loss = values.sum() * 0.0
            if batch is not None:
                before, goals = old[batch.source].to(values), returns[batch.source].to(values)
                losses, clipped = clipped_value_loss(values, before, goals, self.values.value_clip)
                loss = losses.sum() / tokens
                self.sums.add("value/loss", losses.detach().sum(), len(losses))
                self.sums.add("value/clipped", clipped.sum(), len(losses))
            # not by Lightning, whose DDP would wait for the policy's gradients; averaged over ranks it is the whole
            (loss * self.passes.world_size).backward()
        norm = self.last["value/grad_norm"] = self.critic.step()
        if not math.isfinite(norm):
            step = self.rollout.policy_version
            log.warning("Step %d: the value model's gradient norm is %s; its step is skipped.", step, norm)

    def _batches(self, selected: Tensor, passes: int = 0) -> Any:
        """Of responses of this rank, on the device; None for an idle pass. ``passes``: the forward passes, of which a
        backward is two, that each is to count as in train/flops."""
        for batch in self.passes.padded(self.passes.micro_batches("post-train", selected)):
            watchdog.move()
            if batch is not None:
                attended = attended_tokens(batch)
                self.sums.add("train/flops", passes * self.flops.forward(len(attended), float(attended.sum()), 0))
            yield batch and batch.to(self.device)

    def _idle(self) -> Any:
        return idle_micro_batch().to(self.device)
