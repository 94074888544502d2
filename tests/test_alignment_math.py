"""benchmarks/alignment_math.py on a tiny model: what it writes, goes on with, and sums up."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from prerl_lightning.metrics.alignment import GradientComparison
from prerl_lightning.policy.model import Policy
from prerl_lightning.types import Prompt, Response, Rollout

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "alignment_math.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the script in this process, and gives what it wrote to standard output."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))

    def call(folder, *args):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), "--results", str(folder), *map(str, args)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_measures_goes_on_and_sums_up(model_folder, run, tmp_path):
    model, data = tmp_path / "tiny", tmp_path / "math.parquet"
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama-tied"))
    lm = Policy.from_pretrained(model_folder("llama-tied")).model
    lm.generation_config.eos_token_id = None  # answers are as long as they may be
    lm.save_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}=?\n{% endfor %}"
    tokenizer.save_pretrained(model)
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+{n}-1"}], "reward_model": {"ground_truth": str(n)}}
        for n in range(10, 15)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    measure = ("measure", model, "--data", data, "--longest", 80)
    run(tmp_path, *measure, "--answers", 2)
    out = tmp_path / "alignment_math" / "tiny.jsonl"
    first = out.read_text()
    with out.open("a") as file:
        file.write('{"row": 3, "ri')  # killed while writing
    assert "row" in run(tmp_path, *measure, "--answers", 4)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_text().startswith(first)
    assert len({row["row"] for row in found}) == len(found) == 4

    answers = [json.loads(line) for line in (out.parent / "tiny.answers.jsonl").read_text().splitlines()]
    answer, row = answers[3], found[3]
    assert row["tokens"] == len(answer["ids"]) == 80
    comparison, prefix = GradientComparison(Policy.from_pretrained(str(model))), tokenizer.bos_token_id

    def whole(ids):
        """By the measurement that test_alignment.py holds against plain Hugging Face."""
        prompts, responses = [Prompt(0, tuple(answer["prompt"]), "", "")], [Response(ids, [-1.0] * len(ids), "", False)]
        rest = {"group_ids": np.zeros(1, int), "rewards": np.zeros(1), "policy_version": 0, "temperature": 1.0}
        return comparison.responses(Rollout.of(prompts, responses, **rest), [0], {0: 1.0}, prefix)[0][0].products

    for length, part in row["first"].items():
        assert part["cosine"] == pytest.approx(whole(answer["ids"][: int(length)]).cosine, abs=1e-4)
    assert [*row["first"]][-1] == str(row["tokens"])
    restated = whole(answer["question"] + answer["ids"])
    assert row["restated"]["all"]["inner_product"] == pytest.approx(restated.inner_product, rel=1e-3)
    assert sum(part["tokens"] for part in row["probability"].values()) == row["tokens"]

    run(tmp_path, "summary")
    said = json.loads((tmp_path / "alignment_math.json").read_text())["models"]["tiny"]
    assert said["answers"] == 4
    assert said["first_tokens"]["32"]["mean"] == pytest.approx(
        np.mean([r["first"]["32"]["cosine"] for r in found if "32" in r["first"]]), abs=1e-3
    )
    assert (tmp_path / "alignment_math.png").read_bytes().startswith(b"\x89PNG")
