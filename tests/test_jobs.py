"""`prerl job`: what goes along, what is refused, what lightning-sdk gets; and a script that is interrupted here."""

import base64
import gzip
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import environment_kept

from prerl_lightning.errors import InputError
from prerl_lightning.jobs import command
from prerl_lightning.report.reading import read_run

FILES = {
    "my.yaml": """
model: {{class_path: GRPO, init_args: {{model: {model}, lr: 1.0e-3}}}}
data:
  train: {{class_path: ArithmeticProblems, init_args: {{split: train, size: 64}}}}
  val: {{class_path: Files, init_args: {{path: data/held_out.jsonl}}}}
  reward: job_rewards.even
  verification: {{workers: 0}}
  prompts_per_step: 2
  val_samples: 2
  sampling: {{group_size: 4, max_new_tokens: 8}}
  engine: {{class_path: plain_engine.PlainEngine, init_args: {{limit: 64}}}}
trainer: {{accelerator: cpu, max_steps: 4, val_check_interval: 2}}
alignment: {{every_n_steps: 0}}
""",
    "ends.yaml": "trainer: {{callbacks: [{{class_path: job_package.ends.Terminated}}]}}\n",
    "job_rewards.py": "from job_helper import parity\n\n\ndef even(prompt, response, ground_truth, extra):\n"
    "    return parity(response)\n",
    "job_helper.py": "import json, os\n\n\ndef parity(text):\n    return float(sum(map(ord, text)) % 2)\n",
    "job_package/__init__.py": "",
    "job_package/ends.py": """
import os, signal
import lightning as L

class Terminated(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2 and not trainer.ckpt_path:
            os.kill(os.getpid(), signal.SIGTERM)
""",
    "data/held_out.jsonl": '{{"prompt": "1+1=", "answer": "2"}}\n{{"prompt": "1+2=", "answer": "3"}}\n',
    "other.py": "",
    "data/other.jsonl": "",
}
GIVEN = ["--config", "my.yaml", "--config=ends.yaml"]
RECORDS = '#!/bin/sh\n{ echo $$; pwd; for word; do echo "$word"; done; } > "$RECORD"\n'


def asked(*args):
    own, rest = command._parser().parse_known_args(["--machine=H100", "--name=try", *args])
    return own, command.of_job(own, rest)


def contents(arguments):
    """The packed files by their places."""
    text = re.search(r"<<'FILES'.*?\n(.*?)\nFILES\n", arguments["command"], re.S)[1]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(base64.b64decode(text)))) as tar:
        return {entry.name: tar.extractfile(entry).read().decode() for entry in tar}


@pytest.fixture
def here(tmp_path, monkeypatch, model_folder):
    """A user's folder, and none of this shell's variables of the platform."""
    folder = tmp_path / "mine"
    for place, text in FILES.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text.format(model=model_folder("llama-untied")))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in os.environ if name.startswith("LIGHTNING_")]:
        monkeypatch.delenv(name)
    return folder


def test_what_goes_along(here, tmp_path):
    (tmp_path / "shared.yaml").write_text("trainer: {max_steps: 9}")
    (here / "more").mkdir()
    (here / "more" / "few_shot.txt").write_text("2")
    given = [*GIVEN, f"--config={tmp_path / 'shared.yaml'}", "--config", "objectives/gspo", "--files", "more"]
    _, arguments = asked("--studio=s", *given, "--data.val_more={class_path: Files, init_args: {path: data/other*}}")
    assert contents(arguments).keys() == {
        *("my.yaml", "ends.yaml", "shared.yaml", "job_rewards.py", "job_helper.py", "job_package/__init__.py"),
        *("job_package/ends.py", "data/held_out.jsonl", "data/other.jsonl", "more/few_shot.txt"),
    }
    assert contents(arguments)["job_helper.py"] == FILES["job_helper.py"]
    ends = arguments["command"].splitlines()[-1]
    assert "--config my.yaml --config=ends.yaml --config=shared.yaml --config objectives/gspo " in ends
    assert "'--data.val_more={class_path: Files, init_args: {path: data/other*}}' --ckpt_path auto " in ends
    assert (arguments["interruptible"], arguments["max_run_attempts"], arguments["num_machines"]) == (False, None, 1)
    assert "num_nodes" not in arguments["command"]


def test_links_go_along_by_their_names(here, tmp_path):
    """Within this folder or out of it, and a link to a folder above its place is left out."""
    (tmp_path / "far" / "x").mkdir(parents=True)
    (tmp_path / "far" / "x" / "config.json").write_text("{}")
    (tmp_path / "far" / "x" / "around").symlink_to(tmp_path / "far")
    (here / "models").mkdir()
    (here / "models" / "x").symlink_to(tmp_path / "far" / "x")
    (here / "models" / "data").symlink_to(here / "data")
    given = ["--data.val_more=models/data/other.jsonl", "--model.init_args.model=models/x"]
    along = contents(asked("--studio=s", "--config=my.yaml", *given)[1])
    assert {"models/x/config.json", "models/data/other.jsonl", "data/held_out.jsonl"} <= along.keys()
    assert [name for name in along if "around" in name] == []


