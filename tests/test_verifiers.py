r"""What the verifiers make of answers from the wild, by kinds: (truth, response, reward).

`tests/test_math_verify.py` has math-verify's, `tests/test_rewards*.py` the rest: the paper's rule, rewards of form,
hostile text.
"""

import json
from pathlib import Path

import pytest

from prerl_lightning.rewards import NumericReward, boxed_reward, choice_reward, exact_reward, gsm8k_reward, think_format
from prerl_lightning.rewards.reading import boxed_answer
from prerl_lightning.rewards.symbolic import math_verify_reward

SHARED = Path(__file__).parents[2] / "shared"
VERIFIERS = {
    **{
        f.__name__: f
        for f in (boxed_reward, choice_reward, exact_reward, gsm8k_reward, math_verify_reward, think_format)
    },
    "NumericReward": NumericReward(),
}


def wrong(reward, cases):
    """The cases that are judged otherwise."""
    found = []
    for truth, response, expected in cases:
        score = reward("", response, truth, {"truncated": False})
        if float(score) != expected:
            found.append((truth, response, f"{float(score)} for {score.answer!r}, not {expected}"))
    return found


def boxed(*cases):
    return [(truth, f"So it is $\\boxed{{{answer}}}$.", expected) for truth, answer, expected in cases]


def test_cases_from_public_suites_and_bug_reports():
    path = SHARED / "cases" / "verifiers.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = []
    for row in map(json.loads, path.read_text().splitlines()):
        if row["disputed"] or row["by_design"]:
            continue
        try:
            extra = {"truncated": False, **row["extra"]}
            got = float(VERIFIERS[row["verifier"]]("", row["response"], row["ground_truth"], extra))
        except ValueError:
            got = "error"
        if got != row["right"]:
            found.append((row["verifier"], row["ground_truth"], row["response"], got))
    assert found == []


def test_what_the_papers_rule_says_otherwise_stays():
    """`by_design` in the file above: right by value, wrong by the rule's letter."""
    path = SHARED / "cases" / "verifiers.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["by_design"]]
    assert {row["verifier"] for row in rows} == {"boxed_reward"}
    extra = {"truncated": False}
    assert [r for r in rows if float(boxed_reward("", r["response"], r["ground_truth"], extra)) == r["right"]] == []


