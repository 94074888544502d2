"""Readers, formats, checks before sampling, and the order of prompts."""

from pathlib import Path

import pytest

from prerl_lightning.data.loader import PromptLoader
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import PromptFormat, encode_all
from prerl_lightning.data.readers import Files
from prerl_lightning.data.tasks.sums import ArithmeticProblems, TwoDigitSums, is_held_out, solution
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import load_tokenizer
from prerl_lightning.types import Problem, Prompt

MATH = Path(__file__).parents[2] / "shared" / "data" / "math_train.parquet"
MESSAGES = [{"role": "user", "content": "1+1=?"}]


class Fixed(ProblemSet):
    def __init__(self, *prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return Problem(index, self.prompts[index], "1")


def encode(problems, on_bad="error", max_tokens=20, vocab_size=30, checked=None):
    tokenizer = load_tokenizer("embedded-sums")
    return encode_all(problems, "data.train", PromptFormat(), tokenizer, max_tokens, vocab_size, on_bad, checked)


def test_verl_parquet_as_the_paper_ships_it():
    if not MATH.is_file():
        pytest.skip("MATH lies in ../shared, which is absent here")
    problems = Files(str(MATH))
    problems.load()
    assert len(problems) == 7496  # four have no answer
    assert [m["role"] for m in problems[0].prompt] == ["system", "user"]
    assert problems[0].ground_truth
    assert problems[0].extra["data_source"]


# ---------------------------------------------------------------------- prompts


def test_formats():
    tokenizer = load_tokenizer("embedded-sums")
    plain = PromptFormat(template="1+1=2\n{prompt}").encode([Problem(0, "3+4=", "7")], tokenizer)[0]
    assert plain.text == "1+1=2\n3+4="
    assert tokenizer.decode(plain.token_ids, skip_special_tokens=True) == plain.text
    assert plain.token_ids[0] == tokenizer.bos_token_id
    with pytest.raises(InputError, match="no chat template"):
        PromptFormat().encode([Problem(3, MESSAGES, "2")], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{{ think }}"
    chat = PromptFormat(system="be", chat_template_kwargs={"think": "ok"})
    assert chat.encode([Problem(0, MESSAGES, "2")], tokenizer)[0].text == "system:be\nuser:1+1=?\nok"
    assert PromptFormat(chat=True).encode([Problem(0, "1", "1")], tokenizer)[0].text == "user:1\n"
    with pytest.raises(InputError, match="needs chat"):
        PromptFormat(system="be").encode([Problem(0, "1", "1")], tokenizer)
    with pytest.raises(InputError, match=r"no \{prompt\} in it"):
        PromptFormat(template="x")


@pytest.mark.parametrize(
    ("bad", "vocab_size", "words"),
    [
        ("", 30, "row 1: the prompt is empty"),
        (" \n", 30, "row 1: the prompt is empty"),
        ("1" * 30, 30, "row 1: the prompt has 31 tokens, 20 are allowed"),
        ("k", 20, "row 1: token id 29 is outside the model's vocabulary of 20"),
    ],
)
def test_bad_prompts_are_found_before_sampling(bad, vocab_size, words, caplog):
    problems = Fixed("1+1", bad, "2+2")
    with pytest.raises(InputError, match=words):
        encode(problems, vocab_size=vocab_size)
    assert [p.row for p in encode(problems, "drop", vocab_size=vocab_size)] == [0, 2]
    assert "1 of 3 prompts dropped" in caplog.text
    with pytest.raises(InputError, match="no usable prompt among 1"):
        encode(Fixed(bad), "drop", vocab_size=vocab_size)


def test_what_is_not_looked_at_at_the_start_is_when_it_is_drawn(caplog):
    """Of six prompts two are tokenised first; of the others a bad one gives way to the next that is good."""
    made = []

    class Watched(Fixed):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    problems = Watched("1", "2", "3", "4" * 30, "", "6")
    caplog.set_level("INFO", "prerl_lightning")
    found = encode(problems, "drop", checked=2)
    assert sorted(set(made)) == [0, 1]
    assert "2 of 6 prompts checked, others as they are drawn" in caplog.text
    assert found.longest == 20
    assert len(found) == 6
    assert [p.row for p in found] == [0, 1, 2, 5, 5, 5]
    assert "row 3: the prompt has 31 tokens, 20 are allowed" in caplog.text
    with pytest.raises(
        InputError, match="row 3: the prompt has 31 tokens"
    ):  # whoever wants none has them all looked at
        encode(problems, "error", checked=2)
    assert [p.row for p in encode(problems, "drop")] == [0, 1, 2, 5]
    assert encode(Fixed("1", "22"), checked=2).longest == 3


def test_many_at_a_time_are_tokenised_as_each_by_itself():
    tokenizer = load_tokenizer("embedded-sums")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    problems = [Problem(0, "1+1", "2"), Problem(1, MESSAGES, "2"), Problem(2, "22+1=?", "2")]
    each = [PromptFormat().encode([p], tokenizer)[0] for p in problems]
    assert PromptFormat().encode(problems, tokenizer) == each


# ---------------------------------------------------------------------- order


def prompts(n):
    return [Prompt(i, (1,), "", "") for i in range(n)]


def rows(loader):
    return [[p.row for p in batch] for batch in loader]


def test_ranks_share_each_global_batch():
    one = PromptLoader(prompts(20), 4, 0, 1, shuffle_seed=3)
    two = [PromptLoader(prompts(20), 4, rank, 2, shuffle_seed=3) for rank in (0, 1)]
    joined = [a + b for a, b in zip(*map(rows, two), strict=True)]
    assert rows(one) == joined
    assert sorted(row for batch in joined for row in batch) == list(range(20))
    held_out = [rows(PromptLoader(prompts(5), 4, rank, 2, None)) for rank in (0, 1)]
    assert held_out == [[[0, 1], [4]], [[2, 3], []]]


def test_the_cursor_goes_on_where_it_was():
    whole = PromptLoader(prompts(10), 3, 0, 1, shuffle_seed=0)
    assert len(whole) == 3
    first, second = rows(whole), rows(whole)
    assert [len(batch) for batch in second] == [3, 3, 3]
    assert sorted(map(tuple, first)) != sorted(map(tuple, second))
    stopped = PromptLoader(prompts(10), 3, 0, 1, shuffle_seed=0)
    iterator = iter(stopped)
    seen = [[p.row for p in next(iterator)] for _ in range(2)]
    resumed = PromptLoader(prompts(10), 3, 0, 1, shuffle_seed=0)
    resumed.load_state_dict(stopped.state_dict())
    assert seen + rows(resumed) == first
    assert rows(resumed) == second
    assert rows(PromptLoader(prompts(10), 3, 0, 1, shuffle_seed=1)) != first


# ---------------------------------------------------------------------- the embedded task


def test_the_splits_are_disjoint_and_pure():
    train, held_out = ArithmeticProblems("train", 2000), ArithmeticProblems("held_out", 2000)
    assert not any(is_held_out(p.prompt.strip()) for p in train)
    assert all(is_held_out(p.prompt.strip()) for p in held_out)
    assert [train[7], held_out[9]] == [ArithmeticProblems("train", 10)[7], ArithmeticProblems("held_out", 10)[9]]
    assert train[7] != ArithmeticProblems("train", 10, seed=1)[7]
    questions = [f"{a}+{b}-{c}=?" for a in range(10, 99, 3) for b in range(10, 99, 3) for c in range(10, 99, 7)]
    assert 0.09 < sum(map(is_held_out, questions)) / len(questions) < 0.11
    for problem in held_out:
        assert int(problem.ground_truth) == eval(problem.prompt.strip().removesuffix("=?"))


def test_careful_writers_are_right(monkeypatch):
    import random

    from prerl_lightning.data.tasks import sums

    monkeypatch.setattr(sums, "CARELESS", 0.0)
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        chain, question = sums.draw_problem(rng, "train")
        text = solution(chain, rng)
        texts.append(text)
        assert text.rpartition("#")[2] == str(eval(question.removesuffix("=?")))
    assert any("wait" in t for t in texts)
    assert any("check" in t for t in texts)


def test_two_digit_sums():
    problem = TwoDigitSums("held_out", 4)[2]
    *shots, question = problem.prompt
    answers = [m["content"].split(" = ") for m in shots if m["role"] == "assistant"]
    assert len(answers) == 4
    assert all(eval(asked) == int(answer) for asked, answer in answers)
    assert eval(question["content"].removeprefix("What is ").removesuffix("?")) == int(problem.ground_truth)


def test_tokenizer_round_trip():
    tokenizer = load_tokenizer("embedded-sums")
    text = "43-36+17=?\n43-36=17 wait 43-36=7 check 7+36=43;7+17=24#24"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("§")["input_ids"] == [tokenizer.bos_token_id, tokenizer.unk_token_id]
