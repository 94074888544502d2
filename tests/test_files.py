"""Data as it is in the world: every usual format and layout, answers of every kind, rows that are of no use."""

import bz2
import gzip
import json
import logging
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerl_lightning.data.named import NamedProblems
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.readers import Files, HubDataset
from prerl_lightning.errors import InputError
from prerl_lightning.types import Problem

ROWS = [{"question": "1+1?", "answer": "033", "level": 1}, {"question": "2+2?", "answer": "2024-01-01", "level": 2}]
MESSAGES = [{"role": "user", "content": "1+1=?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def text(content, path):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def compressed(path, codec):
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), codec) as stream:
        stream.write(lines(ROWS).encode())
    return path


def saved(path, split=None):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({split: table}) if split else table).save_to_disk(str(path))
    return path


def parquet(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


CSV = "question,answer,level\n1+1?,033,1\n2+2?,2024-01-01,2\n"
FORMATS = {
    "rows.jsonl": partial(text, lines(ROWS)),
    "blank lines.jsonl": partial(text, "\n" + lines(ROWS[:1]) + "  \n" + lines(ROWS[1:])),
    "bom.jsonl": partial(text, b"\xef\xbb\xbf" + lines(ROWS).encode()),
    "windows.jsonl": partial(text, lines(ROWS).replace("\n", "\r\n")),
    "no end.jsonl": partial(text, lines(ROWS).rstrip()),
    "array.json": partial(text, json.dumps(ROWS)),
    "pretty.json": partial(text, json.dumps(ROWS, indent=2)),
    "lines.json": partial(text, lines(ROWS)),
    "no suffix": partial(text, lines(ROWS)),
    "rows.csv": partial(text, CSV),
    "bom.csv": partial(text, b"\xef\xbb\xbf" + CSV.encode()),
    "rows.tsv": partial(text, CSV.replace(",", "\t")),
    "rows.jsonl.gz": partial(text, gzip.compress(lines(ROWS).encode())),
    "rows.json.gz": partial(text, gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv.gz": partial(text, gzip.compress(CSV.encode())),
    "rows.jsonl.bz2": partial(text, bz2.compress(lines(ROWS).encode())),
    "rows.jsonl.zst": partial(compressed, codec="zstd"),
    "rows.parquet": parquet,
    "parquet without suffix": parquet,
    "saved": saved,
    "saved with splits": partial(saved, split="train"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    problems = Files(str(FORMATS[name](tmp_path / name)), prompt="question")
    problems.load()
    assert [(p.prompt, p.ground_truth) for p in problems] == [("1+1?", "033"), ("2+2?", "2024-01-01")]
    assert [p.row for p in problems] == [0, 1]
    assert {k: int(v) for k, v in problems[1].extra.items()} == {"level": 2}


def test_several_files(tmp_path):
    a, b = text(lines(ROWS[:1]), tmp_path / "a.jsonl"), text(json.dumps(ROWS[1:]), tmp_path / "b.json")
    text("no data", tmp_path / "README.md")
    for path in ([str(a), str(b)], str(tmp_path), str(tmp_path / "*.json*"), str(tmp_path / "**")):
        if path == str(tmp_path / "**"):
            (tmp_path / "README.md").unlink()
        problems = Files(path, prompt="question")
        problems.load()
        assert [(p.row, p.ground_truth) for p in problems] == [(0, "033"), (1, "2024-01-01")]
    text(lines([*ROWS, {"question": "x"}]), b)
    problems = Files([str(a), str(b)], prompt="question", max_unusable=0)
    with pytest.raises(InputError, match=r"b\.json, row 2: no column 'answer'; its columns are question"):
        problems.load()


def test_folders_of_splits(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[1:])
    parquet(tmp_path / "test-00000-of-00001.parquet", [{"question": "held out", "answer": "1", "level": 3}])
    with pytest.raises(InputError, match=r"it holds the splits test, train: say which in split"):
        Files(str(tmp_path), prompt="question").load()
    with pytest.raises(InputError, match=r"no split 'dev'; there are test, train"):
        Files(str(tmp_path), prompt="question", split="dev").load()
    for split, number in (("train", 2), ("test", 1)):
        problems = Files(str(tmp_path), prompt="question", split=split)
        problems.load()
        assert len(problems) == number


ORZ = [
    [{"from": "human", "value": f"{i}+1?"}, {"from": "assistant", "ground_truth": {"value": str(i)}}] for i in (1, 2)
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "=?"}]}]
SOLVED = [*MESSAGES, {"role": "assistant", "content": "It is 2."}]
VERL = {"prompt": MESSAGES, "reward_model": {"style": "rule", "ground_truth": "2"}, "data_source": "x"}


@pytest.mark.parametrize(
    ("row", "options", "prompt", "truth"),
    [
        ({"q": "x", "a": {"b": [{"c": 5}]}}, {"prompt": "q", "answer": "a.b[0].c"}, "x", "5"),
        ({"q": "x", "a": ["5", "6"]}, {"prompt": "q", "answer": "a[-1]"}, "x", "6"),
        ({"q.x": "x", "a": "5"}, {"prompt": "q.x", "answer": "a"}, "x", "5"),
        ({"messages": SOLVED, "answer": "2"}, {"prompt": "messages[0].content"}, "1+1=?", "2"),
        (VERL, {}, MESSAGES, "2"),
        (ORZ, {"prompt": "[0].value", "answer": "[1].ground_truth.value"}, "1+1?", "1"),
        # of any kind
        ({"prompt": "x", "answer": 27.0}, {}, "x", "27"),
        ({"prompt": "x", "answer": 0.5}, {}, "x", "0.5"),
        ({"prompt": "x", "answer": 10**29 + 1}, {}, "x", "1" + "0" * 28 + "1"),
        ({"prompt": "x", "answer": ["27"]}, {}, "x", "27"),
        # within a solution
        ({"prompt": "x", "answer": r"\boxed{1}, no: $\boxed{\frac12}$"}, {"answer_in": "boxed"}, "x", r"\frac12"),
        ({"prompt": "x", "answer": "1+1=2\n#### 2"}, {"answer_in": "after_hashes"}, "x", "2"),
        ({"prompt": "x", "answer": "1+1=2\n#### 2"}, {"answer_in": "whole"}, "x", "1+1=2\n#### 2"),
        # chats
        ({"prompt": PARTS, "answer": "2"}, {}, [{"role": "user", "content": "1+1\n=?"}], "2"),
        ({"prompt": SOLVED, "answer": "2"}, {}, MESSAGES, "2"),
    ],
)  # fmt: skip
def test_rows(tmp_path, caplog, row, options, prompt, truth):
    content = json.dumps(row) if isinstance(row, list) else lines([row])
    problems = Files(str(text(content, tmp_path / "rows.jsonl")), **options)
    problems.load()
    assert (problems[0].prompt, problems[0].ground_truth) == (prompt, truth)
    if row is not ORZ and row.get("prompt") is SOLVED:
        assert "the messages of 1 rows end with the assistant's, which is left out of the prompt; the first: row 0" in (
            caplog.text
        )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "no column 'answer'; its columns are prompt"),
        ({"prompt": "x", "answer": None}, "'answer' is missing"),
        ({"prompt": "x", "answer": float("nan")}, "'answer' is missing"),
        ({"prompt": "x", "answer": " "}, "'answer' is empty, which an empty answer would earn"),
        ({"prompt": "x", "answer": True}, "'answer' is no text or number, but True"),
        ({"prompt": "x", "answer": {"value": "2"}}, "the path of one in it, such as answer.value"),
        ({"prompt": "x", "answer": ["2", "3"]}, r"the path of one in it, such as answer\[0\]"),
        ({"prompt": "x", "answer": r"It is $\boxed{2}$."}, "a solution, not an answer: set answer_in: boxed"),
        ({"prompt": "x", "answer": "1+1=2 #### 2"}, "a solution, not an answer: set answer_in: after_hashes"),
        ({"prompt": "", "answer": "2"}, "'prompt' is empty"),
        ({"prompt": 5, "answer": "2"}, "neither text nor a list of chat messages"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "neither text nor a list of chat messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}, "a message with .*image"),
        ({"prompt": SOLVED[1:], "answer": "2"}, "the assistant's messages alone"),
        (5, "it is not a JSON object"),
    ],
)
def test_rows_of_no_use_are_counted_and_the_first_is_named(tmp_path, caplog, row, words):
    good = [{"prompt": str(i), "answer": str(i)} for i in range(3)]
    path = str(text(lines([good[0], row, *good[1:]]), tmp_path / "rows.jsonl"))
    problems = Files(path)
    problems.load()
    assert [p.row for p in problems] == [0, 2, 3]
    assert "1 of 4 rows make no problem; the first: row 1:" in caplog.text
    with pytest.raises(
        InputError, match=f"1 of 4 rows make no problem, which is more than max_unusable .*row 1: .*{words}"
    ):
        Files(path, max_unusable=0).load()
    with pytest.raises(InputError, match=f"row 0: .*{words}"):
        Files(str(text(lines([row]), tmp_path / "alone.jsonl"))).load()


