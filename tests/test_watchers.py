"""Statistics of a rollout against hand-computed ones; samples, the run's record, and what loggers get."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.samples import _to_loggers, best_and_worst, new_words, terminal_line
from prerl_lightning.callbacks.watcher import due
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.rollout import repetition, rollout_statistics
from prerl_lightning.types import Prompt, Response, Rollout


def response(ids, log_probs=None, truncated=False):
    return Response(tuple(ids), tuple(log_probs or [-1.0] * len(ids)), "", truncated)


def test_statistics_by_hand():
    rollout = Rollout(
        prompts=(Prompt(0, (1,), "", ""), Prompt(1, (1,), "", ""), Prompt(2, (1,), "", "")),
        group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]),
        responses=(
            response([5, 6], [-1.0, -3.0]),
            response([5], [-2.0]),
            response([5, 6, 7], truncated=True),
            *(response([4]) for _ in range(3)),
            *(response([]) for _ in range(3)),
        ),
        rewards=torch.tensor([1.0, 0.0, 0.5, 1, 1, 1, 0, 0, 0], dtype=torch.float64),
        policy_version=0,
        temperature=1.0,
        timeouts=2,
    )
    found = rollout_statistics(rollout)
    assert found == pytest.approx(
        {
            "reward/mean": 4.5 / 9,
            "reward/timeouts": 2,
            "reward/errors": 0,
            "rollout/responses": 9,
            "rollout/tokens": 9,
            "rollout/response_length": 1,
            "rollout/response_length/right": 5 / 4,
            "rollout/response_length/wrong": 4 / 5,
            "rollout/truncated": 1 / 9,
            "rollout/entropy": (1 + 3 + 2 + 3 + 3) / 9,
            "rollout/repetition": 0,
            "rollout/log_prob/right": -(1 + 3 + 1 + 1 + 1) / 5,
            "rollout/log_prob/wrong": -(2 + 3) / 4,
            "rollout/groups_mixed": 1 / 3,
            "rollout/groups_all_right": 1 / 3,
            "rollout/groups_all_wrong": 1 / 3,
            "rollout/pass@1": (1 / 3 + 1 + 0) / 3,
            "rollout/pass@2": (2 / 3 + 1 + 0) / 3,
            "rollout/pass@3": (1 + 1 + 0) / 3,
        }
    )


def test_what_there_is_nothing_of_is_left_out():
    rollout = Rollout((Prompt(0, (1,), "", ""),), torch.tensor([0]), (response([]),), torch.zeros(1).double(), 0, 1.0)
    found = rollout_statistics(rollout)
    assert "rollout/entropy" not in found
    assert "rollout/log_prob/wrong" not in found
    assert "rollout/response_length/right" not in found
    assert all(math.isfinite(v) for v in found.values())


def test_repetition_by_hand_and_by_counting():
    tokens = [*(1, 2, 3, 4, 1, 2, 3, 4, 1), *(1, 2, 3, 4), *(7, 8)]
    # 1234 2341 3412 4123 1234 2341 : 2 of 6; the second response repeats only the first one
    assert repetition(torch.tensor(tokens), torch.tensor([9, 4, 2])) == pytest.approx(2 / 7)
    assert repetition(torch.tensor([1, 2]), torch.tensor([2])) == 0
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 60, (40,), generator=generator)
    ids = torch.randint(0, 3, (int(lengths.sum()),), generator=generator)
    seen, n = set(), 0
    for i, part in enumerate(ids.split(lengths.tolist())):
        grams = [(i, *part[j : j + 4].tolist()) for j in range(len(part) - 3)]
        seen |= set(grams)
        n += len(grams)
    assert repetition(ids, lengths) == pytest.approx(1 - len(seen) / n)


def test_best_and_worst_are_of_several_prompts(make_rollout):
    rollout = make_rollout(n_prompts=3, group_size=2, rewards=[1.0, 1.0, 0.5, 0.0, 0.0, 0.2])
    assert best_and_worst(rollout, 3) == [(0, "best"), (4, "worst"), (2, "best")]
    assert len(best_and_worst(rollout, 9)) == 3


def sample(**changes):
    row = {"step": 3, "life": 1, "objective": "GRPO", "kind": "held_out", "row": 7, "prompt": "2+2=?\n"}
    row |= {"response": "5 wait\n4", "ground_truth": "4", "reward": 1.0, "truncated": False, "tokens": 5}
    return row | {"thoughts": [(2, 6, "transition")], "previous": None} | changes


def test_a_sample_in_the_terminal():
    line = terminal_line(sample(previous={"step": 1, "response": "5\n3", "reward": 0.0}), 300)
    assert line.plain == (
        "  sample, held out: reward 1.00, truth 4: '2+2=?\\n' -> 5 wait\\n4 (changed since at step 1)"
    )
    styled = {(line.plain[s.start : s.end], str(s.style)) for s in line.spans}
    assert ("wait", "bold yellow") in styled
    assert {text for text, style in styled if style == "underline"} == {"wait", "4"}
    same = terminal_line(sample(previous={"step": 1, "response": "5 wait\n4", "reward": 1.0}), 300)
    assert same.plain.endswith("(as at step 1)")
    assert "(cut off)" in terminal_line(sample(truncated=True, kind="worst"), 3).plain


def test_new_words():
    assert new_words("a b c", "a x  c a") == [(2, 3), (7, 8)]
    assert new_words("", "a") == [(0, 1)]
    assert new_words("a", "") == []


def test_samples_as_a_table_in_loggers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tables = []
    with_tables = SimpleNamespace(log_table=lambda **table: tables.append(table))  # as W&B's, which is not installed
    board = TensorBoardLogger(tmp_path)
    rows = [sample(), sample(response="a|b <script>\n2", previous={"step": 1, "response": "x", "reward": 0.0})]
    _to_loggers(SimpleNamespace(loggers=[with_tables, board]), rows)
    assert tables[0]["step"] == 3
    assert [len(line) for line in tables[0]["data"]] == [len(tables[0]["columns"])] * 2
    assert tables[0]["data"][1][-1] == "at step 1: x"
    board.experiment.flush()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "a&#124;b &lt;script&gt;<br>2" in text


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(KeyboardInterrupt(), "interrupted", None), (ValueError("no"), "failed", "ValueError: no")],
)
def test_how_a_run_ended(tmp_path, error, status, message):
    record = RunRecord()
    record.path, record.record = tmp_path / "run.json", {"status": "running"}
    record.on_exception(SimpleNamespace(), SimpleNamespace(), error)
    record.on_train_end(SimpleNamespace(interrupted=False), SimpleNamespace())
    found = json.loads(record.path.read_text())
    assert (found["status"], found["error"]) == (status, message)
    assert found["ended"]


@pytest.mark.parametrize(
    ("steps_a_batch", "every", "expected"),
    [
        (1, 5, [1, 5, 7, 10, 12]),
        (1, 50, [1, 7, 12]),
        (3, 5, [3, 6, 9, 12]),
        (2, 5, [2, 6, 8, 10, 12]),  # 5, 7, 10 and 12 lie within these batches
        (1, 0, []),
    ],
)
def test_when_a_measurement_is_due(steps_a_batch, every, expected):
    module = SimpleNamespace(lives=[("NSRPreRL", 0), ("GRPO", 7)], rollout=SimpleNamespace(policy_version=0))
    found = []
    for before in range(0, 12, steps_a_batch):
        module.rollout.policy_version = before
        if due(SimpleNamespace(global_step=before + steps_a_batch, max_steps=12), module, every):
            found.append(before + steps_a_batch)
    assert found == expected


def test_wrong_numbers_are_refused():
    with pytest.raises(InputError, match="alignment"):
        GradientAlignment(responses=0)