CHOICES = [
    *(
        ("C", form, 1)
        for form in (
            *(
                "C",
                "c",
                "(C)",
                "C.",
                "**C**",
                "C)",
                "(C) 12",
                "C) 12",
                '"C"',
                "\\(C\\)",
                "$C$",
                "\\boxed{C}",
                "\\boxed{\\textbf{(C)}}",
            ),
            *(
                "\\boxed{\\text{C}}",
                "\\boxed{\\mathrm{(C)}\\ 12}",
                "$\\boxed{\\textbf{(C) }12}$",
                "\\boxed{C. 12}",
                "\\boxed{C: apples}",
            ),
            *(
                "Answer: C",
                "ANSWER: (C)",
                "Answer\uff1aC",
                "answer - C",
                "Answer = C",
                "**Answer:** C",
                "**Answer: C**",
                "Final answer\n\nC",
            ),
            *(
                "The answer is C",
                "the answer is c",
                "The answer is **C**.",
                "The answer is [C].",
                'The answer is "C".',
                "The answer is 'C'",
            ),
            *(
                "The answer is \\(C\\).",
                "The answer is $\\textbf{(C)}$",
                "The answer is <C>",
                "<answer>C</answer>",
                "The answer is `C`",
            ),
            *(
                "The answer is option C.",
                "The answer must be (C).",
                "The correct answer to this question is C",
                "The correct option is C.",
            ),
            *(
                "I choose C.",
                "I'll go with option C",
                "Option C is correct.",
                "C is the right answer.",
                "So C.",
                "Therefore, the answer is (C) 7.",
            ),
            "So $x=\\boxed{12}$. The answer is (C).",
            "\\boxed{x+1} is the sum, hence the answer is C.",
            "The answer is C. Option B is wrong since it ignores friction.",
            "The answer is C, since (A) and (B) are too small.",
            "Answer: C\n\nExplanation: Option A fails because x < 0, and option D would need n even.",
            "The answer is (A). No: the answer is **C**.",
            "It is not A, and not B; the answer is C.",
            "The answer is C. I think B is a trap.",
            "The answer is a matter of taste, so (C)",
            "<think>\\boxed{A}? The answer is B.</think>The answer is (C).",
            "Options: (A) 1 (B) 2 (C) 3 (D) 4. The answer is C.",
        )
    ),
    *(
        (letter, form, 0)
        for letter in "ABCDI"
        for form in (
            *(
                "A or B",
                "The answer is A or B.",
                "The answer is either (C) or (D)",
                "\\boxed{A, B}",
                "\\boxed{A \\text{ or } B}",
            ),
            *(
                "\\boxed{A}, \\boxed{B}",
                "The answer is A, B",
                "The answer is C/D",
                "The answer is both A and B.",
                "Answer: (A), (B)",
            ),
            *(
                "(A)(B)(C)(D)",
                "Options: (A) 1 (B) 2 (C) 3 (D) 4",
                "Answer choices: (A) 1 (B) 2 (C) 3",
                "Answer: (A) 1 (B) 2 (C) 3 (D) 4",
            ),
            *(
                "The answer is a number.",
                "The answer is a tie between two",
                "Answer: I do not know",
                "I think not.",
                "A lot of work.",
            ),
            *(
                "Answer: I don't know",
                "Answer: Don't know",
                "The answer is unclear.",
                "The answer is None of the above",
                "Answer: Let's see.",
            ),
            *(
                "Option B is wrong",
                "The answer is not B",
                "Choice C fails.",
                "",
                "\\boxed{}",
                "\\boxed{12}",
                "\\boxed{A + B}",
            ),
        )
    ),
    *(
        ("C", form, 1)
        for form in (
            *(
                "C. Carbon dioxide",
                "C: 42",
                "C - Carbon",
                "C \u2013 Carbon",
                "C, because it is",
                "C because of it",
                "Option C",
            ),
            *(
                "option (C)",
                "Answer C",
                "C is the answer.",
                "**C.** Carbon dioxide",
                "C. Since A and B are too small.",
                "C. Vitamin C.",
            ),
            *(
                "The answer isn't D, it's C",
                "The answer is neither A nor B, but C",
                "The answer is not (B), but rather (C).",
            ),
            *("The answer is C (A is wrong).", "The answer is C. It could be D only if x < 0."),
        )
    ),
    *(
        (letter, form, 0)
        for letter in "CD"
        for form in (
            *("The answer is C (or D)", "The answer is C (or possibly D)", "The answer is C, or maybe D."),
            *("The answer is probably C but could be D", "The answer is C, though it might be D", "C or D", "C, D"),
            *(
                "A. 1 B. 2 C. 3 D. 4",
                "A: 1\nB: 2\nC: 3\nD: 4",
                "C: 42, D: 43",
                "C. Maybe D",
                "C - Carbon, or B - Boron",
            ),
            *(
                "The answer is not C",
                "The answer isn't D",
                "The answer is not D, but C is wrong too",
                "Option C is wrong",
            ),
        )
    ),
    ("A", "The answer is a", 1),
    ("A", "The answer is A, because (B) is too small.", 1),
    ("A", "The answer is A because B is false.", 1),
    ("I", "The answer is I.", 1),
    ("I", "The answer is (I), I think.", 1),
    ("J", "The answer is J", 1),
    ("B", "The answer is B, not A", 1),
]


def test_choices():
    assert wrong(choice_reward, CHOICES) == []


