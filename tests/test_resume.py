"""`prerl fit --ckpt_path`: after a kill, by the best, under another configuration, within a limit of time."""

import csv
import json
import os
import shutil
import signal
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from forked import prerl
from lives_worker import ENGINE
from report_runs import write_run

from prerl_lightning.callbacks.monitors import held_out_names, training_names
from prerl_lightning.errors import InputError
from prerl_lightning.report.process import identity
from prerl_lightning.report.reading import read_run
from prerl_lightning.resume import compare, newest
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
      init_args: {dirpath: runs/small/version_0/before, filename: "{step}", every_n_train_steps: 1, save_top_k: -1}
    - {class_path: dying.InValidation, init_args: {step: 2}}
"""
BEFORE_2 = "runs/small/version_0/before/step=2.ckpt"


class SharedEngine(VLLMEngine):
    """One for all runs of this process."""

    def start(self, *args, **kwargs):
        ENGINE.start(*args, **kwargs)
        self.__dict__ = ENGINE.__dict__


def fit(*args):
    """`prerl fit` in this process, to its end."""
    from prerl_lightning.run import PrerlCLI

    return PrerlCLI.run(["fit", "--config=small.yaml", *map(str, args)])


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model_folder):
    """A folder with a run that died in the validation of step 2, the checkpoint of that step written."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "small.yaml").write_text(CONFIG.format(model=model_folder("llama-tied")))
    (folder / "before.yaml").write_text(BEFORE)
    files = ["--config=small.yaml", "--config=before.yaml", "--checkpoint.monitor=val/avg@2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    process = prerl(folder, "fit", *files, env=env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    return folder


@pytest.fixture
def here(killed, refused):
    """The working directory, with a copy of all that lies there."""
    shutil.copytree(killed, Path.cwd(), dirs_exist_ok=True)
    return Path.cwd()


@pytest.fixture(scope="module")
def whole(killed):
    """An uninterrupted run of 3 steps, and the folder that its runs/ is in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(killed)
        patch.setattr("sys.argv", ["prerl"])
        return fit("--checkpoint.monitor=val/avg@2", "--trainer.default_root_dir=whole")


def column(run, name):
    with (Path(run) / "metrics.csv").open() as lines:
        return {int(r["step"]): float(r[name]) for r in csv.DictReader(lines) if r.get(name)}


def load(path):
    return torch.load(path, weights_only=False)


def test_the_last_weights_are_validated(whole, here):
    assert list(column("whole/small/version_0", "val/avg@2")) == [0, 2, 3]
    epochs = ("--data.train.init_args.size=8", "--trainer.max_steps=-1", "--trainer.val_check_interval=100")
    for version, validated in ((1, [0, 2]), (2, [4])):
        fit(*epochs, f"--trainer.max_epochs={version}", *(["--ckpt_path=last"] if version == 2 else []))
        assert list(column(f"runs/small/version_{version}", "val/avg@2")) == validated


def test_killed_in_a_validation(whole, here):
    """It runs when the run is resumed, whole, and before the next step."""
    assert list(column("runs/small/version_0", "val/avg@2")) == [0]
    fit(f"--ckpt_path={BEFORE_2}", "--checkpoint.monitor=val/avg@2")
    found, expected = (column(f"{root}/small/version_{v}", "val/avg@2") for root, v in (("runs", 1), ("whole", 0)))
    assert 2 in found
    assert found == pytest.approx({step: expected[step] for step in (2, 3)})
    assert list(column("runs/small/version_1", "reward/mean")) == [3]
    assert json.loads(Path("runs/small/version_1/run.json").read_text())["status"] == "finished"
    assert Path("runs/small/version_1/model/model.safetensors").is_file()


def test_fast_dev_run(here):
    fit("--trainer.fast_dev_run=true")
    assert [path.name for path in Path("runs/small").iterdir()] == ["version_0"]


def test_nothing_left_to_train(whole, here, caplog):
    """What is missing of validation and model is made up for, and said."""
    caplog.set_level("INFO", "prerl_lightning")
    fit(f"--ckpt_path={BEFORE_2}", "--trainer.max_steps=2")
    assert "nothing is left to train. Its weights were not validated yet, and are now." in caplog.text
    run = Path("runs/small/version_1")
    assert list(column(run, "val/avg@2")) == [2]
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    caplog.clear()
    fit("--ckpt_path=last", "--trainer.max_steps=2")
    assert "nothing is left to train." in caplog.text
    assert "validated" not in caplog.text
    again = run.with_name("version_2")
    assert json.loads((again / "run.json").read_text())["status"] == "finished"
    assert (again / "model" / "model.safetensors").is_file()
    assert not (again / "checkpoints").exists()
    merged = read_run(run)
    assert (list(merged.training), list(merged.validation)) == ([1, 2], [0, 2])


def test_the_best_is_kept_whatever_the_interval(whole, here):
    """Nothing but the end is due here; of a resumed run the best may lie in the folder before."""
    scores = {s: v for s, v in column("whole/small/version_0", "val/avg@2").items() if s}
    best = max(scores, key=scores.get)
    path = here / f"whole/small/version_0/checkpoints/step={best}.ckpt"
    assert load(path)["global_step"] == best
    shutil.copytree(path.parents[2], "runs/small", dirs_exist_ok=True)
    options = ("--checkpoint.monitor=val/avg@2", "--trainer.max_steps=5")
    resumed = fit("--ckpt_path=best", *options)
    assert min(column("runs/small/version_1", "reward/mean")) == best + 1
    scores = {s: v for s, v in scores.items() if s <= best} | column("runs/small/version_1", "val/avg@2")
    assert float(resumed.trainer.checkpoint_callback.best_model_score) == pytest.approx(max(scores.values()))
    assert Path(resumed.trainer.checkpoint_callback.best_model_path).stem == f"step={max(scores, key=scores.get)}"
    assert path.is_file()


CHANGES = {
    "seed_everything": 1,
    "model.init_args.lr": 0.01,
    "data.sampling.group_size": 4,
    "data.prompts_per_step": 8,
    "data.train.init_args.size": 128,
    "data.reward": "prerl_lightning.rewards.arithmetic_reward",
    "trainer.limit_train_batches": 4,
}
HARMLESS = {
    "trainer.max_steps": 4,
    "model.init_args.packing": "false",
    "data.engine.init_args.max_num_seqs": 16,
    "trainer.default_root_dir": "elsewhere",
    "samples.every_n_steps": 1,
}


def options(changes):
    return [f"--{key}={value}" for key, value in changes.items()]


def test_another_configuration_is_refused_and_listed(here, refused):
    shutil.move(BEFORE_2, "moved.ckpt")  # the checkpoint alone knows it
    args = ("fit", "--config=small.yaml", "--ckpt_path=moved.ckpt", *options(CHANGES | HARMLESS))
    found = refused(*args, "--trainer.callbacks.init_args.successor.init_args.lr=0.01")
    bound, free = found.split("These differ too, and may:")
    assert "--ckpt_path: moved.ckpt was written by a run in which" in bound
    assert "--allow_changes true" in free
    for key in (*CHANGES, "lives.2.successor.init_args.lr"):
        assert f"  {key}: " in bound, key
    for key in HARMLESS:
        assert f"  {key}: " in free, key
    assert "data.prompts_per_step: 4 in the checkpoint, 8 now" in bound
    assert len(list(Path("runs/small").iterdir())) == 1  # nothing was started


@pytest.mark.parametrize("key", [*CHANGES, "lives.2.at_step", "lives.2.successor.init_args.kl_coefficient"])
def test_each_of_these_alone_is_refused(killed, tmp_path, key):
    before = load(killed / BEFORE_2)["configuration"]
    torch.save({"optimizer_states": [], "configuration": before}, tmp_path / "alone.ckpt")
    present = deepcopy(before)
    compare(str(tmp_path / "alone.ckpt"), present, allow_changes=False)
    place = present
    if key.startswith("lives.2."):
        place, key = present["trainer"]["callbacks"][0]["init_args"], key.removeprefix("lives.2.")
    *path, name = key.split(".")
    for part in path:
        place = place[part]
    place[name] = 5
    with pytest.raises(InputError, match=f"{name}: .* in the checkpoint, 5 now"):
        compare(str(tmp_path / "alone.ckpt"), present, allow_changes=False)


def test_an_argument_that_is_newer_than_the_checkpoint(killed, tmp_path):
    """Left at its default it changes nothing, in any life."""
    before = load(killed / BEFORE_2)["configuration"]
    present = deepcopy(before)
    (life,) = before["trainer"]["callbacks"][:1]
    for place, name in (
        (before["data"], "refill"),
        (before["model"]["init_args"], "kl_in"),
        (life["init_args"]["successor"]["init_args"], "entropy_coefficient"),
    ):
        del place[name]
    torch.save({"optimizer_states": [], "configuration": before}, tmp_path / "older.ckpt")
    compare(str(tmp_path / "older.ckpt"), present, allow_changes=False)
    present["data"]["refill"] = 2
    with pytest.raises(InputError, match=r"data\.refill: 0 in the checkpoint, 2 now"):
        compare(str(tmp_path / "older.ckpt"), present, allow_changes=False)


def test_lives_are_compared_by_their_steps(tmp_path):
    """In whatever order they stand in the file."""

    def configuration(*steps):
        lives = [
            {"class_path": "PolicyReincarnation", "init_args": {"at_step": s, "successor": f"of {s}"}} for s in steps
        ]
        return {"model": {}, "data": {}, "trainer": {"callbacks": lives}}

    path = str(tmp_path / "any.ckpt")
    torch.save({"optimizer_states": [], "configuration": configuration(3, 8)}, path)
    compare(path, configuration(8, 3), allow_changes=False)
    with pytest.raises(InputError, match=r"lives\.3\.at_step: 8 in the checkpoint, 9 now"):
        compare(path, configuration(9, 3), allow_changes=False)


def test_last_is_the_newest_file(tmp_path):
    paths = [tmp_path / run / "checkpoints" / "last.ckpt" for run in ("b", "c", "a")]
    for age, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        torch.save({}, path)
        os.utime(path, (10**9 - age, 10**9 - age))
    assert newest([tmp_path]) == paths[0]


def test_last_says_which_newer_run_has_no_checkpoint(tmp_path, caplog):
    """Killed before its first one; neither a run that has one nor an older run is named."""
    lost = {"pid": 1, "started": -1, "where": identity()["where"]}
    for version, age in enumerate((0, 3600, 0)):
        run = write_run(tmp_path / f"version_{version}", steps=7, status="running", process=lost, max_steps=50)
        for file in run.iterdir():
            os.utime(file, (time.time() - age,) * 2)
    path = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save({}, path)
    os.utime(path, (time.time() - 60,) * 2)
    assert newest([tmp_path]) == path
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        f"{tmp_path / 'version_2'} is newer, and has no checkpoint: killed at step 7 of 50: its process is gone and "
        "has not said why."
    )


def test_last_falls_back_to_what_is_whole(tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for age, name in enumerate(("step=6.ckpt", "step=4.ckpt", "step=2.ckpt")):
        torch.save({"weights": torch.randn(100)}, folder / name)
        os.utime(folder / name, (10**9 - age, 10**9 - age))
    os.link(folder / "step=6.ckpt", folder / "last.ckpt")
    flip(folder / "last.ckpt")
    (folder / "step=4.ckpt").write_bytes(b"")
    os.utime(folder / "step=4.ckpt", (10**9 - 1, 10**9 - 1))
    assert newest([tmp_path]) == folder / "step=2.ckpt"
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" is ")[0] for line in said] == [str(folder / name) for name in ("last.ckpt", "step=4.ckpt")]
    assert "damaged: the checksum of " in said[0]
    assert " is empty." in said[1]
    (folder / "step=2.ckpt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of the checkpoints below"):
        newest([tmp_path])


def flip(path):
    """One bit, in the midst of a tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "flipped", "folder", "foreign", "other model"])
