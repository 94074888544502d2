"""A few of the faults of soak.py, in four minutes: what is said, the exit status, and that no value changes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from driver import Fault, Run, differences
from forked import Forked

INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


def record(run):
    """run.json of its newest folder that has one."""
    found = max(run.runs.glob("version_*/run.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(found.read_text())


def left(run):
    return [*(path.name for path in run.runs.glob("**/*.new")), *(p.name for p in (run.folder / "tmp").glob("prerl*"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function from a strategy to a run without a fault, to its end."""
    done = {}

    def run(strategy: str) -> Run:
        if strategy not in done:
            done[strategy] = Run(tmp_path_factory.mktemp("alone"), strategy, starts=Forked)
            done[strategy].whole()
        return done[strategy]

    return run


def test_one_process(tmp_path, alone):
    run = Run(tmp_path / "run", starts=Forked)

    assert run.suffer(Fault("start-up", (INT,), delay=1.0)) == 128 + INT, run.output
    assert run.output.strip().splitlines() == ["prerl: ended by SIGINT."]
    assert not run.runs.exists()

    assert run.suffer(Fault("step 3")) == -signal.SIGKILL, run.output

    # in the validation where life 2 begins; the reward's workers get it too
    assert run.suffer(Fault("validation 4", (TERM,))) == 128 + TERM, run.output
    assert "Traceback" not in run.output
    assert "Resuming from" in run.output
    assert "step 3/12  life 1 NSRPreRL" in run.output
    assert "SIGTERM: stopped at step 4. The checkpoint: " in run.output
    assert (record(run)["status"], record(run)["error"]) == ("interrupted", "SIGTERM")
    assert not list(run.runs.glob("*/model"))

    assert run.suffer(Fault("step 6", (INT, INT), to="first")) == 128 + INT, run.output
    assert "stopped at once" in run.output
    assert "Traceback" not in run.output
    assert record(run)["status"] == "running"  # as after a kill

    # SLURM's, in one task: no --ckpt_path, which a requeued job's command has not either
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_NAME": "rl", "SLURM_NODELIST": "here", "SLURM_NNODES": "1"}
    run.environment |= {**slurm, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    assert run.suffer(Fault("step 8", (USR1,))) == 128 + USR1, run.output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert "SLURM requeues job 77, which goes on from " in run.output
    assert not list(run.folder.glob("hpc_ckpt_*.ckpt"))  # which Lightning would give to any later job here
    assert run.end(run.start(resume=False)) == 0, run.output
    assert "step 9/" not in run.output
    assert "held out    avg@2" in run.output

    assert differences(alone(""), run)[0] == 0
    assert not left(run)


def test_two_ranks(tmp_path, alone):
    run = Run(tmp_path / "run", "ddp", ["--watchdog.warn_after=11", "--watchdog.end_after=2"], starts=Forked)

    assert run.suffer(Fault("step 2", (TERM,), to="rank 1")) == 128 + TERM, run.output
    assert "SIGTERM: stopped at step 3. " in run.output
    assert "Traceback" not in run.output
    assert not run.left

    assert run.suffer(Fault("step 6", (signal.SIGSTOP,), to="rank 1", launched=True)) == 1, run.output
    last = run.output.strip().splitlines()[-1]
    assert last.startswith("prerl: error: No rank has moved for "), run.output
    assert "rank 1 (pid " in last
    assert "without a sign of life: stopped?" in last
    assert record(run)["status"] == "failed"
    assert not run.left

    assert run.suffer(Fault("step 8", to="rank 1", launched=True)) == 1, run.output
    last = run.output.strip().splitlines()[-1]
    assert "rank 1 (pid " in last, run.output
    assert "was killed by SIGKILL in the " in last
    assert "Traceback" not in run.output
    assert "was killed by SIGKILL" in record(run)["error"]
    assert not run.left

    run.whole()
    assert differences(alone("ddp"), run)[0] == 0
    assert not left(run)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_without_a_fault_are_one(alone, strategy):
    """The same prompts, seeds and global batch as on one process, and so the same rewards and steps, but for rounding.
    In `test_two_ranks` Lightning's launcher starts the ranks."""
    run, one = alone(strategy), alone("").values()
    assert "step 12/12  life 2 GRPO" in run.output
    assert len(list(run.runs.glob("version_0/model/model.safetensors"))) == 1
    found = run.values()
    for name in ("reward/mean", "val/avg@2", "optim/grad_norm"):
        values, expected = ({step: v for (key, step), v in r.items() if key == name} for r in (found, one))
        assert len(expected) >= 4
        assert values == pytest.approx(expected, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_in_other_places(tmp_path, strategy):
    alone = Run(tmp_path / "alone", strategy)
    alone.whole()
    run = Run(tmp_path / "run", strategy)
    for to in ("first", "rank 1", "tree"):
        assert run.suffer(Fault("start-up", (TERM,), to=to, delay=1.0)) == 128 + TERM, run.output
        assert not run.left
    assert run.suffer(Fault("validation 0", (HUP,))) == 128 + HUP, run.output
    assert "SIGHUP: stopped at step 0. No checkpoint." in run.output
    assert run.suffer(Fault("validation 4", (TERM,))) == 128 + TERM, run.output
    assert "SIGTERM: stopped at step 4. " in run.output
    assert run.suffer(Fault("writing 6")) == -signal.SIGKILL, run.output
    assert run.suffer(Fault("step 8", to="first")) == -signal.SIGKILL, run.output
    assert not run.left
    run.whole()
    assert differences(alone, run)[0] == 0
    assert not left(run)
