"""`prerl watch` over made-up run folders: pictures, reading on, and the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import HOSTILE, grow_old, info, sample, training_row, validation_row, write_metrics, write_run
from rich.console import Console

from prerl_lightning.cli import main
from prerl_lightning.errors import InputError
from prerl_lightning.report import frame as picture
from prerl_lightning.report.folders import find
from prerl_lightning.report.listing import runs
from prerl_lightning.report.metrics import MetricsFile
from prerl_lightning.report.process import identity
from prerl_lightning.report.watch import RunFiles, follow, last_lines


def shown(files: RunFiles, width: int = 120, height: int = 60) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(picture.frame(files.run, width, height))
    return console.export_text()


def read(folder) -> RunFiles:
    files = RunFiles(folder)
    files.read()
    return files


def test_one_picture_has_progress_curves_times_and_samples(tmp_path, capsys):
    folder = write_run(tmp_path / "dsrl" / "version_0")
    main(["watch", str(folder)])
    text = capsys.readouterr().out
    assert "dsrl version_0   NSR-PreRL → GRPO   finished at step 60 of 60" in text
    assert "reincarnation: GRPO from step 10" in text
    assert "0.360 → 0.659 [0.599, 0.719]" in text  # 0.36 + 0.4 (1 - exp(-55 / 40)), +- 0.06
    assert "transition / step 0" in text
    assert "1.81 s a step" in text  # 1.76 and 0.05 for watchers
    assert "rollout 50%" in text
    assert "✓ step 60" in text
    assert "✗ step 60" in text
    assert "\x1b" not in text


def test_what_ended_a_run_early_is_shown(tmp_path):
    text = shown(read(write_run(tmp_path / "a", max_steps=90, stopped="trainer.max_time: 1:00:00 is over")))
    assert "stopped at step 60 of 90: trainer.max_time: 1:00:00 is over" in text


def test_narrow_and_low_terminals_get_a_picture_too(tmp_path):
    files = read(write_run(tmp_path / "a"))
    for width, height in ((40, 10), (60, 24), (200, 80)):
        text = shown(files, width, height)
        assert max(map(len, text.splitlines())) <= width
        assert "reward" in text


def test_a_run_that_has_not_made_a_step_and_an_empty_one(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "new"} | info(0, 10, 60, status="running", ended=None)))
    files = read(tmp_path)
    assert "running, at step 0 of 60" in shown(files)
    assert "no step yet" in shown(files)
    write_metrics(tmp_path, [validation_row(0, 10, 1.0, 0)])
    assert files.read()
    assert "held-out avg@8" in shown(files)


def test_reads_on_where_it_stopped_and_afresh_when_the_header_grows(tmp_path):
    rows = [training_row(step, 0, 1.0, 0) for step in range(1, 8)]
    write_metrics(tmp_path, rows[:3])
    file = MetricsFile(tmp_path / "metrics.csv")
    assert file.read()
    assert not file.read()
    assert list(file.rows.training) == [1, 2, 3]
    write_metrics(tmp_path, rows[:4])
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[:-20])
    assert not file.read()  # the fourth line is not whole yet
    assert file.rows.cut_off
    (tmp_path / "metrics.csv").write_bytes(whole)
    assert file.read()
    assert list(file.rows.training) == [1, 2, 3, 4]
    assert not file.rows.cut_off
    write_metrics(tmp_path, rows)  # the fifth has alignment/...: a longer header
    assert file.read()
    assert list(file.rows.training) == [1, 2, 3, 4, 5, 6, 7]
    assert file.rows.training[5]["alignment/cosine"] == pytest.approx(rows[4]["alignment/cosine"])


def test_follows_a_run_until_it_ends(tmp_path):
    rows = [training_row(step, 10, 1.0, 0) for step in range(1, 5)]
    running = {"name": "a"} | info(0, 10, 4, status="running", ended=None)
    (tmp_path / "run.json").write_text(json.dumps(running))
    console = Console(width=100, height=40, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(len(files.run.training))
        if len(seen) <= len(rows):
            write_metrics(tmp_path, rows[: len(seen)])
        elif len(seen) == len(rows) + 1:
            (tmp_path / "samples.jsonl").write_text(json.dumps(sample(4, 0, 10)) + "\n")
        else:
            (tmp_path / "run.json").write_text(json.dumps(running | {"status": "finished"}))
        assert len(seen) < 20

    files = RunFiles(tmp_path)
    follow(files, console, 1.0, sleep)
    assert seen == [0, 1, 2, 3, 4, 4]
    assert "finished at step 4 of 4" in console.export_text()


def test_ctrl_c_ends_it_quietly(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prerl_lightning.report.watch.follow", interrupted)
    monkeypatch.setattr("prerl_lightning.report.watch.Console", lambda: Console(force_terminal=True, width=80))
    main(["watch", str(write_run(tmp_path / "a"))])
    assert capsys.readouterr() == ("", "")


def test_says_when_there_is_no_sign_of_life(tmp_path):
    folder = write_run(tmp_path / "a", steps=20, status="running", ended=None, max_steps=60)
    assert "running, at step 20 of 60" in shown(read(folder))
    assert "about 1 min 20 s left" in shown(read(folder))  # 40 steps of 2 seconds
    grow_old(folder, 3600)
    text = shown(read(folder))
    assert "no sign of life since" in text
    assert "left" not in text


def test_before_the_first_step_it_waits_longer(tmp_path):
    write_run(tmp_path / "a", steps=0, status="running", ended=None, max_steps=60)
    for name in ("metrics.csv", "run.json"):
        grow_old(tmp_path / "a", 1700, name)  # one row, of the evaluation at step 0
    assert "running, at step 0 of 60" in shown(read(tmp_path / "a"))
    for name in ("metrics.csv", "run.json"):
        grow_old(tmp_path / "a", 200, name)
    assert "no sign of life since" in shown(read(tmp_path / "a"))


def test_a_resumed_run_says_where_its_earlier_steps_are(tmp_path):
    first = write_run(tmp_path / "a" / "version_0", steps=23)
    source = str(first / "checkpoints" / "last.ckpt")
    folder = write_run(tmp_path / "a" / "version_1", first=21, resumed_from=source)
    assert "resumed: figures since step 21; earlier steps in version_0" in shown(read(folder))


def test_values_that_are_no_numbers_are_no_error(tmp_path):
    folder = write_run(tmp_path / "a", steps=3, lives=[["A"]])
    row = training_row(4, 10, 1.0, 0) | {"time/rollout": float("nan"), "rollout/responses": float("inf")}
    write_metrics(folder, [training_row(3, 10, 1.0, 0), row])
    assert "of the last 2" in shown(read(folder))
    (folder / "config.yaml").write_text("model: text\ndata: text\ntrainer: text\n")
    (folder / "run.json").unlink()
    assert "unknown model" in shown(read(folder))


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path):
    folder = write_run(tmp_path / "a", steps=3)
    code = "import sys; from prerl_lightning.cli import main; main(['watch', sys.argv[1]])"
    made = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    made.stdout.close()
    assert made.stderr.read() == b""
    assert made.wait() == 0


def test_text_of_a_model_cannot_steer_the_terminal(tmp_path):
    folder = write_run(tmp_path / "a")
    hostile = sample(60, 0, 10, "\x1b[2J\x1b]0;title\x07\u202e wait \U0001f642 [bold]x[/bold]")
    (folder / "samples.jsonl").write_text(json.dumps(hostile) + "\n" + json.dumps(sample(60, 1, 10, HOSTILE)) + "\n")
    text = shown(read(folder))
    assert not any(c in text for c in "\x1b\x07\u202e\u2028")
    assert "·[2J·]0;title·· wait \U0001f642 [bold]x[/bold]" in text
    evil = "\x1b[2J\u202e"
    changed = {"name": f"n{evil}", "model": f"m{evil}", "status": "failed", "error": f"e{evil}\nsecond line{evil}"}
    changed |= {"lives": [[f"l{evil}", 0]], "machine": {"cpu": f"c{evil}"}}
    (folder / "run.json").write_text(json.dumps(info(0, 10, 60) | changed))
    family = f"f{evil}"
    rows = [training_row(s, 10, 1.0, 0) | {f"thoughts/{family}_ratio": s} for s in (1, 2)]
    write_metrics(folder, rows)
    spoken = sample(2, 0, 10, "wait") | {"thoughts": [[0, 4, family]], "kind": evil}
    (folder / "samples.jsonl").write_text(json.dumps(spoken) + "\n")
    text = shown(read(folder))
    assert all(f"{letter}·[2J·" in text for letter in "nmelcf")
    assert not any(c in text for c in "\x1b\u202e")
    assert "second line" not in text
    marked = picture._response(hostile, ["transition"])
    assert marked.plain[marked.spans[0].start : marked.spans[0].end] == "wait"


def test_finds_the_run_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run below runs/"):
        find(None)
    for i, name in enumerate(("dsrl/version_2", "dsrl/version_10", "grpo/version_0")):
        folder = write_run(tmp_path / "runs" / name, steps=1)
        for file in ("metrics.csv", "run.json", "config.yaml"):
            os.utime(folder / file, (1000 - i, 1000 - i))
    assert find("runs/dsrl").name == "version_10"
    assert find(None).name == "version_2"
    with pytest.raises(InputError, match="no such folder"):
        find("runs/nothing")
    with pytest.raises(InputError, match="is a file"):
        find("runs/grpo/version_0/metrics.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run in it"):
        find("empty")


def test_a_run_that_has_written_its_configuration_alone(tmp_path):
    folder = write_run(tmp_path / "runs" / "dsrl" / "version_0")
    for file in ("metrics.csv", "run.json", "samples.jsonl", "alignment.jsonl"):
        (folder / file).unlink()
    text = shown(read(find(str(folder.parent))))
    assert "1970" not in text
    assert "nothing but its configuration yet, written 20" in text


def test_a_killed_run_is_not_running(tmp_path, capsys):
    """A real process, killed; one that nobody has waited for yet is dead too."""
    say = "import json; from prerl_lightning.report.process import identity; print(json.dumps(identity()), flush=True)"
    child = subprocess.Popen([sys.executable, "-c", f"{say}; input()"], stdin=-1, stdout=-1, text=True)
    process = json.loads(child.stdout.readline())
    folder = write_run(tmp_path / "a" / "version_0", steps=20, status="running", max_steps=60, process=process)

    def status():
        return read(folder).run.status()

    assert status() == ("running", "running, at step 20 of 60")
    grow_old(folder, 3600)
    assert status()[0] == "silent"
    assert "though its process is there" in status()[1]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert status() == ("killed", "killed at step 20 of 60: its process is gone and has not said why")
    child.communicate()
    assert status()[0] == "killed"
    # the picture ends, as one of a run that has
    follow(RunFiles(folder), Console(file=open(os.devnull, "w"), force_terminal=True), 1.0, pytest.fail)  # noqa: SIM115
    # the number went to another process; another machine; what is no identity
    for other, state in (
        (process | {"pid": os.getpid()}, "killed"),
        (process | {"where": "elsewhere"}, "silent"),
        (process | {"pid": -1}, "silent"),
        ({}, "silent"),
    ):
        write_run(folder, steps=20, status="running", max_steps=60, process=other)
        grow_old(folder, 3600)
        assert status()[0] == state


def test_the_list_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        runs([])
    lost = {"pid": 1, "started": -1, "where": identity()["where"]}
    when = "2026-11-2{}T12:00:00+00:00".format
    write_run(
        Path("runs/grpo/version_0"), steps=20, switch=0, started=when(3), status="failed", error="no", max_steps=60,
        lives=[["Dr. GRPO", 0]],
    )  # fmt: skip
    write_run(Path("runs/dsrl/version_0"), steps=30, started=when(1), status="running", process=lost, max_steps=60)
    write_run(
        Path("runs/dsrl/version_1"), first=21, started=when(4), status="interrupted", model="a/" * 20 + "model",
        resumed_from="runs/dsrl/version_0/checkpoints/last.ckpt",
    )  # fmt: skip
    write_run(Path("runs/study/s/dsrl-seed-0/dsrl/version_0"), steps=9, started=when(2), lives=[["A", 0], ["B", 7]])
    bare = write_run(Path("runs/bare/version_0"), files=("config.yaml",))
    (bare / "metrics.csv").unlink()
    config = (bare / "config.yaml").read_text()
    of_terms = config.replace("objectives.NSRPreRL\n  init_args: {", "Objective\n  init_args: {name: RLOO, ")
    (bare / "config.yaml").write_text(of_terms)
    Path("runs/dsrl/version_0/checkpoints").mkdir()
    Path("runs/empty/version_0").mkdir(parents=True)
    runs([])
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in [head, *lines]] == [
        *("run", "dsrl/version_0", "study/s/dsrl-seed-0/dsrl/version_0", "grpo/version_0", "dsrl/version_1"),
        "bare/version_0",
    ]
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    two = "NSR-PreRL -> GRPO at 10"
    assert cells[0][1:] == [two, "embedded", "30/60", "0.36 -> 0.55", "killed", "2026-11-21 12:00"]
    assert cells[1][1:] == ["A -> B at 7", "embedded", "9/9", "0.36", "finished", "2026-11-22 12:00"]
    assert cells[2][1:] == ["Dr. GRPO", "embedded", "20/60", "0.36 -> 0.52", "failed", "2026-11-23 12:00"]
    assert cells[3][1:5] == [two, "...a/a/a/a/a/a/a/a/model", "60/60", "0.36 -> 0.66"]  # with its predecessor's
    assert cells[4][1:6] == ["RLOO -> GRPO at 10", "embedded", "0/60", "-", "unknown"]
    runs(["runs/grpo/version_0"])
    assert "runs/grpo/version_0  Dr. GRPO" in capsys.readouterr().out
    with pytest.raises(InputError, match="no run in runs/empty"):
        runs(["runs/empty"])


def test_reads_the_end_of_long_sample_files_alone(tmp_path):
    lines = [json.dumps(sample(step, 0, 10, f"answer {step}")) for step in range(1, 2001)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + '\n{"step": 2001, "resp')
    found = last_lines(tmp_path / "samples.jsonl")
    assert found[-1]["step"] == 2000
    assert 10 < len(found) < 1000
