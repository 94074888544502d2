"""The other verifiers, and what hostile text does to all of them."""

import random

import pytest

from prerl_lightning.rewards import (
    DenyList,
    LengthPenalty,
    NumericReward,
    RepetitionPenalty,
    SoftOverlongPenalty,
    WeightedSum,
    arithmetic_reward,
    boxed_format,
    boxed_reward,
    choice_reward,
    exact_reward,
    gsm8k_reward,
    last_number_reward,
    think_format,
)
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rewards.symbolic import math_verify_reward


@pytest.mark.parametrize(
    ("reward", "response", "truth", "score", "answer"),
    [
        (gsm8k_reward, "so 5 + 13 = 18\n#### 18", "18", 1, "18"),
        (gsm8k_reward, "#### $1,000.00.", "steps 3*4\n#### 1000", 1, "1000"),
        (gsm8k_reward, "it makes 18 dollars", "18", 1, "18"),
        (gsm8k_reward, "18 or 19", "18", 0, "19"),
        (gsm8k_reward, "-0", "0", 1, "0"),
        (gsm8k_reward, "none", "18", 0, None),
        (gsm8k_reward, "7 ####", "7", 1, "7"),
        (gsm8k_reward, "9" * 500, "9" * 500, 1, "9" * 500),
        (exact_reward, " yes \n", "yes", 1, "yes"),
        (exact_reward, r"I say \boxed{yes}", "yes", 1, "yes"),
        (exact_reward, "Yes", "yes", 0, "Yes"),
        (NumericReward(), r"\boxed{0.75}", "3/4", 1, "0.75"),
        (NumericReward(), r"\boxed{0.5}", "3/4", 0, "0.5"),
        (NumericReward(), r"\boxed{\frac{3}{4}}", "0.75", 1, "0.75"),
        (NumericReward(), r"\boxed{-\frac34}", "-0.75", 1, "-0.75"),
        (NumericReward(), r"\boxed{1.5 \times 10^{-3}}", "1.5e-3", 1, "0.0015"),
        (NumericReward(), "about 1,000.05 in all", "1000", 1, "1000"),
        (NumericReward(relative=1e-6), "1000.05", "1000", 0, "1000.05"),
        (NumericReward(), r"\boxed{x}", "1", 0, "x"),
        (NumericReward(), r"\boxed{1/0}", "1", 0, "1/0"),
        (NumericReward(absolute=0.1), "0.05", "0", 1, "0"),
        (choice_reward, r"\boxed{C}", "(C)", 1, "C"),
        (choice_reward, r"\boxed{\text{(c)}}", "C", 1, "C"),
        (choice_reward, "The answer is (B). No: the answer is **C**.", "C", 1, "C"),
        (choice_reward, "Answer: c", "C", 1, "C"),
        (choice_reward, "I weigh (A) and (B)", "B", 0, None),
        (choice_reward, "c.", "C", 1, "C"),
        (choice_reward, "Cats", "C", 0, None),
        (choice_reward, "The answer is a matter of taste, so (D)", "D", 1, "D"),
        (choice_reward, "", "C", 0, None),
        (math_verify_reward, r"so $\boxed{0.5}$", r"\frac{1}{2}", 1, None),
        (math_verify_reward, r"\boxed{-\frac{33}{2}}", r"\frac{-33}{2}", 1, None),
        (math_verify_reward, r"\boxed{27.0}", "27", 1, None),
        (math_verify_reward, r"\boxed{1{,}000}", "1000", 1, None),
        (math_verify_reward, r"\boxed{28}", "27", 0, None),
        (math_verify_reward, r"\boxed{}", "27", 0, None),
        (math_verify_reward, "The answer is $27$.", "27", 1, None),
        (math_verify_reward, "nothing", "27", 0, None),
    ],
)
def test_verifiers(reward, response, truth, score, answer):
    found = reward("", response, truth, {"truncated": False})
    assert float(found) == score
    if reward is not math_verify_reward:
        assert found.answer == answer
    elif score:
        assert found.answer == truth
    assert float(reward("", response, truth, {"truncated": True})) == 0


def test_a_ground_truth_that_is_none_is_an_error_not_a_wrong_answer():
    for reward, truth in ((choice_reward, "42"), (NumericReward(), "blue"), (math_verify_reward, "")):
        with pytest.raises(ValueError, match="the ground truth"):
            reward("", "x", truth, {})


def test_rewards_of_form():
    assert boxed_format("", r"\boxed{1}", "", {}) == 1
    assert boxed_format("", r"\boxed{1", "", {}) == 0
    assert think_format("", "<think>hm</think> 4", "", {}) == 1
    assert think_format("...<think>\n", "hm</think> 4", "", {}) == 1
    for text in ("4", "<think>hm", "<think>hm</think>", "hm <think> hm</think> 4", "<think>a</think> b </think>"):
        assert think_format("", text, "", {}) == 0
    assert [LengthPenalty(100)("", "", "", {"tokens": n}) for n in (0, 50, 500)] == [0, -0.5, -1]
    soft = SoftOverlongPenalty(buffer=20)
    lengths = (0, 80, 90, 100)
    assert [soft("", "", "", {"tokens": n, "max_new_tokens": 100}) for n in lengths] == [0, 0, -0.5, -1]
    assert RepetitionPenalty(2)("", "a b a b a b", "", {}) == pytest.approx(2 / 5 - 1)
    assert RepetitionPenalty(3)("", "a b c d", "", {}) == 0


