"""No code from checkpoints, models, templates, runs and completions, and no key in what a run writes."""

import csv
import json
import pathlib
import re
import shutil
import sys
import zipfile

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from test_watchers import sample

from prerl_lightning import manual, secrets, shipped
from prerl_lightning.callbacks.sample_views import terminal_line
from prerl_lightning.cli import main
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.errors import InputError
from prerl_lightning.jobs.files import arguments_and_files
from prerl_lightning.metrics.thoughts import load_families
from prerl_lightning.policy.model import load_config, load_model, load_tokenizer
from prerl_lightning.resume import load
from prerl_lightning.types import Problem

KEY = "f00dcafe0123456789"
CONFIG = """
model: {{class_path: GRPO, init_args: {{model: {model}, lr: 1.0e-3}}}}
data:
  train: {{class_path: ArithmeticProblems, init_args: {{split: train, size: 64}}}}
  reward: parity.parity_reward
  verification: {{workers: 0}}
  prompts_per_step: 2
  sampling: {{group_size: 2, max_new_tokens: 4}}
  engine: plain_engine.PlainEngine
trainer:
  accelerator: cpu
  max_steps: 1
  logger: {{class_path: test_security.KeyedLogger, init_args: {{api_key: {key}1, uri: "https://me:{key}2@host/x"}}}}
  callbacks: {{class_path: test_security.Judge, init_args: {{options: [{{hf_token: {key}3, eos_token: "</s>"}}]}}}}
alignment: {{every_n_steps: 0}}
"""


class KeyedLogger(CSVLogger):
    def __init__(self, api_key: str, uri: str, save_dir: str = "runs", name: str = "keyed"):
        super().__init__(save_dir, name=name)
        assert api_key == f"{KEY}1"  # it is given what is hidden from others
        assert f"{KEY}2" in uri


class Judge(L.Callback):
    def __init__(self, options: list[dict]):
        assert options == [{"hf_token": f"{KEY}3", "eos_token": "</s>"}]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def fit(*args):
    """`prerl fit` in this process, as if called by its own command line."""
    from prerl_lightning.run import PrerlCLI

    sys.argv[1:] = ["fit", "--config=keyed.yaml", *map(str, args)]
    return PrerlCLI.run(sys.argv[1:])


