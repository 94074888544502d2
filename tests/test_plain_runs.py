"""Whole runs by an engine of plain words, counted by hand: lives, validations, resumes, what is drawn and for whom."""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from plain_engine import PlainEngine
from test_step import alternating_reward, sgd, start, weights
from trainers import quiet_trainer
from transformers import AutoModelForCausalLM

from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.health import RunHealth
from prerl_lightning.callbacks.held_out import HeldOut
from prerl_lightning.callbacks.monitors import held_out_names
from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import Watcher
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.readers import Files
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError, RunError
from prerl_lightning.objectives import GRPO, NSRPreRL, Objective, agreement
from prerl_lightning.objectives.advantages import Advantage
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.update import Update
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import HeldOutSampling, Sampling

G, P = 4, 2


class Engine(PlainEngine):
    """Notes what it is asked for, and outlives a fit as vLLM does. ``shift``: what its log-probs are off by, of tokens
    in turn too high and too low."""

    def __init__(self, shift=0.0, dtype=torch.float32, **options):
        super().__init__(**options)
        self.calls, self.shift, self.dtype = [], shift, dtype

    def start(self, model, seed, place):
        if self.model is None:
            super().start(model, seed, place)
        self.weights_dtype = self.dtype

    def generate(self, prompts, sampling, seeds, greedy=False, on_group=None):
        self.calls.append(SimpleNamespace(prompts=prompts, sampling=sampling, seeds=list(seeds), greedy=greedy))
        groups = super().generate(prompts, sampling, seeds, greedy, on_group)
        for response in (r for group in groups for r in group):
            response.log_probs[::2] += self.shift
            response.log_probs[1::2] -= self.shift
        return groups


class Notes(L.Callback):
    """What the Trainer says of each step, and of each validation with the weights that the engine has then."""

    def __init__(self):
        self.steps, self.validations, self.groups = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        metrics = trainer.callback_metrics
        self.steps.append((int(metrics["life"]), round(float(metrics["optim/lr"]), 6)))

    def on_validation_batch_end(self, trainer, module, outputs, *_):
        self.groups += [(trainer.global_step, group) for group in outputs["samples"]]
        self.greedy = outputs["greedy"]

    def on_validation_end(self, trainer, module):
        held = torch.cat([p.flatten() for p in trainer.datamodule.engine.model.parameters()]).double()
        assert torch.equal(held, weights(module))
        self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/avg@2"])))


