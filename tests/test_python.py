"""Runs from Python: `prerl.fit`, a Trainer of one's own, the examples, a notebook."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from commands import environment_kept
from transformers.utils import logging as its

import prerl_lightning as prerl
from prerl_lightning import api
from prerl_lightning.arguments import check_kinds
from prerl_lightning.errors import InputError
from prerl_lightning.evaluation.command import evaluate
from prerl_lightning.objectives.advantages import GroupStd
from prerl_lightning.policy.model import ASSETS, load_model
from prerl_lightning.settings import described

ROOT = Path(__file__).parents[1]


def small(**given):
    options = {
        "train": prerl.CountdownProblems("train", 64),
        "val": prerl.CountdownProblems("held_out", 8),
        "prompts_per_step": 4,
        "sampling": prerl.Sampling(group_size=4, max_new_tokens=48),
        "engine": prerl.VLLMEngine(max_model_len=64),
        "val_greedy": False,
    }
    return prerl.RolloutDataModule(**(options | given))


@pytest.fixture(scope="module")
def quietly():
    with environment_kept():
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, quietly):
    """Three steps in two lives, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        checks, check = [], prerl.RolloutDataModule.check
        patch.setattr(prerl.RolloutDataModule, "check", lambda *args: checks.append(check(*args)))
        data = small()
        run = prerl.fit(
            prerl.NSRPreRL(model="embedded", lr=3e-4),
            data,
            [prerl.Life(2, prerl.GRPO(lr=3e-4), optimizer="reset")],
            max_steps=3,
            callbacks=[prerl.Thoughts(families={"wait": ["wait"]})],
            val_check_interval=2,
            name="mine",
            seed=5,
        )
        assert data.engine._llm is data.engine.weights_dtype is None  # freed, as if it had never been started
        assert described(data) == described(small())  # as it was: another seed's run may have it
        assert len(checks) == 1
    return folder, run


def test_a_run_leaves_what_the_command_leaves(fitted):
    folder, run = fitted
    assert run.folder == Path("runs/mine/version_0")
    there = {path.name for path in (folder / run.folder).iterdir()}
    files = {"metrics.csv", "config.yaml", "run.json", "samples.jsonl", "held_out.jsonl", "alignment.jsonl"}
    assert files | {"checkpoints", "model"} <= there
    record = json.loads((folder / run.folder / "run.json").read_text())
    assert (record["status"], record["lives"], record["seed"]) == ("finished", [["NSRPreRL", 0], ["GRPO", 2]], 5)


def test_what_it_gives_back(fitted, monkeypatch):
    folder, run = fitted
    monkeypatch.chdir(folder)
    assert list(run.accuracies) == [0, 2, 3]
    assert run.accuracy == run.accuracies[3]
    held_out = f"held out avg@8 {run.accuracy:.3f}"
    assert repr(run) == f"<runs/mine/version_0: finished, 3 steps of NSR-PreRL \u2192 GRPO, {held_out}>"
    assert run.status == "finished"
    assert list(run.metrics.index) == [0, 1, 2, 3]
    assert run.metrics["reward/mean"].notna().sum() == 3
    assert run.metrics.loc[3, "val/avg@8"] == run.accuracy
    assert set(run.samples.kind) >= {"held_out"}
    assert run.model.joinpath("model.safetensors").is_file()
    assert run.checkpoint.is_file()
    assert run.plot("reward/mean", "val/avg@8")._repr_svg_().startswith("<svg")
    with pytest.raises(InputError, match=r"plot: this run has no reward/men\. Did you mean reward/mean"):
        run.plot("reward/men")
    page = run.report("page.html").read_text()
    assert "NSR-PreRL" in page
    assert prerl.load_run("runs/mine/version_0").accuracies == run.accuracies
    with pytest.raises(InputError, match="no metrics"):
        prerl.load_run("runs")


def test_what_the_last_lines_say_to_type_works(fitted, monkeypatch, capsys):
    """Of a run from Python, with its config.yaml; and the same from Python."""
    folder, run = fitted
    monkeypatch.chdir(folder)
    evaluate(["--config", str(run.folder / "config.yaml"), "--model", str(run.model), "--k", "2"])
    assert "Samples and summary.json are in evaluations/mine-version_0" in capsys.readouterr().out
    found = prerl.evaluate(run.model, k=2, datamodule=small(seed=5), folder="again")
    assert found["val"] == json.loads(Path("evaluations/mine-version_0/summary.json").read_text())["val"]
    with pytest.raises(InputError, match=r"evaluations/mine: no such folder\. Did you mean evaluations/mine-version_0"):
        prerl.compare("evaluations/mine", "again")