def test_machines_and_their_variables(here):
    given = ["--num_machines=2", "--folder=/teamspace/shared", "--interruptible", "--source=https://git.org/me/fork"]
    _, arguments = asked("--image=me/prerl", "--path_mappings=/runs=bucket:a/b", *given, *GIVEN)
    assert arguments["path_mappings"] == {"/runs": "bucket:a/b"}
    assert (arguments["num_machines"], arguments["max_run_attempts"]) == (2, command.ATTEMPTS)
    text = arguments["command"]
    assert all(part in text for part in ("--trainer.num_nodes 2", 'work="${PRERL_DRY_RUN:-/teamspace/shared}/try"'))
    assert "git clone -q https://git.org/me/fork" in text
    env = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    env["PRERL_DRY_RUN"] = str(here / "job")
    alone = subprocess.run(["sh", "-c", text], env=env, capture_output=True, text=True)
    assert alone.returncode
    assert "MASTER_ADDR" in alone.stderr


REFUSED = [
    ("--config=my.yaml", "where. Give --studio NAME or --image"),
    ("--studio=s", "give --config FILE"),
    ("--studio=s --config=mine.yaml", "mine.yaml: no such file"),
    ("--studio=s --config=my.yaml --num_machines=2", "--num_machines: the machines need one folder"),
    ("--studio=s --config=my.yaml --num_machines=0", "--num_machines: 0 must be"),
    ("--image=i --config=my.yaml", "--image: it keeps no files"),
    ("--studio=s --config=my.yaml --folder=runs", "--folder: runs must begin with /"),
    ("--studio=s --config=my.yaml --path_mappings=/a=b", "--path_mappings: of an --image"),
    ("--studio=s --config=my.yaml --env=NOT_THERE", "--env: NOT_THERE is no variable"),
    ("--studio=s --config=my.yaml --env=HF_TOKEN=abc", "--env: HF_TOKEN=<hidden> is no variable"),
    ("--studio=s --config=my.yaml --ckpt_path=last", "--ckpt_path: a job goes on from its own"),
    ("--studio=s --config=my.yaml --trainer.logger.init_args.api_key=abc", "among its arguments would stand in"),
    ("--studio=s --config=my.yaml --source=https://me:abc@git.org/fork", "among its arguments would stand in"),
    ("--studio=s --config=keyed.yaml", r"keyed.yaml: trainer.logger.init_args.api_key, a key or password, would"),
    ("--studio=s --config=my.yaml --data.val_more=../far.jsonl", "data.val_more: ../far.jsonl is not below"),
    ("--studio=s --config=my.yaml --files=large.bin", r"The largest: large.bin \(200,000 bytes\)"),
    ("--studio=s --config=my.yaml --files=huge.bin", r"The largest: huge.bin \(9,000,000 bytes\)"),
    ("--studio=s --config=my.yaml --files=absent", "--files: absent: no such"),
    ("--studio=s --config=my.yaml --name=a/b", "--name: 'a/b' must be"),
]