GSM8K = [
    *(
        ("18", f"\\boxed{{{a}}}", 1)
        for a in (
            "18\\text{ cm}^2",
            "18 m^2",
            "x = 18",
            "\\text{18 dollars}",
            "9\\cdot2=18",
            "18 eggs per day",
            "\\text{Total: }18",
        )
    ),
    *(("18", a, 0) for a in ("\\boxed{20} or \\boxed{18}", "\\boxed{20, 18}", "\\boxed{20 or 18}")),
    ("2", "\\boxed{x^2}", 0),
    ("2", "\\boxed{18\\text{ cm}^2}", 0),
    ("3", "\\boxed{18\\text{ (from 3 boxes)}}", 0),
    ("2000000", "\\boxed{2 million}", 1),
    ("18", "#### 18", 1),
    ("18", "#### 9 * 2 = 18", 1),
    ("18", "#### The answer is 18.", 1),
    ("-5", "#### \u22125", 1),
    ("-5", "#### -5", 1),
    ("-5", "#### - 5", 1),
    ("-5", "#### -$5", 1),
    ("5", "#### \u22125", 0),
    ("-5", "so it is \u20135", 1),
    ("2.5", "#### 2\\frac{1}{2}", 1),
    ("2.5", "#### 2 1/2", 1),
    ("10.5", "#### 2\\frac{1}{2}", 0),
    ("0.75", "so x = 3/4", 1),
    ("0.75", "so x = \\frac{3}{4}", 1),
    ("4", "so x = 3/4", 0),
    ("3", "so x = 3/4", 0),
    ("1200", "#### 1.2e3", 1),
    ("1200", "#### 1.2 \\times 10^3", 1),
    ("123", "They are 1,2,3", 0),
    ("1234", "They are 12,34", 0),
    ("1234", "#### 1,234", 1),
    ("1234567", "$1,234,567.00", 1),
    ("18", "It is \\boxed{18}, found in 3 steps.", 1),
    ("3", "It is \\boxed{18}, found in 3 steps.", 0),
    ("18", "<think>#### 17</think>#### 18", 1),
    ("5", "10 - 5 = 5", 1),
    ("-5", "10 - 5", 0),
    ("20", "The answer is 15-20.", 0),
]
NUMERIC = boxed(
    *(
        ("50", a, 1)
        for a in (
            *(
                "\\text{50}",
                "\\mathbf{50}",
                "\\boldsymbol{50}",
                "\\text{50 m}",
                "x = \\text{50}",
                "\\approx 50",
                "\\sim 50",
                "~50",
            ),
            *(
                "\\text{about }50",
                "x \\approx 50",
                "The answer is 50",
                "50°C",
                "50\\text{ }^\\circ\\text{C}",
                "50~\\text{K}",
                "50€",
            ),
            *("50 {\\rm km}", "50\\ \\Omega", "50\\,\\mathrm{k}\\Omega", "50\\,\\mu\\text{m}", "50 µm"),
        )
    ),
    *(
        ("50", a, 0)
        for a in (
            "50 million",
            "50\\text{ million}",
            "50 dozen",
            "50 or more",
            "50\\text{ at least}",
            "\\ge 50",
            "\\text{not }50",
            "\\text{40 or 50}",
        )
    ),
    *(("50000000", a, 1) for a in ("50 million", "50\\text{ million dollars}")),
    ("1.5e6", "1.5 million", 1),
    ("1.5 million", "1500000", 1),
    ("3e8", "3\u00d710⁸", 1),
    ("1e-3", "10⁻³", 1),
    ("-0.5", "\\frac{1}{-2}", 1),
    ("0.5", "\\frac{-1}{-2}", 1),
    ("-0.5", "-\\frac{1}{-2}", 0),
    ("-3", "--3", 0),
    *(
        ("50", a, 1)
        for a in (
            "x=50",
            "x = 50",
            "50\\text{ m}",
            "50 m",
            "50\\,\\mathrm{m/s}",
            "$50",
            "50\\%",
            "v_0 = 50 m/s",
            "50.",
            "50^\\circ",
            "50\\,\\mathrm{m^2}",
            "50\\text{ cm²}",
            "50\\,\\text{m}/\\text{s}^{2}",
        )
    ),
    *(
        ("50", a, 0)
        for a in ("2x=50", "x+y=50", "50 or 60", "40, 50", "50x", "50\\pi", "\u221250", "50 60", "5\\cdot 10", "50/2")
    ),
    ("50", "50" + " ." * 300 + "!", 0),  # at once
    ("-3", "\u22123", 1),
    ("2.5", "2\\frac{1}{2}", 1),
    ("10.5", "2\\frac{1}{2}", 0),
    ("10.5", "2 1/2", 0),
    ("1e6", "10^6", 1),
    ("1e6", "10^{6}", 1),
    ("6.6e-34", "0", 0),
    ("6.6e-34", "6.6001e-34", 1),
    ("2e-10", "5e-10", 0),
    ("0", "1e-12", 0),
    ("0", "0.0", 1),
)


def test_numbers():
    assert wrong(gsm8k_reward, GSM8K) == []
    assert wrong(NumericReward(), NUMERIC) == []
    assert wrong(NumericReward(absolute=0.1), [("0", "0.05", 1), ("0", "0.2", 0)]) == []
    assert (
        wrong(NumericReward(), [("4", "so x = 3/4", 0), ("0.75", "so x = 3/4", 1), ("1500", "1.5 \u00d7 10^3", 1)])
        == []
    )
    assert wrong(NumericReward(), [("3e8", "about 3 \u00d7 10⁸ m/s", 1), ("5e7", "about 50 million", 1)]) == []


def test_an_empty_truth_is_an_error_where_an_empty_answer_would_earn_it():
    for reward in (exact_reward, math_verify_reward, NumericReward(), choice_reward):
        with pytest.raises(ValueError, match="the ground truth"):
            reward("", "\\boxed{}", " ", {})
    assert float(gsm8k_reward("", "", "", {})) == 0


def test_the_box():
    assert boxed_answer("none") is None
    assert boxed_answer("in \\boxed {}") == ""
    assert boxed_answer("\\boxed{\\left\\{ x \\right.}") == "\\left\\{ x \\right."
    assert boxed_answer("\\boxed{2\\frac{\\}{p}}") == "2\\frac{\\}{p}"
    assert boxed_answer("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert boxed_answer("\\boxed{" * 50_000 + "1" + "}" * 50_000) == "1"
    assert boxed_answer("\\boxed{1}\n" * 50_000) == "1"
