"""Completions to read: which are chosen, and where they go; `sample_views` shows them."""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L

from prerl_lightning import ranks
from prerl_lightning.callbacks.progress import StepBar
from prerl_lightning.callbacks.sample_views import terminal_line, to_loggers
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import Watcher, append_lines, callbacks_of, run_folder
from prerl_lightning.errors import check_bounds
from prerl_lightning.metrics.thoughts import ThoughtFinder, load_families
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.rollout.sampler import Group
from prerl_lightning.types import Prompt, Response, Rollout

log = logging.getLogger(__name__)


class Samples(Watcher):
    """Every n steps, and at a life's end, the best and the worst responses of the batch; at each validation the answers
    to the same held-out problems, which that samples anyway: greedy ones where there are (``data.val_greedy``), so that
    what changes is the policy. Thoughts are highlighted, and words that the answer to the same problem did not have
    before are underlined.

    Args:
        every_n_steps: of the batch's; 0: never.
        number: of the batch's each time, best and worst in turn, each to another prompt.
        held_out: held-out problems, the first ones.
        max_characters: shown in the terminal of each; the file has them whole.
    """

    def __init__(self, every_n_steps: int = 20, number: int = 3, held_out: int = 2, max_characters: int = 300) -> None:
        self.every_n_steps, self.number, self.held_out = every_n_steps, number, held_out
        self.max_characters = max_characters
        check_bounds(self, "samples", {"every_n_steps": 0, "number": 0, "held_out": 0, "max_characters": 1})
        self.folder: Path | None = None
        self.finder: ThoughtFinder | None = None
        self.earlier: dict[int, dict[str, Any]] = {}  # the last answer to a held-out problem, by its row
        self._validation: list[Group] = []

    def state_dict(self) -> dict[str, Any]:
        return {"earlier": self.earlier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier = state_dict["earlier"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder = run_folder(trainer)
        watching = callbacks_of(trainer, Thoughts)
        self.finder = watching[0].finder if watching else ThoughtFinder(load_families())

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        rollout = module.rollout
        if rollout is None or not module.due(self.every_n_steps):
            return {}
        rows = []
        for i, kind in best_and_worst(rollout, self.number):
            prompt = rollout.prompts[int(rollout.group_ids[i])]
            rows.append(self._row(trainer, module, kind, prompt, rollout.responses[i], float(rollout.rewards[i])))
        rows = ranks.gather(rows)
        best = sorted((r for r in rows if r["kind"] == "best"), key=lambda r: -r["reward"])
        worst = sorted((r for r in rows if r["kind"] == "worst"), key=lambda r: r["reward"])
        turns = [row for pair in zip_longest(best, worst) for row in pair if row is not None]
        self._show(trainer, turns[: self.number])
        return {}

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: dict[str, list[Group]], *_: Any
    ) -> None:
        groups = self._validation + (outputs["greedy"] or outputs["samples"])
        self._validation = sorted(groups, key=lambda group: group.prompt.row)[: self.held_out]

    def on_validation_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        groups, self._validation = self._validation, []
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        rows = [
            self._row(trainer, pl_module, "held_out", g.prompt, g.responses[0], g.verdicts[0].score) for g in groups
        ]
        rows = sorted(ranks.gather(rows), key=lambda row: row["row"])[: self.held_out]
        for row in rows:
            row["previous"] = self.earlier.get(row["row"])
            self.earlier[row["row"]] = {key: row[key] for key in ("step", "response", "reward")}
        self._show(trainer, rows)

    def _row(
        self, trainer: L.Trainer, module: PolicyModule, kind: str, prompt: Prompt, response: Response, reward: float
    ) -> dict[str, Any]:
        assert self.finder is not None
        return {
            "step": trainer.global_step,
            "life": module.acting.life,
            "objective": module.acting.title,
            "kind": kind,
            "row": prompt.row,
            "prompt": prompt.text,
            "response": response.text,
            "ground_truth": prompt.ground_truth,
            "reward": reward,
            "truncated": response.truncated,
            "tokens": len(response.token_ids),
            "thoughts": self.finder.spans(response.text),
            "previous": None,
        }

    def _show(self, trainer: L.Trainer, rows: Sequence[dict[str, Any]]) -> None:
        if not rows or not trainer.is_global_zero:
            return
        if self.folder is not None:
            append_lines(self.folder, "samples.jsonl", rows)
        bars = callbacks_of(trainer, StepBar)
        for row in rows:
            line = terminal_line(row, self.max_characters)
            if bars and bars[0].progress is not None:
                bars[0].progress.console.print(line)
            else:
                log.info("%s", line.plain)
        to_loggers(trainer.loggers, rows)


def best_and_worst(rollout: Rollout, n: int) -> list[tuple[int, str]]:
    """(number in the rollout, ``best`` or ``worst``) of n responses in turn, each to another prompt."""
    order = rollout.rewards.argsort(descending=True, stable=True).tolist()
    group = rollout.group_ids.tolist()
    found: list[tuple[int, str]] = []
    seen: set[int] = set()
    for turn in range(min(n, len(rollout.prompts))):
        candidates = reversed(order) if turn % 2 else order
        i = next(i for i in candidates if group[i] not in seen)
        seen.add(group[i])
        found.append((i, "worst" if turn % 2 else "best"))
    return found
