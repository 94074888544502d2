"""Checkpoints of a Trainer: written once, whole or not at all, behind the validation of their step."""

import errno
import fcntl
import resource
import tempfile
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from prerl_lightning.callbacks.saving import NotWritten, RunCheckpoint
from prerl_lightning.checkpoints import WholeFileIO
from prerl_lightning.compat import validate_now
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO
from prerl_lightning.watchdog import Watchdog


class Counting(L.LightningModule):
    """A module whose held-out score is a function of the step."""

    def __init__(self, score=lambda step: step):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(500, 100)
        self.score = score

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.layer(torch.randn(2, 500)).sum())
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.log("val/score", float(self.score(self.global_step)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def fit(
    folder, steps=6, score=lambda step: step, val=2, held_out=1, ckpt_path=None, module=Counting, trainer=(), **options
):
    """``trainer``: settings of its own."""
    checkpoint = RunCheckpoint(dirpath=str(folder), **{"every_n_train_steps": 2, **options})
    own = {"max_steps": steps, "val_check_interval": val, "callbacks": [checkpoint], "enable_checkpointing": True}
    trainer = quiet_trainer(**(own | dict(trainer)))
    loaders = [DataLoader(range(100)), [] if held_out is None else DataLoader(range(held_out))]
    trainer.fit(module(score), *loaders, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return checkpoint


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def load(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("val", [2, 3, 100])
@pytest.mark.parametrize("steps", [6, 7])
def test_one_write_a_save(tmp_path, monkeypatch, steps, val):
    written = []
    plain = torch.save

    def save(checkpoint, file, *args, **kwargs):
        written.append(checkpoint["global_step"])
        plain(checkpoint, file, *args, **kwargs)

    monkeypatch.setattr("torch.save", save)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # nothing goes through the temporary folder
    fit(tmp_path, steps, val=val)
    assert written == [2, 4, 6] + ([7] if steps == 7 else [])
    assert names(tmp_path) == ["last.ckpt", "step=6.ckpt"]
    last, step = tmp_path / "last.ckpt", tmp_path / "step=6.ckpt"
    assert last.samefile(step) == (steps == 6)  # a name of the same file
    assert load(last)["global_step"] == steps
    assert load(step)["global_step"] == 6


def test_one_write_a_save_that_is_judged(tmp_path, monkeypatch):
    """Behind the validation of its step, not before and behind."""
    written = []
    plain = torch.save
    monkeypatch.setattr("torch.save", lambda c, *args, **kw: (written.append(c["global_step"]), plain(c, *args, **kw)))
    fit(tmp_path, 6, monitor="val/score")
    assert written == [2, 4, 6]


def test_the_score_is_that_of_the_weights(tmp_path):
    """Due where a validation is, a checkpoint is written behind it; the best is the best, and last the newest."""
    scores = {2: 1.0, 4: 5.0, 6: 3.0}
    checkpoint = fit(tmp_path, score=lambda step: scores.get(step, 0.0), monitor="val/score")
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt"]
    assert float(checkpoint.best_model_score) == 5.0
    assert load(tmp_path / "step=4.ckpt")["global_step"] == 4
    assert load(tmp_path / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("held_out", [None, 0])
def test_without_held_out_problems_nothing_is_waited_for(tmp_path, monkeypatch, held_out):
    saved = []
    plain = torch.save
    monkeypatch.setattr("torch.save", lambda c, *args: saved.append(c["global_step"]) or plain(c, *args))
    fit(tmp_path, held_out=held_out)
    assert saved == [2, 4, 6]


def test_only_validated_steps_are_judged_by_a_held_out_score(tmp_path):
    checkpoint = fit(tmp_path, val=3, monitor="val/score", every_n_train_steps=1, score=lambda step: -step)
    assert checkpoint.best_k_models.keys() == {str(tmp_path / "step=3.ckpt")}
    assert load(tmp_path / "last.ckpt")["global_step"] == 6
    fit(tmp_path / "all", val=3, monitor="val/score", every_n_train_steps=1, save_top_k=-1)
    assert names(tmp_path / "all") == ["last.ckpt", "step=3.ckpt", "step=6.ckpt"]


def test_none_means_at_validations(tmp_path):
    fit(tmp_path, val=3, every_n_train_steps=None, save_top_k=-1)
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=6.ckpt"]


def test_an_error_in_the_validation_does_not_lose_its_step(tmp_path):
    def fail(step):
        raise RuntimeError("the verifier is gone")

    with pytest.raises(RuntimeError, match="verifier"):
        fit(tmp_path, steps=6, val=4, every_n_train_steps=4, score=fail)
    assert load(tmp_path / "last.ckpt")["global_step"] == 4
    fit(tmp_path, steps=6, val=4, every_n_train_steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_plugin_that_writes_later(tmp_path):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    fit(tmp_path, trainer={"plugins": [AsyncCheckpointIO()]})
    assert load(tmp_path / "last.ckpt")["global_step"] == 6


def test_by_time(tmp_path):
    from datetime import timedelta

    fit(tmp_path, train_time_interval=timedelta(0), save_top_k=-1, val=100)
    assert names(tmp_path) == ["last.ckpt", *(f"step={i}.ckpt" for i in range(1, 7))]


def test_a_full_disk_leaves_the_good_checkpoint(tmp_path):
    fit(tmp_path, steps=2)
    before = load(tmp_path / "last.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a checkpoint has 600,000 bytes
    try:
        with pytest.raises(NotWritten, match=r"step=4\.ckpt could not be written \(\[Errno .* GiB are needed, "):
            fit(tmp_path, steps=4, every_n_train_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    after = load(tmp_path / "last.ckpt")
    assert all(torch.equal(after["state_dict"][k], before["state_dict"][k]) for k in before["state_dict"])


def test_where_a_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    fit(tmp_path, steps=2)
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "step=2.ckpt")
    assert load(tmp_path / "last.ckpt")["global_step"] == 2


def test_validations_at_which_none_is_due_are_judged(tmp_path):
    scores = {3: 5.0, 6: 1.0}
    fit(tmp_path, steps=7, val=3, monitor="val/score", every_n_train_steps=5, score=lambda step: scores.get(step, 0.0))
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt"]
    assert load(tmp_path / "step=3.ckpt")["global_step"] == 3
    assert load(tmp_path / "last.ckpt")["global_step"] == 7


@pytest.mark.parametrize("save_top_k", [1, 2, -1])
@pytest.mark.parametrize("interval", [2, 4])
def test_a_resumed_run_goes_on_comparing(tmp_path, recwarn, save_top_k, interval):
    """With the best of the run before, in whose folder nothing is deleted; also where runs have been moved."""
    scores = {2: 5.0, 4: 4.0, 6: 3.0, 8: 6.0}
    options = {"monitor": "val/score", "save_top_k": save_top_k}
    first, second, moved = (tmp_path / run / "version_0" / "checkpoints" for run in ("a", "b", "moved"))
    fit(first, 4, score=scores.get, **options)
    before = names(first)
    options["every_n_train_steps"] = interval
    checkpoint = fit(second, 6, scores.get, ckpt_path=first / "last.ckpt", **options)
    assert (float(checkpoint.best_model_score), checkpoint.best_model_path) == (5.0, str(first / "step=2.ckpt"))
    assert names(second) == ["last.ckpt", *(["step=6.ckpt"] if (save_top_k, interval) == (-1, 2) else [])]
    (tmp_path / "a").rename(tmp_path / "moved")
    checkpoint = fit(second, 8, scores.get, ckpt_path=moved / "last.ckpt", **options)
    assert (float(checkpoint.best_model_score), checkpoint.best_model_path) == (6.0, str(second / "step=8.ckpt"))
    assert names(moved) == before
    assert not [w for w in recwarn if "won't be reloaded" in str(w.message)]


def test_a_best_that_is_gone_is_said(tmp_path, caplog):
    fit(tmp_path / "a", 4, monitor="val/score", score={2: 5.0, 4: 4.0}.get)
    (tmp_path / "a" / "step=2.ckpt").unlink()
    again = {"monitor": "val/score", "ckpt_path": tmp_path / "a" / "last.ckpt"}
    checkpoint = fit(tmp_path / "b", 6, {6: 3.0}.get, **again)
    assert "step=2.ckpt, kept for its val/score of 5, is not there any more." in caplog.text
    assert checkpoint.best_model_path == str(tmp_path / "b" / "step=6.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_the_dtype_asked_for(tmp_path, model_folder, dtype):
    from safetensors.torch import load_file

    from prerl_lightning.callbacks.saving import export_policy
    from prerl_lightning.policy.model import Policy

    folder = model_folder("llama-tied")
    export_policy(Policy.from_pretrained(folder), tmp_path, dtype)
    before, after = (load_file(f"{path}/model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_seen(model_folder, value):
    from prerl_lightning.policy.model import Policy

    policy = Policy.from_pretrained(model_folder("llama-tied"))
    assert policy.is_finite()
    with torch.no_grad():
        list(policy.parameters())[-1].view(-1)[-1] = value
    assert not policy.is_finite()


def test_a_held_out_monitor_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no metric val/scroe\. Did you mean val/score\?"):
        fit(tmp_path, monitor="val/scroe")


def test_the_best_may_be_what_max_epochs_ends_with(tmp_path):
    """Its validation is behind its last save."""

    class Late(Counting):
        def on_train_epoch_end(self):
            validate_now(self.trainer)

    settings = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 4}
    checkpoint = fit(tmp_path, 4, val=3, module=Late, trainer=settings, monitor="val/score")
    assert float(checkpoint.best_model_score) == 4
    assert checkpoint.best_model_path.endswith("step=4.ckpt")


def test_intervals_are_kept_where_a_batch_makes_several_steps(tmp_path):
    class Thrice(Counting):
        def training_step(self, batch, batch_idx):
            for _ in range(3):
                super().training_step(batch, batch_idx)

    fit(tmp_path, 30, val=100, module=Thrice, every_n_train_steps=10, save_top_k=-1)
    assert [n for n in names(tmp_path) if "=" in n] == ["step=12.ckpt", "step=21.ckpt", "step=30.ckpt"]


def test_what_was_not_trained_is_not_the_best(tmp_path):
    """A validation before the first step leaves no checkpoint, however good."""

    class Early(Counting):
        def on_train_start(self):
            validate_now(self.trainer)

    fit(tmp_path, 3, lambda step: -step, module=Early, monitor="val/score", every_n_train_steps=100)
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]


def test_what_a_killed_run_had_begun_to_write_is_swept(tmp_path):
    fit(tmp_path, steps=2)
    (tmp_path / "step=4.ckpt.new").write_bytes(b"half")
    writing = (tmp_path / "step=5.ckpt.new").open("wb")  # by a process that lives
    fcntl.flock(writing, fcntl.LOCK_EX)
    fit(tmp_path, steps=2)
    assert [name for name in names(tmp_path) if name.endswith(".new")] == ["step=5.ckpt.new"]


def test_a_full_disk_need_not_stop_the_run(tmp_path, caplog):
    """The books are as before: the good file is not removed for one that is not there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullForAWhile(Counting):
        def training_step(self, batch, batch_idx):
            room = 100_000 if 4 <= self.global_step < 6 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            super().training_step(batch, batch_idx)

    try:
        fit(tmp_path, steps=8, every_n_train_steps=2, when_full="go_on", module=FullForAWhile)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("could not be written") == 1
    assert "step=6.ckpt could not be written" in caplog.text
    assert names(tmp_path) == ["last.ckpt", "step=8.ckpt"]
    assert load(tmp_path / "last.ckpt")["global_step"] == 8


def test_a_folder_that_cannot_be_written_in_is_refused(tmp_path):
    (tmp_path / "file").touch()
    trainer = quiet_trainer(default_root_dir=tmp_path / "file" / "runs")
    with pytest.raises(InputError, match=r"trainer\.default_root_dir: .* cannot be written in: Not a directory"):
        RunCheckpoint().check_run(trainer, GRPO("embedded"))


def test_room_for_two_checkpoints_is_asked_for_at_the_start(tmp_path, monkeypatch, caplog):
    trainer = quiet_trainer(default_root_dir=tmp_path / "runs")
    RunCheckpoint().check_run(trainer, GRPO("embedded"))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=21 << 20))  # two of 868,000 x 12 bytes
    RunCheckpoint().check_run(trainer, GRPO("embedded"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=19 << 20))
    RunCheckpoint(save_weights_only=True).check_run(trainer, GRPO("embedded"))
    with pytest.raises(InputError, match=r"takes 0\.02 GiB for the two, and 0\.02 are free in .*when_full go_on"):
        RunCheckpoint().check_run(trainer, GRPO("embedded"))
    RunCheckpoint(when_full="go_on").check_run(trainer, GRPO("embedded"))
    assert "takes 0.02 GiB" in caplog.text


def test_a_slow_disk_is_warned_of_and_ends_no_run(tmp_path, monkeypatch, caplog):
    """Nothing counts what the kernel writes; a rank that does not move elsewhere is lost."""
    ended = threading.Event()
    found = Watchdog()
    found.warn_after = found.end_after = 1.0
    monkeypatch.setattr(found, "_end", lambda why: (ended.set(), found.close()))
    found.mark("checkpoint", 7)
    found.open(tmp_path / "table", 0, 1, lambda: None)
    assert not ended.wait(5)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "prerl_lightning.watchdog"]
    assert said.endswith("s: all are in the checkpoint of step 7.")
    found.mark("update", 7)
    assert ended.wait(30)


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    WholeFileIO().save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 3
