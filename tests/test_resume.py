"""`prerl fit --ckpt_path` as a user calls it: after a kill, by the best, under another configuration, within a limit."""

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import start
from lives_worker import ENGINE

from prerl_lightning.rollout.vllm_engine import VLLMEngine

TESTS = Path(__file__).parent
CONFIG = """
model: {{class_path: NSRPreRL, init_args: {{model: {model}, lr: 1.0e-3}}}}
data:
  train: {{class_path: ArithmeticProblems, init_args: {{split: train, size: 64}}}}
  val: {{class_path: ArithmeticProblems, init_args: {{split: held_out, size: 4}}}}
  reward: parity.parity_reward
  prompts_per_step: 4
  val_samples: 2
  sampling: {{group_size: 3, max_new_tokens: 16}}
  engine: {{class_path: test_resume.SharedEngine, init_args: {{max_model_len: 64, kv_cache_mib: 32}}}}
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 2
  callbacks: [{{class_path: PolicyReincarnation, init_args: {{at_step: 1, successor: {{class_path: GRPO}}}}}}]
alignment: {{every_n_steps: 0}}
"""
BEFORE = """
trainer:
  callbacks+:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: before, filename: "{step}", every_n_train_steps: 1, save_top_k: -1}
    - {class_path: dying.InValidation, init_args: {step: 2}}
"""


class SharedEngine(VLLMEngine):
    """One for all runs of this process."""

    def start(self, *args, **kwargs):
        ENGINE.start(*args, **kwargs)
        self.__dict__ = ENGINE.__dict__


@pytest.fixture
def fit(refused):
    """A function that runs `prerl fit` in this process and gives what it wrote to stdout."""
    from prerl_lightning.cli import main

    def call(capsys, *args):
        capsys.readouterr()
        main(["fit", *map(str, args)])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model_folder):
    """A folder with a run that died in the validation of step 2, the checkpoint of that step written."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "small.yaml").write_text(CONFIG.format(model=model_folder("llama-tied")))
    (folder / "before.yaml").write_text(BEFORE)
    files = ["--config=small.yaml", "--config=before.yaml", "--checkpoint.monitor=val/avg@2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    process = start(folder, "fit", *files, env=env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    return folder


@pytest.fixture
def here(killed, refused):
    """The working directory, with a copy of all that lies there."""
    shutil.copytree(killed, Path.cwd(), dirs_exist_ok=True)
    return Path.cwd()


def column(run, name):
    with (run / "metrics.csv").open() as lines:
        return {int(r["step"]): float(r[name]) for r in csv.DictReader(lines) if r.get(name)}


def load(path):
    return torch.load(path, weights_only=False)


def runs(folder):
    return sorted((folder / "runs" / "small").iterdir())
