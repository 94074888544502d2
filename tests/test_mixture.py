"""Several sets to train on, sets with settings of their own, and groups without signal that give way to others."""

from collections import Counter
from types import SimpleNamespace

import lightning as L
import mixture_worker
import pytest
import torch
from forked import Forked, finish_together
from mixture_worker import G, P, odd, rollouts
from test_plain_runs import Engine
from trainers import quiet_trainer

from prerl_lightning.callbacks.monitors import check_monitors, held_out_names, training_names
from prerl_lightning.data import Mixture, RolloutDataModule, Source
from prerl_lightning.data.loader import PromptLoader
from prerl_lightning.data.mixture import MixedPrompts
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.glossary import column
from prerl_lightning.objectives import GRPO
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import HeldOutSampling, Sampling
from prerl_lightning.types import Prompt


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-untied")


@pytest.fixture(scope="module")
def whole(model_folder):
    """Three steps on one rank."""
    return rollouts(model_folder("llama-untied"), 3)


# ---------------------------------------------------------------------- the order


def mixed(weights, sizes=(20, 5, 3)):
    sets = {name: [Prompt(i, (1,), "", "") for i in range(n)] for name, n in zip("abc", sizes, strict=True)}
    return MixedPrompts(sets, weights)


def drawn(loader):
    return [[(p.source, p.row) for p in batch] for batch in loader]


def test_each_step_has_about_its_share_of_each_set_and_each_set_its_own_epochs():
    loader = PromptLoader(mixed({"a": 2, "b": 1, "c": 1}), 4, 0, 1, shuffle_seed=3)
    epochs = [drawn(loader) for _ in range(3)]
    for batch in (batch for epoch in epochs for batch in epoch):
        counts = Counter(source for source, _ in batch)
        assert 1 <= counts["a"] <= 3, counts
        assert max(counts["b"], counts["c"]) <= 2
    everything = [prompt for epoch in epochs for batch in epoch for prompt in batch]
    assert Counter(source for source, _ in everything) == {"a": 42, "b": 21, "c": 21}
    for source, size in (("a", 20), ("b", 5), ("c", 3)):  # whole turns, each in another order
        rows = [row for of, row in everything if of == source]
        turns = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        assert all(sorted(turn) == list(range(size)) for turn in turns)
        assert len({tuple(turn) for turn in turns}) > 1
    by_size = PromptLoader(mixed(None), 4, 0, 1, shuffle_seed=3)
    assert sorted(p for batch in drawn(by_size) for p in batch) == sorted(
        (s, i) for s, n in (("a", 20), ("b", 5), ("c", 3)) for i in range(n)
    )


def test_the_order_of_a_mixture_is_that_of_any_number_of_ranks_and_of_a_resume():
    prompts = mixed({"a": 1, "b": 3, "c": 2})
    loader = PromptLoader(prompts, 4, 0, 1, shuffle_seed=3)
    one = drawn(loader) + drawn(loader)
    two = [PromptLoader(prompts, 4, rank, 2, shuffle_seed=3) for rank in (0, 1)]
    assert [a + b for a, b in zip(*(drawn(r) + drawn(r) for r in two), strict=True)] == one
    later = PromptLoader(prompts, 4, 0, 1, shuffle_seed=3)
    later.load_state_dict({"epoch": 1, "cursor": 2})
    assert drawn(later) == one[7 + 2 :]
    assert one[:7] != one[7:]


# ---------------------------------------------------------------------- a run of a mixture


