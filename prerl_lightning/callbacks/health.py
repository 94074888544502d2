"""Says when a run cannot learn or has come to nothing, and stops one whose policy is ruined."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L

from prerl_lightning.callbacks.progress import accuracy_key
from prerl_lightning.callbacks.watcher import append_lines, run_folder
from prerl_lightning.errors import InputError, RunError, check_bounds
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.lives import end_life
from prerl_lightning.types import Rollout

log = logging.getLogger(__name__)

Cause = Literal["no_signal", "accuracy", "entropy", "length"]
BATCH_FILE = "ruin.jsonl"


@dataclass
class Drought:
    """Rollouts in a row in which no group's rewards differ, added up."""

    rollouts: int = 0
    responses: int = 0
    rewards: float = 0.0
    truncated: int = 0
    answered: int = 0
    lowest: float = float("inf")
    highest: float = -float("inf")

    def add(self, rollout: Rollout) -> None:
        self.rollouts += 1
        self.responses += len(rollout)
        self.rewards += float(rollout.rewards.sum())
        self.truncated += int(rollout.truncated.sum())
        self.answered += rollout.answered
        self.lowest = min(self.lowest, float(rollout.rewards.min()))
        self.highest = max(self.highest, float(rollout.rewards.max()))

    def __str__(self) -> str:
        rewards = f"reward {self.lowest:.2f} in all"
        if self.lowest < self.highest:
            rewards = (
                f"rewards {self.lowest:.2f} to {self.highest:.2f}, {self.rewards / self.responses:.2f} on average,"
            )
        return (
            f"{rewards} of {self.responses} responses, {self.truncated / self.responses:.0%} cut off at their longest, "
            f"an answer read in {self.answered}"
        )

    def advice(self) -> str:
        if self.lowest < self.highest:
            return "Each prompt's responses are all alike: raise data.sampling.group_size, or take other problems."
        if self.highest > 0:
            return "The reward tells no response from another: the problems are solved, or it accepts everything."
        if self.truncated > self.responses / 2:
            return "Raise data.sampling.max_new_tokens, so that answers get to their end."
        if not self.answered:
            return "Look in samples.jsonl whether answers have the form that data.reward looks for; see data.format."
        return "The problems are too hard for this model, or data.reward does not know a right answer."


