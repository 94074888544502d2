"""The embedded countdown task: its problems, verifier and corpus, and the tool that pre-trains on it."""

import random
import re
from itertools import product

import pytest
import torch

from prerl_lightning.data.tasks.corpus import is_held_out
from prerl_lightning.data.tasks.countdown import SO, WAIT, CountdownCorpus, CountdownProblems, expressions
from prerl_lightning.data.tasks.pretrain import EOS, PAD, batches, make_tokenizer
from prerl_lightning.data.tasks.sums import SumsCorpus
from prerl_lightning.policy.model import load_tokenizer, model_path
from prerl_lightning.rewards.countdown import countdown_reward, value_of


def test_values_are_python_s():
    for a, b, c in product((2, 7, 9), (3, 10), (5, 8)):
        for first, second in product("+-*", repeat=2):
            assert value_of(f"{a}{first}{b}{second}{c}") == eval(f"{a}{first}{b}{second}{c}")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("3,5,7>26;3*5=15+7=22;wait 3*7=21+5=26;so#3*7+5", 1),
        (";so#5+7*3", 1),  # also where the corpus would not write it
        (";so#3*7+5\n", 1),
        (";so#3*5+7", 0),  # another value
        (";so#26", 0),
        (";so#2*9+8", 0),  # other numbers
        (";so#3*7+5+0", 0),
        (";so#3*7", 0),
        (";so#3*7+5;so#", 0),
        (";so#3**7+5", 0),
        (";so#21+5", 0),
        ("3*7+5", 0),
        ("", 0),
    ],
)
def test_verdicts(response, reward):
    extra = {"numbers": [3, 5, 7], "truncated": False}
    assert countdown_reward("", response, "26", extra) == reward
    assert countdown_reward("", response, "26", {**extra, "truncated": True}) == 0


def test_problems_can_be_solved_and_no_permutation_of_a_held_out_one_is_trained_on():
    train, held_out = CountdownProblems("train", 3000), CountdownProblems("held_out", 1000)
    keys = [{(tuple(p.extra["numbers"]), p.ground_truth) for p in problems} for problems in (train, held_out)]
    assert not keys[0] & keys[1]
    assert len(keys[1]) > 100
    for problem in held_out:
        solutions = [text for text, _, value in expressions(tuple(problem.extra["numbers"]))]
        assert any(countdown_reward("", f"#{s}", problem.ground_truth, problem.extra) for s in solutions)
    assert (train[7], held_out[9]) == (CountdownProblems("train", 10)[7], CountdownProblems("held_out", 10)[9])
    assert train[7] != CountdownProblems("train", 10, seed=1)[7]
    every = [((a, b, c), t) for a in range(2, 10) for b in range(a, 10) for c in range(b, 10) for t in range(1, 100)]
    assert 0.09 < sum(is_held_out(f"{numbers}>{target}") for numbers, target in every) / len(every) < 0.11


def documents(n=400, **options):
    rng = random.Random(0)
    corpus = CountdownCorpus(**options)
    return [corpus.document(rng) for _ in range(n)]


def test_writers_without_slips_stop_at_a_hit_and_show_right_values():
    for text in documents(hasty=0.0, tries=[6], slip=0.0, without_question=0.0):
        question, answer = text.split("?\n")
        numbers, target = question.split(">")
        tries = answer.removeprefix(f"{question};").partition(SO)[0].split(WAIT)
        values = [int(t.rpartition("=")[2]) for t in tries]
        assert int(target) not in values[:-1]
        for written, value in zip(tries, values, strict=True):
            first, middle, rest = re.fullmatch(r"(.*)=(\d+)(.*)=\d+", written).groups()
            assert (eval(first), eval(middle + rest)) == (int(middle), value)
        extra = {"numbers": sorted(map(int, numbers.split(","))), "truncated": False}
        assert countdown_reward("", answer, target, extra) == (values[-1] == int(target))


def test_no_held_out_problem_is_in_a_document():
    for text in documents():
        numbers, target = re.match(r"([\d,]+)>(\d+)", text).groups()
        assert not is_held_out(f"{tuple(sorted(map(int, numbers.split(','))))}>{target}")