def test_answers_in_solutions_that_have_none(tmp_path):
    """NuminaMath's proofs."""
    rows = [{"prompt": "a", "answer": r"\boxed{1}"}, {"prompt": "b", "answer": "Trivial."}]
    path = str(text(lines(rows), tmp_path / "rows.jsonl"))
    problems = Files(path, answer_in="boxed")
    problems.load()
    assert [p.ground_truth for p in problems] == ["1"]
    named = [{"problem": r["prompt"], "solution": r["answer"]} for r in rows]
    problems = NamedProblems("math_train", str(text(lines(named), tmp_path / "named.jsonl")))
    problems.load()
    assert len(problems) == 1


def test_copies_are_folded(tmp_path, caplog):
    """In any format, uneven ones too, and by prompt and truth: two answers to one question are two problems."""
    caplog.set_level("INFO", "prerl_lightning")
    rows = (
        [{"prompt": "a", "answer": "1"}] * 20 + [{"prompt": "b", "answer": "1"}] * 7 + [{"prompt": "b", "answer": "2"}]
    )
    path = str(text(lines(rows), tmp_path / "rows.jsonl"))
    problems = Files(path)
    problems.load()
    assert [(p.row, p.prompt, p.ground_truth) for p in problems] == [(0, "a", "1"), (20, "b", "1"), (27, "b", "2")]
    assert "28 rows, 3 distinct problems: folded" in caplog.text
    unfolded = Files(path, fold=False)
    unfolded.load()
    assert len(unfolded) == 28
    first = Files(path, limit=2)
    first.load()
    assert [p.row for p in first] == [0, 20]
    verl = [{**VERL, "prompt": [{"role": "user", "content": c}]} for c in "aabbb"]
    problems = Files(str(parquet(tmp_path / "verl.parquet", verl)))
    problems.load()
    assert [p.prompt[0]["content"] for p in problems] == ["a", "b"]
    assert problems[0].extra["data_source"] == "x"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("", "file is empty"),
        ("\n\n", "no rows"),
        ('{"prompt": "x", "answer": 1}\nnonsense', "line 2: not JSON"),
        ("nonsense", "line 1: not JSON"),
        ('[{"prompt": "x",\n "answer": 1}', "line 1: not JSON"),
        ('{\n"prompt": "x"\n}', "one JSON object over several lines"),
        ('{"prompt": "x", "answer": 1}\n' + "[" * 100_000, "line 2: too many lists or objects within each other"),
        ("[" * 100_000 + "\n", "line 1: too many lists or objects within each other"),
        (b"PAR1 and no more", "cannot be read"),
        (b'{"prompt": "\xff", "answer": 1}', "line 1: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    path = tmp_path / "file"
    if content is not None:
        text(content, path)
    with pytest.raises(InputError, match=words) as error:
        Files(str(path)).load()
    assert str(path) in str(error.value)


def test_the_hub(tmp_path, monkeypatch):
    """Out of reach here: the library's own loader on a local folder, and its error without network."""
    (tmp_path / "set").mkdir()
    text(lines(ROWS), tmp_path / "set" / "train.jsonl")
    problems = HubDataset(str(tmp_path / "set"), prompt="question")
    problems.load()
    assert problems[0].prompt == "1+1?"
    with pytest.raises(InputError, match="no column 'problem'; its columns are answer, level, question"):
        HubDataset(str(tmp_path / "set"), prompt="problem").load()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="bring its train split as a file"):
        HubDataset("openai/gsm8k", prompt="question", config="main").load()


