"""`prerl` end to end, as a user starts it: the embedded run, and validate on the exported folder. tests/faults has the
same seed again, kills and resumes, and two ranks."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
from commands import finish, start
from forked import prerl
from report_runs import write_run

from prerl_lightning.callbacks.blocks import closing
from prerl_lightning.report.reading import read_run

ROOT = Path(__file__).parents[1]
SMALL = [
    *(
        "--config",
        str(ROOT / "configs" / "dsrl.yaml"),
        "--data.val.init_args.size=16",
        "--trainer.val_check_interval=2",
        "--data.prompts_per_step=8",
    ),
    *("--trainer.callbacks.init_args.at_step=3", "--checkpoint.every_n_train_steps=1", "--samples.every_n_steps=2"),
]


def rows(run, column):
    with (run / "metrics.csv").open() as lines:
        return [(int(r["step"]), float(r[column])) for r in csv.DictReader(lines) if r.get(column)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of 6 steps, 3 in each life."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder, "fit", *SMALL, "--trainer.max_steps=6"))


def test_the_last_lines_of_a_run_whose_reward_no_command_can_import(tmp_path):
    folder = write_run(tmp_path / "runs" / "mine" / "version_0", steps=10)
    (folder / "model").mkdir()
    assert f"prerl evaluate --config {folder}/config.yaml" in str([*closing(read_run(folder), folder, None)])
    with (folder / "config.yaml").open("a") as config:
        config.write("\n# reward: __main__.hits\n")
    said = str([*closing(read_run(folder), folder, None)])
    assert f'prerl.evaluate("{folder}/model", k=8, datamodule=...)' in said
    assert "prerl evaluate" not in said


def test_what_a_run_shows_and_leaves(whole):
    folder, output = whole
    run = folder / "runs" / "dsrl" / "version_0"
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    assert all(word in lines[5] for word in ("step 6/6", "life 2 GRPO", "reward", "mixed", "tok/s", "rollout", "train"))
    assert "life 1 NSRPreRL" in lines[2]
    assert "reborn as GRPO" in output
    assert output.count("held out at step") == 4
    assert "sample, best of batch: reward" in output
    assert "sample, held out: reward" in output
    assert "gradients of log p(y) and log p(y|x): cosine" in output
    opening, closing = (
        output.index(text) for text in ("\nobjective   NSR-PreRL, GRPO from step 3; 6 steps", "\nfinished ")
    )
    assert opening < output.index("held out at step 0") < closing
    assert "\ntraining    CountdownProblems, 4,096 problems; 8 prompts x 8 responses a step\n" in output
    ends = r"^held out    avg@8 0\.\d\d -> 0\.\d\d of 16 problems: [+-]0\.\d\d \[[+-]0\.\d\d, [+-]0\.\d\d\]"
    assert re.search(ends, output[closing:], re.M)
    assert "\nmodel       runs/dsrl/version_0/model\n" in output[closing:]
    told = re.compile(r"(step|held out|thoughts|model|objective|training|engine|time|finished)\b")
    assert max(len(line) for line in output.splitlines() if told.match(line)) <= 100
    noise = [line for line in output.splitlines() if "WARNING" in line or "Loading" in line or "INFO" in line]
    assert not noise
    assert [step for step, _ in rows(run, "val/avg@8")] == [0, 2, 4, 6]
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "checkpoints", "model"} <= set(os.listdir(run))
    by_problem = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [(line["step"], line["life"], len(line["rows"])) for line in by_problem] == [
        *((0, 1, 16), (2, 1, 16), (4, 2, 16), (6, 2, 16))
    ]
    means = [sum(line["score"]) / line["k"] / 16 for line in by_problem]
    assert means == pytest.approx([value for _, value in rows(run, "val/avg@8")])
    counted = [sum(line["thoughts"]["wait"]) / line["k"] / 16 for line in by_problem]
    assert counted == pytest.approx([value for _, value in rows(run, "val/thoughts/wait")])
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "life", "prompt", "response", "reward", "truncated"} <= set(sample)
    assert max(v for _, v in rows(run, "mismatch/log_prob_difference")) < 1e-4


def test_the_glossary_has_every_column_and_no_other(whole):
    from prerl_lightning.metrics.glossary import column, glossary

    folder, _ = whole
    with (folder / "runs" / "dsrl" / "version_0" / "metrics.csv").open() as file:
        names = next(csv.reader(file))
    assert not [name for name in names if column(name) is None]
    not_seen = {each for _, columns in glossary().values() for each in columns} - {column(name) for name in names}
    assert not [each.name for each in not_seen if not each.when]  # but what is only there when it is asked for


def test_the_exported_model_loads_and_validates_alike(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = whole
    run = folder / "runs" / "dsrl" / "version_0"
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, saved[f"policy.model.{name}"]), name
    output = finish(prerl(tmp_path, "validate", *SMALL, f"--model.init_args.model={run / 'model'}"))
    found = [line for line in output.splitlines() if "held out at step" in line][-1]
    last = rows(run, "val/avg@8")[-1][1]
    assert f"avg@8 {last:.3f}" in found
