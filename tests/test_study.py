"""`prerl study`: what is read and refused, which runs are made, what the verdicts are; and one real study, killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import finish, start
from report_runs import write_run

from prerl_lightning.errors import InputError
from prerl_lightning.report import compare
from prerl_lightning.report.reading import read_run
from prerl_lightning.report.runs import Run
from prerl_lightning.study import check, command, schedule
from prerl_lightning.study import record as record_module
from prerl_lightning.study.design import Measure, arguments, identity, read_study
from prerl_lightning.study.measures import Curve, draws, measure, steps_to, target
from prerl_lightning.study.plan import Plan
from prerl_lightning.study.record import Record
from prerl_lightning.study.verdicts import Side, judge, t_quantile

CLAIM = {
    "name": "sooner", "says": "DSRL is sooner.", "measure": {"steps_to_accuracy": {"share": 0.8}}, "arm": "dsrl",
    "against": "grpo", "effect": "ratio", "expected": "more", "margin": 1.0,
}  # fmt: skip


def write_study(folder, claims=(CLAIM,), name="s.yaml", **changes):
    """A study of two arms and three seeds; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm in ("grpo", "dsrl"):
        (folder / f"{arm}.yaml").write_text(json.dumps({"model": {"class_path": arm.upper()}}))
    value = {"arms": {arm: {"config": f"{arm}.yaml"} for arm in ("grpo", "dsrl")}, "seeds": [0, 1, 2]}
    value |= {"claims": list(claims)} | changes
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    return folder / name


FACT = {"families": ["reflection"], "max_steps": 60, "evaluated": 10, "val": True, "samples": 8, "alignment": True}


