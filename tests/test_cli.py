"""The command line: every shipped YAML parses, wrong input is named, and nothing heavy stands before --help."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import environment_kept
from report_runs import write_run

from prerl_lightning.cli import COMMANDS, main
from prerl_lightning.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RUNS = sorted(
    p
    for folder in (CONFIGS, CONFIGS / "sums", CONFIGS / "paper")
    for p in folder.glob("*.yaml")
    if p.stem not in ("time_limit", "lora")
)
OVERLAYS = [
    CONFIGS / "time_limit.yaml",
    CONFIGS / "lora.yaml",
    *sorted((CONFIGS / "strategy").glob("*")),
    *(path for path in sorted((CONFIGS / "logger").glob("*")) if path.stem != "swanlab" or find_spec("swanlab")),
]


def prerl(*args, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-m", "prerl_lightning.cli", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=300,
    )


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line as `prerl` does, without building anything."""
    from parsing import Parsed

    # nor looking at the model
    monkeypatch.setattr("prerl_lightning.training.load_config", lambda model: SimpleNamespace(hidden_size=128))

    def parsed(*args):
        monkeypatch.setattr(sys, "argv", ["prerl"])
        cli = Parsed.run(list(map(str, args)))
        return cli.config.fit

    return parsed


def test_help_lists_and_refusals_import_nothing_heavy(tmp_path):
    """They answer in a second, where torch, Lightning and vLLM take fifteen."""
    write_run(tmp_path / "dsrl" / "version_0", steps=1)
    (tmp_path / "list.yaml").write_text("[1]")
    shown = [["--help"], ["--version"], ["configs"], ["runs", str(tmp_path)], *([c, "--help"] for c in COMMANDS)]
    shown += [["fit", "--help"], ["help", "rloo"], ["help", "evaluate"]]
    refused = {
        "fit --confg=x.yaml": "confg: there is no such key. Did you mean config?",
        "fit --config list.yaml": "--config: list.yaml: it holds no keys",
        "validate --data.sampling.groupsize=4": "Did you mean data.sampling.group_size?",
        "evaluate --model embedded": "give --model and --data",
        "evaluate --model embedded --data math50": "Did you mean math500?",
        "evaluate --model embedded --data math500 --limt 4": "limt: there is no such key. Did you mean limit?",
        "evaluate --config nowhere.yaml": "--config: nowhere.yaml: no such file",
        "compare a b": "prerl compare: a: no such folder",
        "pretrain --wat": "wat: there is no such key",
        "doctor --wat": "unrecognized arguments: --wat",
        "study nowhere.yaml": "there is no file nowhere.yaml",
    }
    code = f"""
import sys
from prerl_lightning.cli import main
for args in {[*shown, *map(str.split, refused)]}:
    print("===", *args, flush=True)
    try:
        main(args)
    except SystemExit as ending:
        print(ending.code, flush=True)
    heavy = {{"torch", "lightning", "vllm", "transformers"}} & set(sys.modules)
    assert not heavy, (args, heavy)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert found.returncode == 0, found.stdout
    assert "usage: prerl" in found.stdout
    assert "prerl 0." in found.stdout
    said = {head: rest for head, _, rest in (part.partition("\n") for part in found.stdout.split("=== "))}
    for args, message in refused.items():
        assert message in said[args], said[args]
        assert said[args].endswith("2\n")
    assert "--data.prompts_per_step    int, default 16" in said["fit --help"]
    assert "prerl evaluate" in said["help evaluate"]


@pytest.mark.parametrize("command", ["fit", *COMMANDS])
def test_help_holds_no_escapes(command, monkeypatch, capsys):
    """argparse formats an argument's help and leaves a description as it is, where a doubled percent sign shows."""
    monkeypatch.setattr(sys, "argv", ["prerl"])
    with suppress(SystemExit), environment_kept():
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--help" in shown
    assert "%%" not in shown
    assert command != "evaluate" or "with 95 % intervals" in shown


@pytest.mark.parametrize("config", RUNS, ids=lambda p: p.stem)
def test_every_run_parses(parse, config):
    found = parse("fit", "--config", config)
    assert found.model.class_path.startswith("prerl_lightning.")
    assert found.trainer.max_steps > 0


