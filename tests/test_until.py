"""A life that ends by a metric: when, the same after a kill, what is refused before the start, where it is said."""

import json
import logging
import math
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from parsing import Parsed
from plain_engine import PlainEngine
from report_runs import write_run
from test_step import sgd, start, weights
from test_watch import read, shown
from trainers import quiet_trainer

from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.monitors import check_monitors
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError
from prerl_lightning.manual import help as show_help
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.until import Ending, Until
from prerl_lightning.report.compare import group
from prerl_lightning.report.headline import lead, states
from prerl_lightning.report.payload import payload
from prerl_lightning.report.reading import read_run
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Sampling
from prerl_lightning.settings import described

ROOT = Path(__file__).parents[1]
RISES_AND_FALLS = [1, 2, 4, 3, 4, 3, 2, 1, 0]
NONE = [math.nan, 1, math.inf, 2, math.nan, 1]


def fired(until: dict, values, killed_at: int = 0) -> int | None:
    """The step whose value ends the life, each step having one; with a checkpoint in between that is resumed from."""
    ending = Ending(Until("m", **until))
    for step, value in enumerate(values, start=1):
        if ending.observe({"m": value, "other": -value}, step):
            assert ending.observe({"m": -100.0}, step + 1) is None  # once
            return step
        assert ending.observe({"other": value}, step) is None
        if step == killed_at:
            state = json.loads(json.dumps(ending.state_dict()))
            ending = Ending(Until("m", **until))
            ending.load_state_dict(state)
    return None


@pytest.mark.parametrize(
    ("until", "values", "step"),
    [
        ({}, RISES_AND_FALLS, 5),  # 3 and 4 do not beat the 4
        ({"patience": 1}, RISES_AND_FALLS, 4),
        ({"patience": 1}, [1, 1], 2),
        ({"worse_by": 0.5, "patience": 1}, RISES_AND_FALLS, 7),
        ({"worse_by": 0.25, "patience": 2}, RISES_AND_FALLS, 7),  # 3 after a 4 that is not worse
        ({"worse_by": 0.51, "patience": 2}, RISES_AND_FALLS, 9),
        ({"window": 3, "patience": 1}, RISES_AND_FALLS, 6),  # means 7/3, 3, 11/3, 10/3
        ({"window": 3, "patience": 1, "worse_by": 0.2}, RISES_AND_FALLS, 8),  # 3 is 18 % less, 2 is
        ({"not_before": 7}, RISES_AND_FALLS, 7),  # what was seen before counts
        ({"mode": "min", "patience": 1}, [3, 2, 3], 3),
        ({"mode": "min", "worse_by": 0.5}, [3, 2, 3, 2.9, 3, 3], 6),
        ({"worse_by": 0.5, "patience": 1}, [-2, -2.9, -3], 3),  # a share of its size
        ({}, [1, 2, 3, 4], None),
        ({"patience": 1}, NONE, 6),
    ],
)
def test_when_a_life_ends_and_the_same_after_a_kill(until, values, step):
    for killed_at in range(len(values)):
        assert fired(until, values, killed_at) == step


def test_what_another_condition_has_seen_is_left_out():
    before, after = Ending(Until("m")), Ending(Until("n"))
    before.observe({"m": 1.0}, 1)
    after.load_state_dict(before.state_dict())
    assert after.best is None


def test_conditions_that_cannot_be():
    for wrong in ({"patience": 0}, {"window": 0}, {"worse_by": -0.1}, {"worse_by": math.nan}, {"not_before": -1}):
        with pytest.raises(InputError, match=rf"until\.{next(iter(wrong))}: "):
            Until("m", **wrong)
    with pytest.raises(InputError, match=r"until\.mode: 'up'\. Write max"):
        Until("m", mode="up")
    with pytest.raises(InputError, match=r"until\.not_before: 9 is not before at_step \(9\)"):
        PolicyReincarnation(9, GRPO(), until=Until("m", not_before=9))


# ---------------------------------------------------------------------- in a run

G, P = 4, 2