@pytest.fixture
def studied(tmp_path, monkeypatch):
    """A function that reads a study of these changes, from an empty folder that is the present one. Its arms are no
    whole configurations: `FACT` is what the command hears of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "facts", lambda commands: dict.fromkeys(commands, FACT))
    return lambda **changes: read_study(write_study(Path("."), **changes))


# ---- the file


def claim(**changes):
    return CLAIM | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": {}}, r"arm: no such key\. Here may stand arms, seeds, claims, name"),
        ({"seeds": None}, r"seeds is missing"),
        ({"seeds": [0, 0]}, r"seeds: \[0, 0\]: give different whole numbers"),
        ({"jobs": 0}, r"jobs: 0: how many runs"),
        ({"arms": {"grpo": {}}}, r"arms\.grpo\.config is missing"),
        ({"arms": {"grpo": {"config": "no.yaml"}}}, r"arms\.grpo\.config: there is no file .*no\.yaml"),
        ({"arms": {"a/b": {"config": "grpo.yaml"}}}, r"arms: 'a/b': names are of letters"),
        ({"set": {"seed_everything": 1}}, r"set\.seed_everything: Use seeds\."),
        ({"set": {"trainer.logger": True}}, r"set\.trainer\.logger: The study says where its runs lie"),
        ({"claims": [claim(arm="drsl")]}, r"claims\[0\]\.arm: no arm 'drsl'\. There are grpo, dsrl"),
        ({"claims": [claim(arm="grpo")]}, r"claims\[0\]\.against: an arm cannot be compared with itself"),
        ({"claims": [CLAIM, claim(says="x")]}, r"claims\[1\]\.name: 'sooner' is the name of claims\[0\], too"),
        ({"claims": [claim(measure={"speed": {}})]}, r"claims\[0\]\.measure: .*There are steps_to_accuracy"),
        ({"claims": [claim(measure={"accuracy": {}})]}, r"claims\[0\]\.measure\.accuracy\.at is missing"),
        ({"claims": [claim(measure={"accuracy": {"at": 1.5}})]}, r"accuracy\.at: 1\.5: give a whole number"),
        ({"claims": [claim(measure={"thoughts": {"family": "a", "of": "all"}})]}, r"of: 'all': write ratio or count"),
        ({"claims": [claim(measure={"steps_to_accuracy": {}})]}, r"give either share, of the baseline's gain, or"),
        ({"claims": [claim(against=None, effect="value")]}, r"a share is of another arm's gain: name it in"),
        ({"claims": [claim(effect="value")]}, r"claims\[0\]\.effect: 'value': write ratio or difference"),
        ({"claims": [claim(expected="higher")]}, r"claims\[0\]\.expected: 'higher': write more or less"),
        ({"claims": [claim(margin=0)]}, r"claims\[0\]\.margin: 0: give a number above 0"),
        ({"claims": [claim(seeds=[1])]}, r"claims\[0\]\.seeds: no such key"),
        ({"tuning": {"seeds": [2, 3], "measure": {"final_accuracy": {}}, "grid": {}}}, r"tuning\.seeds: 2 in seeds"),
        ({"tuning": {"seeds": [9], "measure": {"cosine": {}}, "grid": {}}}, r"tuning\.measure: cosine cannot choose"),
        ({"tuning": {"seeds": [9], "measure": {"final_accuracy": {}}, "grid": {"x": {}}}}, r"tuning\.grid\.x: no arm"),
        (
            {"tuning": {"seeds": [9], "measure": {"final_accuracy": {}}, "grid": {"grpo": {"model.init_args.lr": 1}}}},
            r"tuning\.grid\.grpo\.model\.init_args\.lr: 1: give a list",
        ),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_by_their_key(studied, changes, words):
    with pytest.raises(InputError, match=words):
        studied(**changes)


def test_a_key_that_is_there_twice(tmp_path):
    (tmp_path / "mine.yaml").write_text("arms: {}\nseeds: [0]\nseeds: [1]\n")
    with pytest.raises(InputError, match=r"mine\.yaml, line 3: the key seeds is there twice, before in line 2"):
        read_study(tmp_path / "mine.yaml")


def test_runs_of_a_study_in_the_background_hear_sigint():
    """A shell without job control starts what has a & behind it with SIGINT ignored, and so what that starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"]
    try:
        outside = subprocess.check_output(asked, text=True)
        with schedule._signals():
            inside = subprocess.check_output(asked, text=True)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outside.strip(), inside.strip()) == ("True", "False")


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted((CONFIGS / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_studies(file):
    """Their arms are configurations, and have what the claims ask."""
    study = read_study(file)
    points = {f"{name} {p}": arguments(arm, p) for name, arm in study.arms.items() for p in study.points(name)[:1]}
    found = check.answers({f"arms.{name}": arguments(arm) for name, arm in study.arms.items()} | points)
    check.accepted(found)
    check.check_claims(study, found)


def test_an_arm_that_prerl_fit_refuses(tmp_path):
    config = CONFIGS / "grpo.yaml"
    good = [f"--config={config}", "--trainer.max_steps=20"]
    found = check.answers({"arms.a": good, "arms.b": [*good, "--model.init_args.lrr=1"], "arms.c": good})
    assert list(found) == ["arms.a", "arms.b"]
    with pytest.raises(InputError, match=r"arms\.b: prerl fit refuses it: .*init_args\.lrr: \w+ has no such argument"):
        check.accepted(found)
    placed = check.answers({"arms.a": [*good, "--trainer.logger=true"]})
    with pytest.raises(InputError, match=r"arms\.a: .*trainer\.logger is set"):
        check.accepted(placed)


@pytest.mark.parametrize(
    ("of", "fact", "words"),
    [
        ({"thoughts": {"family": "wait"}}, {}, "no family 'wait' is counted. There are reflection"),
        ({"thoughts": {"family": "wait"}}, {"families": []}, "thoughts are off"),
        ({"accuracy": {"at": 70}}, {}, r"ends at step 60 \(trainer.max_steps\)"),
        ({"accuracy": {"at": 15}}, {}, "step 15 is not evaluated: trainer.val_check_interval is 10"),
        ({"pass_at_k": {"k": 16}}, {}, "data.val_samples is 8"),
        ({"final_accuracy": {}}, {"val": False}, "no held-out problems: set data.val"),
        ({"negative_share": {}}, {"alignment": False}, "alignment.every_n_steps is 0"),
    ],
)
def test_a_claim_on_what_its_runs_will_not_have(studied, of, fact, words):
    study = studied(claims=[claim(), claim(name="b", measure=of)])
    found = {"arms.grpo": FACT | fact, "arms.dsrl": FACT | fact}
    with pytest.raises(InputError, match=rf"claims\[(0|1)\]\.measure: .*{words}.* \(arms\.(grpo|dsrl)\)"):
        check.check_claims(study, found)
    check.check_claims(studied(), {"arms.grpo": FACT, "arms.dsrl": FACT})


def made_all(study):
    for runs in Plan(study).compared().values():
        for run in runs:
            made(run)


@pytest.mark.parametrize("there", [False, True], ids=["runs to make", "nothing to run"])
@pytest.mark.parametrize("flags", [["--dry_run"], ["--no_runs"], []], ids=" ".join)
def test_claims_are_checked_with_and_without_runs_to_make(studied, flags, there):
    study = studied(claims=[claim(measure={"thoughts": {"family": "transitions"}})])
    if there:
        made_all(study)
    with pytest.raises(InputError, match="no family 'transitions' is counted"):
        command.study(["s.yaml", *flags])
    assert not Path("runs/study/s/study.json").exists()


def test_a_dry_run_asks_prerl_fit(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    shutil.copy(Path(__file__).parent / "study_run.yaml", "tiny.yaml")
    arms = {"grpo": {"config": "tiny.yaml"}, "dsrl": {"config": "tiny.yaml", "set": {"trainer.max_step": 8}}}
    write_study(Path("."), arms=arms)
    with pytest.raises(InputError, match=r"arms\.dsrl: prerl fit refuses it: .*trainer\.max_step\b"):
        command.study(["s.yaml", "--dry_run"])
    assert "s: parsing 2 configurations as prerl fit does" in caplog.text


def test_what_was_checked_is_not_checked_again(studied, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "facts", lambda commands: asked.append(1) or dict.fromkeys(commands, FACT))
    studied()
    for flag, total in (("--dry_run", 1), ("--no_runs", 2), ("--dry_run", 2), ("--no_runs", 2)):
        command.study(["s.yaml", flag])
        assert len(asked) == total, flag
    studied(claims=[claim(margin=2.0)])
    command.study(["s.yaml", "--dry_run"])
    assert len(asked) == 3


# ---- which runs


def test_what_makes_two_runs_the_same(studied):
    study = studied(set={"trainer.max_steps": 60})
    grpo, dsrl = study.arms["grpo"], study.arms["dsrl"]
    assert arguments(grpo, {"trainer.max_steps": 20, "model.init_args.lr": "1e-4"}) == [
        "--config=grpo.yaml",
        "--trainer.max_steps=20",
        "--model.init_args.lr=0.0001",
    ]
    key = identity(grpo, 0, {"model.init_args.lr": "1e-4"})
    assert key == identity(replace(grpo, name="another"), 0, {"model.init_args.lr": 0.0001})
    assert len({key, identity(grpo, 1), identity(grpo, 0), identity(dsrl, 0), identity(grpo, 0, {"a.b": 1})}) == 5
    Path("grpo.yaml").write_text("# with a comment\nmodel: {class_path: GRPO}\n")
    assert identity(grpo, 0, {"model.init_args.lr": "1e-4"}) == key
    Path("grpo.yaml").write_text("model: {class_path: PreRL}\n")
    assert identity(grpo, 0, {"model.init_args.lr": "1e-4"}) != key


def planned(study, arm="grpo", seed=0, *more):
    return Plan(study).run(arm, None, seed, *more)


def made(run, **options):
    """A run of the study as files."""
    run.folder.mkdir(parents=True, exist_ok=True)
    return write_run(run.folder / "grpo" / f"version_{options.pop('version', 0)}", switch=0, seed=run.seed, **options)


def test_finished_runs_are_found_also_in_another_study(studied):
    study = studied()
    run = planned(study)
    assert schedule.status(run.folder).state == "none"
    made(run)
    assert schedule.status(run.folder).finished
    other = replace(study, name="other")
    assert planned(other).folder == run.folder
    assert planned(other, "grpo", 1).folder.parent.name == "other"
    assert planned(other, "dsrl").folder.parent.name == "other"


def test_what_is_no_finished_run(studied):
    study = studied()
    run = planned(study)
    run.folder.mkdir(parents=True)
    (run.folder / "run.log").write_text("$ prerl fit\nTraceback:\nprerl: error: data.train: no such file\nbye\n")
    assert schedule.status(run.folder).said == "prerl: error: data.train: no such file"
    made(run, steps=30, max_steps=60)
    assert schedule.status(run.folder).said == "stopped at step 30 of 60"
    made(run, steps=30, max_steps=60, stopped="trainer.max_time: 1:00:00 is over")
    assert schedule.status(run.folder).said == "stopped at step 30 of 60: trainer.max_time: 1:00:00 is over"
    assert schedule.status(made(planned(study, "grpo", 1), status="running").parents[1]).state == "unfinished"
    checkpoint = str((run.folder / "grpo" / "version_0" / "checkpoints" / "last.ckpt").resolve())
    made(run, version=1, first=21, max_steps=60, resumed_from=checkpoint)
    found = schedule.status(run.folder)
    assert (found.state, found.run.steps, list(found.run.validation)) == ("finished", 60, [0, 10, 20, 30, 40, 50, 60])


def test_a_run_that_another_process_makes_is_waited_for(studied):
    run = planned(studied())
    lock = schedule._locked(run.folder)
    assert lock is not None
    lock.write("4711\n")
    lock.flush()
    assert schedule._locked(run.folder) is None
    assert (run.folder / "lock").read_text() == "4711\n"  # the owner's, by whom it is found

    def end():
        made(run)
        lock.close()

    threading.Timer(0.5, end).start()
    ended = []
    schedule.make([run], schedule.slots(1), ended.append)
    assert ended == [run]
    assert not (run.folder / "run.log").exists()  # it was not started


def test_a_failed_run_is_said_and_the_others_go_on(studied):
    """A real process, of a configuration that `prerl fit` refuses for want of a file."""
    runs = [
        replace(planned(studied(), "grpo", seed), arguments=("--config=gone.yaml", f"--seed_everything={seed}"))
        for seed in (0, 1)
    ]
    made(runs[1])  # by another study, since it was listed
    ended = []
    schedule.make(runs, schedule.slots(1), ended.append)
    assert ended == runs
    found = schedule.status(runs[0].folder)
    assert (found.state, "gone.yaml" in found.said) == ("unfinished", True)
    assert (runs[0].folder / "run.log").read_text().startswith("$ prerl fit --config=gone.yaml --seed_everything=0")


def test_runs_side_by_side_have_their_own_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [slot.cores for slot in schedule.slots(2)] == [(0, 1), (2, 3, 4)]
    assert [slot.environment["OMP_NUM_THREADS"] for slot in schedule.slots(2)] == ["2", "3"]
    assert schedule.slots(1) == [schedule.Slot()]
    with pytest.raises(InputError, match="jobs: 6 is more than the 5 cores"):
        schedule.slots(6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert [slot.environment for slot in schedule.slots(2)] == [{"CUDA_VISIBLE_DEVICES": g} for g in ("3", "7")]
    with pytest.raises(InputError, match="jobs: 3 is more than the 2 GPUs"):
        schedule.slots(3)


# ---- tuning

TUNING = {
    "seeds": [100, 101], "measure": {"final_accuracy": {}}, "set": {"trainer.max_steps": 20},
    "grid": {"grpo": {"model.init_args.lr": ["1e-4", "3e-4"]}, "dsrl": {"model.init_args.lr": [0.0001], "a.b": [1, 2]}},
}  # fmt: skip


def test_tuning_chooses_the_best_point_of_those_that_are_whole(studied):
    study = studied(tuning=TUNING)
    assert [dict(p) for p in study.points("dsrl")] == [
        {"model.init_args.lr": 0.0001, "a.b": 1},
        {"model.init_args.lr": 0.0001, "a.b": 2},
    ]
    assert len(Plan(study).tuning()) == 8
    assert Plan(study).chosen("grpo") is None
    assert Plan(study).compared()["grpo"] == []
    for point, speed in enumerate((1.0, 2.0)):
        for run in Plan(study).of_point("grpo", point):
            made(run, speed=speed)
    chosen = Plan(study).chosen("grpo")
    assert chosen == {"model.init_args.lr": "3e-4"}
    run = Plan(study).compared()["grpo"][0]
    assert "--model.init_args.lr=0.0003" in run.arguments
    assert "--trainer.max_steps=20" not in run.arguments
    shutil.rmtree(Plan(study).of_point("grpo", 1)[0].folder)
    assert Plan(study).chosen("grpo") == {"model.init_args.lr": "1e-4"}


def test_tuning_at_unequal_numbers_of_points_is_shown(studied, capsys):
    grid = {"grpo": TUNING["grid"]["grpo"]}
    for of_grid, said in ((TUNING["grid"], False), (grid, True)):
        study = studied(tuning=TUNING | {"grid": of_grid})
        for run in Plan(study).tuning():
            made(run)
        made_all(study)
        command.study(["s.yaml"])
        page = Path("runs/study/s/study.html").read_text()
        for text in (capsys.readouterr().out, page):
            assert ("tuned unequally: dsrl at 0 points, grpo at 2" in text) == said
    record = json.loads(Path("runs/study/s/study.json").read_text())
    assert record["tuning"]["arms"]["dsrl"] == {"points": [], "chosen": {}}
    assert [point["mean"] is not None for point in record["tuning"]["arms"]["grpo"]["points"]] == [True, True]


# ---- registration


def test_what_was_registered_when(studied):
    study = studied(claims=[CLAIM, claim(name="second", margin=1.2)])
    path = Path("study.json")

    def standing(what, finished=(), **changes):
        record = Record(path)
        record.register(studied(**changes) if changes else study, finished)
        record.write()
        return record.standing(what), record.data["history"]

    assert standing("claim sooner")[0].endswith("before any run was finished")
    first = json.loads(path.read_text())["registration"]
    assert standing("claim sooner", ["a", "b"])[0].endswith("before any run was finished")
    assert json.loads(path.read_text())["registration"] == first
    said, history = standing("claim second", ["a", "b"], claims=[CLAIM, claim(name="second", margin=1.0)])
    assert said.startswith("CHANGED ")
    assert said.endswith("after 2 runs were finished")
    assert [h["what"] for h in history] == ["claim second changed"]
    assert history[0]["before"]["said"]["margin"] == 1.2
    said, history = standing("claim third", ["c"], claims=[CLAIM, claim(name="third")])
    assert said.startswith("ADDED ")
    assert said.endswith("after 3 runs were finished")
    assert history[-1]["what"] == "claim second removed"
    assert Record(path).standing("claim sooner").endswith("before any run was finished")
    said, _ = standing("design", claims=[CLAIM, claim(name="third")], seeds=[0, 1])
    assert said.startswith("CHANGED ")
    path.unlink()
    assert standing("claim sooner", ["a"])[0].startswith("registered ")
    assert Record(path).standing("claim sooner").endswith("after 1 run was finished")


def test_a_changed_claim_is_shown_on_the_page(studied, capsys):
    study = studied()
    command.study(["s.yaml", "--no_runs"])
    assert "incomplete: dsrl seed 0: not begun" in capsys.readouterr().out
    made_all(study)
    command.study(["s.yaml"])
    assert "before any run was finished" in capsys.readouterr().out
    studied(claims=[claim(margin=1.5)])
    command.study(["s.yaml", "--dry_run"])
    assert "is there  dsrl, seed 2" in capsys.readouterr().out
    command.study(["s.yaml"])
    assert "CHANGED" in capsys.readouterr().out
    page = Path("runs/study/s/study.html").read_text()
    assert "claim sooner changed" in page
    assert all(f'id="{part}"' in page for part in ("verdicts", "ratios", "registration", "accuracy", "samples"))


def test_a_dry_run_says_what_would_be_recorded(studied, capsys):
    claims = [claim(), claim(name="same"), claim(name="gone")]
    study, path = studied(claims=claims), Path("runs/study/s/study.json")

    def listed():
        """The lines about claims and the design, by their start."""
        command.study(["s.yaml", "--dry_run"])
        lines = capsys.readouterr().out.splitlines()
        return {" ".join(line.split()[:2]): line for line in lines if line.startswith(("claim", "design", "removed"))}

    new = "(would be recorded: registered now, before any run was finished)"
    assert all(line.endswith(new) for line in listed().values())
    assert not Path("runs").exists()
    command.study(["s.yaml", "--no_runs"])
    made_all(study)
    before = path.read_bytes()
    studied(claims=[claim(says="Others.", margin=1.5), claims[1], claim(name="new")], seeds=[0, 1])
    found = listed()
    assert found["claim sooner:"].endswith("(would be recorded: CHANGED now, after 4 runs were finished)")
    assert found["claim new:"].endswith("(would be recorded: ADDED now, after 4 runs were finished)")
    assert found["design arms,"].endswith("(would be recorded: CHANGED now, after 4 runs were finished)")
    assert "(registered 2" in found["claim same:"]
    assert found["removed claim"].endswith("claim gone")
    assert path.read_bytes() == before
    command.study(["s.yaml"])
    capsys.readouterr()
    assert not any("would be" in line for line in listed().values())
    studied(claims=claims)
    assert "(would be recorded: registered 2" in (back := listed()["claim sooner:"])
    assert back.endswith("; changed after that, and put back as it was now, after 6 runs were finished)")


@pytest.mark.parametrize(
    ("margins", "said"),  # of each call's file, None: without the claim, and with so many runs finished
    [
        ([(1.0, 0), (2.0, 4), (1.0, 4)], r"registered T0, before any .*; changed .* as it was T2, after 4 runs were"),
        ([(1.0, 0), (None, 2), (1.0, 3)], r"registered T0, before any .*; removed .* as it was T2, after 3 runs were"),
        ([(1.0, 1), (2.0, 1), (1.0, 2)], r"registered T0, after 1 run was .*; changed .* as it was T2, after 2 runs"),
        # to what was never registered, or no longer when the first run was finished
        ([(1.0, 0), (2.0, 2), (3.0, 3), (2.0, 4)], r"CHANGED T3, after 4 runs were finished"),
        ([(1.0, 0), (2.0, 0), (3.0, 2), (1.0, 4)], r"CHANGED T3, after 4 runs were finished"),
        ([(1.0, 0), (2.0, 0), (3.0, 2), (2.0, 4)], r"registered T1, before any .*; changed .* as it was T3, after 4"),
        ([(1.0, 0), (2.0, 2), (1.0, 3), (2.0, 4)], r"CHANGED T3, after 4 runs were finished"),
        ([(1.0, 0), (2.0, 2), (1.0, 3), (2.0, 4), (1.0, 5)], r"registered T0, .*; changed .* as it was T4, after 5"),
    ],
)
def test_a_claim_put_back_is_as_registered_again(studied, monkeypatch, margins, said):
    path = Path("study.json")
    for call, (margin, done) in enumerate(margins):
        monkeypatch.setattr(record_module, "_now", lambda call=call: f"2026-11-27T0{call}:00:00+00:00")
        record = Record(path)
        other = [] if margin is None else [claim(name="other", margin=margin)]
        record.register(studied(claims=[CLAIM, *other]), list("abcde"[:done]))
        record.write()
    found = re.sub(r"2026-11-27 0(\d):00 UTC", r"T\1", Record(path).standing("claim other"))
    assert re.match(said, found), found
    changes = [h["what"] for h in Record(path).data["history"] if h["what"].startswith("claim other ")]
    assert len(changes) == len(margins) - 1 - any(margin is None for margin, _ in margins)


# ---- measures


def held_out(step, right, k=8, thoughts=None):
    found = {"step": step, "life": 1, "k": k, "rows": list(range(len(right))), "score": [float(c) for c in right]}
    return found | {"right": [int(c) for c in right]} | ({"thoughts": thoughts} if thoughts else {})


def simulated(lines, k=8, alignment=()):
    """A run in memory of these lines of held_out.jsonl."""
    validation = {line["step"]: {f"val/avg@{k}": sum(line["score"]) / k / len(line["rows"])} for line in lines}
    training = {step: {"reward/mean": 0.0} for step in range(1, max(validation) + 1)}
    by_step = {line["step"]: line for line in lines}
    return Run(Path("x"), "x", "", {}, {}, "", training, validation, {0: 0.0}, (), tuple(alignment), 0.0, (), by_step)


def test_t_quantiles():
    table = {(0.95, 1): 12.7062, (0.95, 2): 4.3027, (0.95, 9): 2.2622, (0.99, 10): 3.1693, (0.99, 4): 4.6041}
    for (level, df), expected in table.items():
        assert t_quantile(level, df) == pytest.approx(expected, abs=1e-4)


def test_steps_and_targets_are_those_of_the_report():
    generator = np.random.default_rng(0)
    steps = np.array([0.0, 10, 20, 40, 60])
    for _ in range(300):
        values, goal = generator.random(5).round(1), round(generator.random(), 1)
        curve = dict(zip(steps, values, strict=True))
        found = steps_to(steps, values[:, None], np.array([goal]))[0]
        expected = compare.steps_to(curve, goal)
        assert found == pytest.approx(expected) if expected is not None else np.isnan(found)
        at = target([Curve(steps, values[:, None], None)], 0.8)[0]
        expected = compare.target(curve, 0.8)
        assert at == pytest.approx(expected) if expected is not None else np.isnan(at)


def test_measures_by_hand():
    thoughts = [{"wait": [1, 0, 3]}, {"wait": [4, 8, 0]}]
    run = simulated([held_out(0, [0, 4, 8], thoughts=thoughts[0]), held_out(10, [8, 4, 8], thoughts=thoughts[1])])
    weights = np.array([[1.0, 1, 1], [3, 0, 0]])

    def values(name, **options):
        return measure(run, Measure(name, options), weights).values.tolist()

    assert values("accuracy", at=0) == [0.5, 0.0]
    assert values("final_accuracy") == pytest.approx([20 / 24, 1.0])
    assert values("pass_at_k", k=2, at=0) == pytest.approx([(0 + 1 - 6 / 28 + 1) / 3, 0.0])
    assert values("thoughts", family="wait") == [3.0, 4.0]
    assert values("thoughts", family="wait", of="count", at=0) == pytest.approx([4 / 24, 1 / 8])
    assert measure(run, Measure("thoughts", {"family": "hm"}), weights).missing
    assert measure(run, Measure("accuracy", {"at": 5}), weights).missing == "step 5 was not evaluated"
    reached = measure(run, Measure("steps_to_accuracy", {}), weights, np.array([0.75, 2.0]))
    assert reached.values.tolist() == pytest.approx([7.5, 10.0])
    assert not reached.censored
    assert measure(run, Measure("steps_to_accuracy", {}), weights, np.array([0.9, 0.9])).censored
    rows = [{"step": s, "cosine": c, "inner_product": c, "reward": 0} for s, c in ((1, 0.5), (1, -0.1), (9, 0.2))]
    aligned = simulated([held_out(0, [1])], alignment=rows)
    assert measure(aligned, Measure("negative_share", {}), weights).counted == (1, 3)
    assert measure(aligned, Measure("cosine", {"at": 1}), weights).values.tolist() == pytest.approx([0.2, 0.2])


def test_resamples_are_of_the_problems_and_the_same_for_all():
    weights = draws(5, 4000)
    assert weights[0].tolist() == [1] * 5
    assert (weights.sum(axis=1) == 5).all()
    assert weights[1:].var() == pytest.approx(5 * 0.2 * 0.8, rel=0.05)
    assert (weights == draws(5, 4000)).all()


def test_held_out_results_of_a_resumed_run(tmp_path):
    def write(folder, lines):
        (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3}\n')

    first = write_run(tmp_path / "a" / "version_0", steps=30, status="running")
    write(first, [held_out(s, [1, 2]) for s in (0, 10, 20, 30)])
    checkpoint = str(first / "checkpoints" / "last.ckpt")
    second = write_run(tmp_path / "a" / "version_1", first=21, resumed_from=checkpoint)
    write(second, [held_out(s, [7, 7]) for s in (30, 40, 50, 60)])
    run = read_run(second)
    assert {step: line["right"] for step, line in run.held_out.items()} == {
        **{step: [1, 2] for step in (0, 10, 20)},
        **{step: [7, 7] for step in (30, 40, 50, 60)},
    }
    assert any("held_out.jsonl" in note for note in run.notes)


# ---- verdicts

STEPS = (0, 10, 20, 30, 40, 60)


def simulate(generator, speed, ability, k=8, seed_spread=0.12, start=0.2, gain=0.45):
    """A run whose accuracy rises with this speed, on problems of these abilities (log-odds). Seeds differ in speed."""
    own = speed * np.exp(generator.normal(0, seed_spread))
    lines = []
    for step in STEPS:
        mean = start + gain * (1 - np.exp(-own * step / 15))
        p = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) + ability)))
        lines.append(
            held_out(step, generator.binomial(k, p), k, {"wait": generator.poisson(1 + own * step / 20, len(p))})
        )
    return simulated(lines, k)


