"""Rewards that see tokens, take many answers, are awaited, or are sums of others."""

import asyncio

import pytest
import torch
from reward_forms import Model, judge, length
from test_step import fit
from tokenizers import AddedToken

from prerl_lightning.errors import InputError
from prerl_lightning.metrics.glossary import column
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.objectives import GRPO
from prerl_lightning.objectives.advantages import LENS, SignedReward, group_advantages
from prerl_lightning.policy.model import load_tokenizer
from prerl_lightning.rewards import WeightedSum, boxed_reward, think_format
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rollout.text import decode, think_tags

LIMITS = {"timeout": 0.5, "max_failed": 1.0}


def items(*responses):
    return [Item("", r, "1", {}, row) for row, r in enumerate(responses)]


def test_async_rewards_are_awaited_together_and_fail_alone():
    pool = RewardPool(judge, Verification(workers=1, **LIMITS))
    try:
        # twenty of 0.2 s each have 0.5 s
        verdicts = pool.verify(items(*["fine"] * 17, "late", "raise", "own timeout"))
        assert [v.failure for v in verdicts] == [None] * 17 + ["timeout", "error", "error"]
        assert {(v.score, v.answer) for v in verdicts[:17]} == {(4.0, "fine")}
        assert [v.message for v in verdicts[17:]] == [
            *("longer than 0.5 s", "KeyError('nothing here')", "TimeoutError('of the server')"),
        ]
        # one that does not await is ended by the timer
        assert [v.failure for v in pool.verify(items("hold", "fine"))] == ["timeout", None]
        assert pool.verify(items("fine"))[0].score == 4.0
        assert pool.replaced == 0
    finally:
        pool.close()
    here = RewardPool(judge, Verification(workers=0))

    async def in_a_notebook():
        return here.verify(items("a", "bb"))

    assert [v.score for v in asyncio.run(in_a_notebook())] == [1.0, 2.0]


def test_a_batch_is_whole_groups_and_fails_as_one(monkeypatch):
    monkeypatch.setattr("prerl_lightning.rewards.process.MARGIN", 0.5)
    pool = RewardPool(Model(), Verification(workers=1, batch=4, **LIMITS))
    try:
        groups = [pool.submit(items(*["fine"] * size)) for size in (3, 3, 2, 9)]
        scores = [{f.result().score for f in futures} for futures in groups]
        assert [len(of_group) for of_group in scores] == [1] * 4  # never split
        assert all(min(of_group) >= size for of_group, size in zip(scores, (3, 3, 2, 9), strict=True))
        assert max(scores[0]) <= 6  # there are four by then
        for word, failure, message in (
            ("raise", "error", "KeyError('nothing here')"),
            ("few", "error", "the reward gave 1 numbers for 3 answers"),
            ("exit", "error", "its worker died (exit status 3)"),
            ("hang", "timeout", "longer than 1.5 s for 3 answers"),
        ):
            verdicts = pool.verify(items("fine", word, "fine"))
            assert {v.failure for v in verdicts} == {failure}, word
            assert all(message in v.message for v in verdicts), (word, verdicts)
        assert pool.replaced == 2  # the one that died was given a second try
        assert {v.score for v in pool.verify(items("fine", "fine"))} == {2.0}
    finally:
        pool.close()


def test_a_sum_takes_rewards_of_all_forms_and_says_what_each_gave():
    both = WeightedSum({"judge": judge, "many": Model(), "length": length}, {"many": 0.5, "judge": 1, "length": -2})
    verdicts = RewardPool(both, Verification(workers=0, max_failed=1.0)).verify(items("a", "bb", "not this"))
    assert [(v.score, v.answer, v.parts) for v in verdicts[:2]] == [
        (1.5 - n, "ab"[n - 1] * n, {"judge": n, "many": 3.0, "length": n}) for n in (1, 2)
    ]
    assert (verdicts[2].failure, verdicts[2].parts) == ("error", {})
    each = WeightedSum([boxed_reward, length, length])
    (verdict,) = RewardPool(each, Verification(workers=0)).verify(items(r"\boxed{1}"))
    assert (verdict.score, verdict.answer) == (19.0, "1")
    assert verdict.parts == {"boxed_reward": 1.0, "length": 9.0, "length_2": 9.0}
    for options, said in (
        (({"a": length}, {"b": 1.0}), "WeightedSum.weights: of b; the rewards are a"),
        (({"a": length}, [1.0, 2.0]), "WeightedSum: 1 rewards and 2 weights."),
        (({"a/b": length},), "WeightedSum.rewards: 'a/b': a name is of letters"),
    ):
        with pytest.raises(InputError, match=said):
            WeightedSum(*options)