def test_a_resume_is_compared(fitted, monkeypatch):
    folder, _ = fitted
    monkeypatch.chdir(folder)
    lives = [prerl.Life(2, prerl.GRPO(lr=3e-4), optimizer="reset")]
    with pytest.raises(InputError, match=r"(?s)model\.init_args\.lr: 0\.0003 in the checkpoint, 0\.001 now"):
        prerl.fit(prerl.NSRPreRL(model="embedded", lr=1e-3), small(), lives, 4, name="mine", seed=5, ckpt_path="last")
    data = small(sampling=prerl.Sampling(group_size=8, max_new_tokens=48))
    with pytest.raises(InputError, match=r"data\.sampling\.group_size: 4 in the checkpoint, 8 now"):
        prerl.fit(prerl.NSRPreRL(model="embedded", lr=3e-4), data, lives, 4, name="mine", seed=5, ckpt_path="last")


def test_a_trainer_of_ones_own(fitted, monkeypatch, capsys):
    """In the same process, with another engine; validated at step 0, watched, recorded, and read by the report."""
    folder, _ = fitted
    monkeypatch.chdir(folder)
    trainer = L.Trainer(**prerl.trainer_defaults(max_steps=1), callbacks=prerl.run_callbacks())
    data = small()
    trainer.fit(prerl.GRPO(model="embedded", lr=3e-4), datamodule=data)
    trial = L.Trainer(**prerl.trainer_defaults(fast_dev_run=True), callbacks=prerl.run_callbacks())  # as `fit` advises
    trial.fit(prerl.GRPO(model="embedded", lr=3e-4), datamodule=data)
    data.engine.stop()
    assert [path.name for path in Path("runs/python").iterdir()] == ["version_0"]
    run = prerl.load_run("runs/python/version_0")
    assert list(run.accuracies) == [0, 1]
    assert run.status == "finished"
    assert len(run.samples)
    said = capsys.readouterr()
    assert "Epoch" not in said.out + said.err
    assert said.out.count("step 1/1 ") == 2  # and not once for each run of this process
    assert "watch it    prerl watch" in said.out
    assert all(len(line) <= 100 for line in said.out.splitlines() if line.startswith(("step ", "held out")))
    assert "Warning" not in said.err


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: prerl.fit(prerl.GRPO(model="embedded"), small(), max_stepz=3), "Trainer has no such argument"),
        (lambda: prerl.fit(prerl.GRPO(model="embedded"), small(), max_steps=3, precision="16-mixed"), "precision"),
        (lambda: prerl.fit(prerl.GRPO(), small(), max_steps=3), "model.init_args.model: missing"),
        (lambda: prerl.fit(prerl.GRPO(model="embedded"), small(), max_steps=3, logger=False), "leaves no folder"),
        (lambda: prerl.fit(prerl.GRPO(model="embedded"), small(), fast_dev_run=True), r"fit --trainer\.fast_dev_run"),
        (lambda: prerl.fit(prerl.GRPO(model="without_weights"), small(), max_steps=3), "without_weights"),
        (lambda: prerl.fit(prerl.GRPO(model="embedded"), small(), max_steps=3, ckpt_path="none.ckpt"), "none.ckpt"),
    ],
)
def test_what_cannot_be_is_refused(call, pattern, tmp_path, monkeypatch, quietly):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prerl.VLLMEngine, "start", lambda *args: pytest.fail("the engine was started"))
    (tmp_path / "without_weights").mkdir()
    for file in (ASSETS / "countdown").iterdir():
        if file.suffix != ".safetensors":  # which is seen when the Trainer has made the run's folder
            (tmp_path / "without_weights" / file.name).symlink_to(file)
    with pytest.raises(InputError, match=pattern):
        call()
    assert not list(tmp_path.rglob("version_*"))


class Dicts(prerl.ProblemSet):
    reward = staticmethod(lambda prompt, response, ground_truth, extra: 1.0)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"prompt": "1", "answer": "1"}


def lone(**attributes):
    return type("Lone", (prerl.PolicyModule,), attributes)(model="embedded")