def simulated_study(generator, speeds, claims, seeds=5, problems=64, interaction=0.0):
    """``interaction``: how much the arms differ in which problems are easy, in log-odds."""
    ability = generator.normal(0, 1.2, problems)
    arms = {}
    for arm, speed in speeds.items():
        own = ability + generator.normal(0, interaction, problems)
        arms[arm] = Side({s: simulate(generator, speed, own) for s in range(seeds)}, {})
    level = 1 - 0.05 / len(claims)
    return [judge(c, level, range(seeds), arms[c.arm], arms[c.against], 100).verdict for c in claims]


def several(studied):
    """Claims in each direction, on speed and on what the runs end with."""
    given = [
        claim(),
        claim(name="b", arm="grpo", against="dsrl"),
        claim(name="c", measure={"accuracy": {"at": 20}}, effect="difference", margin=0.0),
        claim(name="d", measure={"thoughts": {"family": "wait", "at": 20}}, expected="less"),
    ]
    return studied(claims=given).claims


@pytest.mark.parametrize("interaction", [0.0, 0.7])
def test_without_an_effect_few_studies_decide_anything(studied, interaction):
    """At the margin every decision is false; at most 5 % of studies make one, whatever the number of claims."""
    claims, generator = several(studied), np.random.default_rng(0)
    speeds = {"grpo": 1.0, "dsrl": 1.0}
    studies = [simulated_study(generator, speeds, claims, interaction=interaction) for _ in range(100)]
    false = sum(any(verdict != "undecided" for verdict in one) for one in studies)
    assert false <= 0.05 * len(studies)