def test_each_set_has_its_own_format_reward_length_and_metrics(whole):
    for step in whole[0]:
        (rewards, group_ids), of = step["rewards"], [source for source, _, _ in step["prompts"]]
        for source, row, ids in step["prompts"]:
            problems = ArithmeticProblems("train", 9, seed=1) if source == "two" else ArithmeticProblems("train", 40)
            assert len(ids) == 1 + len(problems[row].prompt) * (1 + (source == "two"))
        for response, reward, i in zip(step["responses"], rewards, group_ids, strict=True):
            assert len(response) <= (5 if of[i] == "two" else 3)
            if of[i] == "two":
                assert reward == float(len(response) > 2)
        assert step["source/sums/prompts"] + step["source/two/prompts"] == P
        assert 3 <= step["source/two/prompts"] <= 5
        for name in ("sums", "two"):
            own = [r for r, i in zip(rewards, group_ids, strict=True) if of[i] == name]
            assert step[f"source/{name}/reward"] == pytest.approx(sum(own) / len(own))
        # of a reward of a sum that one set alone has
        assert step["reward/long/mean"] == pytest.approx(step["source/two/reward"])
        assert 0 <= step["reward/odd/mean"] <= 1
    assert any(len(r) > 3 for step in whole[0] for r in step["responses"])
    names = training_names(G, ["long", "odd"], ["sums", "two"], refill=True)
    assert all(column(name) is not None for name in names)
    assert {k for step in whole[0] for k in step} - {"prompts", "responses", "rewards", "refill"} <= names


def test_silent_groups_give_way_to_further_prompts(whole, folder):
    plain, _ = rollouts(folder, 3, refill=0)
    for before, after in zip(plain, whole[0], strict=True):
        assert "refill/groups" not in before
        done, size = after["refill"], G
        pairs = [before["rewards"][0][i : i + size] for i in range(0, P * size, size)]
        silent = [len({*pair}) == 1 for pair in pairs]
        # the others are what they were, and no prompt is there twice
        for i in range(P):
            same = before["prompts"][i] == after["prompts"][i]
            assert same == (not silent[i])
            assert not same or before["responses"][2 * i : 2 * i + 2] == after["responses"][2 * i : 2 * i + 2]
        assert len({(source, row) for source, row, _ in after["prompts"]}) == P
        assert done["groups"] >= sum(silent)
        assert done["rounds"] <= 2
        first = sum(len(r) for i in range(P) if silent[i] for r in before["responses"][2 * i : 2 * i + 2])
        assert done["tokens"] >= first
        assert after["refill/groups"] == done["groups"]
        assert 0 <= after["refill/reward"] <= 1
        assert after["rollout/groups_mixed"] >= before["rollout/groups_mixed"]
    assert sum(step["refill"]["groups"] for step in whole[0]) > 0
    assert [s["rollout/groups_mixed"] for s in plain] < [s["rollout/groups_mixed"] for s in whole[0]]


def test_a_resume_samples_the_same(whole, folder):
    _, state = rollouts(folder, 2)
    resumed, _ = rollouts(folder, 1, state=state)
    assert resumed == whole[0][2:]


def test_two_ranks_sample_the_same(whole, folder, tmp_path):
    finish_together([Forked([mixture_worker.__file__, folder, tmp_path, rank]) for rank in range(2)])
    for rank in range(2):
        for one, two in zip(whole[0], torch.load(tmp_path / f"{rank}.pt", weights_only=False), strict=True):
            assert one.keys() == two.keys()
            for key in one:
                assert two[key] == (pytest.approx(one[key]) if isinstance(one[key], float) else one[key]), key


def test_refilling_ends_where_there_are_no_more_prompts(folder):
    """Four problems, of which three are used; all are silent."""
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 4),
        reward=lambda *_: 0.0,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=2, max_new_tokens=2),
        engine=Engine(),
        prompts_per_step=3,
        refill=5,
        seed=0,
    )
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, num_devices=1, num_nodes=1)
    data._load(SimpleNamespace(model_name=folder), data.trainer)
    data._start_pools()
    data.engine.start(folder, 0, None)
    data.engine.policy_version = 0
    rollout = data.rollout(data.some_prompts(3), 0)
    assert (rollout.refill.groups, rollout.refill.rounds, len(data.engine.calls)) == (1, 1, 2)
    assert sorted(p.row for p in rollout.prompts) == [1, 2, 3]
    assert rollout.seconds["rollout"] >= rollout.refill.seconds > 0


