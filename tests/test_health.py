"""Runs that cannot learn say so, ruined ones stop: real runs of the embedded model, one engine for all of them."""

import csv
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from trainers import quiet_trainer

from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.health import RunHealth
from prerl_lightning.callbacks.progress import StepLines
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.saving import ExportModel, RunCheckpoint
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError, RunError
from prerl_lightning.objectives import GRPO, MixedRL, NSRPreRL
from prerl_lightning.objectives.lives import arrange, end_life
from prerl_lightning.rewards import arithmetic_reward
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Sampling
from prerl_lightning.rollout.vllm_engine import VLLMEngine

ROOT = Path(__file__).parents[1]
ENGINE = VLLMEngine(max_model_len=96, kv_cache_mib=32)


def always(value):
    return lambda prompt, response, ground_truth, extra: value


def fit(folder, model, *callbacks, reward=arithmetic_reward, steps=2, group_size=4, val=None, **options):
    """The Trainer behind a run of ``steps`` optimizer steps, of which each leaves a checkpoint."""
    L.seed_everything(0)
    ckpt_path = options.pop("ckpt_path", None)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        val=val,
        reward=reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=group_size, max_new_tokens=64),
        engine=ENGINE,
        prompts_per_step=8,
        val_samples=2,
    )
    trainer = quiet_trainer(
        max_steps=steps,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[*callbacks, RunRecord(), RunCheckpoint(every_n_train_steps=1, save_top_k=-1), ExportModel()],
        val_check_interval=1,
        log_every_n_steps=1,
        **options,
        enable_checkpointing=True,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return trainer


def record(folder):
    return json.loads((folder / "run.json").read_text())


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# ---------------------------------------------------------------------- refused at the start


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", [math.nan, math.inf, -1e-6]),
        ("gradient_clip", [math.nan, math.inf, -1.0]),
        ("clip_low", [-1.0, math.nan]),
        ("clip_high", [-0.1]),
        ("clip_dual", [1.0, math.nan]),
        ("loss_coefficient", [0.0, math.nan]),
        ("kl_coefficient", [-0.1, math.nan, math.inf]),
        ("importance_cap", [1.0, math.nan]),
        ("peak_flops", [0.0, math.nan]),
        ("warmup_steps", [-1]),
        ("minibatches", [0]),
        ("epochs", [0]),
        ("mismatch_samples", [-1]),
        ("micro_batch_size", [0]),
        ("max_tokens_per_microbatch", [0]),
    ],
)
def test_numbers_that_are_none(name, values):
    for value in values:
        with pytest.raises(InputError, match=rf"GRPO\.{name}: .* must be a finite number"):
            GRPO(**{name: value})


def test_other_numbers_that_are_none():
    for value in (math.nan, -0.1):
        with pytest.raises(InputError, match=r"MixedRL\.pretrain_coefficient"):
            MixedRL(value)
    for name, value in (("temperature", math.inf), ("temperature", math.nan), ("top_p", math.nan)):
        with pytest.raises(InputError, match=f"data.sampling.{name}: {value}"):
            Sampling(**{name: value})
    for name in ("prompts_per_step", "val_samples", "val_batch", "max_prompt_tokens"):
        with pytest.raises(InputError, match=rf"data\.{name}: 0"):
            RolloutDataModule(train=ArithmeticProblems("train", 4), **{name: 0})
    with pytest.raises(InputError, match=r"health\.accuracy: nan"):
        RunHealth(accuracy=math.nan)
    with pytest.raises(InputError, match=r"health\.stop_on: entropy is not watched"):
        RunHealth(entropy=0, stop_on=["entropy"])


def reborn(at_step, **options):
    return PolicyReincarnation(at_step=at_step, successor=GRPO(**options))