@pytest.fixture(scope="module")
def ran(tmp_path_factory, model_folder):
    """A folder with a run of one step whose configuration and command line hold keys."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keyed.yaml").write_text(CONFIG.format(model=model_folder("llama-untied"), key=KEY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["prerl"])
        fit("--trainer.logger.init_args.api_key", f"{KEY}1")
    return folder


@pytest.fixture
def here(ran, refused):
    """The working directory, with a copy of all that lies there."""
    shutil.copytree(ran, pathlib.Path.cwd(), dirs_exist_ok=True)
    return pathlib.Path.cwd()


RUN = "runs/keyed/version_0"


# ---------------------------------------------------------------------- keys


def test_no_key_in_what_a_run_writes(here):
    written = [p for p in here.rglob("*") if p.is_file() and p.name != "keyed.yaml"]
    assert {"config.yaml", "run.json", "last.ckpt", "metrics.csv", "model.safetensors"} <= {p.name for p in written}
    assert not [p for p in written if KEY.encode() in p.read_bytes()]  # torch's zip files are not compressed
    config = (here / RUN / "config.yaml").read_text()
    assert "api_key: <hidden>" in config
    assert "hf_token: <hidden>" in config
    assert "https://me:<hidden>@host/x" in config
    assert "eos_token: </s>" in config
    record = json.loads((here / RUN / "run.json").read_text())
    assert record["command"][-2:] == ["--trainer.logger.init_args.api_key", "<hidden>"]


def test_a_run_is_resumed_with_its_keys_and_not_without(here, refused, monkeypatch):
    shutil.copy(f"{RUN}/config.yaml", "again.yaml")
    said = refused("fit", "--config=again.yaml")
    assert "prerl: error: trainer.logger.init_args.api_key: its value, a secret, was left out" in said
    loads = []
    plain = torch.load
    monkeypatch.setattr("torch.load", lambda *a, **kw: loads.append(kw.get("weights_only")) or plain(*a, **kw))
    fit("--ckpt_path=last", "--trainer.max_steps=2")
    assert json.loads((here / "runs/keyed/version_1/run.json").read_text())["status"] == "finished"
    assert len(loads) >= 2  # ours and Lightning's, whose default for a checkpoint from the net is another
    assert set(loads) == {True}


def test_a_report_hides_what_older_runs_wrote(here):
    run = here / RUN
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("api_key: <hidden>", f"api_key: '{KEY}'"))
    record = json.loads((run / "run.json").read_text()) | {
        "command": ["prerl", "--a.password", KEY, f"--b={{token: {KEY}}}"]
    }
    (run / "run.json").write_text(json.dumps(record))
    main(["report", RUN, "--out", "page.html"])
    assert KEY not in (here / "page.html").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apikey", "a.b.WANDB_API_KEY", "token", "hf_token", "db_password", "secret", "X-Api-Key"),
        *("bearer_token", "aws_session_token", "api_keys", "tokens", "passwords", "Authorization"),
    ],
)
def test_names_of_secrets(name):
    assert secrets.is_secret(name)
    hidden, key = secrets.HIDDEN, name.rpartition(".")[2]
    held = {"one": "abc", "more": ["abc", {"two": "abc"}], "off": False, "none": None}
    for value, expected in (("abc", hidden), (["abc"], [hidden]), (("abc",), (hidden,)), ("", ""), (None, None)):
        assert secrets.hide({"x": [{key: value, "other": "abc"}]}) == {"x": [{key: expected, "other": "abc"}]}
    found = secrets.hide({key: held})
    assert found == {key: {"one": hidden, "more": [hidden, {"two": hidden}], "off": False, "none": None}}
    assert [*secrets.hidden_keys(found)] == [f"{key}.one", f"{key}.more", f"{key}.more.two"]
    texts = (
        f"--{name}=abc",
        f"{{{name}: abc, b: 1}}",
        f'{{"{name}": "a bc"}}',
        f"  {name}: 'a bc'",
        f"{name}: [a, bc]",
    )
    below = (f"{name}:\n  one: bc\n  two:\n  - bc", f"  {name}:\n  - bc\n  - 'bc'", f"- {name}: |-\n    bc")
    for text in (*texts, f"{name}: {{a: bc}}", f"--{name}.one=bc", *below, f"https://host/x?{key}=bc&b=1"):
        assert "bc" not in secrets.hide_in_text(text)
    assert secrets.hide_in_command([f"--{name}", "abc", "abc"]) == [f"--{name}", hidden, "abc"]
    assert secrets.hide_in_command([f"--{name}.one", "abc", f"--{name}+", "a"])[1::2] == [hidden, hidden]


@pytest.mark.parametrize(
    "name",
    [
        *("answer_key", "eos_token", "max_new_tokens", "key", "token_ids", "passes", "tokenizer", "bos_token"),
        *("stop_token_ids", "max_tokens_per_microbatch", "special-token", "max_prompt_tokens"),
    ],
)
def test_names_of_what_is_none(name):
    config = {name: "abc", "nested": [{name: 3}, {name: {"a": "b"}}, f"{name}: 3"]}
    assert not secrets.is_secret(f"data.{name}")
    assert secrets.hide(config) == config
    for text in (f"{name}: abc", f"{name}:\n  a: b\n"):
        assert secrets.hide_in_text(text) == text
    assert secrets.hide_in_command([f"--{name}", "abc", f"--{name}=abc"]) == [f"--{name}", "abc", f"--{name}=abc"]


def test_numbers():
    """Of tokens, one is a count and several are ids; any other secret's is hidden."""
    config = {"token": 12, "a_password": 1.5, "tokens": 128, "b": {"tokens": [1, 2]}, "auth_token": True}
    hidden = {"token": secrets.HIDDEN, "a_password": secrets.HIDDEN}
    assert secrets.hide(config) == config | hidden
    command = ["--tokens", "128", "--a.tokens=128", "--tokens=[1, 2]", "`tokens: 1`."]
    assert secrets.hide_in_command(command) == command


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://judge.example/v1?api_key=sk-123", "https://judge.example/v1?api_key=<hidden>"),
        ("https://host/v1?model=a&key=sk-1&n=2", "https://host/v1?model=a&key=<hidden>&n=2"),
        ("https://s3/x?X-Amz-Signature=ab%2F&sig=cd", "https://s3/x?X-Amz-Signature=<hidden>&sig=<hidden>"),
        ("https://ghp_secret@github.com/x", "https://<hidden>@github.com/x"),
        ("git+https://ghp_secret@github.com/x", "git+https://<hidden>@github.com/x"),
        ("postgres://me:p@ss@host/db", "postgres://me:<hidden>@host/db"),
        ("Authorization: Bearer sk-9", "Authorization: Bearer <hidden>"),
        ("curl -H 'Authorization: Basic YTpi' host", "curl -H 'Authorization: Basic <hidden>' host"),
        ("Bearer sk-9", "Bearer <hidden>"),
        ("X-Api-Key: sk", "X-Api-Key: <hidden>"),
        ("--api_key=sk", "--api_key=<hidden>"),
        *(
            (plain, plain)
            for plain in (
                *("ssh://git@github.com/x", "https://host/x?mail=me@host&page=2", "https://host:8000/v1", "me@host"),
                *(
                    "Bearer of 3 swords",
                    "The token: think. Basic facts",
                    "Password:{prompt}",
                    "{prompt}\nSecret: {answer}",
                ),
            )
        ),
    ],
)
def test_secrets_by_their_place(text, expected):
    assert secrets.hide({"a": [text]}) == {"a": [expected]}
    assert [*secrets.hidden_keys(secrets.hide({"a": text}))] == (["a"] if "<hidden>" in expected else [])
    if "<hidden>" in expected:
        secret = set(re.split(r"\W+", text)) - set(re.split(r"\W+", expected))
        shown = secrets.hide_in_command([text, f"--a={text}"])
        assert secret
        assert not [word for word in secret for each in shown if word in re.split(r"\W+", each)]


