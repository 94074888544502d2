"""held_out.jsonl: each validation problem by problem, for whoever compares runs on the same problems."""

from typing import Any

import lightning as L
import torch

from prerl_lightning import ranks
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import append_lines, callbacks_of, run_folder
from prerl_lightning.metrics.evaluation import is_right
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.rollout.sampler import Group


class HeldOut(L.Callback):
    """One line a validation of a training run, lists in the order of ``rows``, the problems' numbers:

    step, life; k: samples a problem; score: the sum of their rewards, right: how many of them are right (as in pass@k);
    thoughts: by family how many their responses hold together, where `Thoughts` counts them.
    """

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] = []

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: dict[str, list[Group]], *_: Any
    ) -> None:
        for group in outputs["samples"]:
            scores = torch.tensor([verdict.score for verdict in group.verdicts], dtype=torch.float64)
            found = {"row": group.prompt.row, "k": len(scores)}
            self._found.append(found | {"score": float(scores.sum()), "right": int(is_right(scores).sum())})

    def on_validation_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        found, self._found = self._found, []
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        folder = run_folder(trainer)
        rows = sorted(ranks.gather(found), key=lambda row: row["row"])
        if not rows or not trainer.is_global_zero or folder is None:
            return
        line: dict[str, Any] = {"step": trainer.global_step, "life": pl_module.acting.life, "k": rows[0]["k"]}
        line["rows"] = [r["row"] for r in rows]
        line |= {key: [r[key] for r in rows] for key in ("score", "right")}
        for watching in callbacks_of(trainer, Thoughts)[:1]:
            line["thoughts"] = {name: [of[row] for row in line["rows"]] for name, of in watching.problems.items()}
        append_lines(folder, "held_out.jsonl", [line])
