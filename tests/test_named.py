"""Sets by name, from files as the hub has them and as verl has them; MATH's ground truths under both verifiers."""

import json
import random
from pathlib import Path

import pytest

from prerl_lightning.data.named import SETS, NamedProblems
from prerl_lightning.data.procedural import ReasoningGym
from prerl_lightning.data.readers import Files
from prerl_lightning.errors import InputError
from prerl_lightning.rewards.boxed import boxed_reward
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rewards.symbolic import math_verify_reward

SHARED = Path(__file__).parents[2] / "shared" / "data"

ROWS = {
    "math_train": ({"problem": "1+1?", "solution": r"It is \boxed{2}."}, "2", r"\boxed{2}"),
    "math500": ({"problem": "1+1?", "answer": "2"}, "2", r"\boxed{2}"),
    "aime24": ({"problem": "1+1?", "answer": "002"}, "2", r"\boxed{2}"),
    "aime25": ({"problem": "1+1?", "answer": 2}, "2", r"\boxed{2}"),
    "amc23": ({"question": "1+1?", "answer": "2.0"}, "2", r"\boxed{2}"),
    "minerva": ({"question": "1/2?", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}", r"\boxed{0.5}"),
    "olympiadbench": ({"question": "1/2?", "final_answer": [r"$\frac{1}{2}$"]}, r"\frac{1}{2}", r"\boxed{0.5}"),
    "gsm8k": ({"question": "1+1?", "answer": "1+1=2\n#### 2"}, "2", "#### 2"),
    "mathqa": (
        {"Problem": "1+1?", "options": "a ) 1 , b ) 2 , c ) none of these", "correct": "b"},
        "b",
        "The answer is (B)",
    ),
    "logical_deduction_five": ({"input": "Who is first?\n(A) x\n(B) y", "target": "(B)"}, "(B)", "(B)"),
}


@pytest.mark.parametrize("name", SETS)
def test_rows_as_the_hub_has_them(tmp_path, name):
    row, truth, right = ROWS[name if name in ROWS else "logical_deduction_five"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    problems = NamedProblems(name, str(file))
    problems.load()
    system, user = problems[0].prompt
    assert (system["role"], user["role"], problems[0].ground_truth) == ("system", "user", truth)
    assert problems.reward("", right, truth, {}) == 1
    assert problems.reward("", "no idea", truth, {}) == 0
    assert SETS[name].licence
    plain = NamedProblems(name, str(file), style="plain", instruction="")
    plain.load()
    assert plain[0].prompt.startswith("Question: ")
    assert plain[0].prompt.endswith("\nAnswer:")


def test_olympiadbench_s_several_answers_are_all_wanted(tmp_path):
    """Its judge joins what stands in dollars."""
    file = tmp_path / "rows.jsonl"
    answers = ["$1$, $2$", "$\\frac{1}{2}$,$3$", r"$(1,2)$ and $(3,4)$", r"$\$5$"]
    file.write_text("".join(json.dumps({"question": f"{a}?", "final_answer": [a]}) + "\n" for a in answers))
    problems = NamedProblems("olympiadbench", str(file))
    problems.load()
    assert [p.ground_truth for p in problems] == ["1, 2", r"\frac{1}{2},3", "(1,2) and (3,4)", r"\$5"]
    right, half = ("2, 1", "3, 0.5", "(3,4), (1,2)", "5"), ("2", "3", "(3,4)", "6")
    for answers, score in ((right, 1), (half, 0)):
        found = [
            problems.reward("", f"\\boxed{{{a}}}", p.ground_truth, {}) for a, p in zip(answers, problems, strict=True)
        ]
        assert found == [score] * 4


def test_mathqa_s_options_are_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS["mathqa"][0]))
    problems = NamedProblems("mathqa", str(file))
    problems.load()
    assert problems[0].prompt[-1]["content"] == "1+1?\n(A) 1\n(B) 2\n(C) none of these"


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"'math600' is none of math_train, math500"):
        NamedProblems("math600")
    with pytest.raises(InputError, match="gsm8k has the splits test, train, not 'dev'"):
        NamedProblems("gsm8k", split="dev")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "1", "solution": "2"}\n')
    with pytest.raises(InputError, match="row 0: 'solution' has no box: '2'"):
        NamedProblems("math_train", str(file)).load()
    with pytest.raises(InputError, match="no column 'answer'; its columns are problem, solution"):
        NamedProblems("math500", str(file)).load()
    file.write_text('{"problem": "1", "answer": "two"}\n')
    with pytest.raises(InputError, match="row 0: an integer is the answer of these problems, not 'two'"):
        NamedProblems("aime24", str(file)).load()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"bring its test split as a file .* columns question, answer"):
        NamedProblems("gsm8k").load()