def test_a_weighted_sum():
    both = WeightedSum([boxed_reward, boxed_format], [1.0, 0.1])
    assert both("", r"\boxed{7}", "7", {}) == pytest.approx(1.1)
    assert both("", r"\boxed{8}", "7", {}) == pytest.approx(0.1)
    assert both("", r"\boxed{8}", "7", {}).answer == "8"
    with pytest.raises(ValueError, match="2 rewards and 1 weights"):
        WeightedSum([boxed_reward, boxed_format], [1.0])


def test_a_deny_list_finds_whole_words():
    deny = DenyList(["wait", "as an AI"])
    assert [deny("", t, "", {}) for t in ("Wait, no", "I, as an ai, think", "the waiter", "fine")] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="empty phrase"):
        DenyList([" "])


PIECES = [
    *("\\boxed{", "\\boxed ", "}", "{", "\\frac", "\\sqrt", "\\text{ ", "$", "####", "9**9**9**9", "(a+)+", "\x00"),
    *("\u202eعربى", "=", "/", "-", "1,", ".5", "<think>", "</think>", "answer is ", "(C)", "\ud800"),
    *("\U0001d7dc", "\\left(", "^"),
    *("9!!!!!!", "\\int_0^1", "\\infty", "10^{10^{10}}", "\\\\", "é", "1e999", "_", " ", "\n", "x", "\\%", "0", "7"),
]


def hostile(n, seed=0):
    """n strings: drawn from PIECES, and every hundredth a big one."""
    rng = random.Random(seed)
    big = [
        *("\\boxed{" * 10_000, "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}", "\\boxed{" + "9" * 1_000_000 + "}"),
        *("a" * 1_000_000, "#" * 1_000_000, "1 " * 300_000, "(" * 100_000, "\\boxed{\\frac" + "1" * 100_000 + "}"),
        *("\\boxed{9**9**9**9}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{" + "!" * 1000 + "}", "answer is " * 50_000),
        *("\\boxed{" + "\\sqrt{" * 300 + "2" + "}" * 300 + "}", "\\boxed{1000000000!}", "answer:" + " *" * 300_000),
        *("-" * 300_000 + "1", "1," * 300_000, "\\text{ " * 100_000, "=" * 500_000, "\x00" * 500_000),
    ]
    for i in range(n):
        yield big[i // 100 % len(big)] if i % 100 == 0 else "".join(rng.choices(PIECES, k=rng.randint(0, 30)))


@pytest.mark.parametrize(
    "reward",
    [boxed_reward, arithmetic_reward, last_number_reward, gsm8k_reward, exact_reward, choice_reward, NumericReward()],
    ids=lambda r: getattr(r, "__name__", type(r).__name__),
)
def test_hostile_text_neither_hangs_nor_breaks_a_plain_verifier(reward):
    truth = "C" if reward is choice_reward else "7"
    pool = RewardPool(reward, Verification(workers=2, timeout=5))
    try:
        texts = list(hostile(10_000))
        verdicts = pool.verify([Item("", text, truth, {}, i) for i, text in enumerate(texts)])
    finally:
        pool.close()
    failed = [(v.failure, v.message, t[:200]) for v, t in zip(verdicts, texts, strict=True) if v.failure]
    assert failed == []


def test_what_is_nested_past_sense_is_no_answer_and_costs_no_time():
    pool = RewardPool(math_verify_reward, Verification(workers=1, timeout=3, max_failed=1))
    many = ["(" * 900, "(" * 60 + "7" + ")" * 60, "{" * 100 + "7" + "}" * 100]
    texts = [form % text for text in many for form in ("\\boxed{%s}", "The answer is $%s$")]
    try:
        verdicts = pool.verify([Item("", text, "7", {}, i) for i, text in enumerate(texts)])
    finally:
        pool.close()
    assert [(v.score, v.failure) for v in verdicts] == [(0.0, None)] * len(texts)


def test_hostile_text_costs_math_verify_its_own_time_at_most():
    """benchmarks/verifiers.py has the 10,000."""
    pool = RewardPool(math_verify_reward, Verification(workers=2, timeout=2, max_failed=0.5))
    try:
        verdicts = pool.verify([Item("", text, "7", {}, i) for i, text in enumerate(hostile(200))])
        assert all(v.failure in (None, "timeout", "error") for v in verdicts)
        after = pool.verify([Item("", "\\boxed{7}", "7", {}, 0)] * 10)
    finally:
        pool.close()
    assert [v.score for v in after] == [1.0] * 10