@pytest.mark.parametrize(("truth", "expected"), [("033", "33"), (33, "33"), ("33.0", "33"), (33.0, "33")])
def test_columns_and_integers_of_named_sets(tmp_path, truth, expected):
    """Maxwell-Jia's AIME has other names, and AIME's 033 is 33; so in verl's format."""
    rows = [{"ID": "2024-I-1", "Problem": "What?", "Solution": "So.", "Answer": truth}]
    problems = NamedProblems("aime24", str(text(lines(rows), tmp_path / "rows.jsonl")))
    problems.load()
    assert problems[0].prompt[-1]["content"] == "What?"
    assert problems[0].ground_truth == expected
    verl = [{**VERL, "reward_model": {"ground_truth": truth}}]
    problems = NamedProblems("aime24", str(text(lines(verl), tmp_path / "verl.jsonl")))
    problems.load()
    assert problems[0].ground_truth == expected


def test_a_generator_s_truths_need_no_form():
    class Own(ProblemSet):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Problem(0, "", "")

    assert Own().forms("1") == ()


def test_what_a_library_logs_of_a_damaged_file_is_said_once(tmp_path):
    """In our own error: `datasets` logs it too, with a traceback."""
    import datasets

    said = []
    watch = logging.Handler()
    watch.emit = said.append
    log = datasets.logging.get_logger("datasets")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 100)
    log.addHandler(watch)
    try:
        with pytest.raises(InputError, match="cannot be read"):
            Files(str(tmp_path / "bad.parquet")).load()
    finally:
        log.removeHandler(watch)
    assert not said


