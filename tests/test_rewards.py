"""Verifiers, case by case."""

import pytest

from prerl_lightning.rewards import arithmetic_reward, boxed_reward, last_number_reward
from prerl_lightning.rewards.boxed import last_boxed


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        (r"-\frac{33}{2}", r"\frac{-33}{2}", 0),
        ("x=5", "5", 1),
        ("xyz=5", "5", 0),
        (r"27\text{ miles}", "27", 1),
        ("", "", 1),
        ("1,000", "1000", 0),
        ("27.0", "27", 0),
        ("1/2", "0.5", 1),
        (".5", r"\dfrac{1}{2}", 1),
        (r"\frac12", r"\frac{1}{2}", 1),
        (r"\tfrac1{2}", r"\frac{1}{2}", 1),
        (r"\sqrt3", r"\sqrt{3}", 1),
        (r"90^\circ", "90", 1),
        (r"\left( 1, 2 \right)", "(1,2)", 1),
        (r"\$5", "5", 1),
        (r"50\%", "50", 1),
        (r"\text{ a}\text{ b}", r"\text{ a}\text{ b}", 1),  # two units cannot be normalised: compared as they stand
        (r"\sqrt", r"\sqrt", 1),
        (r"\frac", "1", 0),
        ("3/-4", "3/-4", 1),
        ("24", "25", 0),
    ],
)
def test_boxed(answer, truth, reward):
    assert boxed_reward("", f"so it is $\\boxed{{{answer}}}$.", truth, {}) == reward


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed 70$ it is", "70"),
        (r"\boxed{1} and \boxed{a{b}c}", "a{b}c"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed", None),
        (r"\fbox{3}", None),
        ("no box", None),
        ("", None),
        (r"\boxed{" * 5000, None),
        ("}" * 5000 + r"\boxed{4}", "4"),
    ],
)
def test_last_box(text, content):
    assert last_boxed(text) == content


def test_a_truncated_response_is_wrong():
    assert boxed_reward("", r"\boxed{7}", "7", {"truncated": False}) == 1
    assert boxed_reward("", r"\boxed{7}", "7", {"truncated": True}) == 0
    assert arithmetic_reward("", "1+1=2#2", "2", {"truncated": True}) == 0


@pytest.mark.parametrize(
    ("response", "reward"),
    [("1+1=2#2", 1), ("#3#2", 1), ("#2 ", 1), ("#2#", 0), ("2", 0), ("", 0), ("#2\x00", 0), ("#" * 10**6, 0)],
)
def test_arithmetic(response, reward):
    assert arithmetic_reward("", response, "2", {}) == reward


@pytest.mark.parametrize(("response", "reward"), [("68\n", 1), ("37 + 31 = 68.", 1), ("-68", 0), ("", 0), ("68 7", 0)])
def test_last_number(response, reward):
    assert last_number_reward("", response, "68", {}) == reward
    assert last_number_reward("", response, "68", {"truncated": True}) == 0