def test_gdpo_against_its_formula():
    """Two rewards whose sums are equal are told apart; the plain sum stays what is logged."""
    rewards = WeightedSum({"a": length, "b": length}, {"a": 1.0, "b": 0.5}, normalise=True)
    a, b = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64), torch.tensor([0.2, 0.4, 0.4, 0.9], dtype=torch.float64)
    group = [{"a": x, "b": y} for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    expected = sum(w * (r - r.mean()) / (r.std() + 1e-6) for w, r in ((1.0, a), (0.5, b)))
    found = torch.tensor(rewards.signals(group), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    # the objective's "mean" leaves it as it is
    assert torch.allclose(group_advantages(found, torch.zeros(4).long(), "mean"), expected, rtol=1e-12, atol=1e-15)
    third = [{"a": 1 / 3, "b": y} for y in (0.1, 0.1, 0.1)]  # the float mean of which misses it
    assert rewards.signals([*third, {}])[0] != 0  # a failure counts 0
    assert rewards.signals(third) == [0.0] * 3


def test_what_counts_as_right_is_the_plain_sum(make_rollout):
    """For `SignedReward` and `LENS`, too, of which a z-score is at most now and then 1."""
    right = torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    rollout = make_rollout(2, 2, rewards=right.tolist())
    summed = type(rollout)(**{**vars(rollout), "normalised": torch.tensor([0.0, 0.0, 0.7, -0.7], dtype=torch.float64)})
    for advantage in (SignedReward(), LENS()):
        found = advantage.of_rollout(summed.signals, summed)
        assert torch.equal(found, advantage.of_rollout(rollout.signals, rollout))
    assert SignedReward().of_rollout(summed.signals, summed).tolist() == [1, 1, 1, -1]


def odd(prompt, response, ground_truth, extra):
    return float(len(response) % 2)


def twice_even(prompt, response, ground_truth, extra):
    return 2.0 - 2.0 * (len(response) % 2)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_step_learns_from_the_rewards_of_a_sum_one_by_one(model_folder, normalise):
    """Their sum is always 1, so without it there is nothing to learn; with it half of one stands against the other."""
    reward = WeightedSum({"odd": odd, "even": twice_even}, {"odd": 1.0, "even": 0.5}, normalise)
    found = fit(GRPO(model=model_folder("llama-untied")), reward=reward).callback_metrics
    assert float(found["optim/skipped"]) == (not normalise)
    assert float(found["reward/mean"]) == 1
    assert float(found["reward/odd/mean"]) + 0.5 * float(found["reward/even/mean"]) == pytest.approx(1)


def test_rewards_of_a_sum_have_columns_of_their_own(make_rollout):
    rollout = make_rollout(2, 2)
    parts = {"right": torch.tensor([1.0, 0.0, torch.nan, torch.nan]), "short": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    found = rollout_statistics(type(rollout)(**{**vars(rollout), "parts": parts}))
    assert (found["reward/right/mean"], found["reward/short/mean"]) == (0.5, 2.5)
    assert column("reward/right/mean") is not None


# ---------------------------------------------------------------------- what a reward sees


@pytest.fixture(scope="module")
def thinker():
    """A tokenizer whose tags of a thought are special tokens, beside another special one, and the tokens' ids."""
    tokenizer = load_tokenizer("embedded-sums")
    special = ["<think>", "</think>", "<tool>"]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer, [tokenizer.convert_tokens_to_ids(text) for text in special]


def test_tags_of_a_thought_stay_in_the_text_though_they_are_special(thinker):
    tokenizer, (opened, closed, tool) = thinker
    prompt, four = tokenizer("2+2=?")["input_ids"], tokenizer("4", add_special_tokens=False)["input_ids"]
    assert think_tags(tokenizer) == {opened, closed}
    ids = [opened, *four, tool, closed, *four, tokenizer.eos_token_id]
    text, raw = (decode(tokenizer, prompt, [ids], special=special)[0] for special in (False, True))
    assert text == "<think>4</think>4"
    assert raw == f"<think>4<tool></think>4{tokenizer.eos_token}"
    assert think_format("2+2=?", text, "4", {}) == 1
    plain = load_tokenizer("embedded-sums")
    assert think_tags(plain) == set()
    assert decode(plain, prompt, [[*four, plain.eos_token_id]]) == ["4"]


def test_a_thought_is_opened_by_its_response_or_by_the_prompt():
    assert think_format("...<think>\n", "hm</think> 4", "", {}) == 1
    assert think_format("...<think>\n", "\nhm\n</think>\n4", "", {}) == 1
    assert think_format("", "<think>hm</think> 4", "", {}) == 1
    assert think_format("", "\n<think>hm</think> 4", "", {}) == 1
    assert think_format("", "hm</think> 4", "", {}) == 1  # by a template, which is not seen
    assert think_format("<think>\n\n</think>\n\n", "hm</think> 4", "", {}) == 0  # closed there, too
    assert think_format("...<think>\n", "hm 4", "", {}) == 0