def test_what_is_no_whole_checkpoint_is_refused_before_the_engine_starts(here, refused, model_folder, kind):
    path, more = Path("bad.ckpt"), []
    content = Path(BEFORE_2).read_bytes()
    path.write_bytes({"cut": content[:-1000], "empty": b"", "garbage": b"garbage" * 100}.get(kind, content))
    if kind == "flipped":
        flip(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "other model":
        more = [f"--model.init_args.model={model_folder('qwen2-tied')}", "--allow_changes=true"]
    said = refused("fit", "--config=small.yaml", f"--ckpt_path={path}", *more)
    expected = {
        "cut": "is cut off, or no checkpoint",
        "empty": "is empty",
        "garbage": "is cut off, or no checkpoint",
        "flipped": "is damaged: the checksum of ",
        "folder": "is a folder",
        "foreign": "is no training checkpoint of this library",
        "other model": "is of another model: model.layers.0.self_attn.",
    }
    assert said.splitlines()[-1].startswith("prerl: error: --ckpt_path: bad.ckpt ")
    assert expected[kind] in said
    assert not Path("runs/small/version_1").exists()


def test_what_changes_no_step_is_free_and_the_rest_may_be_allowed(whole, here, caplog):
    caplog.set_level("INFO", "prerl_lightning")
    fit(f"--ckpt_path={BEFORE_2}", *options(HARMLESS))
    assert "trainer.max_steps: 3 in the checkpoint, 4 now" in caplog.text
    assert list(column("elsewhere/small/version_0", "reward/mean")) == [3, 4]
    caplog.clear()
    fit(f"--ckpt_path={BEFORE_2}", "--allow_changes=true", "--data.sampling.group_size=4")
    assert "data.sampling.group_size: 3 in the checkpoint, 4 now" in caplog.text
    run = Path("runs/small/version_1")
    assert column(run, "rollout/responses") == {3: 16}
    kept = (run / "config.yaml").read_text()
    assert "allow_changes: false" in kept  # it is not for the next resume too
    assert kept.count(" lr: ") == 2  # the optimizer's own, which is not used, is left out


def test_a_time_limit_is_one_of_this_process(here, caplog):
    """By the overlay and by the Trainer's option, whose Timers share their place in checkpoints."""
    caplog.set_level("INFO", "prerl_lightning")
    overlay = (TESTS.parent / "configs" / "time_limit.yaml").read_text()
    Path("limit.yaml").write_text(overlay.replace('"00:00:50:00"', '"00:00:00:01"'))
    first = fit("--config=limit.yaml", "--trainer.max_steps=500").trainer.global_step
    second = fit("--trainer.max_time=00:00:00:01", "--trainer.max_steps=500", "--ckpt_path=last").trainer.global_step
    for version, start_step, end in ((1, 0, first), (2, first, second)):
        run = f"runs/small/version_{version}"
        assert list(column(run, "reward/mean")) == list(range(start_step + 1, end + 1))
        assert end > start_step
        assert list(column(run, "val/avg@2"))[-1] == end
    for end in (first, second):
        why = "trainer.max_time: 0:00:01 is over"
        assert f"Stopped at step {end}, before trainer.max_steps (500): {why}." in caplog.text
    assert read_run(Path("runs/small/version_2")).status() == ("stopped", f"stopped at step {second} of 500: {why}")


def test_a_monitor_that_is_not_there_is_refused_before_the_start(here, refused):
    args = ("fit", "--config=small.yaml")
    found = refused(*args, "--checkpoint.monitor=val/avg@8")
    assert "checkpoint.monitor: this run has no metric val/avg@8. Did you mean val/avg@2?" in found
    assert "There are: val/avg@2, " in found
    assert "reward/mean" in found
    assert "Without data.val" in refused(*args, "--checkpoint.monitor=val/avg@2", "--data.val=null")
    stopping = "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"
    assert "EarlyStopping.monitor: this run has no metric val/loss" in refused(*args, *stopping)
    assert len(list(Path("runs/small").iterdir())) == 1


RARE = {  # not in each step or run
    *("val/maj@2", "val/no_answer", "val/maj@2/low", "val/maj@2/high"),  # parity_reward reads no answer
    *("train/mfu", "reward/mean", "optim/grad_norm", "rollout/repetition"),
    *(f"rollout/{name}/{kind}" for name in ("response_length", "log_prob") for kind in ("right", "wrong")),
}


def test_the_names_to_monitor_are_those_of_a_run(here):
    """Each that a run has, and no other."""
    objective = ["--model=GRPO", "--model.init_args.kl_coefficient=0.1", "--model.init_args.entropy=true"]
    done = fit(*objective, "--trainer.callbacks=null", "--trainer.max_steps=2")
    names = training_names(3) | held_out_names(2, greedy=True)
    found = set(done.trainer.callback_metrics)
    assert found <= names
    assert names - found <= RARE