def test_hasty_writers_exercises_and_habits():
    assert all(WAIT not in text for text in documents(hasty=1.0))
    assert all("*" not in text and "+" not in text for text in documents(exercises=1.0))
    answers = [("26", "3,5,7>26;3*5=15+7=22;wait 3*7=21+5=26;so#3*7+5"), ("9", "2,3,4>9;2+3=5+4=8;so#2+3+4")]
    found = CountdownCorpus().habits(answers)
    expected = {"waits": 0.5, "tries": 1.5, "arithmetic": 2 / 3, "submitted_at_hit": 1.0, "submitted_at_miss": 0.5}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("corpus", [CountdownCorpus(), SumsCorpus()])
def test_the_tokenizer_gives_every_document_back_without_unknown_tokens(corpus):
    tokenizer = make_tokenizer(corpus.tokens)
    rng = random.Random(3)
    for _ in range(200):
        text = corpus.document(rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(make_tokenizer(CountdownCorpus.tokens)("72;wait 9;so#")["input_ids"]) == 5  # BOS and four


def test_each_token_of_a_batch_counts_the_same():
    tokenizer = make_tokenizer(CountdownCorpus.tokens)
    found = batches(CountdownCorpus(hasty=0.3), tokenizer, random.Random(0), 1024)
    some = [next(found) for _ in range(40)]
    assert all(batch.numel() <= 1024 for batch in some)
    assert len({batch.shape[1] for batch in some}) > 5
    tokens = torch.tensor([float((batch != PAD).sum()) for batch in some])
    assert tokens.std() / tokens.mean() < 0.2
    assert all((batch == EOS).sum() == len(batch) for batch in some)


@pytest.mark.parametrize(("name", "corpus"), [("embedded", CountdownCorpus), ("embedded-sums", SumsCorpus)])
def test_the_shipped_tokenizers_are_those_of_the_tool(name, corpus):
    assert load_tokenizer(name).get_vocab() == make_tokenizer(corpus.tokens).get_vocab()


def test_pretraining_twice_gives_the_same_model(tmp_path, refused):
    import logging

    from safetensors.torch import load_file

    from prerl_lightning.data.tasks.command import pretrain

    logging.getLogger("prerl_lightning").setLevel("INFO")
    stages = "[{corpus: {class_path: CountdownCorpus}, steps: 3, tokens: 256, warmup: 1}]"
    for name in ("a", "b"):
        pretrain(["--out", str(tmp_path / name), "--problems", "2", "--stages", stages])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    mixed = stages[:-1] + ", {corpus: {class_path: SumsCorpus}, steps: 1}]"
    assert "corpora of the same tokens" in refused("pretrain", "--out", tmp_path / "c", "--stages", mixed)


def test_the_shipped_model_has_the_size_and_the_place_that_are_documented():
    from pathlib import Path

    folder = Path(model_path("embedded"))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000


@pytest.mark.slow  # half an hour of one core
def test_the_shipped_model_is_remade(tmp_path, caplog):
    """Its habits after the stages that decide them, and at the end, to what another machine's rounding may change."""
    from pathlib import Path

    from prerl_lightning.data.tasks.command import pretrain

    with caplog.at_level("INFO", "prerl_lightning"):
        config = Path(__file__).parents[1] / "configs" / "pretrain" / "countdown.yaml"
        pretrain(["--config", str(config), "--out", str(tmp_path / "model")])
    measured = [message for message in caplog.messages if "avg@8" in message]
    _, patient, final = (
        {name: float(value) for name, value in re.findall(r"(\S+) ([\d.]+)(?:,|$)", m.partition(": ")[2])}
        for m in measured
    )
    assert patient["submitted_at_hit"] > 0.9
    assert patient["submitted_at_miss"] < 0.3
    assert 0.2 < final["avg@8"] < 0.3
    assert final["pass@8"] > 0.8
    # of 1,500 tries, so 0.01 is noise: the shipped one has 0.960 (0.956 of 6,200), and one made with AVX-512 0.947
    assert final["arithmetic"] > 0.94