def test_a_column_that_is_there_twice(tmp_path):
    """Of which the last would win; those without a name are a spreadsheet's empty ones."""
    text("prompt,answer,answer\n1+1,2,3\n", tmp_path / "rows.csv")
    with pytest.raises(InputError, match=r"rows\.csv: it has the column 'answer' more than once"):
        Files(str(tmp_path / "rows.csv")).load()
    text("prompt,answer,,\n1+1,2,,\n", tmp_path / "rows.csv")
    problems = Files(str(tmp_path / "rows.csv"))
    problems.load()
    assert problems[0].ground_truth == "2"


def test_a_nested_column_that_is_null(tmp_path):
    rows = [
        {"q": "x", "ans": {"final": {"values": ["1"]}}},
        {"q": "y", "ans": {"final": None}},
        {"q": "z", "ans": None},
    ]
    for number, name in ((1, "ans.final"), (2, "ans")):
        path = parquet(tmp_path / f"{number}.parquet", [rows[0], rows[number]])
        problems = Files(str(path), prompt="q", answer="ans.final.values[0]", max_unusable=0)
        with pytest.raises(InputError, match=rf"row 1: 'ans.final.values\[0\]' is missing: '{name}' is null"):
            problems.load()


def test_a_csv_of_another_separator(tmp_path):
    text("prompt;answer\n1+1;2\n", tmp_path / "rows.csv")
    with pytest.raises(InputError, match=r"rows\.csv: its only column is 'prompt;answer'\. .* a comma here, not ';'"):
        Files(str(tmp_path / "rows.csv")).load()