# ---------------------------------------------------------------------- held-out sets with settings of their own


def test_held_out_sets_are_each_sampled_in_their_own_way(folder, tmp_path):
    L.seed_everything(0)
    engine, held_out = Engine(), ArithmeticProblems("held_out", 3, seed=5)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 16),
        val=Source(ArithmeticProblems("held_out", 4), max_new_tokens=4),
        val_more={
            "cool": Source(held_out, temperature=0.2, top_p=0.7, samples=3, greedy=False, reward=lambda *_: 0.5),
            "plain": held_out,
        },
        val_sampling=HeldOutSampling(temperature=0.6),
        reward=odd,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=2, max_new_tokens=5, temperature=0.9),
        engine=engine,
        prompts_per_step=2,
        val_samples=2,
        val_batch=4,
    )
    trainer = quiet_trainer(max_steps=1, default_root_dir=tmp_path)
    check_monitors(trainer, [GRPO(model=folder)], data)
    trainer.validate(GRPO(model=folder), datamodule=data, verbose=False)
    calls = [(c.sampling, c.greedy) for c in engine.calls]
    asked = [(s.group_size, s.temperature, s.top_p, s.max_new_tokens, greedy) for s, greedy in calls]
    assert asked[-5:] == [
        *((2, 0.6, 1.0, 4, False), (2, 0.6, 1.0, 4, True)),
        (3, 0.2, 0.7, 5, False),
        *((2, 0.6, 1.0, 5, False), (2, 0.6, 1.0, 5, True)),
    ]
    found = {k for k in trainer.callback_metrics if "maj" not in k}
    names = held_out_names(2, True) | held_out_names(3, False, "val/cool") | held_out_names(2, True, "val/plain")
    assert found == {n for n in names if "maj@" not in n and "no_answer" not in n}
    assert float(trainer.callback_metrics["val/cool/avg@3"]) == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": {"temperature": 0.5}}, r"data\.train\.init_args\.temperature: of held-out problems alone"),
        ({"mixed": {"samples": 2}}, r"data\.train\.init_args\.sets\.a\.init_args\.samples: of held-out problems alone"),
        ({"val": {"samples": 2}}, r"data\.val\.init_args\.samples: give data\.val_samples instead"),
        ({"val": {"temperature": 0.0}}, r"Source\.temperature: 0\.0 must be a finite number above 0"),
        ({"weights": {"b": 1.0}}, r"Mixture\.weights: of b; the sets are a"),
        ({"weights": {"a": 0.0}}, r"Mixture\.weights\.a: 0\.0 must be a finite number above 0"),
        ({"more": True}, r"data\.val_more\.m: a Mixture is to train on"),
    ],
)
def test_settings_out_of_place_are_refused_with_their_key(options, said):
    problems = ArithmeticProblems("train", 4)

    def source(key):
        return Source(problems, **options[key]) if key in options else problems

    def made():
        train = Mixture({"a": source("mixed")}, options.get("weights"))
        more = {"m": Mixture({"a": problems})} if "more" in options else {}
        train = source("train") if "train" in options else train
        return RolloutDataModule(train=train, val=source("val"), val_more=more, engine=Engine())

    with pytest.raises(InputError, match=said):
        made()


def test_a_length_of_a_set_leaves_room_for_its_prompt(folder):
    problems = ArithmeticProblems("train", 4)
    data = RolloutDataModule(
        train=Mixture({"a": problems, "b": Source(problems, max_new_tokens=40)}), engine=Engine(limit=40),
        sampling=Sampling(max_new_tokens=8),
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"data\.train\.init_args\.sets\.b\.init_args\.max_new_tokens: 40 leaves no room for a prompt"
    ):
        data.encode(folder, data.sets)
