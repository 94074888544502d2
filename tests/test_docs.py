"""README.md and docs/: commands and YAML are parsed, links lead somewhere, and all of it builds without a warning."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from prerl_lightning import cli, manual

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = {"model", "data", "trainer", "thoughts", "alignment", "samples", "weights", "health", "checkpoint", "export"}


def fenced(language):
    """(page, the line in front, text) of each block."""
    found = []
    for page in PAGES:
        before = ""
        lines, inside, kind = [], False, ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("```") and not inside:
                inside, kind, lines = True, line[3:].strip(), []
            elif line.startswith("```"):
                if kind == language:
                    found.append((page, before, "\n".join(lines) + "\n"))
                inside = False
            elif inside:
                lines.append(line)
            elif line.strip():
                before = line
    return found


def commands():
    """Those of `sh` blocks, those in backticks that begin with prerl and have an option, and a key with a value."""
    found = []
    for page, _, text in fenced("sh"):
        lines = text.replace("\\\n", " ").splitlines()
        found += [(page, line) for line in lines if line.strip() and not line.startswith("#")]
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        found += [(page, " ".join(code.split())) for code in re.findall(r"`(prerl [^`]*--[^`]*)`", text)]
        settings = [" ".join(code.split()) for code in re.findall(r"`(--[a-z_]+\.[^`\s]*\s[^`]+)`", text)]
        found += [(page, f"prerl fit --config my.yaml {setting}") for setting in settings]
    return sorted({(page.relative_to(ROOT).as_posix(), line) for page, line in found})


COMMANDS = commands()


def identified(rows):
    return [f"{Path(row[0]).name}-{i}" for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would stand: with the files that the documentation names or tells one to write."""
    made = tmp_path_factory.mktemp("reader")
    for name in ("configs", "benchmarks", "docs"):
        (made / name).symlink_to(ROOT / name)
    (made / "my.yaml").write_text((ROOT / "configs" / "dsrl.yaml").read_text())
    for _, _, text in fenced("python"):
        if named := re.match(r"# (my_\w+\.py)", text):
            (made / named[1]).write_text(text)
    (made / "my_module.py").write_text(
        "from prerl_lightning.objectives import GRPO\n\n\nclass MyObjective(GRPO):\n    pass\n"
    )
    return made


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="module")
def fit():
    """`prerl fit`, made once: nothing is built, and no model is looked at."""
    from parsing import Parsed

    class ParserOnly(Parsed):
        def before_instantiate_classes(self):
            pass

    return ParserOnly.run(["fit", "--config", str(ROOT / "configs" / "dsrl.yaml")])


def test_every_key_of_the_command_line_is_described_and_no_other(fit):
    there = {action.dest for action in fit._parser("fit")._actions} - {"help", "print_config"}
    there = {dest for dest in there if not dest.endswith(".help")}
    described = {f"{key}.{a.name}" for key, path in manual.KEYS.items() for a in manual.entry(path).arguments}
    assert {dest for dest in there if "." in dest} - manual.KEYS.keys() == described - manual.KEYS.keys()
    assert {dest for dest in there if "." not in dest} - manual.KEYS.keys() == {*manual.VALUES, "model"}


@pytest.fixture(scope="module")
def options():
    """A function from a command to the options that its --help names."""
    seen: dict[str, str] = {}

    def of(command, capsys):
        if command not in seen:
            module = importlib.import_module(cli.COMMANDS[command])
            with pytest.raises(SystemExit):
                getattr(module, command)(["--help"])
            seen[command] = capsys.readouterr().out
        return seen[command]

    return of


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=identified(COMMANDS))
def test_commands(page, line, here, options, fit, capsys):
    words = shlex.split(line, comments=True)
    words = words[1:] if words[0] in ("srun", "nohup") else words
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all("=" in word or word in targets for word in words[1:])
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), line
    elif words[0] == "prerl":
        command, args = words[1], words[2:]
        if command in cli.FITS:
            rest = ["my.yaml" if a == "FILE" else a for a in args if a not in ("--print_config", "--help")]
            fit.parser.parse_args([command, *rest])
        elif command == "help":
            from prerl_lightning.manual import help

            if args != ["[TOPIC]"]:
                help(args)
                assert capsys.readouterr().out
        elif command != "--help":
            assert command in cli.COMMANDS, line
            known = options(command, capsys)
            own = [a.partition("=")[0] for a in args if a.startswith("-") and not re.match(r"-\d", a)]
            for option in own:
                is_fit_s = command in ("evaluate", "doctor", "job") and option.removeprefix("--").split(".")[0] in KEYS
                assert option in known or is_fit_s or option == "--config", (line, option)
    else:
        assert words[0] in ("uv", "pip", "python3.11", "srun", "sbatch", "#!/bin/bash"), line


YAMLS = [(page.relative_to(ROOT).as_posix(), text) for page, _, text in fenced("yaml")]


@pytest.mark.parametrize(("page", "text"), YAMLS, ids=identified(YAMLS))
def test_yaml(page, text, here, tmp_path, fit):
    found = yaml.safe_load(text)
    if "arms" in found:
        from prerl_lightning.study.design import read_study

        study = here / "study"
        study.mkdir(exist_ok=True)
        for name in ("grpo.yaml", "dsrl.yaml"):
            (here / name).write_text((ROOT / "configs" / name).read_text())
        (study / "some.yaml").write_text(text)
        assert read_study(study / "some.yaml").claims
        return
    assert found.keys() <= KEYS, page
    (tmp_path / "some.yaml").write_text(text)
    whole = {"model", "data"} <= found.keys()
    base = [] if whole else ["--config", "my.yaml"]
    fit.parser.parse_args(["fit", *base, "--config", str(tmp_path / "some.yaml")])
    (tmp_path / "wrong.yaml").write_text(text.replace(next(iter(found)), "modell", 1))
    with pytest.raises(ArgumentError, match="modell"):  # so it is really read
        fit.parser.parse_args(["fit", *base, "--config", str(tmp_path / "wrong.yaml")])