class RunHealth(L.Callback):
    """Warns once a run of each cause why it may come to nothing, with figures and what to look at, in the log and in
    run.json, which `prerl report` and `prerl watch` read:

    - ``no_signal``: no group's rewards differed in so many rollouts in a row, so that nothing contributed;
    - at the start: no held-out response is right;
    - ``accuracy``: held-out avg@k is below this share of what it was at the start of the run;
    - ``entropy``, ``length``: likewise of the rollout's estimated entropy and its response length.

    A ruined policy ends the run: weights that are not finite, or so many optimizer steps in a row skipped over a
    gradient norm that is not. The batch that did it goes into ruin.jsonl in the run's folder (token ids, rewards, the
    engine's log-probs), run.json says failed, no checkpoint is written and nothing exported, and the exit status is 3.
    Looking at the weights costs a twentieth of the optimizer's step.

    Args:
        no_signal: rollouts in a row; 0: not watched.
        accuracy: share of the start; 0: not watched, and so with the next two.
        entropy: share of the first rollout's.
        length: share of the first rollout's.
        skipped: optimizer steps in a row, at least 1.
        stop_on: causes that are more than a warning.
        stop: what they end: the ``run``, as a ruined policy does but for its file, or the ``life``, whose successor
            then takes over, and is measured by its own start; in the last life the run.

    Raises:
        RunError: the run ends.
    """

    def __init__(
        self,
        no_signal: int = 10,
        accuracy: float = 0.5,
        entropy: float = 0.05,
        length: float = 0.1,
        skipped: int = 5,
        stop_on: list[Cause] | None = None,
        stop: Literal["run", "life"] = "run",
    ) -> None:
        self.no_signal, self.accuracy, self.entropy, self.length = no_signal, accuracy, entropy, length
        self.skipped, self.stop_on, self.stop = skipped, stop_on or [], stop
        shares = ("accuracy", "entropy", "length")
        least = {"no_signal": 0, "skipped": 1} | dict.fromkeys(shares, 0)
        check_bounds(self, "health", least, most=dict.fromkeys(shares, 1))
        for cause in self.stop_on:
            if not getattr(self, cause):
                raise InputError(f"health.stop_on: {cause} is not watched, as health.{cause} is 0. Give it a value.")
        self.folder: Path | None = None
        self.at_start: dict[str, float] = {}
        self.warnings: dict[str, str] = {}  # by cause; run.json has them
        self.drought = Drought()
        self.skipped_in_a_row = 0
        self.life = 0  # that the drought is of
        self.ended_life = 0  # by stop_on, the last one

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self.at_start, "warnings": self.warnings, "ended_life": self.ended_life}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at_start, self.warnings = state_dict["at_start"], state_dict.get("warnings", {})
        self.ended_life = state_dict["ended_life"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        self.folder = run_folder(trainer)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All that decides is the same on all ranks, so that they end together."""
        metrics, rollout, acting = trainer.callback_metrics, pl_module.whole_rollout, pl_module.acting
        assert rollout is not None
        skipped, not_finite = (int(metrics[f"optim/{key}"]) for key in ("skipped", "non_finite"))
        self.skipped_in_a_row = 0 if skipped < acting.batching.steps else self.skipped_in_a_row + not_finite
        if not pl_module.live_policy.is_finite():
            self._ruined(trainer, pl_module, rollout, "the policy's weights are not finite any more")
        if self.skipped_in_a_row >= self.skipped:
            words = f"{self.skipped_in_a_row} optimizer steps in a row were skipped over a gradient that is not finite"
            self._ruined(trainer, pl_module, rollout, words)

        if self.life != acting.life:
            self.life, self.drought = acting.life, Drought()
        if any(term.advantages(rollout.signals, rollout).any() for term in acting.terms):
            self.drought = Drought()
        else:
            self.drought.add(rollout)
        if skipped > not_finite and "skipped" not in self.warnings:
            self._say(
                trainer,
                "skipped",
                f"Step {trainer.global_step}: in {skipped - not_finite} of the rollout's optimizer steps no response "
                "contributes. They change neither the weights nor the optimizer's state, and count all the same; a "
                "step's line has their number as `skipped`.",
            )
        if self.no_signal and self.drought.rollouts >= self.no_signal:
            words = f"no group's rewards differed in {self.drought.rollouts} rollouts in a row: {self.drought}."
            self._found(trainer, pl_module, "no_signal", f"{words} {self.drought.advice()}")
        self._compare(trainer, pl_module, "entropy", "the rollout's entropy", metrics.get("rollout/entropy"))
        length = metrics.get("rollout/response_length")
        self._compare(trainer, pl_module, "length", "the length of responses", length)

    def on_validation_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        metrics = trainer.callback_metrics
        key = accuracy_key(metrics)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and key:
            if trainer.global_step == 0 and not metrics[key]:
                self._nothing_right(trainer, key)
            self._compare(trainer, pl_module, "accuracy", f"held-out {key.removeprefix('val/')}", metrics[key])

    def _nothing_right(self, trainer: L.Trainer, key: str) -> None:
        """A hard task, or prompts or a reward that do not fit the model: said ahead of the first rollout."""
        metrics = trainer.callback_metrics
        shown = [f"{float(metrics['val/truncated']):.0%} cut off at their longest"]
        if "val/no_answer" in metrics:
            shown.append(f"no answer read in {float(metrics['val/no_answer']):.0%}")
        message = (
            f"Step 0: no held-out response is right ({key.removeprefix('val/')} is 0; {', '.join(shown)}). If the "
            "model can do some of these problems, the prompts are not of the form that it knows (data.format, a line's "
            "end), or data.reward does not know a right answer: samples.jsonl has what it wrote."
        )
        self._say(trainer, "nothing_right", message)

    def _compare(self, trainer: L.Trainer, module: PolicyModule, cause: Cause, name: str, value: Any) -> None:
        """With the first value of the run."""
        if value is None:
            return
        start = self.at_start.setdefault(cause, float(value))
        if float(value) < getattr(self, cause) * start:
            shown = [
                f"{key} {float(trainer.callback_metrics[key]):.3g}"
                for key in ("reward/mean", "rollout/entropy", "rollout/response_length", "rollout/truncated")
                if key in trainer.callback_metrics
            ]
            words = f"{name} is {float(value):.3g}, and was {start:.3g} at the start ({', '.join(shown)})."
            advice = "Lower the learning rate, or end this life sooner; samples.jsonl shows what the policy writes now."
            self._found(trainer, module, cause, f"{words} {advice}")

    def _found(self, trainer: L.Trainer, module: PolicyModule, cause: Cause, message: str) -> None:
        message = f"Step {trainer.global_step}: {message}"
        if cause not in self.stop_on:
            if cause not in self.warnings:
                self._say(trainer, cause, message)
        elif self.stop == "life" and self.ended_life == module.acting.life:
            return  # the next one begins with the next rollout that fits
        elif self.stop == "life" and end_life(module, trainer.global_step, f"{cause}, of health.stop_on"):
            self.ended_life, self.at_start = module.acting.life, {}
            ended = f"{cause} ended life {self.ended_life}"
            self._say(trainer, ended, f"{message} This life ends here, as health.stop_on has it.")
        else:
            module.on_train_batch_end()  # the row of this step
            raise RunError(f"{message} The run ends here, as health.stop_on has it.")

    def _ruined(self, trainer: L.Trainer, module: PolicyModule, rollout: Rollout, words: str) -> None:
        metrics = trainer.callback_metrics
        figures = [
            f"{k} {float(metrics[k]):.3g}" for k in ("optim/grad_norm", "optim/lr", "reward/mean") if k in metrics
        ]
        message = f"Step {trainer.global_step}: {words} ({', '.join(figures)}), and the run ends here."
        if self.folder is not None:
            if trainer.is_global_zero:
                append_lines(self.folder, BATCH_FILE, batch_rows(rollout, trainer.global_step))
            message += f" The batch that did it is in {self.folder / BATCH_FILE}."
        module.on_train_batch_end()
        raise RunError(
            f"{message} Checkpoints are of steps before it, and no model is exported. Lower lr or gradient_clip; "
            "--ckpt_path last goes on from the newest checkpoint."
        )

    def _say(self, trainer: L.Trainer, cause: str, message: str) -> None:
        self.warnings[cause] = message
        if trainer.is_global_zero:
            log.warning("%s", message)


def batch_rows(rollout: Rollout, step: int) -> list[dict[str, Any]]:
    """One for each response: its problem's row, token ids, reward, the engine's log-probs."""
    rows = []
    for response, group, reward in zip(
        rollout.responses, rollout.group_ids.tolist(), rollout.rewards.tolist(), strict=True
    ):
        prompt = rollout.prompts[group]
        rows.append(
            {
                **{"step": step, "row": prompt.row, "reward": reward, "truncated": response.truncated},
                **{"prompt_ids": list(prompt.token_ids), "token_ids": response.token_ids.tolist()},
                "log_probs": response.log_probs.tolist(),
            }
        )
    return rows
