"""The package as pip installs it: built from the source archive, away from the checkout, and started there."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from prerl_lightning import __version__
from prerl_lightning.report.listing import runs

ROOT = Path(__file__).parents[1]


def python(*args, cwd):
    subprocess.run([sys.executable, *map(str, args)], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for PYTHONPATH, made without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("prerl_lightning", "configs", "examples"):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    python("-c", "from setuptools.build_meta import build_sdist; build_sdist('.')", cwd=source)
    shutil.rmtree(source / "configs")  # nothing is taken from beside the archive
    (archive,) = source.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--quiet"]
    python("-m", "pip", "install", *options, "--target", target, archive, cwd=source)
    return target


def test_it_has_the_files_that_are_no_code(installed):
    def files(folder):
        return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    package = installed / "prerl_lightning"
    assert files(package / "configs") == files(ROOT / "configs")
    assert files(package / "assets") == files(ROOT / "prerl_lightning" / "assets")
    if (ROOT / "examples").is_dir():
        assert files(package / "examples") == files(ROOT / "examples")
    assert (package / "py.typed").is_file()
    assert {p.relative_to(package) for p in package.rglob("*.py")} >= {
        p.relative_to(ROOT / "prerl_lightning") for p in (ROOT / "prerl_lightning").rglob("*.py")
    }
    assert not (installed / "configs").exists()
    (found,) = installed.glob("*.dist-info")
    metadata = Distribution.at(found).metadata
    assert metadata["Version"] == __version__
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Project-URL"]
    assert len(metadata["Summary"]) < 200


def test_the_demo_from_an_empty_folder(installed, tmp_path, capsys):
    """With an overlay, which must not name the run; both by name."""
    command = [
        *(sys.executable, "-m", "prerl_lightning.cli", "fit"),
        *("--config", "dsrl.yaml", "--config=logger/tensorboard.yaml"),
        *("--trainer.max_steps=2", "--trainer.callbacks.init_args.at_step=1"),
        *("--data.prompts_per_step=4", "--data.val.init_args.size=8", "--data.val_greedy=false"),
    ]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    made = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = made.communicate(timeout=360)
    assert made.returncode == 0, output
    shipped = installed / "prerl_lightning" / "configs" / "dsrl.yaml"
    assert output.count(f"There is no dsrl.yaml: the shipped one is taken, {shipped}\n") == 1
    run = tmp_path / "runs" / "dsrl" / "version_0"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*")] == ["runs/dsrl/version_0"]
    assert {"metrics.csv", "config.yaml", "run.json", "model"} <= set(os.listdir(run))
    assert list(run.glob("events.out.tfevents.*"))
    said = json.loads((run / "run.json").read_text())
    assert (said["status"], said["process"]["pid"]) == ("finished", made.pid)
    runs([str(tmp_path / "runs")])
    assert "dsrl/version_0  NSR-PreRL -> GRPO at 1  embedded  2/2" in capsys.readouterr().out
