"""A few completions with their rewards every n steps, in the terminal and as JSON lines beside the run."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L

from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)


class Samples(L.Callback):
    """Shows and keeps completions of the training batch: right and wrong ones in turn, where there are both.

    Args:
        every_n_steps: 0: never.
        number: of completions each time.
        max_characters: shown of each; the file has them whole.
    """

    def __init__(self, every_n_steps: int = 20, number: int = 3, max_characters: int = 300) -> None:
        self.every_n_steps, self.number, self.max_characters = every_n_steps, number, max_characters
        self.folder: str | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder = trainer.log_dir  # a collective call: all ranks have to make it

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rollout = pl_module.rollout
        due = self.every_n_steps and (trainer.global_step == 1 or trainer.global_step % self.every_n_steps == 0)
        if rollout is None or not due or not trainer.is_global_zero:
            return
        best = rollout.rewards.argsort(descending=True).tolist()
        chosen = [pair[j] for pair in zip(best, reversed(best), strict=True) for j in (0, 1)][: self.number]
        rows = []
        for i in chosen:
            response = rollout.responses[i]
            prompt = rollout.prompts[int(rollout.group_ids[i])]
            rows.append(
                {
                    "step": trainer.global_step,
                    "life": pl_module.acting.life,
                    "objective": type(pl_module.acting).__name__,
                    "row": prompt.row,
                    "prompt": prompt.text,
                    "response": response.text,
                    "ground_truth": prompt.ground_truth,
                    "reward": float(rollout.rewards[i]),
                    "truncated": response.truncated,
                    "tokens": len(response.token_ids),
                }
            )
        for row in rows:
            text = f"{row['prompt'][-self.max_characters :]!r} -> {row['response'][: self.max_characters]!r}"
            cut = " (cut off)" if row["truncated"] else ""
            log.info("  sample: reward %.2f%s, truth %s: %s", row["reward"], cut, row["ground_truth"], text)
        if self.folder is not None:
            path = Path(self.folder) / "samples.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
