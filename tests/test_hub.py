"""A model's card and its way to the Hugging Face hub; a checkpoint of Lightning's registry; `--ckpt_path auto`."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from report_runs import write_run

from prerl_lightning import resume
from prerl_lightning.callbacks.saving import ExportModel
from prerl_lightning.compat import registry_name
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import empty_model
from prerl_lightning.report.card import card
from prerl_lightning.report.reading import read_run

RUN = SimpleNamespace(is_global_zero=True, fast_dev_run=False)


@pytest.fixture
def run(tmp_path):
    """A finished run of two lives, with an exported model."""
    folder = tmp_path / "runs" / "dsrl" / "version_0"
    write_run(folder, steps=20, switch=10)
    info = json.loads((folder / "run.json").read_text())
    info |= {"model": "/home/someone/models/Qwen3-4B", "warnings": ["see /home/someone/notes.txt"]}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def test_a_model_card(run):
    text = card(read_run(run))
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["tags"][-2:] == ["nsr-prerl", "grpo"]
    assert "base_model" not in header
    assert "| 1 | NSR-PreRL | 0 |\n| 2 | GRPO | 10 |" in body
    rows = {line.split("|")[1].strip(): line for line in body.splitlines() if line.startswith("| ")}
    assert rows["avg@8"].count("[") == 2
    assert "step 0 | step 20" in rows["held out, with 95 % intervals over problems"]
    assert "Qwen3-4B" in body
    assert "someone" not in text
    assert all(f"\n- {fact}: " in body for fact in ("seed", "machine", "versions", "warned"))
    info = json.loads((run / "run.json").read_text()) | {"model": "Qwen/Qwen3-4B"}
    (run / "run.json").write_text(json.dumps(info))
    assert yaml.safe_load(card(read_run(run)).split("---\n")[1])["base_model"] == "Qwen/Qwen3-4B"


@pytest.fixture
def server(monkeypatch):
    """As much of the hub as a push asks of it; what it was sent."""
    seen = SimpleNamespace(created=None, files={}, status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = {}
            if self.path == "/api/repos/create":
                seen.created = json.loads(body)
                answer = {"url": f"{constants.ENDPOINT}/me/{seen.created['name']}"}
            elif "/preupload/" in self.path:
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": f["path"], **plain} for f in json.loads(body)["files"]]}
            elif "/commit/" in self.path:
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                seen.files = {f["path"]: base64.b64decode(f["content"]).decode() for f in lines if "path" in f}
                answer = {"commitUrl": f"{constants.ENDPOINT}/me/model/commit/1", "commitOid": "1", "success": True}
            text = json.dumps(answer).encode()
            self.send_response(seen.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go another way
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    yield seen
    http.shutdown()
    http.server_close()


def test_a_push(run, server, caplog):
    caplog.set_level("INFO", "prerl_lightning")
    export = ExportModel(push_to_hub="me/model")
    export.check_run(RUN, None)
    assert (server.created["name"], server.created["organization"]) == ("model", "me")
    assert server.created.get("private") or server.created["visibility"] == "private"
    export._written = run / "model"
    export.on_fit_end(RUN, None)
    assert server.files == {"config.json": "{}", "README.md": card(read_run(run))}
    assert "The model is at http://127.0.0.1" in caplog.text
    export._written, server.status = run / "model", 403  # a run that is over does not fail of it
    export.on_fit_end(RUN, None)
    assert f"By hand: hf upload me/model {run / 'model'}" in caplog.text
    assert "very_secret" not in caplog.text
    with pytest.raises(InputError, match=r"^export.push_to_hub: me/model cannot be written to: HfHubHTTPError"):
        export.check_run(RUN, None)
    export.check_run(SimpleNamespace(is_global_zero=False, fast_dev_run=False), None)


def test_what_cannot_be_pushed_is_refused_before_the_training(monkeypatch, server):
    with pytest.raises(InputError, match=r"nothing is exported with export.enabled: false"):
        ExportModel(enabled=False, push_to_hub="me/model")
    with pytest.raises(InputError, match=r"a/b/c cannot be written to: HFValidationError"):
        ExportModel(push_to_hub="a/b/c").check_run(RUN, None)
    monkeypatch.setattr("prerl_lightning.hub.get_token", lambda: None)
    with pytest.raises(InputError, match="no token of the hub is here: hf auth login"):
        ExportModel(push_to_hub="me/model").check_run(RUN, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be reached from here"):
        ExportModel(push_to_hub="me/model").check_run(RUN, None)


# ---------------------------------------------------------------------- Lightning's registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """litmodels, its download replaced: each model that is asked for, by name, brings the files that it has here."""
    state = {f"policy.model.{name}": tensor for name, tensor in empty_model("embedded").state_dict().items()}
    state = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    whole = {"state_dict": state, "loops": {}, "pytorch-lightning_version": "2.6.6"}
    models = {
        "me/space/model": ["step=4.ckpt"],
        "me/space/model:v2": ["a/last.ckpt"],
        "me/space/two": ["a.ckpt", "b.ckpt"],
    }
    asked = []

    def download_model(name, download_dir, progress_bar=True):
        asked.append(name)
        for file in models[name]:
            (Path(download_dir) / file).parent.mkdir(parents=True, exist_ok=True)
            torch.save(whole, Path(download_dir) / file)

    module = ModuleType("litmodels")
    module.download_model = download_model
    monkeypatch.setitem(sys.modules, "litmodels", module)
    monkeypatch.delenv(resume.RESUMED_FROM, raising=False)
    return asked


def chosen(ckpt_path, runs):
    objective = SimpleNamespace(model_name="embedded", lora=None)
    return resume.chosen(ckpt_path, [runs], objective, None, "max", True)


def test_a_checkpoint_of_the_registry(registry, tmp_path, monkeypatch):
    stale = tmp_path / "registry" / "me_space_model" / "step=2.ckpt"  # of an earlier version
    stale.parent.mkdir(parents=True)
    stale.touch()
    first = chosen("registry:me/space/model", tmp_path)
    assert first == str(stale.with_name("step=4.ckpt"))
    assert chosen("registry:me/space/model:version:v2", tmp_path).endswith("registry/me_space_model_v2/a/last.ckpt")
    # a rank that this process started takes the same; of another's nobody knows
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(resume.RESUMED_FROM, f"{tmp_path}\n{first}")
    assert chosen("registry:me/space/model", tmp_path) == first
    assert registry == ["me/space/model", "me/space/model:v2"]
    monkeypatch.delenv(resume.RESUMED_FROM)
    with pytest.raises(InputError, match="ranks that prerl has not started cannot share a download"):
        chosen("registry:me/space/model", tmp_path)


def test_what_the_registry_has_not(registry, tmp_path, monkeypatch):
    for given, says in (
        ("registry:me/space/two", "holds 2 checkpoints"),
        ("registry:me/space/none", "could not be downloaded: KeyError"),
        ("registry", "names no model. Write registry:"),
    ):
        with pytest.raises(InputError, match=f"^--ckpt_path: .*{says}"):
            chosen(given, tmp_path)
    assert [registry_name(given) for given in ("registry:m:version:3", "last", "my/registry")] == ["m:3", None, None]
    monkeypatch.setitem(sys.modules, "litmodels", None)
    with pytest.raises(InputError, match="needs the package litmodels: pip install litmodels"):
        chosen("registry:me/space/model", tmp_path)


def test_auto_is_last_or_none(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "prerl_lightning")
    monkeypatch.delenv(resume.RESUMED_FROM, raising=False)
    monkeypatch.setattr(resume, "check_weights", lambda *_: None)
    assert chosen("auto", tmp_path) is None
    assert f"A new run: there is no last.ckpt below {tmp_path}" in caplog.text
    (tmp_path / "version_0").mkdir()
    torch.save({}, tmp_path / "version_0" / "last.ckpt")
    monkeypatch.setenv("LOCAL_RANK", "1")  # started by the first, which had seen none
    assert chosen("auto", tmp_path) is None
    monkeypatch.delenv("LOCAL_RANK")
    assert chosen("auto", tmp_path) == chosen("last", tmp_path) == str(tmp_path / "version_0" / "last.ckpt")