@pytest.mark.parametrize(
    ("name", "file", "n", "copies"),
    [("aime24", "aime_2024", 30, 20), ("aime25", "aime_2025", 30, 20), ("amc23", "amc2023", 40, 20)],
)
def test_the_paper_s_twenty_copies_are_folded(name, file, n, copies):
    path = SHARED / f"{file}_20times.parquet"
    if not path.is_file():
        pytest.skip("the paper's files lie in ../shared, which is absent here")
    problems = NamedProblems(name, str(path))
    problems.load()
    assert len(problems) == len({p.prompt[-1]["content"] for p in problems}) == n
    assert all(problems.reward("", f"\\boxed{{{p.ground_truth}}}", p.ground_truth, {}) == 1 for p in problems)
    unfolded = Files(str(path), fold=False)
    unfolded.load()
    assert len(unfolded) == n * copies


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])  # a minute of math-verify
def test_math_s_ground_truths(caplog, every):
    path = SHARED / "math_train.parquet"
    if not path.is_file():
        pytest.skip("MATH lies in ../shared, which is absent here")
    problems = NamedProblems("math_train", str(path))
    problems.load()
    assert "4 of 7500 rows make no problem; the first: row " in caplog.text
    filled = list(problems)
    assert len(filled) == 7496

    def items(answers):
        pairs = zip(filled, answers, strict=True)
        return [Item("", f"So it is $\\boxed{{{a}}}$.", p.ground_truth, {}, p.row) for p, a in pairs]

    own = [p.ground_truth for p in filled]
    neighbours = own[1:] + own[:1]
    assert sum(a == b for a, b in zip(own, neighbours, strict=True)) == 61
    for reward, step in ((boxed_reward, 1), (math_verify_reward, every)):
        some = slice(None, None, step)
        pool = RewardPool(reward, Verification(workers=2, timeout=10))
        try:
            right, others = pool.verify(items(own)[some]), pool.verify(items(neighbours)[some])
        finally:
            pool.close()
        assert [i.row for i, v in zip(items(own)[some], right, strict=True) if v.score != 1] == []  # no exception
        equal = [i * step for i, v in enumerate(others) if v.score == 1]
        assert equal == [i for i in range(0, 7496, step) if own[i] == neighbours[i]]


# ---------------------------------------------------------------------- procedural


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    problems = ReasoningGym("chain_sum", size=5, seed=1, options={"max_terms": 3})
    problems.load()
    again = ReasoningGym("chain_sum", size=5, seed=1, options={"max_terms": 3})
    again.load()
    assert [p.ground_truth for p in problems] == [p.ground_truth for p in again]
    pool = RewardPool(problems.reward, Verification(workers=1))
    try:
        answers = [f"<answer>0</answer> hm <answer>{p.ground_truth}</answer>" for p in problems]
        right = pool.verify([Item("", a, p.ground_truth, p.extra) for a, p in zip(answers, problems, strict=True)])
        wrong = pool.verify([Item("", "<answer>x</answer>", p.ground_truth, p.extra) for p in problems])
    finally:
        pool.close()
    assert [v.score for v in right] == [1.0] * 5
    assert max(v.score for v in wrong) < 1
    assert problems.reward("", "no tags", "1", problems[0].extra) == 0
    assert problems.reward("", f"\\boxed{{{problems[0].ground_truth}}}", "1", problems[0].extra) == 1
    with pytest.raises(InputError, match="no task 'chain_sums'"):
        ReasoningGym("chain_sums").load()
    with pytest.raises(InputError, match="chain_sum with"):
        ReasoningGym("chain_sum", options={"max_word": 3}).load()


@pytest.mark.parametrize("task", ["basic_arithmetic", "leg_counting", "number_sorting", "word_sorting", "gcd"])
def test_reasoning_gym_s_own_answers_are_right(task):
    pytest.importorskip("reasoning_gym")
    problems = ReasoningGym(task, size=20, seed=random.Random(task).randrange(1000))
    problems.load()
    for p in problems:
        assert problems.reward("", f"<answer>{p.ground_truth}</answer>", p.ground_truth, p.extra) == 1