def test_a_known_effect_is_found(studied):
    """1.6 times as fast, over ten seeds, 64 problems and four claims: power 80 % and more for the steps."""
    claims, generator = several(studied), np.random.default_rng(1)
    studies = [simulated_study(generator, {"grpo": 1.0, "dsrl": 1.6}, claims, seeds=10) for _ in range(50)]
    first, second = ([one[i] for one in studies] for i in (0, 1))
    assert first.count("supported") >= 40
    assert second.count("refuted") >= 40
    assert "refuted" not in first
    assert "supported" not in second


def test_other_problems_widen_the_interval(studied):
    """Seeds that agree on eight problems say little of others."""
    (one,) = studied(claims=[claim(measure={"final_accuracy": {}}, effect="difference", margin=0.0)]).claims
    lines = {"grpo": [4] * 8, "dsrl": [4, 4, 4, 4, 4, 4, 4, 8]}
    sides = {arm: Side({s: simulated([held_out(0, [1] * 8), held_out(10, right)]) for s in range(5)}, {})
             for arm, right in lines.items()}  # fmt: skip
    found = judge(one, 0.95, range(5), sides["dsrl"], sides["grpo"])
    assert (found.verdict, found.problems, found.effect) == ("undecided", 8, 1 / 16)
    assert found.low < 0
    bare = {
        arm: Side({s: replace(run, held_out={}) for s, run in side.runs.items()}, {}) for arm, side in sides.items()
    }
    alone = judge(one, 0.95, range(5), bare["dsrl"], bare["grpo"])
    assert (alone.verdict, alone.problems) == ("supported", None)


