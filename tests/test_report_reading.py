"""What `prerl report` reads of runs, and what it refuses."""

import json
import math
import re
import shutil
import sys

import pytest
from report_runs import grow_old, sample, training_row, write_metrics, write_run

from prerl_lightning.errors import InputError
from prerl_lightning.report import compare, headline
from prerl_lightning.report.files import spans
from prerl_lightning.report.folders import expand
from prerl_lightning.report.page import page, report, vega
from prerl_lightning.report.reading import read_run, superseded
from prerl_lightning.report.runs import chain, patience


def test_reads_a_run(tmp_path):
    run = read_run(write_run(tmp_path / "dsrl" / "version_3"))
    assert (run.name, run.version, run.steps, run.max_steps) == ("dsrl", "version_3", 60, 60)
    assert chain(run) == "NSR-PreRL → GRPO"
    assert run.lives == [("NSR-PreRL", 0), ("GRPO", 10)]
    assert run.accuracy == "val/avg@8"
    assert list(run.column("val/avg@8")) == [0, 10, 20, 30, 40, 50, 60]
    assert run.samples_seen[60] == 60 * 256
    assert run.seconds[60] == 123
    assert run.status() == ("finished", "finished at step 60 of 60")
    assert run.notes == ()


def test_how_a_run_stands(tmp_path):
    def status(folder, **options):
        return read_run(write_run(tmp_path / folder, steps=5, **options)).status()

    assert status("a", status="failed", error="RuntimeError: out of memory\nTraceback:\n...") == (
        "failed",
        "failed at step 5 of 5: RuntimeError: out of memory",
    )
    assert status("b", status="interrupted", max_steps=60)[1] == "interrupted at step 5 of 60"
    early = status("f", max_steps=60, stopped="trainer.max_time: 0:00:30 is over")
    assert early == ("stopped", "stopped at step 5 of 60: trainer.max_time: 0:00:30 is over")
    assert early[1] in headline.states([compare.Group("x", (read_run(tmp_path / "f"),), {})], 0)
    assert status("c", status="running") == ("running", "running, at step 5 of 5")
    grow_old(tmp_path / "c", 1000)  # the longest of its steps took 5 seconds
    state, said = read_run(tmp_path / "c").status()
    assert state == "silent"
    assert said.startswith("no sign of life since ")
    assert status("d", files=("config.yaml",))[1] == "reached its 5 steps (no run.json)"
    assert "no run.json says how it ended" in status("e", files=())[1]


def test_runs_that_are_cut_off_or_old_or_bare_are_read_with_a_word(tmp_path):
    cut = read_run(write_run(tmp_path / "cut", steps=7, end="0,2,0.123"))
    assert cut.steps == 7
    assert "metrics.csv ends within a line, which is left out" in cut.notes
    bare = read_run(write_run(tmp_path / "bare", files=()))
    assert "no config.yaml, run.json, samples.jsonl" in bare.notes
    assert bare.lives == [("life 1", 0), ("life 2", 10)]
    old = tmp_path / "old"
    old.mkdir()
    rows = [{"val/avg@8": 0.1}, {"reward/mean": 0.2, "time/step": 2}, {"reward/mean": 0.3, "time/step": 3}]
    write_metrics(old, [*rows, {"val/avg@8": 0.4}])
    lines = (old / "metrics.csv").read_text().splitlines()
    steps = ["step", "0", "0", "1", "1"]  # Lightning's
    where = lines[0].split(",").index("step")
    cells = [line.split(",") for line in lines]
    for line, step in zip(cells, steps, strict=True):
        line[where] = step
    (old / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in cells))
    run = read_run(old)
    assert run.column("reward/mean") == {1: 0.2, 2: 0.3}
    assert run.column("val/avg@8") == {0: 0.1, 2: 0.4}
    assert run.seconds == {0: 0, 1: 2, 2: 5}
    assert any("older version" in note for note in run.notes)


def test_silence_is_judged_by_the_longest_gap_so_far():
    assert patience({0: 0.0}) == 1800  # the engine starts, and step 0 is evaluated
    assert patience({0: 0.0, 1: 5.0, 2: 7.0}) == 300
    assert patience({0: 0.0, 1: 5.0, 2: 405.0, 3: 407.0}) == 2000  # an evaluation took 400 seconds