PYTHON = [(page.relative_to(ROOT).as_posix(), before, text) for page, before, text in fenced("python")]


@pytest.mark.parametrize(("page", "before", "text"), PYTHON, ids=identified(PYTHON))
def test_python(page, before, text, here):
    """Runs, but where it would train: there every name is looked up."""
    import prerl_lightning

    code = compile(text, page, "exec")
    if "fit(" in text:
        names = set(re.findall(r"\bprerl\.(\w+)", text))
        assert not {name for name in names if not hasattr(prerl_lightning, name)}, page
    else:
        exec(code, {"__name__": "documentation"})


def test_the_successor_that_is_shown_is_the_overlay():
    of_the_guide = (yaml.safe_load(text) for page, text in YAMLS if page.endswith("guides/objectives.md"))
    (callbacks,) = (found["trainer"]["callbacks"] for found in of_the_guide if "trainer" in found)
    successor = callbacks[0]["init_args"]["successor"]
    assert successor["init_args"].pop("lr")
    assert successor == yaml.safe_load((ROOT / "configs" / "objectives" / "gspo.yaml").read_text())["model"]


def test_the_embedded_models_are_where_the_guide_says():
    from prerl_lightning.policy.model import EMBEDDED, model_path

    text = (ROOT / "docs" / "guides" / "own-task.md").read_text()
    for name in EMBEDDED:
        assert f"`{Path(model_path(name)).relative_to(ROOT).as_posix()}`" in text


def test_the_modules_that_processes_import_for_a_reward_load_no_torch(here):
    code = "import sys, my_rewards, my_problems; assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


def test_the_set_of_one_s_own_trains(here):
    """Two steps of the embedded model."""
    from plain_engine import PlainEngine

    import prerl_lightning as prerl

    (here / "sums.txt").write_text("".join(f"{a}+{a + 1}-{a}={a + 1}\n" for a in range(10, 18)))
    problems = importlib.import_module("my_problems").Sums("sums.txt")
    data = prerl.RolloutDataModule(
        train=problems,
        prompts_per_step=4,
        sampling=prerl.Sampling(group_size=2, max_new_tokens=16),
        verification=prerl.Verification(workers=0),
        engine=PlainEngine(),
    )
    run = prerl.fit(prerl.GRPO(model="embedded-sums", lr=3e-4), data, max_steps=2, name="own_set")
    assert len(run.metrics) == 2
    assert problems[1].prompt == "11+12-11=?\n"
    assert problems.reward("", "11+12=23;23-11=12#12", problems[1].ground_truth, {"truncated": False}) == 1


@pytest.mark.parametrize("page", ["trl", "verl"])
def test_our_names_beside_theirs_are_ours(page):
    text = (ROOT / "docs" / "coming-from" / f"{page}.md").read_text()
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    topics = {name: path for of_kind in manual.topics().values() for name, path in of_kind.items()}
    known = {f"{topic}.{a.name}" for topic, path in topics.items() for a in manual.entry(path).arguments}
    for row in rows:
        for name in re.findall(r"`([\w.]*\w)`", row):
            last = name.rpartition(".")[2]  # `.top_p` stands behind the name of another of its group
            full = not name.startswith((".", "model.", "data.engine.")) and "." in name
            assert name in known if full else last in topics or any(k.endswith(f".{last}") for k in known), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_paths_that_are_named_are_there():
    for page in PAGES:
        for path in re.findall(r"`((?:configs|benchmarks|tests|prerl_lightning|scripts)/[\w./]+)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


def test_every_page_is_in_a_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or f"\n{name}\n" in index, name


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150


@pytest.mark.skipif(not find_spec("sphinx"), reason="Sphinx is not installed: pip install -e '.[docs]'")
def test_it_builds_without_a_warning_and_asks_no_network(tmp_path):
    """Ten CPU seconds. The reference of every key comes from the docstrings."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        ROOT / "docs",
        tmp_path / "html",
    ]
    built = subprocess.run([*command, "-d", tmp_path / "trees"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "html").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"(?:https?:)?//", text
        ), page
    for sheet in (tmp_path / "html").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet
    shown = re.sub(r"<[^>]*>", "", (tmp_path / "html" / "reference" / "configuration.html").read_text(encoding="utf-8"))
    assert "prompts_per_step (int, 16)" in shown
    assert "<!-- prerl help" not in shown


def test_the_set_up_says_what_it_does(capsys, monkeypatch):
    """How many packages there are to be, and that something still happens."""
    names = runpy.run_path(str(ROOT / "scripts" / "setup_env.py"))
    answer = "Resolved 4 packages in 848ms\nWould download 3 packages\nWould install 4 packages\n + rich==15.0.0\n"
    assert names["number_of_packages"](answer) == "4 packages"
    monkeypatch.setitem(names["run"].__globals__, "PATIENCE", 0.1)
    names["run"]("sleep", "0.35")
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[set-up\] still at it after \d s, \d+\.\d GB written so far", first)