def test_seeds_that_agree_by_chance_leave_an_interval(studied):
    (one,) = studied(claims=[claim(measure={"final_accuracy": {}}, effect="difference", margin=0.0)]).claims
    right = {"grpo": ([4, 2, 4, 1, 0, 6], [2, 4, 4, 0, 1, 6]), "dsrl": ([5, 1, 4, 3, 0, 5], [1, 5, 5, 0, 2, 5])}
    sides = {arm: Side({s: simulated([held_out(0, c)]) for s, c in enumerate(of_seeds)}, {})
             for arm, of_seeds in right.items()}  # fmt: skip
    found = judge(one, 0.95, range(2), sides["dsrl"], sides["grpo"])
    assert [seed.effect for seed in found.seeds] == pytest.approx([1 / 48, 1 / 48])
    assert found.low < 0 < found.high
    assert found.verdict == "undecided"


def curve_runs(*steps):
    """One run a seed that has 0.8 at such a step; None: never."""
    found = {}
    for seed, at in enumerate(steps):
        rises = [(step, 8 if at is not None and step >= at else 1) for step in (0, 10, 20, 30, 40, 50, 60)]
        found[seed] = simulated([held_out(step, [right] * 4) for step, right in rises])
    return Side(found, {})


@pytest.mark.parametrize(
    ("arm", "against", "margin", "verdict"),
    [
        ((20, 20, 20, 20), (60, 60, 60, 60), 1.5, "supported"),
        ((20, 20, 20, 20), (None,) * 4, 1.5, "supported"),  # the others' true steps are more
        ((None,) * 4, (60, 60, 60, 60), 0.5, "undecided"),  # it looks above 0.5, and may be anything
        ((None,) * 4, (20, 20, 20, 20), 1.5, "refuted"),
        ((60, 60, 60, 60), (None,) * 4, 1.5, "undecided"),
        ((10, 60, None, 20), (60, 10, 20, None), 1.5, "undecided"),
    ],
)
def test_runs_that_never_reach_it_are_bounds(studied, arm, against, margin, verdict):
    (one,) = studied(claims=[claim(measure={"steps_to_accuracy": {"accuracy": 0.8}}, margin=margin)]).claims
    found = judge(one, 0.95, range(4), curve_runs(*arm), curve_runs(*against))
    assert found.verdict == verdict, found
    assert found.censored == (arm.count(None), against.count(None))


