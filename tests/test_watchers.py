"""Statistics of a rollout against hand-computed ones; samples, the run's record, and what loggers get."""

import csv
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers import AutoModelForCausalLM

from prerl_lightning.callbacks.alignment import GradientAlignment, chosen
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.sample_views import new_words, terminal_line, to_loggers
from prerl_lightning.callbacks.samples import best_and_worst
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import run_folder
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.alignment import GradientComparison
from prerl_lightning.metrics.rollout import repetition, rollout_statistics
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.advantages import group_advantages
from prerl_lightning.types import Prompt, Response, Rollout


def response(ids, log_probs=None, truncated=False):
    return Response(ids, log_probs or [-1.0] * len(ids), "", truncated)


def test_statistics_by_hand():
    rollout = Rollout.of(
        [Prompt(0, (1,), "", ""), Prompt(1, (1,), "", ""), Prompt(2, (1,), "", "")],
        [
            response([5, 6], [-1.0, -3.0]),
            response([5], [-2.0]),
            response([5, 6, 7], truncated=True),
            *(response([4]) for _ in range(3)),
            *(response([]) for _ in range(3)),
        ],
        group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]),
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


def test_right_is_one_thing(make_rollout):
    """Partial credit is wrong, a weighted sum's 0.9999999999999999 is right."""
    rollout = make_rollout(n_prompts=3, group_size=2, rewards=[0.01, 0.01, 0.7 + 0.2 + 0.1 - 2e-16, 1.0, 1.2, 0.5])
    found = rollout_statistics(rollout)
    assert found["rollout/groups_all_wrong"] == found["rollout/groups_all_right"] == pytest.approx(1 / 3)
    assert found["rollout/groups_mixed"] == pytest.approx(1 / 3)
    assert found["rollout/pass@1"] == pytest.approx((0 + 1 + 0.5) / 3)


def test_what_there_is_nothing_of_is_left_out():
    rest = {"group_ids": torch.tensor([0]), "rewards": torch.zeros(1).double(), "policy_version": 0, "temperature": 1.0}
    rollout = Rollout.of([Prompt(0, (1,), "", "")], [response([])], **rest)
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
    assert line.plain == ("  sample, held out: reward 1.00, truth 4: '2+2=?\\n' -> 5 wait\\n4 (changed since step 1)")
    styled = {(line.plain[s.start : s.end], str(s.style)) for s in line.spans}
    assert ("wait", "bold yellow") in styled
    assert {text for text, style in styled if style == "underline"} == {"wait", "4"}
    same = terminal_line(sample(previous={"step": 1, "response": "5 wait\n4", "reward": 1.0}), 300)
    assert same.plain.endswith("(as at step 1)")
    assert "(cut off)" in terminal_line(sample(truncated=True, kind="worst"), 3).plain


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<start_of_turn>", "<\uff5cUser\uff5c>", "[/INST]"])
def test_an_excerpt_does_not_begin_inside_a_special_token(token):
    from prerl_lightning.terminal import last_part

    text = f"What is 1<2?{token}4"
    for most in range(1, len(text) + 9):
        part = last_part(text, most)
        assert text.endswith(part)
        assert len(part) <= most
        assert part == "4" or token in part
    shown = terminal_line(sample(prompt=text), 3).plain
    assert "truth 4: '4' -> 5 w" in shown


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
    to_loggers([with_tables, board], rows)
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
    trainer = SimpleNamespace(interrupted=False, callbacks=[])
    record.on_exception(trainer, SimpleNamespace(), error)
    record.on_train_end(trainer, SimpleNamespace(stops=SimpleNamespace(reason=lambda _: None)))
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
    module = GRPO(model="embedded-sums")
    module.lives = [("NSRPreRL", 0), ("GRPO", 7)]
    found = []
    for before in range(0, 12, steps_a_batch):
        module.rollout = SimpleNamespace(policy_version=before)
        module._trainer = SimpleNamespace(global_step=before + steps_a_batch, max_steps=12)
        if module.due(every):
            found.append(before + steps_a_batch)
    assert found == expected


