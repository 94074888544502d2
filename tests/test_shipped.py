"""Shipped configurations by name, and what is in the repository beside the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from prerl_lightning import shipped
from prerl_lightning.errors import InputError
from prerl_lightning.study.command import study

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("dsrl.yaml", "dsrl"),
        ("dsrl", "dsrl"),
        ("sums/dsrl.yaml", "sums/dsrl"),
        ("configs/strategy/ddp.yaml", "strategy/ddp"),
        ("study/paper_claims.yaml", "study/paper_claims"),
        ("grpo", "grpo"),
        ("mixed.yaml", None),
        ("./dsrl.yaml", None),
        ("../dsrl.yaml", None),
        ("/dsrl.yaml", None),
        ("ddp.yaml", None),
    ],
)
def test_a_file_of_the_user_s_wins(given, name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("mixed.yaml").write_text("mine")
    Path("grpo").mkdir()  # a folder is no file
    caplog.set_level("INFO", "prerl_lightning")
    expected = str(shipped.FOLDER / f"{name}.yaml") if name else given
    assert shipped.path(given) == expected
    assert {*caplog.messages} == ({f"There is no {given}: the shipped one is taken, {expected}"} if name else set())
    assert Path(expected).is_file() or name is None
    args = ["fit", f"--config={given}", "--config", given, "-c", given, "--data.path", given]
    found = shipped.in_arguments(args)
    assert found == ["fit", f"--config={expected}", "--config", expected, "-c", expected, "--data.path", given]


@pytest.mark.parametrize(
    ("folder", "word", "name"),
    [
        ("objectives", "DAPO", "objectives/dapo"),
        ("objectives", "Dr. GRPO", "objectives/dr_grpo"),
        ("objectives", "REINFORCE++", "objectives/reinforce_pp"),
        ("logger", "WandB", "logger/wandb"),
        ("logger", "dapo", None),
        ("objectives", "GRPO", None),
    ],
)
def test_overlays_by_the_names_of_what_they_set_up(folder, word, name):
    assert shipped.overlay(folder, word) == name


def test_the_list_and_a_copy(capsys):
    shipped.configs([])
    lines = capsys.readouterr().out.split("\n\nExamples")[0].splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert len(lines) == len(list((ROOT / "configs").rglob("*.yaml")))
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)
    assert all((shipped.FOLDER / f"{name}.yaml").read_text().startswith("# ") for name in shipped.names())
    shipped.configs(["sums/dsrl"])
    assert capsys.readouterr().out == (ROOT / "configs" / "sums" / "dsrl.yaml").read_text()
    with pytest.raises(InputError, match=r"none has this name. Did you mean sums/dsrl\?"):
        shipped.configs(["sums/dsr.yaml"])


def test_every_command_takes_them_by_name(refused):
    """Each comes to a refusal that lies behind the file."""
    assert "'./nowhere' is no folder" in refused("fit", "--config=dsrl.yaml", "--model.init_args.model=./nowhere")
    assert "'./nowhere' is no folder" in refused("evaluate", "--config", "sums/dsrl.yaml", "--model", "./nowhere")
    assert "'./nowhere' is no folder" in refused("doctor", "--config", "dsrl.yaml", "--model", "./nowhere")
    Path("taken").touch()
    assert "--out taken is a file" in refused("pretrain", "--config", "pretrain/countdown.yaml", "--out", "taken")
    assert "go by name. Did you mean strategy/ddp?" in refused("fit", "--config", "dsrl.yaml", "--config", "ddp.yaml")
    assert "go by name. Did you mean grpo?" in refused("doctor", "--config", "grpoo.yaml")


def test_a_study_by_name_and_a_copy_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study(["study/smollm2", "--dry_run"])
    listed = capsys.readouterr().out
    assert listed.count("to make") == 6
    shipped.configs(["study/smollm2"])
    Path("mine.yaml").write_text(capsys.readouterr().out)
    study(["mine.yaml", "--dry_run"])
    assert capsys.readouterr().out.replace("study/mine/", "study/smollm2/") == listed
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace("../smollm2_add.yaml", "../smollm3_add.yaml"))
    with pytest.raises(InputError, match=r"no file \.\./smollm3_add.* go by name. Did you mean smollm2_add\?"):
        study(["mine.yaml", "--dry_run"])


def test_pre_commit_runs_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    assert [hook["entry"] for hook in hooks] == [
        f".venv/bin/{command}" for command in re.findall(r"in_venv,(.+)\)", check)
    ]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_the_image_is_set_up_as_the_readme_says():
    """`make setup` is what `make demo` starts with; the Python is one that the package takes."""
    text = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^RUN (.+)$", text, re.M)
    assert command == "make setup EXTRA=${EXTRA}"
    assert "\ndemo: setup ##" in (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"^ARG PYTHON=(.+)$", text, re.M)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    assert set(re.findall(r"EXTRA=(\w+)", text)) == {"cpu", "gpu"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_contributing_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:py|md|yaml|toml))`", text):
        assert any((base / name).exists() for base in (ROOT, ROOT / "prerl_lightning")), name
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), test