def test_refusals(here):
    (here / "keyed.yaml").write_text("trainer: {logger: {class_path: CometLogger, init_args: {api_key: abc}}}")
    (here.parent / "far.jsonl").touch()
    (here / "large.bin").write_bytes(os.urandom(200_000))
    with (here / "huge.bin").open("wb") as file:
        file.truncate(9_000_000)
    for line, says in REFUSED:
        with pytest.raises(InputError, match=says) as error:
            asked(*line.split())
        assert "abc" not in str(error.value)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A `prerl` that writes down its process id, its folder and its arguments; a function that reads them."""
    (tmp_path / "bin").mkdir()
    prerl = tmp_path / "bin" / "prerl"
    prerl.write_text(RECORDS)
    prerl.chmod(0o755)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))

    def read():
        number, folder, *words = (tmp_path / "record").read_text().splitlines()
        return int(number), Path(folder), words

    return prerl, read


def test_a_dry_run(here, recorded, monkeypatch, capfd):
    prerl, read = recorded
    monkeypatch.setattr(sys, "executable", str(prerl.parent / "python"))
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    given = ["--machine=H100", "--studio=s", "--name=try", *GIVEN, "--env=WANDB_API_KEY", "--dry_run"]
    command.job(given)
    out = capfd.readouterr().out
    assert "WANDB_API_KEY (of this shell)" in out
    assert "very-secret" not in out
    assert asked("--studio=s", *GIVEN)[1]["command"] in out
    assert out.endswith("nothing was sent.\n")
    _, folder, words = read()
    assert words == ["fit", *GIVEN, "--ckpt_path", "auto", "--print_config"]
    assert folder.name == "try"
    assert not folder.exists()
    prerl.write_text("#!/bin/sh\necho prerl: error: lr: no such key >&2; exit 2\n")
    with pytest.raises(InputError, match=r"lr: no such key\nprerl job: its script ends with 2 here; nothing was sent"):
        command.job(given)


def test_a_dry_run_s_script_in_a_file(here, recorded, monkeypatch, capfd):
    prerl, read = recorded
    monkeypatch.setattr(sys, "executable", str(prerl.parent / "python"))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    given = ["--machine=H1000", "--studio=s", "--name=try", *GIVEN, "--dry_run"]
    command.job([*given, "--script=job.sh"])
    out = capfd.readouterr().out
    assert "set -eu" not in out
    assert "Whether there is a machine H1000 was not looked at: lightning-sdk is not installed here." in out
    assert "PRERL_DRY_RUN=FOLDER sh job.sh does that again" in out
    assert (here / "job.sh").read_text() == asked("--studio=s", *GIVEN)[1]["command"]
    environment = os.environ | {"PRERL_DRY_RUN": str(here / "there"), "PATH": f"{prerl.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "job.sh"], env=environment, check=True)
    assert read()[1] == here / "there" / "try"
    with pytest.raises(InputError, match=r"--script: nowhere/job\.sh: No such file"):
        command.job([*given, "--script=nowhere/job.sh"])


def test_what_is_kept_keeps_its_times_and_links(here, recorded, tmp_path):
    """By times a checkpoint is the newest."""
    prerl, _ = recorded
    kept = tmp_path / "shown" / "try" / "try"
    kept.mkdir(parents=True)
    (kept / "a.ckpt").write_text("weights")
    (kept / "last.ckpt").hardlink_to(kept / "a.ckpt")
    os.utime(kept / "a.ckpt", (1e9, 1e9))
    text = asked("--studio=s", *GIVEN)[1]["command"].replace("/teamspace/jobs", str(tmp_path / "shown"))
    environment = os.environ | {"PRERL_DRY_RUN": str(tmp_path), "PATH": f"{prerl.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", text], env=environment, check=True)
    made = tmp_path / "try"
    assert (made / "a.ckpt").stat().st_mtime == 1e9
    assert (made / "a.ckpt").samefile(made / "last.ckpt")


def run(words, folder, code=None):
    """`prerl` in this process, in ``folder``."""
    from prerl_lightning.cli import main

    with pytest.MonkeyPatch.context() as patch, environment_kept():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["prerl"])
        patch.setattr(sys, "path", [*sys.path])
        if code is None:
            return main(words)
        with pytest.raises(SystemExit) as ending:
            main(words)
        assert ending.value.code == code


def test_an_interrupted_script_goes_on_where_it_was(here, recorded, tmp_path, monkeypatch):
    """Here on a new machine, to which the platform shows the files of the first; and ends as an uninterrupted one."""
    prerl, read = recorded
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = tmp_path / "home" / "prerl-lightning"
    source.mkdir(parents=True)
    (source / "Makefile").write_text(f"setup:\n\tmkdir -p .venv/bin\n\tcp {prerl} .venv/bin\n")
    text = asked("--studio=s", *GIVEN)[1]["command"].replace("/teamspace/jobs", str(tmp_path / "shown"))
    run(["fit", "--config=my.yaml", "--ckpt_path=auto"], here)
    for name in ("job_rewards", "job_helper", "job_package", "job_package.ends"):
        sys.modules.pop(name, None)
    sys.path.remove(str(here))  # what is not in the job's own folder is nowhere

    def attempt(machine):
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path / machine))
        shell = subprocess.Popen(["sh", "-c", text])
        assert shell.wait() == 0
        number, folder, words = read()
        assert number == shell.pid  # that a signal to the job's shell reaches
        assert folder == tmp_path / machine / "try"
        return words, folder

    words, first = attempt("first")
    run(words, first, code=128 + signal.SIGTERM)
    assert attempt("first") == (words, first)
    shutil.move(first, tmp_path / "shown" / "try" / "try")
    assert attempt("second")[0] == words
    run(words, tmp_path / "second" / "try")
    ended = read_run(tmp_path / "second" / "try" / "runs" / "my" / "version_1")
    assert ended.info["resumed_from"].startswith(str(ended.folder.parent / "version_0"))
    whole = read_run(here / "runs" / "my" / "version_0")
    assert ended.column("optim/loss") == whole.column("optim/loss")
    assert ended.column("val/avg@2") == whole.column("val/avg@2")
    one, other = (
        torch.load(r.folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"] for r in (ended, whole)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


# ---------------------------------------------------------------------- lightning-sdk


@pytest.fixture
def sent(monkeypatch):
    """lightning-sdk with its client, by which alone it reaches the network, replaced: the bodies that it was given."""
    pytest.importorskip("lightning_sdk", reason="pip install lightning-sdk")
    import lightning_sdk
    import lightning_sdk.job
    from lightning_sdk.api import cloud_account_api, job_api, logs_api, mmt_api
    from lightning_sdk.lightning_cloud.openapi import V1Job, V1MultiMachineJob

    bodies = []

    class Client:
        def jobs_service_create_job(self, project_id, body):
            bodies.append(body)
            return V1Job(name=body.name, spec=body.spec, id="1")

        def cloud_space_service_get_cloud_space(self, **_):
            return SimpleNamespace(name="s")

        def jobs_service_create_multi_machine_job(self, project_id, body):
            bodies.append(body)
            return V1MultiMachineJob(name=body.name, spec=body.spec, id="1", machines=body.machines)

    for module in (cloud_account_api, job_api, mmt_api):
        monkeypatch.setattr(module, "cached_lightning_client", lambda *args, **kwargs: Client())
    monkeypatch.setattr(logs_api, "LightningClient", lambda *args, **kwargs: Client())
    teamspace = SimpleNamespace(id="7", name="space", owner=SimpleNamespace(name="me"), default_cloud_account="cloud")
    studio = {"_teamspace": teamspace, "_studio": SimpleNamespace(id="studio-1", name="s", cluster_id="cloud")}
    monkeypatch.setattr(lightning_sdk.job, "_resolve_teamspace", lambda **_: teamspace)
    monkeypatch.setattr(lightning_sdk.job, "_resolve_default_cloud_account", lambda _: None)
    monkeypatch.setattr(lightning_sdk.job, "raise_access_error_if_not_allowed", lambda *_: None)
    monkeypatch.setattr(lightning_sdk, "Teamspace", lambda name: teamspace)
    monkeypatch.setattr(lightning_sdk.Studio, "__init__", lambda self, **_: self.__dict__.update(studio))
    return bodies


def test_what_lightning_sdk_sends(here, sent, recorded, monkeypatch, capfd):
    prerl, _ = recorded
    monkeypatch.setattr(sys, "executable", str(prerl.parent / "python"))
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    given = ["--machine=H100_X_8", "--name=try", *GIVEN, "--env=WANDB_API_KEY", "--interruptible"]
    command.job([*given, "--studio=s", "--teamspace=me/space"])
    out = capfd.readouterr().out
    spec = sent[0].spec
    assert (spec.cloudspace_id, spec.instance_name, spec.spot, spec.max_run_attempts) == (
        *("studio-1", "lit-h100-8", True, command.ATTEMPTS),
    )
    assert spec.command == asked("--studio=s", *GIVEN)[1]["command"]
    assert [(each.name, each.value) for each in spec.env] == [("WANDB_API_KEY", "very-secret")]
    assert "very-secret" not in spec.command + out
    assert "https://lightning.ai/me/space" in out
    for line in (
        "job logs try --follow --teamspace me/space",
        "job stop try",
        "cp -r lit://me/space/jobs/try/try/runs",
    ):
        assert f"lightning-sdk {line}" in out
    command.job([*given, "--image=me/prerl", "--num_machines=2", "--folder=/runs", "--path_mappings=/runs=bucket:a"])
    body = sent[1]
    assert (body.machines, body.max_run_attempts, body.fault_tolerance.strategy) == (
        *(2, command.ATTEMPTS, "MULTI_MACHINE_JOB_FAULT_TOLERANCE_STRATEGY_RECREATE_ALL_NODES"),
    )
    mapping = body.spec.path_mappings[0]
    assert (mapping.container_path, mapping.connection_name, mapping.connection_path) == ("/runs", "bucket", "a")
    assert body.spec.entrypoint == "sh -c"
    with pytest.raises(InputError, match=r"--machine: H10O: lightning-sdk has none of this name. Did you mean H100\?"):
        command.job(["--machine=H10O", "--studio=s", *GIVEN])


def test_what_the_platform_refuses(here, sent, monkeypatch):
    import lightning_sdk

    def run(**arguments):
        raise RuntimeError(f"no credits for {arguments['env']}")

    _, arguments = asked("--studio=s", *GIVEN)
    inspect.signature(lightning_sdk.Job.run).bind(**arguments)
    monkeypatch.setattr(lightning_sdk.Job, "run", run)
    with pytest.raises(InputError, match=r"not sent: RuntimeError: no credits for \{'KEY': '<hidden>'\} If it does"):
        command.send(arguments | {"env": {"KEY": "very-secret"}})


def test_without_lightning_sdk(here, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install lightning-sdk"):
        command.job(["--machine=H100", "--studio=s", *GIVEN])