def test_what_cannot_be_decided(studied):
    (one,) = studied(claims=[claim(measure={"final_accuracy": {}})]).claims
    sides = curve_runs(10, 20, 10), curve_runs(10, 30, 60)
    assert "one seed" in judge(one, 0.95, [0], *sides).why
    absent = replace(sides[1], runs={s: sides[1].runs[s] for s in (0, 1)}, absent={2: "exit status 3"})
    found = judge(one, 0.95, range(3), sides[0], absent)
    assert (found.verdict, found.missing) == ("undecided", ("grpo seed 2: exit status 3",))
    other = {s: simulated([held_out(0, [1] * 5), held_out(10, [s + 1] * 5)]) for s in range(3)}
    assert "different held-out problems" in judge(one, 0.95, range(3), sides[0], Side(other, {})).why
    nothing = Side({s: simulated([held_out(0, [0] * 4)]) for s in range(3)}, {})
    assert "there is no ratio" in judge(one, 0.95, range(3), sides[0], nothing).why


def test_a_share_of_none_is_not_never(studied):
    value = claim(measure={"negative_share": {}}, against=None, effect="value", expected="less", margin=0.05)
    (one,) = studied(claims=[value]).claims

    def side(responses, negative=0):
        products = [-1.0] * negative + [1.0] * (responses - negative)
        rows = [{"step": 1, "cosine": 0.5, "inner_product": x, "reward": 0} for x in products]
        return Side({s: simulated([held_out(0, [1])], alignment=rows) for s in range(5)}, {})

    assert judge(one, 0.95, range(5), side(8), None).verdict == "undecided"
    assert judge(one, 0.95, range(5), side(100), None).verdict == "supported"
    assert judge(one, 0.95, range(5), side(100, 40), None).verdict == "refuted"