@pytest.mark.parametrize(
    ("first", "callbacks", "options", "words"),
    [
        ({"minibatches": 2}, [(3, {})], {}, r"at_step: 3\. NSRPreRL takes 2 .* from step 0 on.* Write 2 or 4\."),
        ({"minibatches": 2, "epochs": 2}, [(3, {})], {}, r"at_step: 3\..* Write 4\."),
        ({"minibatches": 2}, [], {"steps": 9}, r"trainer.max_steps: 9\..* Write 8 or 10\."),
        ({}, [(3, {"epochs": 2}), (6, {})], {}, r"at_step: 6\. GRPO takes 2 .* from step 3 on.* Write 5 or 7\."),
        ({}, [(3, {"epochs": 2})], {"steps": 8}, r"trainer.max_steps: 8\. GRPO .* from step 3 on.* Write 7 or 9\."),
        ({"minibatches": 2}, [(4, {})], {"steps": 3}, r"trainer.max_steps: 3\. NSRPreRL .* Write 2 or 4\."),
        ({}, [], {"group_size": 1}, r"data\.sampling\.group_size: 1\."),
        ({"minibatches": 9}, [], {}, r"NSRPreRL.minibatches: 9 are more than data.prompts_per_step \(8\)"),
        ({}, [(3, {"minibatches": 9})], {"steps": 8}, r"GRPO.minibatches: 9 are more"),
        ({}, [], {"plugins": [MixedPrecision("16-mixed", "cpu")]}, "16-mixed scales the loss"),
        ({}, [(3, {}), (3, {})], {}, "two lives begin at the same step"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(tmp_path, monkeypatch, first, callbacks, options, words):
    monkeypatch.setattr(VLLMEngine, "start", lambda *args: pytest.fail("the engine was started"))
    monkeypatch.setattr(ArithmeticProblems, "load", lambda *args: pytest.fail("the data were read"))
    lives = [reborn(step, **settings) for step, settings in callbacks]
    with pytest.raises(InputError, match=words):
        fit(tmp_path, NSRPreRL(model="embedded-sums", **first), *lives, **{"steps": 12, **options})


# ---------------------------------------------------------------------- ruin


def test_ruined_weights_end_the_run(tmp_path):
    """And leave what was good: the checkpoints, no model, the batch, the row of the step."""
    later = PolicyReincarnation(at_step=1, successor=GRPO(lr=1e38))
    with pytest.raises(RunError, match=r"Step 2: the policy's weights are not finite any more \(optim/grad_norm .*"):
        fit(tmp_path, GRPO(model="embedded-sums"), RunHealth(), later, steps=4)
    assert record(tmp_path)["status"] == "failed"
    assert "weights are not finite" in record(tmp_path)["error"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert not (tmp_path / "model").exists()
    batch = [json.loads(line) for line in (tmp_path / "ruin.jsonl").read_text().splitlines()]
    assert len(batch) == 32
    assert {row["step"] for row in batch} == {2}
    assert all(len(row["token_ids"]) == len(row["log_probs"]) <= 64 for row in batch)
    assert {row["reward"] for row in batch} == {0.0, 1.0}
    with (tmp_path / "metrics.csv").open() as lines:
        assert [row["step"] for row in csv.DictReader(lines)] == ["1", "2"]


def test_gradients_that_stay_non_finite_end_the_run(tmp_path):
    model = GRPO(model="embedded-sums", loss_coefficient=3e38, minibatches=2)
    with pytest.raises(
        RunError, match=r"Step 4: (3|4) optimizer steps in a row were skipped over a gradient that is not"
    ):
        fit(tmp_path, model, RunHealth(skipped=3), steps=8)
    assert record(tmp_path)["status"] == "failed"
    assert (tmp_path / "ruin.jsonl").is_file()
    assert not (tmp_path / "model").exists()


def test_a_ruined_policy_is_not_exported_by_anyone(tmp_path, caplog):
    fit(tmp_path, GRPO(model="embedded-sums", lr=1e38), steps=1)
    assert not (tmp_path / "model").exists()
    assert warnings(caplog)[-1] == "The trained model is not exported: its weights are not finite."


def test_a_ruined_run_s_exit_status(refused, tmp_path):
    """One message without a traceback. For several ranks see test_lives.py."""
    args = [
        "fit",
        "--config",
        ROOT / "configs" / "sums" / "grpo.yaml",
        "--model.init_args.lr=1e38",
        "--trainer.max_steps=3",
    ]
    said = refused(*args, "--data.val=null", "--data.prompts_per_step=4", code=3)
    (line,) = [line for line in said.splitlines() if line.startswith("prerl: error: ")]
    assert line.startswith("prerl: error: Step 1: the policy's weights are not finite any more")
    assert "Traceback" not in said
    run = tmp_path / "runs" / "sums-grpo" / "version_0"
    assert record(run)["status"] == "failed"
    assert not (run / "model").exists()


# ---------------------------------------------------------------------- nothing to learn from


@pytest.mark.parametrize(("value", "words"), [(0.0, "Look in samples.jsonl"), (1.0, "the problems are solved")])
def test_a_reward_that_says_nothing_is_said_once(tmp_path, caplog, value, words):
    """A step in which nothing contributes leaves Adam and the weights as they are, weight decay or not."""
    caplog.set_level(logging.INFO, "prerl_lightning")

    def decaying(parameters):
        return torch.optim.AdamW(parameters, weight_decay=0.5)

    model = GRPO(model="embedded-sums", lr=0.1, optimizer=decaying, minibatches=2)
    trainer = fit(tmp_path, model, RunHealth(no_signal=2), StepLines(), reward=always(value), steps=8)
    said = warnings(caplog)
    assert len(said) == 2
    assert said[0].startswith("Step 2: in 2 of the rollout's optimizer steps no response contributes.")
    assert said[1].startswith(
        f"Step 4: no group's rewards differed in 2 rollouts in a row: reward {value:.2f} in all of 64 responses, "
    )
    assert words in said[1] or (value == 0 and "Raise data.sampling.max_new_tokens" in said[1])
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert len(lines) == 4
    assert all("  mixed 0.00  skipped 2  " in line for line in lines)
    assert not trainer.optimizers[0].state
    untouched = GRPO(model="embedded-sums")
    untouched.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(model.policy.parameters(), untouched.policy.parameters(), strict=True))


def test_held_out_responses_that_are_all_wrong_are_said_before_the_first_rollout(tmp_path, caplog):
    val = ArithmeticProblems("held_out", 4)
    trainer = fit(tmp_path, GRPO(model="embedded-sums"), RunHealth(), reward=always(0.0), steps=1, val=val)
    (said,) = [w for w in warnings(caplog) if w.startswith("Step 0: ")]
    cut = float(trainer.callback_metrics["val/truncated"])
    assert said.startswith(f"Step 0: no held-out response is right (avg@2 is 0; {cut:.0%} cut off at their longest).")
    assert said in record(tmp_path)["warnings"]


def test_a_run_with_mixed_groups_is_left_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO, "prerl_lightning")
    trainer = fit(tmp_path, GRPO(model="embedded-sums"), RunHealth(no_signal=1), StepLines())
    assert not warnings(caplog)
    mixed = float(trainer.callback_metrics["rollout/groups_mixed"])
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert f"  mixed {mixed:.2f}  " in lines[-1]
    assert "skipped" not in lines[-1]
    assert (tmp_path / "model").is_dir()


def test_answers_that_were_read_are_counted(tmp_path):
    """The embedded model's answers have numbers in them, and nearly all have a form that its reward reads."""
    trainer = fit(tmp_path, GRPO(model="embedded-sums"), steps=1)
    rollout = trainer.lightning_module.whole_rollout
    assert 0 < rollout.answered <= 32
    assert float(trainer.callback_metrics["rollout/no_answer"]) == pytest.approx(1 - rollout.answered / 32)


# ---------------------------------------------------------------------- collapse


def test_a_collapse_is_said_with_its_figures(tmp_path, caplog):
    """A learning rate that destroys the embedded model within a few steps."""
    val = ArithmeticProblems("held_out", 16)
    fit(tmp_path, NSRPreRL(model="embedded-sums", lr=0.02), RunHealth(), steps=3, val=val)
    said = [w for w in warnings(caplog) if "held-out avg@2 is 0" in w]
    assert len(said) == 1
    assert re.search(r"held-out avg@2 is 0, and was 0\.\d+ at the start \(reward/mean .*, rollout/entropy ", said[0])
    assert record(tmp_path)["warnings"] == warnings(caplog)


def test_entropy_and_length_are_compared_with_the_first_rollout(tmp_path, caplog):
    health = RunHealth()
    fit(tmp_path / "before", GRPO(model="embedded-sums"), health, steps=1)
    assert not warnings(caplog)
    health.at_start["entropy"] *= 21  # as if the first rollout's had been
    health.at_start["length"] *= 9
    fit(tmp_path / "after", GRPO(model="embedded-sums"), health, steps=1)
    (said,) = warnings(caplog)
    assert re.match(r"Step 1: the rollout's entropy is [\d.]+, and was [\d.]+ at the start \(reward/mean ", said)


def test_a_cause_may_end_the_run(tmp_path):
    health = RunHealth(no_signal=2, stop_on=["no_signal"])
    with pytest.raises(RunError, match=r"Step 2: no group's rewards differed .* as health.stop_on has it\."):
        fit(tmp_path, GRPO(model="embedded-sums"), health, reward=always(0.0), steps=6)
    assert record(tmp_path)["status"] == "failed"
    assert not (tmp_path / "ruin.jsonl").exists()
    assert not (tmp_path / "model").exists()


def test_a_cause_may_end_a_life(tmp_path):
    """The next one begins where its own end fits, and a checkpoint of it resumes in it under the same configuration;
    the last life's end is the run's."""

    def run(folder, **options):
        health = RunHealth(no_signal=2, stop_on=["no_signal"], stop="life")
        later = PolicyReincarnation(at_step=9, successor=GRPO(lr=2e-3, minibatches=2))
        model = NSRPreRL(model="embedded-sums", lr=1e-3)
        with pytest.raises(RunError, match=r"Step [79]: .* rewards differed in 2 rollouts.* The run ends here"):
            fit(folder, model, health, later, reward=always(0.0), steps=11, **options)
        return model

    whole = run(tmp_path / "whole")
    # two rollouts without a signal end life 1 after step 2; life 2 takes two steps a rollout and ends at 11, so at 3
    assert whole.lives == [("NSRPreRL", 0), ("GRPO", 3)]
    assert whole.planned_lives == [("NSRPreRL", 0), ("GRPO", 9)]
    assert record(tmp_path / "whole")["lives"] == [["NSRPreRL", 0], ["GRPO", 3]]
    assert record(tmp_path / "whole")["endings"] == {"1": "no_signal, of health.stop_on"}
    assert any("This life ends here" in said for said in record(tmp_path / "whole")["warnings"])
    with (tmp_path / "whole" / "metrics.csv").open() as lines:
        rows = [(int(r["step"]), float(r["life"]), float(r["optim/lr"])) for r in csv.DictReader(lines)]
    assert rows[:3] == [(1, 1, 1e-3), (2, 1, 1e-3), (3, 1, 1e-3)]
    assert rows[3:] == [(step, 2, 2e-3) for step in (5, 7)]
    # resumed, it has seen one rollout without a signal less; its record has the warnings of before
    resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "checkpoints" / "step=5.ckpt")
    assert resumed.acting.life == 2
    assert resumed.lives == whole.lives
    assert record(tmp_path / "resumed")["warnings"] == record(tmp_path / "whole")["warnings"]


def test_a_cause_that_was_warned_of_ends_a_run_that_is_resumed_to_do_so(tmp_path):
    fit(tmp_path / "first", GRPO(model="embedded-sums"), RunHealth(no_signal=2), reward=always(0.0), steps=3)
    health = RunHealth(no_signal=2, stop_on=["no_signal"])
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    with pytest.raises(RunError, match="Step 5"):
        fit(tmp_path / "second", GRPO(model="embedded-sums"), health, reward=always(0.0), steps=8, ckpt_path=last)


@pytest.mark.parametrize(
    ("rollouts", "steps", "max_steps", "ended_at", "begins"),
    [
        ((1, 1), (0, 9), 11, 3, 3),
        ((1, 2), (0, 9), 11, 3, 3),
        ((1, 2), (0, 9), 11, 4, 5),  # two steps a rollout, from 4 to 11, would end amid one
        ((1, 2), (0, 9), -1, 4, 4),  # no end, which anything fits
        ((2, 3), (0, 8), 17, 4, 8),  # 13 and 11 steps are no multiple of 3
        ((1, 2, 1), (0, 6, 10), 11, 3, 4),  # a life that ends itself
    ],
)
def test_where_the_next_life_may_begin(rollouts, steps, max_steps, ended_at, begins):
    modules = [GRPO(minibatches=n) for n in rollouts]
    for module in modules:
        module._trainer = SimpleNamespace(max_steps=max_steps)
    arrange(modules, steps)
    assert end_life(modules[0], ended_at, "why")
    assert [first for _, first in modules[0].lives] == [0, begins, *steps[2:]]
    assert (modules[0].end_step, modules[1].first_step) == (begins, begins)
    assert modules[-1].end_step is None
    modules[0]._acting = (modules[-1],)
    assert not end_life(modules[0], ended_at + 1, "why")
