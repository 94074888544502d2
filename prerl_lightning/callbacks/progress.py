"""What a person sees: a rich bar in a terminal, one plain line a step elsewhere."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)

BOUNDS = ("/low", "/high")  # of a measure's interval


def figures(trainer: L.Trainer, module: PolicyModule) -> dict[str, str]:
    """The step's figures, short; what has not been measured yet is left out."""
    metrics = trainer.callback_metrics
    accuracy = accuracy_key(metrics)
    skipped = metrics.get("optim/skipped")  # steps that changed nothing
    several = len(module.host.planned_lives) > 1
    shown = {
        "life": f"{module.acting.life} {module.acting.title}" if several else "",
        "reward": _number(metrics.get("reward/mean"), ".2f"),
        "mixed": _number(metrics.get("rollout/groups_mixed"), ".2f"),
        "skipped": _number(skipped, ".0f") if skipped else "",
        "held-out " + accuracy.removeprefix("val/"): _number(metrics.get(accuracy), ".3f"),
        "length": _number(metrics.get("rollout/response_length"), ".0f"),
        "tok/s": _number(metrics.get("rollout/tokens_per_second"), ".0f"),
        "rollout": _number(metrics.get("time/rollout"), ".1f", "s"),
        "train": _number(_sum(metrics, "time/forward_backward", "time/optimizer"), ".1f", "s"),
    }
    return {k: v for k, v in shown.items() if v}


def accuracy_key(metrics: Mapping[str, Any]) -> str:
    """avg@k of the held-out problems among the metrics; empty where there is none."""
    return next((k for k in metrics if k.startswith("val/avg@") and not k.endswith(BOUNDS)), "")


def _sum(metrics: dict[str, Any], *keys: str) -> float | None:
    return sum(float(metrics[k]) for k in keys) if all(k in metrics for k in keys) else None


def _number(value: Any, spec: str, unit: str = "") -> str:
    return "" if value is None else format(float(value), spec) + unit


class StepLines(L.Callback):
    """One line a step, and one a validation, through `logging`: for files, pipes and jobs."""

    @rank_zero_only
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"{k} {v}" for k, v in figures(trainer, pl_module).items() if not k.startswith("held-out")]
        log.info("step %d%s  %s", trainer.global_step, of, "  ".join(parts))

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        metrics = trainer.callback_metrics
        shown = []
        for key in (k for k in metrics if k.startswith("val/") and "avg@" in k and not k.endswith(BOUNDS)):
            name, measure = key.removeprefix("val/").rpartition("/")[::2]  # of `data.val_more`'s sets
            (low, high), of = (metrics[f"{key}{end}"] for end in BOUNDS), key.rpartition("/")[0]
            said = [f"{measure} {metrics[key]:.3f} [{low:.2f}, {high:.2f}] of {metrics[f'{of}/problems']:.0f}"]
            for more in (measure.replace("avg", "pass"), measure.replace("avg", "maj"), "greedy"):
                if (value := metrics.get(f"{of}/{more}")) is not None:
                    said.append(f"{more} {value:.2f}")
            said += [f"cut {cut:.0%}"] if (cut := metrics[f"{of}/truncated"]) else []
            shown.append(f"{name}: {', '.join(said)}" if name else ", ".join(said))
        log.info("held out at step %d: %s", trainer.global_step, "; ".join(shown))


class StepBar(RichProgressBar):
    """Lightning's rich bar with the figures of a rollout step."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Step"  # runs are counted in steps, Lightning's would be "Epoch 0/-2"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:  # type: ignore[override]
        return figures(trainer, pl_module) if isinstance(pl_module, PolicyModule) else {}
