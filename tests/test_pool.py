"""Rewards in worker processes: real ones, killed, hung, and out of memory."""

import os
import re
import signal
import sys
import time

import pytest

from prerl_lightning.errors import InputError
from prerl_lightning.rewards.boxed import boxed_reward
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rollout.slow import SlowRollouts, Usage


def awkward(prompt, response, ground_truth, extra):
    """Does what the response says."""
    if response == "raise":
        raise KeyError("nothing here")
    if response == "nan":
        return float("nan")
    if response == "sleep":
        time.sleep(60)
    if response == "swallow":  # a verifier that catches what it should not
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if response == "regex":  # does not come back to Python for ages
        re.match(r"(a+)+$", "a" * 64 + "b")
    if response == "memory":
        return float(len(bytearray(8 << 30)))
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(3)
    if response == "print":
        print("noise", flush=True)
    if response == "once" and not os.path.exists(extra["flag"]):
        open(extra["flag"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def items(*responses, **extra):
    return [Item("", r, "1", extra, row) for row, r in enumerate(responses)]


@pytest.fixture
def pool():
    made = RewardPool(awkward, Verification(workers=2, timeout=0.5, memory_mib=1024, max_failed=1.0))
    yield made
    made.close()


def test_verdicts_tell_timeout_error_and_reward_apart_and_keep_order(pool):
    awkwards = ["raise", "nan", "sleep", "swallow", "regex", "memory", "exit", "sys.exit"]
    wanted = dict.fromkeys(("sleep", "swallow", "regex"), "timeout")
    wanted |= dict.fromkeys(("raise", "nan", "memory", "exit", "sys.exit"), "error")
    responses = [r for a in awkwards for r in ("fine", a, "print", "fine")]
    verdicts = pool.verify(items(*responses))
    assert [v.failure for v in verdicts] == [wanted.get(r) for r in responses]
    assert [v.score for v in verdicts] == [0.0 if r in wanted else 1.0 for r in responses]
    told = {r: v.message for r, v in zip(responses, verdicts, strict=True)}
    assert "nothing here" in told["raise"]
    assert "nan" in told["nan"]
    assert "exit status 3" in told["exit"]
    assert "MemoryError" in told["memory"]


def test_a_worker_killed_from_outside_is_replaced_and_its_answer_verified(pool, tmp_path):
    assert pool.verify(items("once", flag=str(tmp_path / "flag")))[0].score == 1.0
    before = pool.pids
    futures = pool.submit(items(*["fine"] * 200))
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert {f.result().score for f in futures} == {1.0}
    assert {v.score for v in pool.verify(items(*["fine"] * 40))} == {1.0}
    assert not set(pool.pids) & set(before)


def worker(prompt, response, ground_truth, extra):
    """Which one it is."""
    return float(os.getpid())


@pytest.fixture
def pair(monkeypatch):
    """Two workers, which count as hung after a second."""
    monkeypatch.setattr("prerl_lightning.rewards.pool.MARGIN", 0.7, raising=False)
    made = RewardPool(worker, Verification(workers=2, timeout=0.2, max_failed=1.0))
    assert len(set(made.pids)) == 2
    yield made
    made.close()


def test_what_a_stopped_worker_had_to_do_is_done_by_the_other(pair, caplog):
    stopped, other = pair.pids
    os.kill(stopped, signal.SIGSTOP)
    found = pair.verify(items(*["fine"] * 64))
    assert [v.score for v in found if not v.failure] == [other] * 63
    (lost,) = (row for row, v in enumerate(found) if v.failure)
    assert f"reward: at row {lost} its worker did not answer; another is started." in caplog.text
    assert pair.replaced == 1
    deadline = time.monotonic() + 60
    while len(pair.pids) < 2:  # without any work
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_message_that_a_stopped_worker_does_not_read_is_not_waited_for(pair):
    """It is larger than the pipe's buffer."""
    for pid in (before := pair.pids):
        os.kill(pid, signal.SIGSTOP)
    futures = pair.submit(items(*["x" * 1_000_000] * 4))
    assert not {f.result(timeout=60).score for f in futures} & {0.0, *before}


def test_a_rollout_that_waited_explains_itself(pair, monkeypatch, caplog):
    monkeypatch.setattr("prerl_lightning.rollout.slow.SECONDS", 0.5)
    slow = SlowRollouts()

    def step(number):
        before, start = Usage.now(pair), time.perf_counter()
        pair.verify(items(*["fine"] * 8))
        slow.look(number, {"rollout": 0.4, "reward": time.perf_counter() - start}, before, Usage.now(pair))

    for number in range(4):
        step(number)
    assert "The rollout" not in caplog.text
    for pid in pair.pids:
        os.kill(pid, signal.SIGSTOP)
    step(4)
    (said,) = (r.getMessage() for r in caplog.records if r.name == "prerl_lightning.rollout.slow")
    assert re.match(
        r"The rollout after step 4 took 0\.4 s to sample and \d\.\d s more until the last verdict; the median so "
        r"far is \S+ s \(reward\)\. .* of CPU, .* and replaced [12] reward workers; the load is",
        said,
    )
    step(5)
    assert len([r for r in caplog.records if r.name == "prerl_lightning.rollout.slow"]) == 1


def test_the_death_of_one_answer_is_not_blamed_on_the_next(tmp_path):
    """Both in one message: the first kills two workers, the second one, and is verified by the next."""
    pool = RewardPool(awkward, Verification(workers=1, timeout=0.5, max_failed=1.0))
    try:
        # the first keeps the worker busy until all of them wait
        found = pool.verify(items("sleep", "exit", "once", *["fine"] * 9, flag=str(tmp_path / "flag")))
    finally:
        pool.close()
    assert [v.failure for v in found] == ["timeout", "error", *[None] * 10]


def test_too_many_failures_stop_the_run(caplog):
    pool = RewardPool(awkward, Verification(workers=1, timeout=5, max_failed=0.25))
    try:
        assert len(pool.verify(items("raise", "fine", "fine", "fine"))) == 4
        assert "error at row 0: KeyError('nothing here'); truth '1', response 'raise'" in caplog.text
        with pytest.raises(InputError, match=r"2 of 4 answers could not be verified.*max_failed \(25%\)"):
            pool.verify(items("raise", "raise", "fine", "fine"))
    finally:
        pool.close()


def test_without_workers_rewards_run_here(tmp_path):
    seen = []

    def local(*arguments):
        seen.append(os.getpid())
        return 1.0

    assert RewardPool(local, Verification(workers=0)).verify(items("x"))[0].score == 1.0
    assert seen == [os.getpid()]
    with pytest.raises(InputError, match=r"local cannot be used in a worker process.*workers: 0"):
        RewardPool(local, Verification())


def test_a_reward_that_a_worker_cannot_load_is_named(monkeypatch):
    monkeypatch.setattr(boxed_reward, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "boxed_reward", boxed_reward, raising=False)
    with pytest.raises(InputError, match=r"boxed_reward cannot be used in a worker process.*module on PYTHONPATH"):
        RewardPool(boxed_reward, Verification())


def test_workers_end_with_the_training_process(tmp_path):
    """Killed with -9, in the middle of an endless verification."""
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_pool as t; "
        "p = t.RewardPool(t.awkward, t.Verification(workers=2, timeout=2, max_failed=1)); "
        "p.submit(t.items('swallow')); print(*p.pids, flush=True); import time; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_options_are_checked():
    with pytest.raises(InputError, match=r"data\.verification\.timeout: 0"):
        Verification(timeout=0)