def test_nothing_is_hidden_in_what_is_shipped():
    for name in shipped.names():
        text = (shipped.FOLDER / f"{name}.yaml").read_text()
        assert secrets.hide(yaml.safe_load(text)) == yaml.safe_load(text)
        assert secrets.hide_in_text(text) == text
    assert not [key for key in manual.options() if secrets.is_secret(key)]


@pytest.mark.parametrize(
    "text", ["https://host/v1?api_key=sk-1", "https://ghp_a@github.com/x", "Authorization: Bearer a1"]
)
def test_a_job_takes_no_secret_along(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("judged.yaml").write_text(json.dumps({"data": {"reward": {"init_args": {"options": [text]}}}}))
    with pytest.raises(InputError, match=r"judged\.yaml: data\.reward\.init_args\.options, a key or password, would"):
        arguments_and_files(["--config", "judged.yaml"], {})


# ---------------------------------------------------------------------- checkpoints, models


def test_checkpoints_run_no_code(here, refused):
    """Neither where it is compared, nor by Lightning; what is none of ours is refused unless a flag says otherwise."""
    ours = torch.load(f"{RUN}/checkpoints/last.ckpt", weights_only=True)
    torch.save(ours | {"extra": Touch(here / "marker")}, f"{RUN}/checkpoints/last.ckpt")
    said = refused("fit", "--config=keyed.yaml", "--ckpt_path=last", "--trainer.max_steps=2")
    assert "last.ckpt holds more than tensors and plain values (io.open)" in said
    assert "--weights_only false" in said
    with pytest.raises(InputError, match="more than tensors"):
        load(f"{RUN}/checkpoints/last.ckpt")
    assert not (here / "marker").exists()
    torch.save(ours | {"extra": pathlib.Path("x")}, "odd.ckpt")
    fit("--ckpt_path=odd.ckpt", "--trainer.max_steps=2", "--weights_only=false")
    assert "weights_only: null" in (here / "runs/keyed/version_1/config.yaml").read_text()


def test_names_in_a_checkpoint_s_zip_lead_nowhere(here):
    path = here / "inner" / "odd.ckpt"
    path.parent.mkdir()
    shutil.copy(f"{RUN}/checkpoints/last.ckpt", path)
    with zipfile.ZipFile(path, "a") as file:
        for name in ("../evil", "last/../../evil", str(here / "evil")):
            file.writestr(name, "x")
    before = sorted(here.rglob("*"))
    with pytest.raises(InputError, match="is no training checkpoint"):
        load(str(path))
    assert sorted(here.rglob("*")) == before


def test_pickled_weights_run_no_code(tmp_path, model_folder):
    shutil.copytree(model_folder("llama-untied"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(tmp_path / "marker")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="its pickled weights are damaged or hold more"):
        load_model(str(tmp_path / "model"))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("known", [False, True])
def test_a_model_s_own_code_is_not_run(tmp_path, model_folder, known, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nor is anyone asked
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama-untied"), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    for file, names in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ())):
        value = json.loads((folder / file).read_text())
        value |= {"auto_map": dict.fromkeys(names, "evil.Evil") or {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        value |= {} if known else {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
        (folder / file).write_text(json.dumps(value))
    for loads in (load_config, load_tokenizer, load_model):
        if known:
            loads(str(folder))
        else:
            with pytest.raises(InputError, match="brings code of its own"):
                loads(str(folder))
    assert not (tmp_path / "marker").exists()


def test_chat_templates_are_in_a_sandbox(tmp_path):
    tokenizer = load_tokenizer("embedded-sums")
    problem = Problem(3, [{"role": "user", "content": "x"}], "")
    globals_of = "cycler.__init__.__globals__"
    for evil in (f"{globals_of}.os.system('touch {tmp_path}/marker')", "''.__class__.__mro__[1].__subclasses__()"):
        tokenizer.chat_template = "{{ " + evil + " }}"
        with pytest.raises(InputError, match=r"Row 3: the chat template .* fails \((Security|Undefined)Error"):
            PromptFormat().encode([problem], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(InputError, match=r"TemplateError: no system message"):
        PromptFormat().encode([problem], tokenizer)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is shown


def test_no_cell_of_a_run_is_a_formula(here):
    """Its header has the names of families of thoughts, which are words."""
    with (here / RUN / "metrics.csv").open() as file:
        header, *rows = csv.reader(file)
    assert all(name[0].isalpha() for name in header)
    for cell in (cell for row in rows for cell in row if cell):
        float(cell)
    for name in ("=HYPERLINK(1)", "@sum", "+1"):
        with pytest.raises(InputError, match="a family is one word"):
            load_families({name: ["wait"]})


EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r wait\n4"


def test_completions_cannot_steer_the_terminal(capsys):
    """In the lines of samples, for a terminal and for a file, and in all else that is logged or refused."""
    shown = Console(force_terminal=True, width=200, color_system=None)
    before = {"step": 1, "response": f"5 {EVIL}", "reward": 0.0}
    thought = EVIL.index("wait")
    row = sample(response=EVIL, prompt=EVIL, ground_truth=EVIL, thoughts=[(thought, thought + 4, "a")], previous=before)
    line = terminal_line(row, 300)
    assert line.plain[line.spans[0].start : line.spans[0].end] == "wait"
    assert "·[2J·]0;title··31m·· wait" in line.plain
    assert line.plain.endswith("wait\\n4 (changed since step 1)")
    with shown.capture() as drawn:
        shown.print(line)
    for text in (line.plain, drawn.get()):
        assert not any(c in text for c in "\x1b]\x07\x9b\u202e\r".replace("]", ""))


def test_messages_cannot_steer_the_terminal(refused, monkeypatch, tmp_path):
    import prerl_lightning.report.watch

    def say(_):
        import logging

        logging.getLogger("prerl_lightning.test").warning("one%s\ntwo", EVIL)
        raise InputError(f"first {EVIL}\nsecond")

    monkeypatch.setattr(prerl_lightning.report.watch, "watch", say)
    monkeypatch.setattr("sys.stdout", (tmp_path / "out").open("w"))
    said = refused("watch")
    sys.stdout.close()
    logged = (tmp_path / "out").read_text()
    assert said == "first ·[2J·]0;title··31m·· wait\n4\nprerl: error: second\n"
    assert logged == "one·[2J·]0;title··31m·· wait\n4\ntwo\n"