def test_a_resumed_run_has_its_predecessors_rows(tmp_path):
    first = write_run(tmp_path / "a" / "version_0", steps=23, every=1)
    second = write_run(
        tmp_path / "a" / "version_1", first=21, resumed_from=str(first / "checkpoints" / "last.ckpt"), samples=1
    )
    run = read_run(second)
    assert list(run.training) == list(range(1, 61))
    assert list(run.validation) == [*range(21), 30, 40, 50, 60]  # those of the first run at 21 to 23 are of lost steps
    assert run.seconds[20] == 43  # the first run's own
    assert run.seconds[21] == 43 + 45  # row 21 says 45 seconds since the second began
    assert run.notes == (f"steps 1 to 20 are of {first}, from which it was resumed (its steps 21 to 23 are left out)",)
    write_metrics(second, [])
    assert list(read_run(second).training) == list(range(1, 24))  # it has made no step yet
    shutil.rmtree(first)
    assert "which is not there" in read_run(second).notes[-1]


def test_a_run_and_what_it_was_resumed_from_are_one_run(tmp_path, capsys):
    folders = []
    for i, (first, steps) in enumerate(((1, 23), (21, 44), (41, 60))):
        source = {"resumed_from": str(folders[-1] / "checkpoints" / "last.ckpt")} if folders else {}
        folders.append(write_run(tmp_path / "a" / f"version_{i}", first=first, steps=steps, samples=1, **source))
    assert superseded(folders) == set(folders[:2])
    assert superseded([folders[0], folders[2]]) == {folders[0]}  # over version_1, which is not given
    out = report([str(tmp_path / "a"), "-o", str(tmp_path / "report.html")])
    assert "1 run," in capsys.readouterr().out
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    (run,) = data["runs"]
    table = next(t for t in run["tables"] if "reward/mean" in t["columns"])
    assert table["step"] == list(range(1, 61))
    assert table["samples"] == [256 * s for s in range(1, 61)]
    assert "means over" not in out.read_text().split("<noscript>")[0]


def test_arguments_that_mean_no_run_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "a" / "version_0", steps=1)
    for i in (2, 10):
        write_run(tmp_path / "runs" / "a" / f"version_{i}", steps=1)
    assert [p.name for p in expand(["runs/a", "runs/a/version_0"])] == ["version_0", "version_2", "version_10"]
    for given, said in {
        "runs/b": "no such folder",
        "runs/a/version_0/metrics.csv": "is a file. Give the run's folder",
        "runs": "no metrics.csv in it, and no version_N folder",
    }.items():
        with pytest.raises(InputError, match=re.escape(said)):
            report([given])
    with pytest.raises(InputError, match="no folder nowhere"):
        report([str(folder), "-o", "nowhere/report.html"])
    with pytest.raises(InputError, match="is a folder"):
        report([str(folder), "-o", "runs"])