def fit(folder, model, *callbacks, engine=None, steps=3, reward=alternating_reward, val=False, ckpt_path=None, **more):
    L.seed_everything(0)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        val=ArithmeticProblems("held_out", 4) if val else None,
        reward=reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=G, max_new_tokens=8, temperature=0.9),
        engine=engine or Engine(),
        prompts_per_step=P,
        val_samples=2,
        val_batch=3,
    )
    trainer = quiet_trainer(
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[*callbacks],
        val_check_interval=2,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **more,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return trainer


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-untied")


# ---------------------------------------------------------------------- lives


def test_each_life_has_its_own_steps_and_schedule(folder, tmp_path):
    notes = Notes()
    settings = {"optimizer": sgd, "lr_schedule": "linear"}
    later = PolicyReincarnation(2, GRPO(lr=0.02, warmup_steps=1, **settings))
    fit(tmp_path, NSRPreRL(model=folder, lr=0.01, **settings), notes, later, steps=5)
    # linear to the life's end: over 2 steps, and over the 2 behind one of warm-up
    assert notes.steps == [(1, 0.01), (1, 0.005), (2, 0.02), (2, 0.02), (2, 0.01)]


@pytest.mark.parametrize(("optimizer", "steps"), [("carry", 3), ("reset", 2)])
def test_the_optimizer_s_state_at_a_rebirth(folder, tmp_path, optimizer, steps):
    trainer = fit(tmp_path, GRPO(model=folder), PolicyReincarnation(1, GRPO(), optimizer))
    state = trainer.optimizers[0].state_dict()["state"]
    assert {float(s["step"]) for s in state.values()} == {steps}


@pytest.mark.parametrize("kl", [(0.0, 0.5), (0.5, 0.0)])
def test_a_resume_goes_on_in_its_life_with_its_reference(folder, tmp_path, kl):
    """A penalty that is large beside the loss, in the life that is resumed in."""

    def run(name, kl, **options):
        health = RunHealth()
        later = PolicyReincarnation(at, GRPO(lr=0.02, optimizer=sgd, kl_coefficient=kl[1]))
        first = GRPO(model=folder, lr=0.02, optimizer=sgd, kl_coefficient=kl[0])
        saving = RunCheckpoint(every_n_train_steps=1, save_top_k=-1, dirpath=str(tmp_path / name))
        return weights(fit(tmp_path, first, later, saving, health, steps=4, **options).lightning_module), health

    at, resumed_at = (1, 2) if kl[1] else (3, 1)
    (whole, health), (plain, _) = run("whole", kl), run("plain", (0.0, 0.0))
    path = tmp_path / "whole" / f"step={resumed_at}.ckpt"
    resumed, resumed_health = run("resumed", kl, ckpt_path=path)
    went = (whole - start(folder)).norm()
    assert (whole - plain).norm() / went > 1e-2
    assert (whole - resumed).norm() / went < 1e-5
    assert resumed_health.at_start == health.at_start
    at = 2
    with pytest.raises(InputError, match="GRPO from step 2"):
        run("other", kl, ckpt_path=path)


# ---------------------------------------------------------------------- validations


def test_validations_are_of_the_weights_of_their_step_each_alone(folder, tmp_path):
    """Of the first weights, at the interval, of the last; and a step's that a checkpoint was written in front of."""
    notes, engine = Notes(), Engine()
    early = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    behind = RunCheckpoint(every_n_train_steps=1, dirpath=str(tmp_path / "behind"))
    fit(tmp_path, GRPO(model=folder, lr=0.01), notes, early, behind, engine=engine, val=True)
    assert [step for step, _ in notes.validations] == [0, 2, 3]
    for step, found in notes.validations:
        groups = [group for of, group in notes.groups if of == step]
        assert sorted(g.prompt.row for g in groups) == sorted({g.prompt.row for g in groups})
        assert len(groups) == 4
        rewards = [alternating_reward("", r.text, "", {}) for g in groups for r in g.responses]
        assert found == pytest.approx(sum(rewards) / 8)
        assert [v.score for g in groups for v in g.verdicts] == rewards
    (group,) = notes.greedy  # of the second batch, which has one problem
    (response,) = group.responses
    ids = [*group.prompt.token_ids, *response.token_ids.tolist()]
    best = engine.log_probs(ids, 1.0).argmax(-1)[len(group.prompt.token_ids) - 1 : -1]
    assert best.tolist() == response.token_ids.tolist()

    sampled = [c for c in engine.calls if not c.greedy and c.sampling.group_size == 2]
    luck = [[seed for call in sampled[i : i + 2] for seed in call.seeds] for i in (0, 2, 4)]
    assert luck[0] == luck[1] == luck[2]  # the same at each step
    assert len(set(luck[0])) == 4  # another for each problem

    last = torch.load(tmp_path / "behind" / "last.ckpt", weights_only=False)
    assert last["validation"] == {"step": 3, "due": False}
    again = Notes()
    fit(tmp_path, GRPO(model=folder, lr=0.01), again, val=True, ckpt_path=tmp_path / "step=2.ckpt")
    assert again.validations == notes.validations[1:]


# ---------------------------------------------------------------------- what is drawn, and for whom


def told_reward(prompt, response, ground_truth, extra):
    """Of what a reward is told, nothing may belong to another response."""
    return len(response) + 100.0 * extra["truncated"] + 1000.0 * extra["tokens"]


def test_each_response_gets_its_own_reward(folder, tmp_path):
    ends = [[([5, 6, 2], None), ([5, 6, 7, 8], None)] * 2, [([9, 2], None), ([9] * 8, None)] * 2]
    engine = Engine()
    model = GRPO(model=folder)
    trainer = fit(tmp_path, model, engine=engine, steps=1, reward=told_reward)
    engine.replay = ends
    data = trainer.datamodule
    data._start_pools()
    rollout = data.rollout(data.some_prompts(2), 0)
    assert rollout.truncated.tolist() == [False, True] * 4
    told = zip(rollout.texts, rollout.truncated.tolist(), rollout.lengths.tolist(), strict=True)
    expected = [told_reward("", text, "", {"truncated": cut, "tokens": n}) for text, cut, n in told]
    assert rollout.rewards.tolist() == expected
    assert len(set(expected)) == 4
    assert list(data._slow.before["reward"])[1:] == [rollout.seconds["reward"]]  # what a later one is measured by


def test_luck_depends_on_the_step_and_the_place_among_all_ranks():
    data = RolloutDataModule(train=ArithmeticProblems("train", 4), engine=Engine(), seed=3)
    whole = data._seeds(4, 7)
    assert len({*whole, *data._seeds(4, 8)}) == 8
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank)
        assert data._seeds(2, 7) == whole[2 * rank : 2 * rank + 2]


