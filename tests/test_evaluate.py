"""`prerl evaluate` and `prerl compare` as a user starts them: whole, on two ranks, killed, resumed, of a checkpoint."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import finish
from forked import finish_together, prerl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from plain_engine import PlainEngine
from safetensors.torch import load_file

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError
from prerl_lightning.evaluation import command, compare, evaluate, read_results
from prerl_lightning.evaluation.devices import ranks_on
from prerl_lightning.evaluation.files import ResultFile
from prerl_lightning.evaluation.measures import measures
from prerl_lightning.evaluation.weights import checkpoint_weights
from prerl_lightning.metrics.intervals import interval
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Place, Sampling

ROOT = Path(__file__).parents[1]
EMBEDDED = [
    *("evaluate", "--config", str(ROOT / "configs" / "sums" / "dsrl.yaml"), "--data.val.init_args.size=24"),
    *("--data.val_batch=4", "--data.sampling.max_new_tokens=48", "--k", "4", "--out", "out"),
]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(prerl(folder, *EMBEDDED))


def test_what_an_evaluation_shows_and_leaves(whole):
    folder, output = whole
    records = rows(folder / "out" / "val.jsonl")
    assert [r["row"] for r in records] == list(range(24))
    assert all(len(r["samples"]) == 4 and r["greedy"] for r in records)
    found = json.loads((folder / "out" / "summary.json").read_text())["val"]
    scores = [[s["score"] for s in r["samples"]] for r in records]
    average = sum(map(sum, scores)) / 96
    assert found["avg@4"] == pytest.approx(average, abs=1e-12)
    assert 0.15 < average < 0.6  # 0.37 on 128 problems
    assert found["pass@4"] == pytest.approx(sum(max(s) for s in scores) / 24)
    assert (found["avg@4/low"], found["avg@4/high"]) == interval(torch.tensor(scores, dtype=torch.float64).mean(1))
    for word in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@4", "greedy", "length", "truncated", "no_answer"):
        assert word in output
    assert re.search(r"avg@4 +\d\.\d{3}  \[\d\.\d{3}, \d\.\d{3}\]  of 24 problems", output)


def second_rank(process):
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError("there is no second rank")


def test_two_ranks_killed_and_resumed_end_as_one_that_never_stopped(whole, tmp_path, refused, free_port):
    """Batches that do not divide, and one problem in the last: a rank has none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = prerl(tmp_path, *EMBEDDED, "--devices=2", "--data.val_batch=5", env=environment)
    file = tmp_path / "out" / "val.jsonl"
    while not file.is_file() or len(file.read_bytes().splitlines()) < 6:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(second_rank(process), signal.SIGKILL)
    output = finish(process, code=1)
    assert re.search(
        r"\nprerl: error: rank 1 \(pid \d+\) was killed by SIGKILL in the evaluation of batch \d\. The evaluation has "
        r"ended; the same command goes on where it was\.\n$",
        output,
    ), output
    assert "Traceback" not in output
    done = len(rows(file)) if file.read_bytes().endswith(b"\n") else None
    assert done in (5, 10, 15, 20)
    with file.open("ab") as torn:
        torn.write(b'{"row": 99, "sam')  # what a kill in the middle of a write leaves
    environment |= {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    each = [environment | {"MASTER_PORT": str(free_port), "RANK": r, "LOCAL_RANK": r} for r in ("0", "1")]
    batch = f"--data.val_batch={23 - done}"
    processes = [prerl(tmp_path, *EMBEDDED, batch, env=env) for env in each]  # as torchrun starts them
    finish_together(processes)
    output = processes[0].said()
    assert f"going on behind {done} problems" in output
    assert output.count("Samples and summary.json are in out") == 1
    for name in ("val.jsonl", "summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole[0] / "out" / name).read_bytes()
    assert "with other settings (sampling:" in refused(*EMBEDDED, "--data.sampling.temperature=0.5")


def test_a_checkpoint_s_weights_are_those_evaluated(whole, tmp_path, refused):
    """One big step away from the shipped model: a checkpoint has the weights of its exported folder, and its texts are
    not the shipped model's."""
    config = ["--config", ROOT / "configs" / "sums" / "dsrl.yaml"]
    small = ["--trainer.max_steps=1", "--model.init_args.lr=0.003", "--trainer.callbacks=null"]
    finish(prerl(tmp_path, "fit", *config, *small, "--data.val=null"))
    run = tmp_path / "runs" / "sums-dsrl" / "version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"
    exported = load_file(run / "model" / "model.safetensors")
    found = dict(checkpoint_weights(checkpoint, "embedded-sums"))
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)
    finish(prerl(tmp_path, *EMBEDDED, "--ckpt_path", checkpoint, "--no_greedy"))
    texts = [[[s["text"] for s in r["samples"]] for r in rows(f / "out" / "val.jsonl")] for f in (tmp_path, whole[0])]
    assert texts[0] != texts[1]
    file = tmp_path / "not.ckpt"
    file.write_text("nothing")
    assert "is no training checkpoint" in refused(*EMBEDDED, "--ckpt_path", file)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["evaluate"], "give --model and --data"),
        (["evaluate", "--model", "embedded", "--data", "math600"], "'math600' is none of"),
        (["evaluate", "--model", "embedded", "--data", "amc23=nowhere.parquet"], "nowhere.parquet: no such file"),
        (["evaluate", "--model", "embedded", "--data", "amc23,aime24", "--data", "amc23=b"], "a set is given twice"),
        (["evaluate", "--model", "embedded", "--data", "amc23", "--k", "0"], "--k: 0 is below 1"),
        (["evaluate", "--model", "embedded", "--data", "amc23", "--devices", "0"], "--devices: 0 is below 1"),
        (["compare", "nowhere", "nowhere"], "nowhere: no such folder"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_input_is_named(refused, args, words):
    assert words in refused(*args)


def test_from_python(model_folder, tmp_path, monkeypatch):
    """Own problems, own engine and reward: whole, gone on with, refused; and the same as the command's files."""
    monkeypatch.chdir(tmp_path)
    model, asked = model_folder("llama-untied"), []

    def reward(prompt, response, ground_truth, extra):
        asked.append(prompt)
        return float(len(response) % 2)

    data = RolloutDataModule(
        train=ArithmeticProblems("train", 8),
        verification=Verification(workers=0),
        sampling=Sampling(max_new_tokens=4),
        engine=PlainEngine(),
        val_batch=4,
    )

    def run(size=6, **options):
        sets = {"mine": ArithmeticProblems("held_out", size)}
        try:
            return evaluate(model, sets, k=2, reward=reward, datamodule=data, **options)
        finally:
            assert data.engine.model is data.engine.weights_dtype is None  # freed, and may be started again

    found = run()
    folder = tmp_path / "evaluations" / Path(model).name
    assert found == json.loads((folder / "summary.json").read_text())
    settings, records = read_results(folder / "mine.jsonl")
    assert (settings["k"], settings["problems"], [r["row"] for r in records]) == (2, 6, list(range(6)))
    assert found["mine"]["avg@2"] == pytest.approx(sum(s["score"] for r in records for s in r["samples"]) / 12)
    assert len(asked) == 18
    lines = (folder / "mine.jsonl").read_text().splitlines(keepends=True)
    (folder / "mine.jsonl").write_text("".join(lines[:5]))  # four problems
    assert run(folder=folder) == found
    assert len(asked) == 24
    with pytest.raises(InputError, match=r"with other settings .*greedy: True there, False here"):
        run(folder=folder, greedy=False)
    with pytest.raises(InputError, match="k: 0 is below 1"):
        evaluate(model, "math500", k=0)
    with pytest.raises(InputError, match="name sets"):
        evaluate(model)
    data.engine.start(model, 0, Place())
    with pytest.raises(InputError, match="has been started"):
        evaluate(model, {"mine": ArithmeticProblems("held_out", 4)}, datamodule=data)


def test_sets_are_evaluated_together_or_one_after_the_other(model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prerl"])
    (tmp_path / "c.yaml").write_text(
        "model: {class_path: GRPO}\n"
        "data: {engine: {class_path: plain_engine.PlainEngine, init_args: {limit: 200}}, verification: {workers: 0}, "
        "sampling: {max_new_tokens: 4}, train: {class_path: ArithmeticProblems}}"
    )
    (tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1", "problem": f"{i}+1", "answer": i + 1}) + "\n" for i in range(2))
    )

    def run(out, *sets):
        given = [word for name in sets for word in ("--data", f"{name}=set.jsonl")]
        options = ["--config=c.yaml", "--model", model_folder("llama-untied"), "--style=plain", "--no_greedy", "--k=2"]
        return command.evaluate([*options, *given, "--out", out])

    def summary(out):
        return json.loads((tmp_path / out / "summary.json").read_text())

    both = run("both", "amc23", "aime24")
    assert list(both) == ["amc23", "aime24"]
    run("after", "aime24")
    (tmp_path / "after" / "foreign.jsonl").write_text("{}\n")
    assert list(run("after", "amc23")) == ["amc23"]
    assert summary("after") == summary("both") == both
    file = tmp_path / "after" / "aime24.jsonl"
    first, *lines = file.read_text().splitlines(keepends=True)
    for text, why in (
        (first + lines[0], "1 of 2 problems are done"),
        (first.replace('"weights": [', '"weights": ["other", ') + "".join(lines), "made with another weights"),
    ):
        file.write_text(text)
        run("after", "aime25")
        assert summary("after").keys() == {"amc23", "aime25"}
        assert f"aime24.jsonl is left out of summary.json: {why}" in caplog.text
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"amc23.jsonl", "aime24.jsonl", "summary.json"}


def test_a_file_that_is_begun_is_gone_on_with(tmp_path):
    """Settings are compared as the file has them; a kill within the first line leaves nothing to go on with."""
    settings = {"k": 2, "sampling": {"stop_token_ids": (5,)}}
    file = tmp_path / "mine.jsonl"
    file.write_text('{"settings": {"k"')
    ResultFile(file, settings).append([{"row": 3}])
    assert read_results(file) == ({"k": 2, "sampling": {"stop_token_ids": [5]}}, [{"row": 3}])
    assert ResultFile(file, settings).records == {3: {"row": 3}}
    with pytest.raises(InputError, match=r"sampling: .*\[5\]\} there, .*\[6\]\} here"):
        ResultFile(file, settings | {"sampling": {"stop_token_ids": (6,)}})


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": 4, "GROUP_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1},
        {
            **{"SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_NUM_NODES": 2, "SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2},
            **{"SLURM_PROCID": 3, "SLURM_LOCALID": 1, "SLURM_NODEID": 1},
        },
    ],
    ids=["torchrun", "srun"],
)
def test_ranks_that_were_started_by_others(variables, monkeypatch):
    """Lightning's own launcher starts none beside them."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Fabric sets it for this process's whole life
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    for devices in (None, 2):
        place, launch = ranks_on(devices)
        assert place == Place(3, 4, 1)
        strategy = inspect.getclosurevars(launch).nonlocals["fabric"].strategy
        assert strategy.cluster_environment.creates_processes_externally
    with pytest.raises(InputError, match=r"--devices: 3, and 2 ranks have been started on this machine"):
        ranks_on(3)


def test_a_machine_without_so_many_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # Lightning finds that none is
    with pytest.raises(InputError, match=r"--devices: 2 cannot be: .*(CUDA|gpu)"):
        ranks_on(2)


def write(folder, scores):
    folder.mkdir()
    lines = [{"settings": {}}]
    for row, problem in enumerate(scores):
        samples = [
            {"text": "", "score": s, "answer": str(s), "failure": None, "tokens": 3, "truncated": False}
            for s in problem
        ]
        lines.append({"row": row, "prompt": "", "ground_truth": "1", "samples": samples, "greedy": None})
    (folder / "math500.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_partial_rewards_are_pointed_at(tmp_path):
    """avg@k counts a half as a half, pass@k as wrong."""
    for name, half in (("whole", 1), ("partial", 0.5)):
        write(tmp_path / name, [[half, 0, 0, 0]] * 2 + [[1, half, 0, 0]] * 2)
        found = measures(read_results(tmp_path / name / "math500.jsonl")[1])
        told = "samples have a reward that is neither 0 nor 1: avg, maj and greedy count it as it is, pass as wrong"
        assert (told in command._table({"math500": found})) == (name == "partial")
    assert (found["avg@4"], found["pass@4"], found["partial"]) == (0.25, 0.5, 0.25)


def test_comparing_needs_no_more_than_torch():
    code = "import sys, prerl_lightning.evaluation.comparison\nprint({'transformers', 'torchmetrics'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_compare(tmp_path, capsys):
    write(tmp_path / "a", [[1, 0, 0, 0]] * 60 + [[0, 0, 0, 0]] * 40)
    write(tmp_path / "b", [[1, 1, 0, 0]] * 60 + [[0, 0, 0, 0]] * 40)
    whole = command.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert whole == compare(tmp_path / "a", tmp_path / "b")
    assert (whole["math500"].problems, whole["math500"].of_a, whole["math500"].of_b) == (100, 100, 100)
    found = whole["math500"].measures["avg@4"]
    assert (found["a"], found["b"]) == (0.15, 0.30)
    assert found["difference"] == pytest.approx(0.15)
    # paired: every problem moves by 0 or 1/4, so that the interval is that of 60 coin flips' share over 4
    deviation = (0.6 * 0.4 / 100) ** 0.5 / 4
    assert (found["low"], found["high"]) == pytest.approx((0.15 - 1.96 * deviation, 0.15 + 1.96 * deviation), abs=0.03)
    assert found["p"] < 0.001
    assert found["smallest"] == pytest.approx(deviation * (1.96 + 0.84), rel=0.2)
    output = capsys.readouterr().out
    assert "avg@4      0.150 -> 0.300  +0.150" in output
    assert "  p < 0.001  " in output
    assert f"shows {found['smallest']:.3f} and more" in output