@pytest.fixture
def measured(model_folder, make_rollout, tmp_path):
    """A module with a tiny policy and a rollout behind its first step, and a Trainer's part of it."""
    module = NSRPreRL(model=model_folder("llama-tied"))
    module.configure_model()
    rollout = make_rollout(n_prompts=4, group_size=4)
    texts = ("wait, check", "wait", "", "so be it") * 4
    module.rollout = module.whole_rollout = replace(rollout, texts=texts)
    trainer = SimpleNamespace(global_step=1, max_steps=9, is_global_zero=True, log_every_n_steps=1)
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer.precision_plugin = SimpleNamespace(forward_context=nullcontext)
    module._trainer = trainer
    return module, trainer, tmp_path


def test_what_alignment_logs(measured):
    """Against the comparison that test_alignment.py checks, and log-probs of plain forwards."""
    module, trainer, folder = measured
    watcher = GradientAlignment(responses=5, likelihoods=6, bins=2)
    watcher.folder = folder
    found = watcher.watch(trainer, module)
    rollout = module.rollout
    advantages = group_advantages(rollout.rewards, rollout.group_ids, "mean").tolist()
    rows = [json.loads(line) for line in (folder / "alignment.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert {(r["life"], r["objective"]) for r in rows} == {(1, type(module.acting).__name__)}

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    assert found["alignment/cosine"] == pytest.approx(mean(r["cosine"] for r in rows))
    assert found["alignment/inner_product"] == pytest.approx(mean(r["inner_product"] for r in rows))
    assert found["alignment/negative_share"] == mean(r["inner_product"] < 0 for r in rows)
    for name, sign in (("positive", 1), ("negative", -1)):
        some = [r for r in rows if r["advantage"] * sign > 0]
        assert some
        assert found[f"alignment/cosine/{name}"] == pytest.approx(mean(r["cosine"] for r in some))
        assert found[f"alignment/inner_product/{name}"] == pytest.approx(mean(r["inner_product"] for r in some))
    numbers = chosen(rollout, torch.tensor(advantages).sign(), 5)
    assert [r["advantage"] for r in rows] == [advantages[n] for n in numbers]
    assert [r["reward"] for r in rows] == [float(rollout.rewards[n]) for n in numbers]
    assert [sum(r["layer_inner_products"].values()) for r in rows] == pytest.approx([r["inner_product"] for r in rows])
    for kind in ("position", "probability"):
        names = {name for r in rows for name in r[kind]}
        assert {k.removeprefix(f"alignment/{kind}/") for k in found if k.startswith(f"alignment/{kind}/")} == names
        for name in names:
            cosines = [r[kind][name]["cosine"] for r in rows if name in r[kind]]
            assert found[f"alignment/{kind}/{name}"] == pytest.approx(mean(cosines))
    assert {"1_of_2", "2_of_2"} == {name for r in rows for name in r["position"]}
    assert all(sum(part["tokens"] for part in r["position"].values()) == r["tokens"] for r in rows)
    weights = dict(enumerate(advantages))
    _, of_policy = GradientComparison(module.policy).responses(rollout, numbers, weights, module.prefix_id)
    assert found["alignment/policy_gradient/cosine"] == pytest.approx(of_policy.cosine, rel=1e-5)

    model = AutoModelForCausalLM.from_pretrained(module.model_name)
    sums = {"right": [0.0, 0], "wrong": [0.0, 0]}
    for n in chosen(rollout, (rollout.rewards >= 1).long() * 2 - 1, 6):
        ids = torch.tensor(rollout.responses[n].token_ids).long()
        logits = model(torch.cat([torch.tensor([module.prefix_id]), ids])[None]).logits[0, :-1] / rollout.temperature
        log_prob = float(logits.log_softmax(-1).gather(1, ids[:, None]).sum().detach())
        name = "right" if rollout.rewards[n] >= 1 else "wrong"
        sums[name] = [sums[name][0] + log_prob, sums[name][1] + len(ids)]
    for name, (total, tokens) in sums.items():
        assert found[f"rollout/marginal_log_prob/{name}"] == pytest.approx(total / tokens, rel=1e-4)


def test_what_thoughts_log(measured):
    module, trainer, _ = measured
    thoughts = Thoughts()
    found = thoughts.watch(trainer, module)
    assert found["thoughts/transition"] == 0.5
    assert found["thoughts/reflection"] == 0.25
    assert found["thoughts/transition_ratio"] == 1
    assert "thoughts/subgoal_ratio" not in found
    tokens = float(module.rollout.lengths.sum())
    assert found["thoughts/transition_per_1k"] == pytest.approx(8000 / tokens)
    module.rollout, trainer.global_step = replace(module.rollout, texts=("wait wait",) * 16, policy_version=1), 2
    again = Thoughts()
    again.load_state_dict(thoughts.state_dict())
    for one in (thoughts, again):
        assert one.watch(trainer, module)["thoughts/transition_ratio"] == 4


def validated(thoughts, module, trainer, texts, step, fn="fit"):
    """What a validation records of two answers of each problem."""
    trainer.state, trainer.global_step, trainer.sanity_checking = SimpleNamespace(fn=fn), step, False
    verdicts = [SimpleNamespace(score=1.0)] * 2
    for row in reversed(range(len(texts))):
        responses = [Response((5,), (-1.0,), texts[row], False)] * 2
        group = SimpleNamespace(prompt=SimpleNamespace(row=row), responses=responses, verdicts=verdicts)
        thoughts.on_validation_batch_end(trainer, module, {"samples": [group]})
    thoughts.on_validation_batch_end(trainer, module, {"samples": []})
    thoughts.on_validation_epoch_end(trainer, module)
    return {k: v for k, v in module.row.values.items() if k.startswith("val/thoughts/")}


@pytest.mark.parametrize(("fn", "step", "expected"), [("fit", 0, 1.0), ("fit", 5, 0.5), ("validate", 0, 0.5)])
def test_ratios_of_held_out_answers(measured, fn, step, expected):
    """Validation alone knows no step 0 but a checkpoint's."""
    module, trainer, _ = measured
    thoughts = Thoughts()
    thoughts.at_start = {"val/thoughts/transition": 2.0}
    found = validated(thoughts, module, trainer, ["wait"], step, fn)
    assert found["val/thoughts/transition"] == 1
    assert found["val/thoughts/transition_ratio"] == expected
    assert ("val/thoughts/transition_ratio/low" in found) == (step == 0 and fn == "fit")


def test_held_out_ratios_have_an_interval_over_problems(measured, caplog):
    """By the same draws of problems for both counts; no upper end where some draws have none at the start."""
    module, trainer, _ = measured
    thoughts, before, after = Thoughts(), [0, 1, 2, 1, 0, 3] * 5, [1, 4, 3, 5, 0, 2] * 5
    texts = [f"wait {'check ' * (i == 7)}" * n for i, n in enumerate(before)]
    validated(thoughts, module, trainer, texts, step=0)
    again = Thoughts()  # resumed
    again.load_state_dict(thoughts.state_dict())
    module.row.values.clear()
    with caplog.at_level("INFO"):
        found = validated(again, module, trainer, ["wait check " * n for n in after], step=5)
        again.on_validation_end(trainer, module)
    assert found["val/thoughts/transition_ratio"] == pytest.approx(15 / 7)
    drawn = torch.randint(30, (20_000, 30), generator=torch.Generator().manual_seed(1))
    counts = [torch.tensor(c, dtype=torch.float64)[drawn].sum(1) for c in (after, before)]
    expected = torch.quantile(counts[0] / counts[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    ends = [found[f"val/thoughts/transition_ratio/{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(expected, rel=0.05)
    assert 1.3 < ends[0] < 15 / 7 < ends[1] < 3.5
    assert found["val/thoughts/reflection_ratio"] == pytest.approx(75)
    assert "val/thoughts/reflection_ratio/low" in found
    assert "val/thoughts/reflection_ratio/high" not in found
    assert "thoughts/reflection 2.5 (x75.00 [" not in caplog.text
    assert "reflection 2.5 (x75.00 [" in caplog.text
    assert "inf])" in caplog.text
    module.row.values.clear()
    found = validated(again, module, trainer, ["wait"] * 29, step=6)  # other problems
    assert "val/thoughts/transition_ratio" in found
    assert "val/thoughts/transition_ratio/low" not in found


def test_seal_s_labels_beside_the_phrases(measured):
    module, trainer, _ = measured
    text = "wait, but add\n\nso verify\n\nalternatively\n\nadd"
    module.rollout = replace(module.rollout, texts=(text,) * 16)
    found = Thoughts(rule="seal").watch(trainer, module)
    assert found["thoughts/transition"] == 3
    labels = [found[f"thoughts/seal/{label}"] for label in ("reflection", "transition", "execution")]
    assert labels == [2, 1, 1]
    assert found["thoughts/seal/reflection_ratio"] == 1
    tokens = float(module.rollout.lengths.sum())
    assert found["thoughts/seal/reflection_per_1k"] == pytest.approx(32_000 / tokens)
    assert {"thoughts/seal/reflection/right", "thoughts/seal/execution_per_1k/wrong"} <= set(found)
    assert not [key for key in Thoughts().watch(trainer, module) if "seal" in key]
    module.row.values.clear()
    held_out = validated(Thoughts(rule="seal"), module, trainer, [text] * 3, step=0)
    assert held_out["val/thoughts/seal/transition"] == 1
    assert held_out["val/thoughts/seal/transition_ratio/low"] == 1


def test_rows_for_the_loggers(measured, tmp_path):
    """Rare measurements are written whatever ``log_every_n_steps``, and nothing is repeated."""
    module, trainer, _ = measured
    trainer.loggers = [CSVLogger(tmp_path, name="", version="")]  # flushes every 100 rows by itself
    for step, recorded in ((1, {"a": 1.0}), (2, {}), (3, {"b": 2.0})):
        trainer.global_step = step
        module.record(recorded)
        module.on_train_batch_end()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert [(r["step"], r["optim/step"], r.get("a"), r.get("b")) for r in rows] == [
        ("1", "1", "1.0", None),
        ("3", "3", None, "2.0"),
    ]


def test_where_a_run_s_files_go(tmp_path):
    board, table = TensorBoardLogger(tmp_path, "t"), CSVLogger(tmp_path, "c")
    other = SimpleNamespace(save_dir=tmp_path, name="w", version="abc")  # as W&B's
    nowhere = SimpleNamespace(save_dir=None, name=None, version=None)

    def folder(*loggers):
        strategy = SimpleNamespace(broadcast=lambda value: value)
        return run_folder(SimpleNamespace(loggers=list(loggers), strategy=strategy))

    assert folder(board, table) == tmp_path / "c" / "version_0"
    assert folder(board) == tmp_path / "t" / "version_0"
    assert folder(other) == tmp_path / "w" / "abc"
    assert folder(nowhere) is None
    assert folder() is None


def test_wrong_numbers_are_refused():
    with pytest.raises(InputError, match="alignment"):
        GradientAlignment(responses=0)
    with pytest.raises(InputError, match="bins: 1 would be the whole response"):
        GradientAlignment(bins=1)
    with pytest.raises(InputError, match=r"alignment\.sketch: 65536: give 0, or a prime .* 65537"):
        GradientAlignment(sketch=65536)
