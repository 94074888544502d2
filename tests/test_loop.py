"""examples/loop.py takes the steps that `prerl fit` takes."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from prerl_lightning.run import PrerlCLI

ROOT = Path(__file__).parents[1]


def test_its_rewards_and_losses_are_those_of_prerl_fit(refused):
    spec = importlib.util.spec_from_file_location("loop", ROOT / "examples" / "loop.py")
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    assert len((ROOT / "examples" / "loop.py").read_text().splitlines()) <= 250
    pretrain, posttrain = loop.DSRL
    lives = (replace(pretrain, steps=2), replace(posttrain, steps=2))
    found = list(loop.main(lives, prompts_per_step=8, group_size=4, seed=3))
    PrerlCLI.run(
        [
            *("fit", f"--config={ROOT / 'configs' / 'dsrl.yaml'}", "--seed_everything=3", "--data.val=null"),
            *("--data.prompts_per_step=8", "--data.sampling.group_size=4", "--trainer.accelerator=cpu"),
            *("--trainer.max_steps=4", "--trainer.callbacks.init_args.at_step=2", "--export.enabled=false"),
        ]
    )
    with Path("runs/dsrl/version_0/metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["optim/loss"]]
    assert [step for step, _, _ in found] == [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [mean for _, mean, _ in found] == pytest.approx([float(row["reward/mean"]) for row in rows])
    assert [loss for _, _, loss in found] == pytest.approx(
        [float(row["optim/loss"]) for row in rows], rel=1e-4, abs=1e-6
    )
