"""Rewards in worker processes: real ones, killed, hung, and out of memory."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from prerl_lightning.errors import InputError
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rollout.slow import SlowRollouts, Usage
from prerl_lightning.watchdog import watchdog


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
    if response == "huge":
        return 1e308
    if response == "print":
        print("noise", flush=True)
    if response == "loud":  # much more than a pipe holds, from Python, from C and from a child, with escapes
        print("\x1b[2Jone")
        print("two", file=sys.stderr)
        os.write(1, b"three\n")
        os.write(2, b"\n \nfour\xff\n" + b"x" * 10_000_000)
        os.system("echo a child; echo and its error >&2")
    if response == "last words":
        os.write(2, b"Fatal: \x1b[2J no such device\n")
        os._exit(3)
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
    awkwards = ["raise", "nan", "huge", "sleep", "swallow", "regex", "memory", "exit", "sys.exit"]
    wanted = dict.fromkeys(("sleep", "swallow", "regex"), "timeout")
    wanted |= dict.fromkeys(("raise", "nan", "huge", "memory", "exit", "sys.exit"), "error")
    responses = [r for a in awkwards for r in ("fine", a, "print", "fine")]
    verdicts = pool.verify(items(*responses))
    assert [v.failure for v in verdicts] == [wanted.get(r) for r in responses]
    assert [v.score for v in verdicts] == [0.0 if r in wanted else 1.0 for r in responses]
    told = {r: v.message for r, v in zip(responses, verdicts, strict=True)}
    assert "nothing here" in told["raise"]
    assert "nan" in told["nan"]
    assert told["huge"] == "the reward is 1e+308; it must lie between -1e+09 and 1e+09"
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


def test_signals_to_the_whole_job_are_not_the_workers_to_answer(pool):
    before, futures = pool.pids, pool.submit(items("sleep", *["fine"] * 40))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for pid in before:
            os.kill(pid, number)
    assert [f.result().failure for f in futures] == ["timeout", *[None] * 40]
    assert pool.pids == before


def worker(prompt, response, ground_truth, extra):
    """Which one it is."""
    return float(os.getpid())


@pytest.fixture
def pair(monkeypatch):
    """Two workers, which count as hung after a second."""
    monkeypatch.setattr("prerl_lightning.rewards.process.MARGIN", 0.7)
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


def counted(prompt, response, ground_truth, extra):
    """Writes that it was asked; then what `awkward` does."""
    with open(extra["asked"], "a") as file:
        file.write("x")
    return awkward(prompt, response, ground_truth, extra)


@pytest.mark.parametrize(("does", "deaths"), [("sleep", 0), ("exit", 2)])
def test_a_batch_stops_as_soon_as_too_many_failures_are_certain(tmp_path, monkeypatch, caplog, does, deaths):
    """Of 128 answers 4 show it: a verifier that hangs, and one that dies, cost no more time-outs or starts."""
    monkeypatch.setattr("prerl_lightning.rewards.pool.WAIT", 0.3)
    asked = tmp_path / "asked"
    options = Verification(workers=2, timeout=0.5, max_failed=0.03)
    pool = RewardPool(counted, options)
    caplog.set_level("INFO")
    try:
        with pytest.raises(
            InputError, match=r"4 of 128 answers could not be verified, more than .*; \d+ more were not waited for"
        ):
            pool.verify(items(*[does] * 128, asked=str(asked)))
    finally:
        pool.close()
    # each that failed, those that are under way at that moment in two workers, and what these take up until the close
    assert len(asked.read_text()) <= (4 + 2 + 2) * max(1, deaths)
    said = [r.getMessage() for r in caplog.records if "of waiting" in r.getMessage()]
    assert re.fullmatch(
        r"reward: \d of 128 answers are verified after \d s of waiting, \d of them failed; above 3 the run stops\.",
        said[0],
    )
    assert len(said) <= 6  # at ever longer intervals


def test_a_pool_closes_without_waiting_for_what_hangs(tmp_path):
    asked = tmp_path / "asked"
    pool = RewardPool(counted, Verification(workers=2, timeout=30, max_failed=1.0))
    futures = pool.submit(items(*["sleep"] * 64, asked=str(asked)))
    _wait_for(asked.exists)
    pids = pool.pids
    pool.close()
    assert all(future.cancelled() for future in futures)
    assert not any(map(_runs, pids))
    assert len(asked.read_text()) <= 2


def starting(prompt, response, ground_truth, extra):
    """Starts a process that nobody waits for; then what `awkward` does."""
    os.system(f"sleep 300 & echo $! >> {extra['pids']}")
    return awkward(prompt, response, ground_truth, extra)


def test_what_a_verifier_starts_ends_with_its_worker(tmp_path):
    """Killed as it hangs, dead by itself, and closed."""
    pids = tmp_path / "pids"
    pool = RewardPool(starting, Verification(workers=1, timeout=0.5, max_failed=1.0))
    try:
        found = pool.verify(items("regex", "once", "fine", pids=str(pids), flag=str(tmp_path / "flag")))
        *lost, last = map(int, pids.read_text().split())
        assert [v.failure for v in found] == ["timeout", None, None]
        assert len(lost) == 3  # one asked twice
        _wait_for(lambda: not any(map(_runs, lost[:-1])))
        assert _runs(lost[-1])  # the worker goes on, and may need it
        assert _runs(last)
    finally:
        pool.close()
    _wait_for(lambda: not _runs(last))


def test_what_workers_write_is_shown_once_and_blocks_none(capfd, caplog):
    caplog.set_level("INFO")
    pool = RewardPool(awkward, Verification(workers=2, timeout=60, max_failed=1.0))
    try:
        assert {v.score for v in pool.verify(items(*["loud"] * 6))} == {1.0}
        (died,) = pool.verify(items("last words"))
    finally:
        pool.close()
    assert died.message == "its worker died (exit status 3), and wrote last: Fatal: ·[2J no such device"
    said = [r.getMessage() for r in caplog.records if "wrote:" in r.getMessage()]
    assert len(said) == 5
    wanted = ("·[2Jone", "two", "three", "four\N{REPLACEMENT CHARACTER}")
    assert all(f"reward: a worker wrote: {line}" in said for line in wanted[:2])
    assert set(said) <= {f"reward: a worker wrote: {line}" for line in (*wanted, "x" * 300)}
    assert caplog.text.count("what workers write from here on is not shown") == 1
    assert capfd.readouterr() == ("", "")


def test_each_verdict_is_a_move(pool):
    """For the watchdog, to which a rank that waits for its verifiers would look as if it stood still."""
    before = watchdog._moves
    pool.verify(items("fine", "raise", "fine"))
    assert watchdog._moves == before + 3


def test_failures_cannot_steer_the_terminal(caplog):
    class Odd(Exception):
        def __repr__(self):
            return "\x1b[2J\u202e"

    def reward(*_):
        raise Odd

    pool = RewardPool(reward, Verification(workers=0, max_failed=0.5))
    with pytest.raises(InputError, match="·\\[2J·") as error:
        pool.verify([Item("", "\x1b]0;title\x07", "\x1b", {})])
    for text in (caplog.text, str(error.value)):
        assert "response '\\x1b]0;title\\x07'" in text
        assert not any(c in text for c in "\x1b\x07\u202e")


def test_without_workers_rewards_run_here(tmp_path):
    seen = []

    def local(*arguments):
        seen.append(os.getpid())
        return 1.0

    assert RewardPool(local, Verification(workers=0)).verify(items("x"))[0].score == 1.0
    assert seen == [os.getpid()]


def test_a_reward_of_a_script_or_a_notebook_s_cell_goes_to_workers():
    """With what it calls, which no import would find."""
    here = {"__name__": "__main__"}
    code = "import os\ndef half(): return os.getpid() / 2\ndef reward(*arguments): return half() * 2"
    exec(code, here)
    pool = RewardPool(here["reward"], Verification(workers=1))
    try:
        assert pool.verify(items("x"))[0].score not in (0.0, os.getpid())
    finally:
        pool.close()


def test_a_reward_that_a_worker_cannot_load_is_named():
    lock = threading.Lock()

    def locked(*arguments):
        return float(lock.locked())

    class Unloadable:
        def __reduce__(self):
            return eval, ("1 / 0",)

    with pytest.raises(InputError, match=r"locked cannot be used in a worker process.*pickle.*workers: 0"):
        RewardPool(locked, Verification())
    with pytest.raises(InputError, match=r"in a worker process: ZeroDivisionError.*module on PYTHONPATH"):
        RewardPool(Unloadable(), Verification())


@pytest.mark.parametrize("how", ["import", "import of C", "Python", "C", "sleep"])
def test_workers_end_with_the_training_process(tmp_path, how):
    """Killed with -9, while they hang for good; and with them what they have started."""
    pids = tmp_path / "pids"
    code = (
        "import hanging; from prerl_lightning.rewards.pool import *; "
        "RewardPool(hanging.reward, Verification(timeout=200)).verify([Item('', '', '', {})] * 64)"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"HANGS": how, "PIDS": str(pids), "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        _wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    finally:
        process.kill()
        process.wait()
    workers = [int(pid) for pid in pids.read_text().split()]
    try:
        _wait_for(lambda: not any(map(_runs, workers)), seconds=10)
    finally:
        for pid in filter(_runs, workers):
            os.kill(pid, signal.SIGKILL)


def _wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_options_are_checked():
    for name, wrong, words in (
        ("workers", -1, "-1 must be a finite number of at least 0"),
        ("timeout", 0, "0 must be a finite number above 0"),
        ("timeout", float("nan"), "nan must be"),
        ("memory_mib", 255, "255 must be a finite number of at least 256"),
        ("max_failed", 1.5, "1.5 must be a finite number of at most 1"),
    ):
        with pytest.raises(InputError, match=rf"data\.verification\.{name}: {words}"):
            Verification(**{name: wrong})
