"""A real pretrained model through the whole of `prerl fit`. By hand: pytest -m slow tests/test_smollm2.py"""

import csv
from pathlib import Path

import pytest
from test_data import MATH
from test_run import ROOT, finish, start

MODEL = ROOT / "models" / "smollm2-135m"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is missing: a copy of SmolLM2-135M-Instruct"),
]


def fit(folder, config, *more):
    output = finish(
        start(ROOT, "fit", f"--config=configs/{config}.yaml", f"--trainer.default_root_dir={folder}", *more), 1500
    )
    with (Path(folder) / config / "version_0" / "metrics.csv").open() as lines:
        return output, [row for row in csv.DictReader(lines) if row.get("reward/mean")]


@pytest.mark.skipif(not MATH.is_file(), reason="MATH lies in ../shared, which is absent here")
def test_three_steps_on_math(tmp_path):
    _, rows = fit(tmp_path, "smollm2_math", f"--data.train.init_args.path={MATH}")
    assert len(rows) == 3
    for row in rows:
        assert float(row["mismatch/log_prob_difference"]) < 0.06  # bf16 engine, fp32 trainer
        assert float(row["rollout/response_length"]) > 20


def test_the_reward_rises_on_sums(tmp_path):
    _, rows = fit(tmp_path, "smollm2_add", "--trainer.max_steps=20", "--trainer.limit_val_batches=0")
    rewards = [float(row["reward/mean"]) for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