@pytest.mark.parametrize("effect", ["ratio", "difference"])
def test_a_ratio_of_shares_is_no_surer_than_their_difference(studied, effect):
    """2 of 40 responses against 8 of 40, in each of two seeds the same: a spread over seeds of 0."""
    compared = claim(measure={"negative_share": {}}, effect=effect, expected="less", margin=int(effect == "ratio"))
    (one,) = studied(claims=[compared]).claims

    def side(negative):
        products = [-1.0] * negative + [1.0] * (20 - negative)
        rows = [{"step": 1, "cosine": 0.5, "inner_product": x, "reward": 0} for x in products]
        return Side({s: simulated([held_out(0, [1])], alignment=rows) for s in range(2)}, {})

    assert judge(one, 0.95, range(2), side(1), side(4)).verdict == "undecided"


# ---- a real one

REAL = """
arms:
  grpo: {config: tiny.yaml}
  nsr: {config: tiny.yaml, set: {model.class_path: NSRRL}}
seeds: [0]
claims:
  - {name: ends, says: NSR ends higher., measure: {final_accuracy: {}}, arm: nsr, against: grpo, effect: difference,
     expected: more, margin: 0}
  - {name: sooner, says: And sooner., measure: {steps_to_accuracy: {accuracy: 0.25}}, arm: nsr, against: grpo,
     effect: ratio, expected: more, margin: 1}
  - {name: thinks, says: It thinks more., measure: {thoughts: {family: reflection, at: 3, of: count}}, arm: nsr,
     against: grpo, effect: difference, expected: more, margin: 0}
"""