def test_a_prompt_leaves_room_for_its_response(folder):
    def lengths(limit):
        problems = ArithmeticProblems("train", 64)
        data = RolloutDataModule(train=problems, engine=Engine(limit=limit), sampling=Sampling(max_new_tokens=8))
        return [len(p.token_ids) for p in data.encode(folder, {"train": problems})["train"]]

    longest = max(lengths(200))
    assert len(lengths(longest + 8)) == 64
    with pytest.raises(InputError, match=f"has {longest} tokens, {longest - 1} are allowed"):
        lengths(longest + 7)


def test_an_engine_that_outlives_a_fit_gets_the_next_one_s_weights(folder, tmp_path, monkeypatch):
    checked, plain = [], agreement.check
    monkeypatch.setattr(agreement, "check", lambda module: (checked.append(module), plain(module)))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    moved = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.3)
    moved.save_pretrained(other)
    engine, second = Engine(), GRPO(model=folder)
    fit(tmp_path, GRPO(model=str(other)), engine=engine, steps=1)
    for _ in range(2):
        trainer = fit(tmp_path, second, engine=engine, steps=1)
        assert float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-5
    assert checked[1:] == [second] * 2


@pytest.mark.parametrize(
    ("shift", "dtype", "said"),
    [
        (0.005, torch.float32, ""),
        (0.02, torch.float32, "are 0.02 nats apart on average, 0.01 are allowed"),
        (0.05, torch.bfloat16, ""),
        (0.5, torch.bfloat16, "nats apart on average, 0.2 are allowed"),
    ],
)
def test_the_mismatch_is_the_mean_distance_a_token(folder, tmp_path, shift, dtype, said):
    model, engine = GRPO(model=folder), Engine(shift, dtype)
    if not said:
        fit(tmp_path, model, engine=engine, steps=1)
        return
    with pytest.raises(InputError, match=said):
        fit(tmp_path, model, engine=engine, steps=1)


def test_the_mismatch_is_measured_before_the_weights_move(folder, tmp_path):
    model = GRPO(model=folder, lr=0.05, optimizer=sgd, minibatches=2, epochs=2)
    trainer = fit(tmp_path, model, steps=4, reward=told_apart(lambda i: True))
    assert float(trainer.callback_metrics["optim/approx_kl"]) != 0
    assert float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-5


# ---------------------------------------------------------------------- health


