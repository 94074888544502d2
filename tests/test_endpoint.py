"""`prerl evaluate --endpoint` against a small server of this process that speaks OpenAI's API, and `vllm serve`."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prerl_lightning.errors import InputError
from prerl_lightning.evaluation import evaluate as from_python
from prerl_lightning.evaluation.command import evaluate
from prerl_lightning.policy.model import model_path
from prerl_lightning.rollout.endpoint import Endpoint
from prerl_lightning.rollout.engine import Place, Sampling


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "big"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
            busy = server.busy > 0
            server.busy -= busy
        if busy:
            return self.reply({"error": "busy"}, 503)
        if body["model"] != "big":
            return self.reply({"error": "no such model"}, 404)
        chat = self.path == "/v1/chat/completions"
        question = body["messages"][-1]["content"] if chat else body["prompt"]
        # right when greedy, and for every other seed
        right = body["temperature"] == 0 or body["seed"] % 2 == 0
        text = f"It is \\boxed{{{len(question) if right else 'wrong'}}}."
        cut = body["seed"] % 4 == 3 and not right
        choice = {"finish_reason": "length" if cut else "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return self.reply({"choices": [choice], "usage": {"completion_tokens": len(text)}})

    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    there = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.asked, there.busy, there.lock = [], 0, threading.Lock()
    there.url = f"http://127.0.0.1:{there.server_port}/v1"
    thread = threading.Thread(target=there.serve_forever, args=(0.02,))
    thread.start()
    yield there
    there.shutdown()
    thread.join()
    there.server_close()


@pytest.fixture
def problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": "x" * n, "answer": n} for n in range(1, 7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "aime24=rows.jsonl"


def test_an_evaluation_of_a_model_that_is_elsewhere(server, problems, tmp_path, monkeypatch, caplog):
    """No tokenizer, no weights: a name that is no folder and no hub id."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = ["--endpoint", server.url, "--model", "big", "--data", problems, "--k", "4", "--out", "out"]
    options += ["--data.sampling.max_new_tokens=33", "--data.val_sampling.temperature=0.6", "--data.sampling.top_k=20"]
    options += ["--data.format.chat_template_kwargs={enable_thinking: false}"]
    found = evaluate(options)["aime24"]
    records = [json.loads(line) for line in (tmp_path / "out" / "aime24.jsonl").read_text().splitlines()[1:]]
    assert [r["greedy"]["score"] for r in records] == [1.0] * 6
    assert found["greedy"] == 1
    samples = [s for r in records for s in r["samples"]]
    assert found["avg@4"] == sum(s["score"] for s in samples) / 24 == 0.5  # seeds in a row
    assert all(s["tokens"] == len(s["text"]) for s in samples)
    assert any(s["truncated"] for s in samples)
    assert len(server.asked) == 30
    first = server.asked[0]
    assert first["path"] == "/v1/chat/completions"
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    expected = {"model": "big", "max_tokens": 33, "temperature": 0.6, "top_k": 20, "key": "Bearer secret"}
    assert {key: first[key] for key in expected} == expected
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert {a["temperature"] for a in server.asked} == {0.6, 0.0}
    assert evaluate(options)["aime24"] == found  # all is there
    assert len(server.asked) == 30
    known = from_python("big", problems, k=4, folder=tmp_path / "python", endpoint=server.url)["aime24"]
    assert known["avg@4"] == found["avg@4"]
    with pytest.raises(InputError, match=r"does not serve 'small', but big"):
        evaluate([*options[:3], "small", *options[4:8], "--out", "other"])
    with pytest.raises(InputError, match=r"give --model as the server calls it"):
        evaluate(["--endpoint", server.url, "--data", problems])
    with pytest.raises(InputError, match=r"--endpoint: a server has devices of its own"):
        evaluate([*options, "--devices=2"])


def test_text_goes_to_completions_and_a_busy_server_is_asked_again(server, monkeypatch):
    waited = []
    monkeypatch.setattr("prerl_lightning.rollout.endpoint.time.sleep", waited.append)
    endpoint = Endpoint(server.url, "big")
    endpoint.start("", 0, Place())
    server.busy = 2
    told = []
    groups = endpoint.generate([b"abc", b"ab"], Sampling(group_size=2), [2, 4], on_group=lambda i, g: told.append(i))
    assert [[r.text for r in g] for g in groups] == [
        ["It is \\boxed{3}.", "It is \\boxed{wrong}."],
        ["It is \\boxed{2}.", "It is \\boxed{wrong}."],
    ]
    assert told == [0, 1]
    assert len(waited) == 2
    assert {a["path"] for a in server.asked} == {"/v1/completions"}
    assert not {"top_k", "stop", "stop_token_ids", "chat_template_kwargs"} & set(server.asked[0])
    with pytest.raises(InputError, match=r"/v1/completions answered 404 .*no such model"):
        Endpoint(server.url, "none").generate([b"a"], Sampling(), [0])
    with pytest.raises(InputError, match=r"cannot be asked .*Is the server running\?"):
        Endpoint("http://127.0.0.1:9/v1", "big").start("", 0, Place())
    with pytest.raises(InputError, match="is no URL such as"):
        Endpoint("localhost:8000", "big")
    with pytest.raises(InputError, match="cannot be given a policy's weights"):
        endpoint.update_weights([], 1)


@pytest.mark.slow
def test_vllm_serve_answers_token_for_token_as_the_engine_in_process(tmp_path, free_port, monkeypatch):
    """Texts and chats."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path("embedded")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(free_port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--enforce-eager"]
    command += ["--chat-template", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"]
    url, environment = f"http://127.0.0.1:{free_port}/v1", {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # tests/conftest.py has it off, for the engine in this process
    options = ["--config=dsrl", "--data.val.init_args.size=8", "--data.sampling.max_new_tokens=64", "--k=4"]
    there = ["--endpoint", url, "--model", "tiny"]
    found, up = {}, False
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            while not up:
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
                with contextlib.suppress(InputError):  # it is not up yet
                    Endpoint(url, "tiny").start("", 0, Place())
                    up = True
            found["text"] = evaluate([*options, *there, "--out", "text"])
            found["chat"] = evaluate([*options, *there, "--out", "chat", "--data.format.chat=true"])
        finally:
            server.terminate()
    found["engine"] = evaluate([*options, "--data.engine.init_args.max_model_len=128", "--out", "engine"])
    assert found["text"] == found["chat"] == found["engine"]
    answers = {}
    for out in found:
        records = [json.loads(line) for line in (tmp_path / out / "val.jsonl").read_text().splitlines()[1:]]
        answers[out] = [(r["samples"], r["greedy"]) for r in records]
    assert answers["text"] == answers["chat"] == answers["engine"]
