"""Reasoning behaviours by keywords: of each step's responses and of the held-out ones, and their ratio to step 0."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from prerl_lightning.callbacks.watcher import Watcher
from prerl_lightning.metrics.thoughts import ThoughtCounts, ThoughtFinder, load_families
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.rollout.sampler import Group

log = logging.getLogger(__name__)


class Thoughts(Watcher):
    """Logs thoughts/FAMILY (mean count a response), thoughts/FAMILY_per_1k (tokens), both also /right and /wrong, and
    thoughts/FAMILY_ratio: to the count in the responses of the untrained policy, as arXiv 2604.14142 reports; the same
    of held-out responses as val/thoughts/..., whose ratio compares answers to the same problems.

    Args:
        families: YAML file of keyword families (metrics/thoughts.py); None: the package's, English; ``countdown``:
            the embedded task's.
        enabled: False: do not.
    """

    def __init__(self, families: str | None = None, enabled: bool = True) -> None:
        self.enabled = enabled
        self.families = load_families(families)
        self.finder = ThoughtFinder(self.families)
        self.training, self.held_out = (ThoughtCounts(self.finder.families) for _ in range(2))
        self.at_start: dict[str, float] = {}  # counts by the untrained policy, by logged key

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self.at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at_start = state_dict["at_start"]

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        rollout = module.rollout
        if not self.enabled or rollout is None or not module.due(trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return {}
        self._add(self.training, rollout.texts, rollout.lengths, rollout.rewards)
        return self._found(self.training, "thoughts/", untrained=rollout.policy_version == 0)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: dict[str, list[Group]], *_: Any
    ) -> None:
        if self.enabled and not trainer.sanity_checking:
            responses = [r for group in outputs["samples"] for r in group.responses]
            lengths = torch.tensor([len(r.token_ids) for r in responses], dtype=torch.long)
            scores = [v.score for group in outputs["samples"] for v in group.verdicts]
            self._add(self.held_out, [r.text for r in responses], lengths, torch.tensor(scores, dtype=torch.float64))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        if self.enabled and not trainer.sanity_checking:
            prefix = "val/thoughts/"
            untrained = trainer.state.fn == "fit" and trainer.global_step == 0
            found = self._found(self.held_out, prefix, untrained)
            pl_module.record(found)
            shown = []
            for family in self.finder.families:
                if count := found.get(prefix + family):
                    ratio = found.get(f"{prefix}{family}_ratio")
                    shown.append(f"{family} {count:.3g}" + (f" (x{ratio:.2f})" if ratio is not None else ""))
            if shown and trainer.state.fn == "fit":
                log.info("thoughts a held-out response, and to step 0: %s", ", ".join(shown))

    def _add(self, counts: ThoughtCounts, texts: Sequence[str], lengths: Tensor, rewards: Tensor) -> None:
        found = [self.finder.counts(text) for text in texts]
        counts.update(torch.tensor(found, dtype=torch.long).view(-1, len(self.finder.families)), lengths, rewards)

    def _found(self, counts: ThoughtCounts, prefix: str, untrained: bool) -> dict[str, float]:
        found = {prefix + key: value for key, value in counts.compute().items()}
        counts.reset()
        families = [prefix + family for family in self.finder.families]
        if untrained:
            self.at_start |= {key: found[key] for key in families if key in found}
        ratios = {f"{k}_ratio": found[k] / self.at_start[k] for k in families if k in found and self.at_start.get(k)}
        return found | ratios