def told_apart(at):
    """A reward that tells the responses of a rollout apart where ``at`` says so of its number, from 0."""
    calls = iter(range(10**6))

    def reward(prompt, response, ground_truth, extra):
        number = next(calls)
        return float(number % 2 and at(number // (G * P)))

    return reward


def test_no_signal_is_counted_in_a_row(folder, tmp_path, caplog):
    fit(tmp_path, GRPO(model=folder), RunHealth(no_signal=2), steps=5, reward=told_apart(lambda i: i % 2))
    assert "no group's rewards differed" not in caplog.text


def test_skipped_steps_are_counted_in_a_row(folder, tmp_path, monkeypatch):
    plain, calls = Update.backward, iter(range(100))
    bad = {0, 2, 4}

    def poisoned(self, *args, **kwargs):
        jobs = plain(self, *args, **kwargs)
        if next(calls) in bad:
            next(self.policy.parameters()).grad.view(-1)[0] = float("inf")
        return jobs

    monkeypatch.setattr(Update, "backward", poisoned)
    always = told_apart(lambda i: True)
    fit(tmp_path, GRPO(model=folder), RunHealth(skipped=2), steps=5, reward=always)
    bad.update({6, 7})
    with pytest.raises(RunError, match="Step 3: 2 optimizer steps in a row"):
        fit(tmp_path, GRPO(model=folder), RunHealth(skipped=2), steps=5, reward=always)


# ---------------------------------------------------------------------- held-out sets


def test_further_held_out_sets_are_sampled_as_said_and_kept_apart(folder, tmp_path):
    """Under names of their own, by the sampling of validations; callbacks see the first set alone."""
    L.seed_everything(0)
    engine, notes, held_out = Engine(), Notes(), HeldOut()
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        val=ArithmeticProblems("held_out", 4),
        val_more={"small": ArithmeticProblems("held_out", 3, seed=5)},
        val_sampling=HeldOutSampling(temperature=0.5, max_new_tokens=5),
        reward=lambda prompt, response, truth, extra: float(extra["max_new_tokens"] == 5),
        verification=Verification(workers=0),
        sampling=Sampling(group_size=G, max_new_tokens=8, temperature=0.9),
        engine=engine,
        prompts_per_step=P,
        val_samples=2,
        val_batch=3,
    )
    trainer = quiet_trainer(max_steps=1, default_root_dir=tmp_path, callbacks=[notes, held_out, Thoughts()])
    names = {*held_out_names(2, True), *held_out_names(2, True, "val/small")}
    trainer.fit(GRPO(model=folder), datamodule=data)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/") and "thoughts" not in k}
    assert set(metrics) == {n for n in names if "maj@" not in n and "no_answer" not in n}
    assert (metrics["val/problems"], metrics["val/small/problems"]) == (4, 3)
    assert metrics["val/avg@2"] == metrics["val/small/avg@2"] == 1  # by what the verifier is told of the length
    asked = {(c.sampling.temperature, c.sampling.max_new_tokens) for c in engine.calls if c.sampling.group_size == 2}
    assert asked == {(0.5, 5)}
    trained = [c for c in engine.calls if c.sampling.group_size == G and not c.greedy]
    assert {(c.sampling.temperature, c.sampling.max_new_tokens) for c in trained} == {(0.9, 8)}
    assert len(notes.groups) == 2 * 4  # before the step and after it
    small = data._prompts["val/small"]
    assert {p.token_ids for p in small} & {tuple(p) for c in engine.calls for p in c.prompts} == {
        p.token_ids for p in small
    }


def test_names_and_sampling_of_held_out_sets_are_checked(folder):
    problems = ArithmeticProblems("held_out", 4)
    for options in ({"val_more": {"a": problems}}, {"val": problems, "val_more": {"a/b": problems}}):
        with pytest.raises(InputError, match=r"data\.val_more: 'a"):
            RolloutDataModule(train=problems, engine=Engine(), **options)
    with pytest.raises(InputError, match=r"data\.val_sampling\.temperature: 0\.0 must be a finite number above 0"):
        HeldOutSampling(temperature=0.0)
    data = RolloutDataModule(
        train=problems, val=problems, engine=Engine(limit=40), val_sampling=HeldOutSampling(max_new_tokens=40),
        sampling=Sampling(max_new_tokens=8),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"data\.val_sampling\.max_new_tokens: 40 leaves no room for a prompt"):
        data.encode(folder, {"train": problems} | data.held_out)


# ---------------------------------------------------------------------- what a run begins with


def _boxed(prompt, response, ground_truth, extra):
    return float(response == f"\\boxed{{{ground_truth}}}")


def _hashes(prompt, response, ground_truth, extra):
    return float(response == f"#### {ground_truth}")


def _never(prompt, response, ground_truth, extra):
    return 0.0


def _broken(prompt, response, ground_truth, extra):
    return extra["difficulty"]


@pytest.mark.parametrize(("reward", "mean"), [(_boxed, 1), (_hashes, 1), (_never, 0), (_broken, None)])
def test_the_first_prompt_and_the_verifier_s_word_on_the_truths_come_before_the_engine(
    folder, tmp_path, caplog, reward, mean
):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+{i}=?", "answer": 2 * i} for i in range(10, 40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    class Late(Engine):
        def start(self, *args):
            seen.append(caplog.text)
            super().start(*args)

    caplog.set_level("INFO", "prerl_lightning")
    data = RolloutDataModule(
        train=Files(str(file)),
        reward=reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=G, max_new_tokens=4),
        engine=Late(),
        prompts_per_step=P,
    )
    trainer = quiet_trainer(max_steps=1, default_root_dir=tmp_path)
    if mean is None:
        with pytest.raises(InputError, match=r"data\.train: the reward fails on each of 30 truths .*'20': KeyError"):
            trainer.fit(GRPO(model=folder), datamodule=data)
        assert not seen
        return
    trainer.fit(GRPO(model=folder), datamodule=data)
    said = seen[0]
    assert "data.train: 30 problems. What the model sees of the first: '<bos>10+10=?'. Its truth: '20'." in said
    assert f"of 30 truths likewise: {mean} on average" in said
    assert ("the set's own truths earn 0 on average" in said) == (mean == 0)
    assert said.count("What the model sees") == caplog.text.count("What the model sees") == 1
    if mean == 0:
        assert "If a truth is no answer here, write data.verification.try_truths: false." in said
        caplog.clear()
        data.verification = replace(data.verification, try_truths=False)
        quiet_trainer(max_steps=1, default_root_dir=tmp_path).fit(GRPO(model=folder), datamodule=data)
        assert "truths" not in caplog.text


