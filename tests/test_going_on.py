"""Which checkpoint a run goes on from, and what is left of one that could not be written: whole runs from Python, by an
engine of plain words."""

import errno
import gc
import json
import os
import signal
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from commands import environment_kept
from plain_engine import PlainEngine
from test_step import alternating_reward

import prerl_lightning as prerl
from prerl_lightning.callbacks.requeue import requeue
from prerl_lightning.errors import InputError, RunError
from prerl_lightning.resume import RESUMED_FROM, chosen, lasts


@pytest.fixture
def plainly(tmp_path, monkeypatch, model_folder):
    """A function that trains in this process by an engine of plain words, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RESUMED_FROM, raising=False)

    def made(val=False):
        return prerl.RolloutDataModule(
            train=prerl.ArithmeticProblems("train", 16),
            val=prerl.ArithmeticProblems("held_out", 2) if val else None,
            reward=alternating_reward,
            verification=prerl.Verification(workers=0),
            sampling=prerl.Sampling(group_size=2, max_new_tokens=4),
            engine=PlainEngine(),
            prompts_per_step=2,
        )

    def train(max_steps, name="a", val=False, data=None, **options):
        data = data or made(val)
        objective = options.pop("objective", None) or prerl.GRPO(model=model_folder("llama-untied"), lr=1e-3)
        return prerl.fit(objective, data, max_steps=max_steps, name=name, accelerator="cpu", **options)

    train.data = made
    with environment_kept():
        yield train


def resumed_from(run):
    found = run.record.info["resumed_from"]
    return found and Path(found).resolve()


def test_checkpoints_elsewhere_are_found(plainly, tmp_path):
    """A new run would have overwritten them."""

    def kept():
        return [prerl.RunCheckpoint(every_n_train_steps=2, dirpath=str(tmp_path / "kept"))]

    plainly(2, ckpt_path="auto", callbacks=kept())
    again = plainly(3, ckpt_path="auto", callbacks=kept())
    assert resumed_from(again) == tmp_path / "kept" / "last.ckpt"


def test_a_finished_run_that_is_asked_for_again_is_given_back(plainly):
    whole = plainly(2, val=True, ckpt_path="auto")
    again = plainly(2, val=True, ckpt_path="auto")
    assert resumed_from(again) == whole.checkpoint.resolve()
    assert again.accuracies == whole.accuracies


def test_a_folder_in_the_home_is_one_folder(plainly, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = plainly(1, default_root_dir="~/kept")
    assert run.folder == tmp_path / "home" / "kept" / "a" / "version_0"
    assert {file.name for file in run.folder.iterdir()} > {"metrics.csv", "run.json", "checkpoints", "model"}
    assert resumed_from(plainly(2, default_root_dir="~/kept", ckpt_path="auto")) == run.checkpoint.resolve()


def test_a_requeued_job_goes_on_and_no_other_does(plainly, tmp_path, monkeypatch):
    run = plainly(1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    trainer = SimpleNamespace(is_global_zero=True)
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    requeue(trainer, str(run.checkpoint), tmp_path / "runs" / "a")
    assert resumed_from(plainly(2, name="other")) is None
    assert resumed_from(plainly(2)) == run.checkpoint.resolve()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert resumed_from(plainly(2)) is None


def test_a_rank_takes_no_checkpoint_of_a_former_fit(tmp_path, monkeypatch):
    """Which has told it by the environment that it was started with."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(RESUMED_FROM, f"{tmp_path / 'a'}\n{tmp_path / 'a' / 'last.ckpt'}")
    assert chosen("auto", [tmp_path / "b"], None, None, "max", True) is None


def test_weights_alone_are_not_resumed_from(plainly):
    run = plainly(1, callbacks=[prerl.RunCheckpoint(save_weights_only=True)])
    with pytest.raises(InputError, match=r"has no optimizer state \(checkpoint\.save_weights_only\)"):
        plainly(2, ckpt_path=str(run.checkpoint))


def test_a_name_without_runs_is_answered_with_those_that_there_are(plainly):
    plainly(1, name="mine")
    with pytest.raises(InputError, match=r"there is no folder runs/yours: there are mine\. Give the run's --name"):
        plainly(2, name="yours", ckpt_path="last")


def test_links_that_lead_nowhere_and_halves_of_a_rename_are_seen(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "last.ckpt").symlink_to(tmp_path / "gone")
    assert lasts([tmp_path]) == []
    (tmp_path / "version_1").mkdir()
    (old := tmp_path / "version_1" / "last.ckpt.old").mkdir()
    assert lasts([tmp_path]) == [old]
    (tmp_path / "version_1" / "last.ckpt").mkdir()
    assert lasts([tmp_path]) == [old.with_suffix("")]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(plainly, seed):
    with pytest.raises(InputError, match=rf"fit\.seed: {seed} must be"):
        plainly(1, seed=seed)


def test_what_a_row_cannot_be_written_to_ends_a_run_with_a_word(plainly, monkeypatch):
    """A full disk: metrics.csv first, and then run.json, whose own error must not hide it."""

    def full(self):
        if self.metrics:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", full)
    with pytest.raises(RunError, match=r"Step 1: the row of metrics.csv could not be written \(\[Errno 28\] No space"):
        plainly(2)
    assert json.loads(Path("runs/a/version_0/run.json").read_text())["status"] == "failed"


class Interrupts(L.Callback):
    def __init__(self, hook):
        self.hook = hook

    def setup(self, trainer, module, stage):
        if self.hook == "setup":
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_end(self, trainer, module):
        if self.hook == "end":
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("hook", ["setup", "end"])
def test_ctrl_c_ends_a_script_wherever_it_comes(plainly, hook):
    """Lightning makes an exit of the one, and nobody asked for the other: the script went on with its next fit."""
    with pytest.raises(KeyboardInterrupt):
        plainly(1, callbacks=[Interrupts(hook)])


def test_shares_of_time_are_of_all_of_it(plainly):
    """The last step's watchers were in the sum and not in the whole."""
    run = plainly(1, callbacks=[Slow()])
    assert run.metrics["time/since_start"].max() >= run.metrics["time/watchers"].sum() >= 0.5


class Slow(prerl.Watcher):
    def watch(self, trainer, module):
        time.sleep(0.5)
        return {}


def test_a_fit_holds_no_model_behind_its_end(plainly, model_folder):
    objective = prerl.GRPO(model=model_folder("llama-untied"))
    plainly(1, objective=objective)
    kept = weakref.ref(objective)
    del objective
    gc.collect()
    assert kept() is None


def test_the_same_data_with_another_model_has_its_prompts(plainly, model_folder):
    """Prompts are a model's: of its tokenizer, template and length."""
    data = plainly.data()
    plainly(1, data=data)
    before = [prompt.token_ids for prompt in data.some_prompts(2)]
    other = prerl.GRPO(model="embedded", lr=1e-3)
    plainly(1, name="b", data=data, objective=other)
    expected = plainly.data()
    plainly(1, name="c", data=expected, objective=prerl.GRPO(model="embedded", lr=1e-3))
    found = [prompt.token_ids for prompt in data.some_prompts(2)]
    assert found == [prompt.token_ids for prompt in expected.some_prompts(2)] != before