def test_an_output_that_would_destroy_a_file_or_fail_is_refused_before_any_work(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", steps=1)
    before = (folder / "metrics.csv").read_text()
    monkeypatch.setattr("prerl_lightning.report.page.read_run", lambda _: pytest.fail("has begun to read"))
    with pytest.raises(InputError, match="does not end in"):
        report([str(folder), "-o", str(folder / "metrics.csv")])
    assert (folder / "metrics.csv").read_text() == before
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match="no permission"):
            report([str(folder), "-o", str(tmp_path / "x.html")])
    vega.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vl_convert", None)
        with pytest.raises(InputError, match="pip install vl-convert-python"):
            report([str(folder), "-o", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()


def test_values_that_are_no_numbers_are_left_out_of_sums_and_steps(tmp_path):
    rows = [training_row(step, 0, 1.0, 0) for step in range(1, 4)]
    rows[1] |= {"rollout/responses": math.nan, "time/since_start": math.nan, "life": math.nan, "time/step": math.inf}
    folder = write_run(tmp_path / "a", files=())
    write_metrics(folder, [*rows, {"optim/step": math.nan, "optim/loss": 1.0}, {"val/step": math.inf, "val/avg@8": 1}])
    run = read_run(folder)
    assert list(run.training) == [1, 2, 3]
    assert run.validation == {}
    assert run.samples_seen == {0: 0, 1: 256, 2: 256, 3: 512}
    assert run.seconds == {0: 0, 1: 5, 2: 5.05, 3: 9}  # the second adds its watchers' seconds
    assert run.lives == [("life 1", 0)]
    assert "have no step, and are left out: 2" in " ".join(run.notes)
    page([run])


def test_files_of_an_unknown_form_are_left_out_with_a_note(tmp_path):
    folder = write_run(tmp_path / "a", steps=20, lives=[["A"]], machine="a box", seed=0)
    (folder / "samples.jsonl").write_text('no json\n{"step": 1}\n' + json.dumps(sample(1, 0, 10)) + "\n")
    (folder / "alignment.jsonl").write_text('{"step": 1, "cosine": "high", "reward": 1}\n')
    run = read_run(folder)
    assert run.lives == [("NSR-PreRL", 0), ("GRPO", 10)]  # from config.yaml
    assert "run.json: machine, lives of an unknown form" in run.notes
    assert "lines of samples.jsonl that are cut off or of an unknown form, and are left out: 2" in run.notes
    assert "lines of alignment.jsonl that are cut off or of an unknown form, and are left out: 1" in run.notes
    (folder / "run.json").write_text('{"name": "x", "li')
    (folder / "config.yaml").write_text("a: [1,\n b: {")
    assert {"run.json cannot be read", "config.yaml cannot be read"} <= set(read_run(folder).notes)
    (folder / "run.json").unlink()
    one = "{class_path: PolicyReincarnation, init_args: {at_step: 7, successor: {class_path: a.GRPO}}}"
    (folder / "config.yaml").write_text(f"model: {{class_path: x.NSRPreRL}}\ntrainer: {{callbacks: {one}}}\n")
    assert read_run(folder).lives == [("NSR-PreRL", 0), ("GRPO", 7)]
    for text in ("model: text\ndata: text\ntrainer: text\n", "model: [1]\ntrainer: {callbacks: [1, {}]}\n"):
        (folder / "config.yaml").write_text(text)
        assert "unknown model" in page([read_run(folder)])
    (folder / "metrics.csv").write_text("")
    assert "metrics.csv has no rows" in read_run(folder).notes
    odd = {
        "response": "wait and see",
        "thoughts": [["a", "b", "c"], [9, 12, "x"], [0, 4, "y"], [2, 6, "z"], [0, 99, "w"], 1],
    }
    assert spans(odd) == [(0, 4, "y"), (9, 12, "x")]


def test_versions_without_metrics_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a" / "version_0", steps=1)
    (write_run(tmp_path / "a" / "version_1", steps=1) / "metrics.csv").unlink()
    assert "a/version_1: no metrics.csv in it, left out." in report(["a"]).read_text()


def test_a_predecessor_is_looked_for_beside_the_run_first(tmp_path, monkeypatch):
    """Not below the folder that one happens to be in; and where the runs were moved to."""
    from prerl_lightning.report.reading import _predecessor

    for base in (tmp_path, tmp_path / "there"):
        for version in ("version_0", "version_1"):
            folder = base / "runs" / "dsrl" / version
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text("step\n")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "there" / "runs" / "dsrl" / "version_1"
    for source, expected in (
        ("runs/dsrl/version_0/checkpoints/last.ckpt", run.with_name("version_0")),
        (str(tmp_path / "runs/dsrl/version_0/checkpoints/last.ckpt"), tmp_path / "runs/dsrl/version_0"),
        ("/gone/runs/dsrl/version_0/checkpoints/last.ckpt", run.with_name("version_0")),
        ("/gone/runs/other/version_0/checkpoints/last.ckpt", None),
        ("/gone/runs/before/version_0/checkpoints/last.ckpt", run.with_name("version_0")),  # renamed
    ):
        (run / "run.json").write_text(json.dumps({"name": "before", "resumed_from": source}))
        assert _predecessor(run) == expected, source
