"""fsdp2 on two processes, in fp32 and in bf16, of weights read by each rank for itself or loaded whole, tied and
untied, one rank without work: gradients against those of one process in fp32. And checkpoints in folders of shards."""

import fcntl
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from forked import Forked, finish_together
from safetensors.torch import load_file
from sharded_worker import WAYS, fit
from test_update import attached, gradient
from trainers import quiet_trainer

from prerl_lightning import checkpoints, resume
from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.convert import convert, export
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.policy import files
from prerl_lightning.policy.model import Policy

SHAPES = ("llama-tied", "qwen3-untied")


@pytest.fixture(scope="module")
def folders(model_folder):
    return {shape: model_folder(shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folders, make_rollout):
    out = tmp_path_factory.mktemp("sharded")
    # of one prompt, two responses contribute, and one of them, a negative, under NSR-PreRL: a rank has nothing to do
    rollout = make_rollout(2, 2, rewards=[1, 0, 1, 1])
    torch.save((folders, rollout), out / "input")
    worker, env = Path(__file__).with_name("sharded_worker.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    finish_together([Forked([worker, rank, out], env=env) for rank in range(2)])
    return out, rollout


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_gradients(sharded, folders, shape, precision, way, objective):
    out, rollout = sharded
    name = f"{shape}-{precision}-{way}-{objective.__name__}"
    ranks = [torch.load(out / f"{name}.{rank}") for rank in range(2)]
    assert sorted(rank["own"] for rank in ranks) == ([0, 1] if objective is NSRPreRL else [1, 1])
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"])
    exact = gradient(attached(objective, folders[shape]), rollout)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
        of_one = gradient(attached(objective, folders[shape]), rollout)
    error, error_of_one = (float((g - exact).norm() / exact.norm()) for g in (ranks[0]["gradient"], of_one))
    assert error < 1e-5 + 1.5 * error_of_one
    assert error_of_one < 0.1


@pytest.fixture
def written(sharded, tmp_path):
    """A copy of the checkpoint that two ranks have written."""
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    shutil.copytree(sharded[0] / "checkpoints" / "step=1.ckpt", path)
    return path


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


def test_a_folder_becomes_one_file_and_back(sharded, written, tmp_path):
    whole = torch.load(sharded[0] / "whole.ckpt")
    file, folder = tmp_path / "file.ckpt", tmp_path / "folder.ckpt"
    convert([str(written), str(file)])
    assert equal(torch.load(file), whole)
    assert file.stat().st_size == pytest.approx((sharded[0] / "whole.ckpt").stat().st_size, rel=0.02)
    convert([str(file), str(folder)])
    assert equal(checkpoints.WholeFileIO().load_checkpoint(folder), whole)
    assert len(list(folder.glob("*.distcp"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.ckpt", "folder.ckpt", "run"]
    with pytest.raises(InputError, match="there already"):
        convert([str(written), str(file)])


def test_what_is_exported_of_a_checkpoint_is_what_the_run_exports(sharded, written, tmp_path, monkeypatch):
    """Tied weights once, in files of limited size."""
    export([str(written), str(tmp_path / "one"), "--dtype", "bfloat16"])
    monkeypatch.setattr(files, "FILE_BYTES", 20_000)
    export([str(sharded[0] / "whole.ckpt"), str(tmp_path / "several"), "--dtype", "bfloat16"])
    expected = load_file(sharded[0] / "exported" / "model.safetensors")
    assert equal(load_file(tmp_path / "one" / "model.safetensors"), expected)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_text() == (sharded[0] / "exported" / name).read_text()
    parts = list((tmp_path / "several").glob("*.safetensors"))
    assert len(parts) > 2
    policies = [Policy.from_pretrained(str(tmp_path / name)) for name in ("one", "several")]
    assert equal(*({name: p.data for name, p in policy.named_parameters()} for policy in policies))
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.new"))


def test_a_folder_that_is_not_whole_is_seen_and_last_falls_back(written, caplog):
    assert checkpoints.damage(written) is None
    older = written.with_name("step=1.ckpt")
    shutil.copytree(written, older)
    os.utime(older, (0, 0))
    part = written / "__1_0.distcp"
    good = part.read_bytes()

    def cut():
        part.write_bytes(good[:-100])

    def flip():
        middle = len(good) // 2  # more than what is only padding
        part.write_bytes(good[:middle] + bytes(b ^ 1 for b in good[middle : middle + 128]) + good[middle + 128 :])

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(written / "ran"),))

    def swap():
        part.write_bytes(good)
        (written / ".metadata").write_bytes(pickle.dumps(Code()))

    for spoil, words in (
        (cut, "not whole"),
        (flip, "damaged|not whole"),
        (part.unlink, "not whole.*No such file"),
        (swap, "posix.mkdir is none of a checkpoint's"),
        ((written / "meta.pt").unlink, "a folder without meta.pt"),
    ):
        spoil()
        assert re.search(words, checkpoints.damage(written) or ""), words
        caplog.clear()
        assert resume.newest([written.parents[1]]) == older
        assert f"{written} is " in caplog.text
    assert not (written / "ran").exists()


def test_what_a_kill_left_of_a_folder_is_swept(written):
    folder = written.parent
    shutil.copytree(written, folder / "step=2.ckpt.new")
    (folder / "step=3.ckpt.new").mkdir()
    shutil.copytree(written, folder / "step=4.ckpt.new")
    written.rename(folder / "last.ckpt.old")  # between two names
    assert resume.newest([folder]) == folder / "last.ckpt.old"
    with (folder / "step=4.ckpt.new" / "meta.pt").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        checkpoints.sweep(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt.old", "step=4.ckpt.new"]
    (folder / "last.ckpt.old").rename(written)
    checkpoints.link(folder / "last.ckpt", folder / "step=2.ckpt")
    checkpoints.link(folder / "step=2.ckpt", folder / "last.ckpt")
    assert checkpoints.damage(folder / "last.ckpt") is None
    assert (folder / "last.ckpt" / "meta.pt").stat().st_nlink == 2


def test_one_rank_goes_on_where_two_were(sharded, folders, tmp_path):
    out, _ = sharded
    for path in (out / "run" / "step=2.ckpt", out / "resumed False" / "step=2.ckpt"):
        found = fit(folders["llama-tied"], tmp_path / path.parent.name, "auto", 3, path)
        torch.testing.assert_close(found, torch.load(out / "weights.pt"), rtol=1e-5, atol=1e-6)


def test_shards_need_a_strategy_that_shards(tmp_path):
    trainer = quiet_trainer(default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"checkpoint\.sharded: .*--trainer\.strategy fsdp2"):
        RunCheckpoint(sharded=True).check_run(trainer, GRPO(model="embedded"))
