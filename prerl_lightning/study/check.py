"""Whether ``prerl fit`` takes each arm's arguments, and what a claim may ask of its runs.

A process of its own, since it imports torch: `facts` starts it, which costs some seconds once a study.
"""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prerl_lightning.errors import InputError, said_by_us
from prerl_lightning.study.design import Measure, Study


def facts(commands: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """By the place in the study's file: families of thoughts, max_steps, evaluated (steps between validations, None:
    not known before), val (whether there are held-out problems) and samples, each problem's.

    Raises:
        InputError: what `prerl fit` says to the first command that it refuses.
    """
    command = [sys.executable, "-m", "prerl_lightning.study.check"]
    asked = subprocess.run(command, input=json.dumps(commands), capture_output=True, text=True, check=False)
    if asked.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{asked.stderr}")
    return accepted(json.loads(asked.stdout.splitlines()[-1]))


def accepted(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for place, said in found.items():
        if "error" in said:
            raise InputError(f"{place}: prerl fit refuses it: {said['error']}")
    return found


def check_claims(study: Study, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError where the runs of an arm could not have what a claim, or the tuning, measures."""
    asked = [(f"claims[{i}].measure", c.measure, [c.arm, *([c.against] if c.against else [])])
             for i, c in enumerate(study.claims)]  # fmt: skip
    if study.tuning:
        asked.append(("tuning.measure", study.tuning.measure, list(study.tuning.points)))
    for place, measure, arms in asked:
        for arm in arms:
            if mend := _lacks(measure, found[f"arms.{arm}"]):
                raise InputError(f"{place}: {measure}: {mend} (arms.{arm})")


def _lacks(measure: Measure, fact: Mapping[str, Any]) -> str | None:
    options, every, last = measure.options, fact["evaluated"], fact["max_steps"]
    at, family, held_out = options.get("at"), options.get("family"), measure.name not in ("negative_share", "cosine")
    if held_out and not fact["val"]:
        return "the arm has no held-out problems: set data.val."
    if family is not None and family not in fact["families"]:
        return f"no family {family!r} is counted. There are {', '.join(fact['families']) or 'none: thoughts are off'}."
    if options.get("k", 1) > fact["samples"]:
        return f"data.val_samples is {fact['samples']}: each problem has so many."
    if at is not None and last > 0 and at > last:
        return f"the arm ends at step {last} (trainer.max_steps)."
    if held_out and at and every and at % every and at != last:
        return f"step {at} is not evaluated: trainer.val_check_interval is {every}."
    if not held_out and not fact["alignment"]:
        return "nothing is measured: alignment.every_n_steps is 0."
    return None


def _fact(args: Sequence[str]) -> dict[str, Any]:
    from prerl_lightning.metrics.thoughts import load_families
    from prerl_lightning.run import PrerlCLI

    class ParsedOnly(PrerlCLI):
        def instantiate_classes(self) -> None:
            pass

        def after_instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    config = ParsedOnly.run(["fit", *args]).config["fit"]
    for key, value in (("trainer.logger", config.trainer.logger), ("checkpoint.dirpath", config.checkpoint.dirpath)):
        if value is not None:
            return {"error": f"{key} is set, and the study says where its runs lie: leave it out."}
    interval, model = config.trainer.val_check_interval, config.model.get("init_args") or {}
    whole = isinstance(interval, int) and model.get("minibatches", 1) == model.get("epochs", 1) == 1
    return {
        "families": list(load_families(config.thoughts.families)) if config.thoughts.enabled else [],
        "max_steps": config.trainer.max_steps,
        "evaluated": interval if whole else None,
        "val": config.data.val is not None,
        "samples": config.data.val_samples,
        "alignment": config.alignment.every_n_steps > 0,
    }


def answers(commands: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """`facts`, with what is refused as {"error": ...}, the last."""
    found: dict[str, dict[str, Any]] = {}
    for place, args in commands.items():
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                found[place] = _fact(args)
        except Exception as error:
            found[place] = {"error": str(said_by_us(error) or error)}
        if "error" in found[place]:
            break
    return found


if __name__ == "__main__":
    print(json.dumps(answers(json.load(sys.stdin))))