def wait_for(found, process, seconds=400):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_a_study_stopped_and_killed_equals_an_uninterrupted_one(tmp_path):
    """Stopped before its first step, killed with its run at step 1, finished; and the killed run once more, whole."""
    config = (Path(__file__).parent / "study_run.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(config)
    (tmp_path / "s.yaml").write_text(REAL)
    folder = tmp_path / "runs" / "study" / "s"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def lock():
        pids = [p.read_text() for p in folder.glob("grpo-*/lock")]
        return int(pids[0]) if pids and pids[0].endswith("\n") else None

    process = start(tmp_path, "study", "s.yaml", env=env)
    pid = wait_for(lock, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=128 + signal.SIGTERM)
    assert not Path(f"/proc/{pid}").exists()
    process = start(tmp_path, "study", "s.yaml", env=env)
    wait_for(lambda: list(folder.glob("grpo-*/**/step=1.ckpt")), process)
    process.kill()
    os.killpg(int(next(folder.glob("grpo-*/lock")).read_text()), signal.SIGKILL)
    process.communicate()
    output = finish(start(tmp_path, "study", "s.yaml", env=env))
    assert "grpo, seed 0: resumed" in output
    assert output.count("one seed shows no spread over seeds") == 3
    killed = json.loads((folder / "study.json").read_text())
    assert [run["status"] for run in killed["runs"]] == ["finished", "finished"]
    assert [p.name for p in sorted(folder.glob("grpo-*/tiny/*"))] == ["version_0", "version_1"]

    # what the problems' file says is what metrics.csv says
    for row in killed["runs"]:
        run = read_run(tmp_path / row["version"])
        assert list(run.held_out) == list(run.validation) == [0, 1, 2, 3]
        for what in (Measure("final_accuracy", {}), Measure("pass_at_k", {"k": 4}), Measure("pass_at_k", {}),
                     Measure("thoughts", {"family": "reflection", "of": "count"})):  # fmt: skip
            by_problem, by_column = (
                measure(one, what, np.ones((1, 16))).values[0] for one in (run, replace(run, held_out={}))
            )
            assert by_problem == pytest.approx(by_column)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "runs", again / "runs")
    for file in ("tiny.yaml", "s.yaml"):
        shutil.copy(tmp_path / file, again)
    shutil.rmtree(next((again / "runs" / "study" / "s").glob("grpo-*")))
    output = finish(start(again, "study", "s.yaml", env=env))
    assert "1 run to make" in output
    whole = json.loads((again / "runs" / "study" / "s" / "study.json").read_text())
    assert whole["verdicts"] == killed["verdicts"]
    assert [v["seeds"][0]["arm"] is not None for v in whole["verdicts"]] == [True] * 3
