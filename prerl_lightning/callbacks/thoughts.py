"""Reasoning behaviours by keywords: of each step's responses and of the held-out ones, and their ratio to step 0."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from prerl_lightning import ranks
from prerl_lightning.callbacks.watcher import Watcher
from prerl_lightning.compat import logs_every
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.seal import SealLabels
from prerl_lightning.metrics.thoughts import ThoughtCounts, ThoughtFinder, load_families, ratio_interval
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.rollout.sampler import Group

log = logging.getLogger(__name__)


class Thoughts(Watcher):
    """Logs thoughts/FAMILY (mean count a response), thoughts/FAMILY_per_1k (tokens), both also /right and /wrong, and
    thoughts/FAMILY_ratio: to the count in the responses of the untrained policy, as arXiv 2604.14142 reports; the same
    of held-out responses as val/thoughts/..., whose ratio compares answers to the same problems and has a 95 % interval
    over them (/low, and /high where there is such an end).

    Args:
        families: keyword families (metrics/thoughts.py), e.g. ``{reflection: [wait, check]}``, or a YAML file of them;
            None: the package's, English.
        rule: ``seal`` counts by SEAL's rule too (metrics/seal.py), as thoughts/seal/LABEL; ``phrases``: families alone.
        enabled: False: do not.
    """

    def __init__(
        self,
        families: str | dict[str, list[str]] | None = None,
        rule: Literal["phrases", "seal"] = "phrases",
        enabled: bool = True,
    ) -> None:
        if rule not in ("phrases", "seal"):
            raise InputError(f"thoughts.rule: {rule!r}; give seal, or phrases.")
        self.enabled = enabled
        self.families = load_families(families)
        self.finder = ThoughtFinder(self.families)
        self.counters: list[ThoughtFinder | SealLabels] = [self.finder, *([SealLabels()] if rule == "seal" else [])]
        self.names = [name for counter in self.counters for name in counter.families]
        self.training, self.held_out = (ThoughtCounts(self.names) for _ in range(2))
        self.at_start: dict[str, float] = {}  # counts by the untrained policy, by logged key
        # of its held-out responses, by family: each problem's row and count
        self.problems_at_start: dict[str, dict[int, int]] = {}
        self.problems: dict[str, dict[int, int]] = {}  # the same, of the last validation
        self._problems: list[tuple[int, list[int]]] = []
        self._shown: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self.at_start, "problems_at_start": self.problems_at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at_start = state_dict["at_start"]
        self.problems_at_start = state_dict.get("problems_at_start", {})

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        rollout = module.rollout
        if not self.enabled or rollout is None or not module.due(logs_every(trainer)):
            return {}
        self.training.update(self._counts(rollout.texts), rollout.lengths, rollout.rewards)
        return self._found(self.training, "thoughts/", untrained=rollout.policy_version == 0)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: dict[str, list[Group]], *_: Any
    ) -> None:
        if not self.enabled or trainer.sanity_checking:
            return
        groups = outputs["samples"]
        responses = [r for group in groups for r in group.responses]
        counts = self._counts([r.text for r in responses])
        lengths = torch.tensor([len(r.token_ids) for r in responses], dtype=torch.long)
        scores = torch.tensor([v.score for group in groups for v in group.verdicts], dtype=torch.float64)
        self.held_out.update(counts, lengths, scores)
        of_groups = counts.split([len(group.responses) for group in groups])
        self._problems += [(g.prompt.row, c.sum(0).tolist()) for g, c in zip(groups, of_groups, strict=True)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        if not self.enabled or trainer.sanity_checking:
            return
        prefix = "val/thoughts/"
        untrained = trainer.state.fn == "fit" and trainer.global_step == 0
        problems, self._problems = dict(sorted(ranks.gather(self._problems))), []
        counts = {name: {row: c[i] for row, c in problems.items()} for i, name in enumerate(self.names)}
        self.problems = counts
        if untrained:
            self.problems_at_start = counts
        found = self._found(self.held_out, prefix, untrained)
        shown = []
        for name in self.names:
            ratio = found.get(key := f"{prefix}{name}_ratio")
            start = self.problems_at_start.get(name, {})
            if ratio is not None and start.keys() == counts[name].keys():
                both = (torch.tensor([*one.values()], dtype=torch.float64) for one in (counts[name], start))
                ends = zip(("low", "high"), ratio_interval(*both), strict=True)
                found |= {f"{key}/{end}": value for end, value in ends if math.isfinite(value)}
            if count := found.get(prefix + name):
                low, high = (found.get(f"{key}/{end}", math.inf) for end in ("low", "high"))
                of = f" (x{ratio:.2f} [{low:.2f}, {high:.2f}])" if ratio and not untrained else ""
                shown.append(f"{name} {count:.3g}{of}")
        pl_module.record(found)
        self._shown = shown

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Behind the line with the accuracy."""
        shown, self._shown = self._shown, []
        if shown and trainer.state.fn == "fit":
            log.info("thoughts a held-out response: %s", ", ".join(shown))

    def _counts(self, texts: Sequence[str]) -> Tensor:
        """(texts, names)"""
        found = [[n for counter in self.counters for n in counter.counts(text)] for text in texts]
        return torch.tensor(found, dtype=torch.long).view(-1, len(self.names))

    def _found(self, counts: ThoughtCounts, prefix: str, untrained: bool) -> dict[str, float]:
        found = {prefix + key: value for key, value in counts.compute().items()}
        counts.reset()
        families = [prefix + name for name in self.names]
        if untrained:
            self.at_start |= {key: found[key] for key in families if key in found}
        ratios = {f"{k}_ratio": found[k] / self.at_start[k] for k in families if k in found and self.at_start.get(k)}
        return found | ratios