def run(folder, model, until, shares, steps=7, at_step=6, ckpt_path=None, callbacks=(), later=()):
    """Of rollout n the share ``shares[n]`` of the responses is right; each life's rate falls to its planned end."""
    L.seed_everything(0)
    done = int(Path(ckpt_path).stem.removeprefix("step=")) if ckpt_path else 0
    calls = iter(range(done * G * P, 10**6))

    def reward(prompt, response, ground_truth, extra):
        number = next(calls)
        return float(number % (G * P) < shares[number // (G * P)] * G * P)

    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=G, max_new_tokens=8),
        engine=PlainEngine(),
        prompts_per_step=P,
    )
    rates = {"lr": 0.01, "optimizer": sgd, "lr_schedule": "linear"}
    trainer = quiet_trainer(
        max_steps=steps,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=5,  # a condition sees the steps between, too
        callbacks=[
            PolicyReincarnation(at_step, GRPO(**rates), until=until),
            *(PolicyReincarnation(step, GRPO(**rates), until=each) for step, each in later),
            RunRecord(),
            *callbacks,
            RunCheckpoint(1 if ckpt_path is None else 100, save_top_k=-1, dirpath=str(folder / "checkpoints")),
        ],
        enable_checkpointing=True,
    )
    host = NSRPreRL(model=model, **rates)
    trainer.fit(host, datamodule=data, ckpt_path=ckpt_path)
    return host


def test_a_life_ends_at_the_same_step_whenever_the_run_is_killed(model_folder, tmp_path, caplog):
    """In two lives, each with a condition of its own; what fired is in the log and in run.json."""
    caplog.set_level(logging.INFO, "prerl_lightning")
    model, shares = model_folder("llama-untied"), [0.25, 0.5, 0.375, 0.25, 0.5, 0.25, 0.25, 0.5]
    until = Until("reward/mean", patience=2)
    options = {"until": until, "shares": shares, "later": [(7, Until("reward/mean", worse_by=0.3, patience=1))]}
    whole = run(tmp_path / "whole", model, **options, steps=8)
    lives = [("NSRPreRL", 0), ("GRPO", 4), ("GRPO", 6)]
    assert whole.lives == lives
    assert whole.planned_lives == [("NSRPreRL", 0), ("GRPO", 6), ("GRPO", 7)]
    said = "reward/mean is 0.25, after 0.5 at step"
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["lives"] == [list(life) for life in lives]
    assert record["endings"] == {"1": f"{said} 2", "2": f"{said} 5"}
    line = f"Step 4: {said} 2. The life of NSRPreRL ends at step 4, as its `until` has it."
    assert line in caplog.text
    rows = read_run(tmp_path / "whole").training
    # rows of a life's last steps; its rate would have come to 0 at step 6, the next one's, from 4, at 7
    assert {step: round(row["optim/lr"], 5) for step, row in rows.items()} == {
        **{1: 0.01, 4: round(0.01 * 3 / 6, 5)},
        **{5: 0.01, 6: round(0.01 * 2 / 3, 5), 8: 0.005},
    }
    for step in (3, 4, 5):  # before it fires, between that and the switch, in a later life
        path = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        resumed = run(tmp_path / f"from_{step}", model, **options, steps=8, ckpt_path=path)
        assert resumed.lives == lives
        assert json.loads((tmp_path / f"from_{step}" / "run.json").read_text())["endings"] == record["endings"]
        moved = (weights(whole) - start(model)).norm()
        assert (weights(resumed) - weights(whole)).norm() / moved < 1e-5


def test_a_watcher_s_metric_or_at_step_ends_it(model_folder, tmp_path, caplog):
    model = model_folder("llama-untied")
    watching = Thoughts(families={"any": list("0123456789")})
    metric = Until("thoughts/any_ratio", window=2, patience=1)
    found = run(tmp_path / "never", model, metric, [0.5] * 3, steps=3, at_step=2, callbacks=[watching])
    assert found.lives == [("NSRPreRL", 0), ("GRPO", 2)]
    assert found.endings == {1: None}
    assert "not measured" not in caplog.text
    found = run(tmp_path / "absent", model, Until("optim/entropy"), [0.5] * 2, steps=2, at_step=1)
    assert found.lives == [("NSRPreRL", 0), ("GRPO", 1)]
    assert "until: optim/entropy was not measured in the life of NSRPreRL, which so ended by at_step." in caplog.text


# ---------------------------------------------------------------------- refused before the start


def refused_or_not(until, at_step=20, max_steps=50, val=True, callbacks=(), **trainer):
    problems = ArithmeticProblems("held_out", 4) if val else None
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64), val=problems, engine=PlainEngine(), sampling=Sampling(group_size=8)
    )
    later = PolicyReincarnation(at_step, GRPO(), until=until)
    trains = quiet_trainer(
        max_steps=max_steps, callbacks=[later, *callbacks], val_check_interval=10, log_every_n_steps=1, **trainer
    )
    host = NSRPreRL(model="embedded-sums", minibatches=2)
    check_monitors(trains, [host, later.successor], data)


WATCHING = {"callbacks": [Thoughts(families={"wait": ["wait"]}), GradientAlignment(every_n_steps=5)]}