def embedded(**given):
    return prerl.GRPO(**({"model": "embedded"} | given))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prerl.fit(small(), small()), "fit.objective: it is a RolloutDataModule; it must be PolicyModule."),
        (
            lambda: prerl.fit(prerl.GRPO, small()),
            "fit.objective: it is the class GRPO, not one that is made, GRPO(...);",
        ),
        (lambda: prerl.fit(embedded(), []), "fit.data: [] is a list; it must be RolloutDataModule."),
        (
            lambda: prerl.fit(embedded(), small(), max_steps="5"),
            "fit.max_steps: '5' is a str; it must be a whole number.",
        ),
        (
            lambda: prerl.fit(embedded(), small(), [(1, prerl.GRPO())]),
            "fit.lives[0]: (1, GRPO()) is a tuple; it must be",
        ),
        (
            lambda: prerl.fit(embedded(), small(), prerl.Life(1, prerl.GRPO())),
            "fit.lives: it is a PolicyReincarnation;",
        ),
        (
            lambda: prerl.fit(embedded(), small(), [prerl.Life(1, prerl.GRPO)]),
            "PolicyReincarnation.successor: it is the class",
        ),
        (
            lambda: prerl.fit(embedded(), small(), callbacks=prerl.Thoughts()),
            "fit.callbacks: it is a Thoughts; it must be a",
        ),
        (
            lambda: prerl.fit(embedded(), small(), logger="wandb"),
            "trainer.logger: 'wandb' is a str; it must be Logger or",
        ),
        (lambda: embedded(lr="3e-4"), "GRPO.lr: '3e-4' must be a finite number of at least 0."),
        (lambda: prerl.fit(embedded(lr=True), small()), "GRPO.lr: True is a bool; it must be a number."),
        (
            lambda: prerl.Life("3", prerl.GRPO()),
            "PolicyReincarnation.at_step: '3' is a str; it must be a whole number.",
        ),
        (
            lambda: prerl.Life(3, prerl.GRPO(), until="rollout/pass@4"),
            "PolicyReincarnation.until: 'rollout/pass@4' is a str; it must be Until or None.",
        ),
        (
            lambda: prerl.Mixture([small().train]),
            "Mixture.sets: it is a list; it must be a dict of ProblemSet by text.",
        ),
        (
            lambda: prerl.Term("pre_train"),
            "terms.space: 'pre_train' is a str; it must be one of post-train, pre-train.",
        ),
        (
            lambda: prerl.Term("pre-train", contributing="none"),
            "terms.contributing: 'none' is a str; it must be one of all,",
        ),
        (
            lambda: prerl.Term("pre-train", surrogate="PPOClip"),
            "terms.surrogate: 'PPOClip' is a str; it must be Surrogate or",
        ),
        (
            lambda: prerl.Term("pre-train", advantage=GroupStd),
            "terms.advantage: it is the class GroupStd, not one that is",
        ),
        (
            lambda: prerl.Term("pre-train", weight=1.0),
            "terms.weight: 1.0 is a float; it must be Weight or a function or",
        ),
        (lambda: prerl.fit(lone(terms=()), small()), "Lone.terms: there is none."),
        (lambda: prerl.fit(lone(terms=prerl.Term("pre-train")), small()), "Lone.terms: "),
        (
            lambda: prerl.fit(one := embedded(), small(), [prerl.Life(1, one)]),
            "PolicyReincarnation.successor: one object",
        ),
        (
            lambda: prerl.fit(embedded(), small(), callbacks=[prerl.Thoughts(), prerl.Thoughts()]),
            "trainer.callbacks: Thoughts is there twice.",
        ),
        (lambda: prerl.fit(embedded(), small(), name="../mine"), "name: ../mine leads out of the folder of runs"),
        (lambda: prerl.fit(prerl.GRPO(), small()), "model.init_args.model: missing"),
        (
            lambda: prerl.fit(embedded(), small(train=Dicts())),
            "data: a set of problems gave a dict; it must give Problem(",
        ),
        (
            lambda: prerl.fit(embedded(lr_schedule="lineal"), small()),
            "GRPO.lr_schedule: 'lineal' is a str; it must be one of constant, linear, cosine. Did you mean linear?",
        ),
        (
            lambda: prerl.fit(embedded(), small(), [prerl.Life(1, prerl.GRPO(aggregation="sum"))]),
            "PolicyReincarnation.successor.aggregation: 'sum' is a str; it must be one of token-mean,",
        ),
        (
            lambda: prerl.fit(embedded(lora={"rank": 2}), small()),
            "GRPO.lora: {'rank': 2} is a dict; it must be Lora or None.",
        ),
        (
            lambda: prerl.fit(embedded(model=torch.nn.Linear(1, 1)), small()),
            "GRPO.model: it is a Linear; it must be text or None.",
        ),
        (
            lambda: prerl.fit(embedded(), small(sampling=prerl.Sampling(4.0))),
            "data.sampling.group_size: 4.0 is a float; it must be a whole number.",
        ),
        (
            lambda: prerl.fit(embedded(), small(engine="vllm")),
            "data.engine: 'vllm' is a str; it must be Engine or None.",
        ),
        (lambda: prerl.fit(embedded(), small(reward="f")), "data.reward: 'f' is a str; it must be a function or None."),
        (
            lambda: prerl.fit(embedded(), small(train="rows.jsonl")),
            "data.train: 'rows.jsonl' is a str; it must be ProblemSet. Files(path) reads a file,",
        ),
        (
            lambda: prerl.fit(embedded(), small(train=prerl.Mixture({"a": "gsm8k"}))),
            "Mixture.sets: {'a': 'gsm8k'} is a dict; it must be a dict of ProblemSet by text.",
        ),
        (lambda: prerl.evaluate("embedded", "gsm8k", k="8"), "evaluate.k: '8' is a str; it must be a whole number."),
        (
            lambda: prerl.evaluate("embedded", small().val),
            "evaluate.data: it is a CountdownProblems; it must be text or",
        ),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(call, said, tmp_path, monkeypatch, quietly):
    """As YAML's is by its parser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prerl.VLLMEngine, "start", lambda *args: pytest.fail("the engine was started"))
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(said)
    assert not list(tmp_path.iterdir())


def test_what_would_do_passes(tmp_path):
    """A path for text, numpy's numbers, what a class of one's own asks for, or what it leaves out."""

    class Own(prerl.GRPO):
        def __init__(self, scale: str = None, **options):  # noqa: RUF013  (as users write)
            super().__init__(**options)
            self.scale = scale

    data = small(prompts_per_step=np.int64(4), train=prerl.Files(tmp_path / "rows.jsonl"))
    check_kinds(data, "data")
    for own in (Own(model=tmp_path, lr=np.float32(0.1)), Own(scale=3, optimizer=torch.optim.SGD, lr=1)):
        check_kinds(own, "Own")


def test_loading_shows_no_bar(capsys):
    """In a script or a notebook, too, where transformers was imported before us; what is shown else stays as it is."""
    its.enable_progress_bar()
    load_model("embedded")
    assert capsys.readouterr().err == ""
    assert its.is_progress_bar_enabled()


def test_a_notebook_has_one_rank(tmp_path, monkeypatch, quietly):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(InputError, match=r"trainer\.devices: a notebook trains on one device"):
        prerl.fit(prerl.GRPO(model="embedded"), small(), max_steps=1, accelerator="cpu", devices=2)
    assert api._one_device({}) == api._one_device({"devices": 1}) == 1


def test_described_as_a_configuration():
    found = described(small())
    assert found["class_path"] == "prerl_lightning.data.module.RolloutDataModule"
    given = found["init_args"]
    assert given["sampling"]["group_size"] == 4
    assert given["train"]["init_args"] == {"split": "train", "size": 64, "seed": 0}
    assert given["engine"]["init_args"]["max_model_len"] == 64
    objective = described(prerl.GRPO(model="embedded", lr=1e-4))["init_args"]
    assert (objective["model"], objective["lr"]) == ("embedded", 1e-4)
    assert objective["optimizer"]["class_path"] == "torch.optim.adamw.AdamW"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("room", ["", ".data", ".rollout", ".callbacks", ".metrics", ".policy", ".evaluation"])
def test_a_room_shows_its_names(room):
    from importlib import import_module

    package = import_module(f"prerl_lightning{room}")
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError):
        package.nonsense  # noqa: B018


def test_the_import_loads_nothing_heavy():
    code = "import sys, prerl_lightning; print({'torch', 'lightning', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_example_of_an_own_task(tmp_path, monkeypatch, refused, capsys):
    """By its YAML, and by its Python."""
    import shutil

    from prerl_lightning.cli import main

    shutil.copytree(ROOT / "examples" / "own_task", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    main(["fit", "--config", "task.yaml", "--trainer.max_steps=1", "--data.prompts_per_step=4"])
    assert prerl.load_run("runs/task/version_0").record.lives == [("DrGRPO", 0)]
    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace("STEPS = 20", "STEPS = 1"))
    runpy.run_path(str(script), run_name="__main__")
    assert "of the held-out answers are right; the model is in runs/own_task" in capsys.readouterr().out
    for name in ("objective", "rewards"):
        sys.modules.pop(name)


def cells(notebook):
    """Its code cells, for two steps."""
    found = [cell for cell in notebook.cells if cell.cell_type == "code"]
    settings = next(cell for cell in found if "STEPS, SWITCH =" in cell.source)
    settings.source = settings.source.replace("STEPS, SWITCH = 20, 5", "STEPS, SWITCH = 2, 1")
    return found


def test_the_cells_of_the_notebook(tmp_path, monkeypatch, quietly):
    """One after the other, with what a kernel does with the last line of each."""
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    names, shown = {}, []
    for cell in cells(nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)):
        *body, last = ast.parse(cell.source).body
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert sum(hasattr(value, "_repr_svg_") and "<svg" in value._repr_svg_() for value in shown) == 2
    assert list(names["run"].accuracies) == [0, 2]
    assert (tmp_path / "first_run.html").is_file()


@pytest.mark.slow  # a kernel of its own; the cells are run above
def test_the_notebook(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)
    cells(notebook)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error"]