def test_an_objective_is_laid_over_a_run(parse):
    """Its terms and its minibatches; the model, its rate, the data and the other life stay."""
    base, over = CONFIGS / "dsrl.yaml", CONFIGS / "objectives" / "gspo.yaml"
    before, found = parse("fit", "--config", base), parse("fit", "--config", base, "--config", over)
    assert found.model.class_path == "prerl_lightning.Objective"
    assert found.model.init_args.terms[0].surrogate.class_path.endswith(".GSPO")
    assert (found.model.init_args.model, found.model.init_args.lr) == ("embedded", 3e-4)
    assert found.model.init_args.minibatches == 4
    assert found.data == before.data
    assert found.trainer.callbacks == before.trainer.callbacks


def test_the_readme_shows_the_dsrl_config_as_it_is():
    assert (CONFIGS / "dsrl.yaml").read_text() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("hidden", "amx", "accelerator", "expected"),
    [
        (512, True, "auto", "bf16-mixed"),
        (511, True, "auto", "32-true"),
        (512, False, "cpu", "32-true"),
    ],
)
def test_bf16_is_the_default_where_it_is_faster_and_the_engine_s(
    parse, monkeypatch, hidden, amx, accelerator, expected
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr("prerl_lightning.training.load_config", lambda model: SimpleNamespace(hidden_size=hidden))
    args = ("fit", "--config", CONFIGS / "dsrl.yaml", f"--trainer.accelerator={accelerator}")
    assert parse(*args).trainer.precision == "32-true"
    args += ("--data.engine.init_args.dtype=bfloat16",)
    assert parse(*args).trainer.precision == expected
    assert parse(*args, "--trainer.precision=32-true").trainer.precision == "32-true"


def test_a_logger_s_missing_package_is_named(parse, monkeypatch):
    monkeypatch.setattr("prerl_lightning.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        parse("fit", "--config", CONFIGS / "dsrl.yaml", "--config", CONFIGS / "logger" / "wandb.yaml")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_overlays_keep_the_callbacks(parse, overlay, monkeypatch):
    monkeypatch.setattr("prerl_lightning.run.LOGGERS", {})  # wandb need not be here
    base = parse("fit", "--config", CONFIGS / "dsrl.yaml")
    found = parse("fit", "--config", CONFIGS / "dsrl.yaml", "--config", overlay)
    assert found.trainer.callbacks[0].class_path == base.trainer.callbacks[0].class_path
    assert (found.trainer, found.model) != (base.trainer, base.model)
    if overlay.stem == "time_limit":
        assert [c.class_path.rpartition(".")[2] for c in found.trainer.callbacks] == ["PolicyReincarnation", "Timer"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "prerl"),
        (["arm.yaml"], "arm"),
        (["shared.yaml", "arm.yaml", "overlay.yaml"], "arm"),
        (["shared.yaml", "short.yaml", "missing.yaml"], "short"),
        (["arm.yaml", "other.yaml", "broken.yaml"], "other"),
        (["overlay.yaml", "shared.yaml"], "overlay"),
        ([str(CONFIGS / "sums" / "dsrl.yaml"), "overlay.yaml"], "sums-dsrl"),  # not the runs of dsrl.yaml
        ([str(CONFIGS / "dsrl.yaml")], "dsrl"),
        (["runs/arm/version_3/config.yaml"], "arm"),
        (["config.yaml"], "config"),
    ],
)
def test_the_file_with_the_objective_names_the_run(given, name, tmp_path, monkeypatch):
    from prerl_lightning.refusals import config_files
    from prerl_lightning.run import _run_name

    files = {
        "shared": "model: {init_args: {model: embedded}}", "arm": "model: {class_path: GRPO}", "short": "model: GRPO",
        "other": "model:\n  class_path: NSRPreRL", "overlay": "trainer: {strategy: ddp}", "broken": "model: {a: [",
    }  # fmt: skip
    files |= {"runs/arm/version_3/config": files["arm"], "config": files["arm"]}
    (tmp_path / "runs/arm/version_3").mkdir(parents=True)
    for stem, text in files.items():
        (tmp_path / f"{stem}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    ways = [[f"--config={file}" if i % 2 else f"--config {file}" for i, file in enumerate(given, k)] for k in (0, 1)]
    for way in ways:
        assert _run_name(config_files(["fit", *" ".join(way).split(), "--trainer.max_steps=1"])) == name


def test_loggers_without_a_name_have_the_run_s(parse, tmp_path, monkeypatch):
    """Else `last` would find another experiment's checkpoint."""
    monkeypatch.setattr("prerl_lightning.run.LOGGERS", {})
    base = ("fit", "--config", CONFIGS / "dsrl.yaml", "--config")
    for overlay in ("tensorboard", "wandb"):
        loggers = parse(*base, CONFIGS / "logger" / f"{overlay}.yaml").trainer.logger
        assert [logger.init_args.name for logger in loggers] == ["dsrl", "dsrl"]
    loggers = parse(*base, CONFIGS / "logger" / "tensorboard.yaml", "--name=mine").trainer.logger
    assert [logger.init_args.name for logger in loggers] == ["mine", "mine"]
    with pytest.raises(InputError, match=r"name: 'a/b' is no folder's"):
        parse(*base, CONFIGS / "grpo.yaml", "--name=a/b")
    own = tmp_path / "own.yaml"
    lit = "{class_path: lightning.pytorch.loggers.LitLogger, init_args: {save_logs: SAVE}}"
    own.write_text(f"trainer: {{logger: [MLFlowLogger, {lit.replace('SAVE', 'false')}]}}")
    mlflow, litlogger = parse(*base, own).trainer.logger
    assert (mlflow.init_args.run_name, litlogger.init_args.name) == ("dsrl", "dsrl")
    own.write_text(f"trainer: {{logger: {lit.replace('SAVE', 'true')}}}")
    with pytest.raises(InputError, match=r"LitLogger.save_logs: it would start the whole command once more"):
        parse(*base, own)
    own.write_text("trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: mine}}}")
    assert parse(*base, own).trainer.logger.init_args.name == "mine"


def test_overrides(parse):
    found = parse(
        *("fit", "--config", CONFIGS / "dsrl.yaml", "--model.init_args.lr=3e-4", "--trainer.max_steps=7"),
        *("--data.sampling.group_size=4", "--trainer.strategy=fsdp2", "--checkpoint.every_n_train_steps=5"),
    )
    assert found.model.init_args.lr == 3e-4
    assert (found.trainer.max_steps, found.data.sampling.group_size) == (7, 4)
    assert found.checkpoint.every_n_train_steps == 5


def test_a_prefix_means_the_same_in_yaml_and_on_the_command_line(parse, tmp_path):
    from prerl_lightning.objectives import NSRPreRL

    base = ("fit", "--config", CONFIGS / "dsrl.yaml")
    for text, meant in (("5", 5), ("'\"#\"'", "#")):
        (tmp_path / "prefix.yaml").write_text(f"model: {{init_args: {{prefix: {text}}}}}\n")
        in_yaml = parse(*base, "--config", tmp_path / "prefix.yaml").model.init_args.prefix
        typed = parse(*base, "--model.init_args.prefix", text.strip("'")).model.init_args.prefix
        assert NSRPreRL(prefix=in_yaml).prefix == NSRPreRL(prefix=typed).prefix == meant


def test_wrong_input_is_named_without_a_traceback(tmp_path):
    found = prerl("fit", "--config", CONFIGS / "dsrl.yaml", "--model.init_args.model=./nowhere", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("prerl: error: model: './nowhere' is no folder with a config.json.")
    assert len(found.stderr.splitlines()) == 1


def test_a_reward_is_found_in_the_current_folder(tmp_path):
    """By the installed script, for which Python does not look there by itself; behind what is installed."""
    (tmp_path / "my_rewards.py").write_text("def f(prompt, response, ground_truth, extra):\n    return 1.0\n")
    (tmp_path / "yaml.py").write_text("raise RuntimeError('not mine to take')\n")
    code = "import sys; from prerl_lightning.cli import main; main(sys.argv[1:])"
    config = CONFIGS / "dsrl.yaml"
    # -P: as a script in another folder is started
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "fit",
        "--config",
        config,
        "--data.reward=my_rewards.f",
        "--print_config",
    ]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "reward: my_rewards.f" in found.stdout, found.stderr


def test_a_crash_in_native_code_says_where_in_python_it_was(tmp_path):
    (tmp_path / "mine.py").write_text("import os\nos.abort()\n")
    found = prerl("fit", "--config", CONFIGS / "dsrl.yaml", "--data.reward=mine.f", cwd=tmp_path)
    assert found.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in found.stderr
    assert f'File "{tmp_path}/mine.py", line 2 in <module>' in found.stderr


def test_lines_are_logged_once_however_often_main_is_called(refused):
    import logging

    log = logging.getLogger("prerl_lightning")
    log.handlers.clear()  # the fixture puts them back
    for _ in range(3):
        refused("compare", "one", "two")
    assert len(log.handlers) == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m prerl_lightning.cli help metrics | head -n 1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    assert len(found.stdout.splitlines()) == 1