@pytest.mark.parametrize(
    ("until", "options", "words"),
    [
        ({"metric": "reward/mean"}, {}, ""),
        ({"metric": "rollout/pass@8"}, {}, ""),
        (
            {"metric": "rollout/pass@9"},
            {},
            r"until\.metric: this run does not measure rollout/pass@9\. Did you mean rol",
        ),
        ({"metric": "reward/maen"}, {}, r"Did you mean reward/mean\?"),
        ({"metric": "time/step"}, {}, "time/step goes by the clock"),
        ({"metric": "train/mfu"}, {}, "train/mfu goes by the clock"),
        ({"metric": "thoughts/wait_ratio"}, {}, "does not measure thoughts/wait_ratio"),
        ({"metric": "thoughts/wait_ratio"}, WATCHING, ""),
        ({"metric": "thoughts/wiat_ratio"}, WATCHING, r"Did you mean thoughts/wait_ratio\?"),
        ({"metric": "alignment/position/1_of_4"}, WATCHING, ""),
        (
            {"metric": "alignment/cosine", "patience": 5},
            WATCHING,
            r"measured 5 times .* Lower alignment\.every_n_steps",
        ),
        ({"metric": "weights/change"}, WATCHING, "does not measure weights/change"),
        ({"metric": "val/avg@8", "patience": 1}, {}, ""),
        ({"metric": "val/thoughts/wait", "patience": 1}, WATCHING, ""),
        ({"metric": "val/thoughts/wait"}, {"val": False, **WATCHING}, r"Without data\.val"),
        ({"metric": "val/avg@8"}, {"val": False}, r"this run does not measure val/avg@8\..* Without data\.val"),
        # 10 rollouts of 2 steps: validated at its start and at its end
        (
            {"metric": "val/avg@8"},
            {},
            r"val/avg@8 is measured 2 times at most.* takes 3 values.* Lower trainer\.val_ch",
        ),
        ({"metric": "val/avg@8"}, {"at_step": 40}, ""),
        ({"metric": "val/avg@8"}, {"at_step": 40, "max_steps": 30}, "from step 0 to 30 val/avg@8 is measured 2 times"),
        ({"metric": "reward/mean", "window": 9}, {}, r"reward/mean is measured 10 times .* takes 11 values.* Raise at"),
    ],
)
def test_a_condition_that_could_never_end_the_life_is_refused(until, options, words):
    if not words:
        refused_or_not(Until(**until), **options)
        return
    with pytest.raises(InputError, match=words):
        refused_or_not(Until(**until), **options)


def test_in_a_configuration_and_in_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prerl"])
    parsed = Parsed.run(["fit", "--config", str(ROOT / "configs" / "dsrl_until.yaml")])
    (callback,) = parsed.config["fit"].trainer.callbacks
    given = vars(callback.init_args.until)
    later = PolicyReincarnation(30, GRPO(), until=Until("rollout/pass@8", worse_by=0.1, window=3))
    assert described(later)["init_args"]["until"] == given
    show_help(["PolicyReincarnation"])
    assert "See also: prerl help PolicyReincarnation.until." in capsys.readouterr().out
    show_help(["PolicyReincarnation.until"])
    said = " ".join(capsys.readouterr().out.split())
    assert "PolicyReincarnation.until: {...}" in said
    assert "worse_by float, default 0.0 share of the best's size" in said


# ---------------------------------------------------------------------- where it is said


def test_the_report_and_watch_say_why(tmp_path):
    why = "rollout/pass@8 (mean of 3) is 0.68, after 0.83 at step 8"
    one = read_run(write_run(tmp_path / "until" / "version_0", endings={"1": why, "x": 1}))
    assert one.endings == {1: why}
    groups = group([one])
    assert f"NSR-PreRL for 10 steps, to where {why}, and then, reincarnated, with GRPO for 50 steps" in lead(
        groups, groups[0]
    )
    assert f"NSR-PreRL ended: {why}" in states(groups, 0.0)
    (drawn,) = payload(groups, [], [])[0]["runs"]
    assert drawn["lives"] == [["NSR-PreRL", 0, None], ["GRPO", 10, why]]
    lives = [["NSRPreRL", 0], ["GRPO", 14]]
    groups = group([one, read_run(write_run(tmp_path / "until" / "version_1", seed=1, lives=lives))])
    assert "NSR-PreRL for 10 to 14 steps and then, reincarnated, with GRPO for 46 to 50 steps" in lead(
        groups, groups[0]
    )
    assert f"NSR-PreRL ended: {why}" in shown(read(one.folder))
    running = write_run(tmp_path / "running", steps=4, status="running", max_steps=60, endings={"1": None})
    assert "reincarnation: GRPO by step 10" in shown(read(running))