# ---------------------------------------------------------------------- a run's own callbacks and axes


class Logs(L.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("own/plain", float(trainer.global_step))


class Measures(Watcher):
    def __init__(self, found):
        self.found = found

    def watch(self, trainer, module):
        return self.found


def logged(folder, *callbacks, model):
    fit(folder, GRPO(model=model, lr=0.01), *callbacks, logger=CSVLogger(folder, name="", version=""))
    with (folder / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_what_a_callback_logs_is_in_the_step_s_row(folder, tmp_path):
    rows = logged(tmp_path, Logs(), Measures({"own/measured": torch.tensor(2)}), model=folder)
    assert [float(row["own/plain"]) for row in rows] == [float(row["step"]) for row in rows] == [1, 2, 3]
    assert [row["own/measured"] for row in rows] == ["2.0"] * 3


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"reward/mean": 99.0}, "Measures: reward/mean is in this step's row already"),
        (None, "Measures: it measured None, and must give numbers"),
        ({"own/text": "text"}, "Measures: it measured {'own/text': 'text'}, and must"),
    ],
)
def test_a_watcher_that_gives_what_no_row_takes_is_named(folder, tmp_path, found, said):
    with pytest.raises(InputError, match=said):
        fit(tmp_path, GRPO(model=folder), Measures(found), steps=1)


def test_two_watchers_of_a_kind_have_a_column_each(folder, tmp_path):
    with pytest.raises(InputError, match="Measures: own/x is in this step's row already"):
        fit(tmp_path, GRPO(model=folder), Measures({"own/x": 1.0}), Measures({"own/x": 2.0}), steps=1)


class Three(Advantage):
    def __call__(self, rewards, group_ids):
        return rewards[:3]


def by_response(tokens):
    return tokens.lengths.float()


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (Term("post-train", Three()), r"Three gave a tensor of shape \(3,\), where a number a response is wanted"),
        (Term("post-train", weight=by_response), r"by_response gave a tensor of shape \(8,\), where a number a token"),
        (Term("post-train", weight=lambda tokens: 1.0), r"<lambda> gave 1\.0, where a number a token is wanted"),
    ],
)
def test_an_axis_of_another_shape_is_named(folder, tmp_path, term, said):
    with pytest.raises(InputError, match=said):
        fit(tmp_path, Objective([term], model=folder), steps=1)


def test_an_objective_that_is_trained_twice_says_where_it_begins(folder, tmp_path, caplog):
    model = GRPO(model=folder)
    fit(tmp_path / "a", model, steps=1)
    assert "has been trained" not in caplog.text
    fit(tmp_path / "b", model, steps=1)
    assert "GRPO has been trained in this process, and goes on from there." in caplog.text
