"""What goes into the page of `prerl report`, by hand."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from report_runs import HOSTILE, cells, rows, sample, write_metrics, write_run

from prerl_lightning.report import background, compare, headline, payload, tables, words
from prerl_lightning.report.figures import families, figures, split_flat
from prerl_lightning.report.page import page, vega
from prerl_lightning.report.reading import read_run


def drawn(folders):
    groups = compare.group([read_run(folder) for folder in folders])
    runs = [run for group in groups for run in group.runs]
    return payload.payload(groups, figures(runs), families(runs))


def test_the_pages_numbers_are_the_files(tmp_path):
    folder = write_run(tmp_path / "a")
    data, left_out = drawn([folder])
    assert left_out == []
    run = read_run(folder)
    found = {}
    for table in data["runs"][0]["tables"]:
        for name, values in table["columns"].items():
            found[name] = {s: v for s, v in zip(table["step"], values, strict=True) if v is not None}
            assert table["samples"] == [256 * s for s in table["step"]]
            assert table["seconds"] == [2 * s + 3 if s else 0 for s in table["step"]]
    for name in ("val/avg@8", "val/avg@8/low", "reward/mean", "alignment/cosine", "thoughts/reflection_per_1k/wrong"):
        assert found[name] == {s: pytest.approx(v, rel=1e-4) for s, v in run.column(name).items()}
    not_drawn = {"optim/step", "life", "val/step", "time/since_start"}
    assert {c for row in run.training.values() for c in row} - not_drawn <= set(found)
    figure = data["figures"]["thoughts-reflection"]
    assert figure["views"]["training-per_1k-both"] == (
        ("right", "thoughts/reflection_per_1k/right"),
        ("wrong", "thoughts/reflection_per_1k/wrong"),
    )


def test_long_runs_are_thinned_evenly_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "POINTS_A_CURVE", 20)
    data, left_out = drawn([write_run(tmp_path / "a", steps=100), write_run(tmp_path / "b", steps=90)])
    for run, end in zip(data["runs"], (100, 90), strict=True):
        table = next(t for t in run["tables"] if "reward/mean" in t["columns"])
        assert table["step"] == list(dict.fromkeys([*range(1, end + 1, 5), end]))
    assert left_out == ["Of the longest curves every 5th point is drawn, and the last."]
    assert [payload.evenly(5, n) for n in (9, 5, 3, 2, 1, 0)] == [
        [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 4], [0, 4], [0], [],
    ]  # fmt: skip


def test_samples_are_thinned_by_whole_steps(tmp_path):
    runs = [read_run(write_run(tmp_path / name, steps=100, samples=3)) for name in "ab"]  # at 1, 20, 40, ... 100
    size = len(payload.to_json(payload._samples(runs, math.inf)[0]).encode())
    shown, (said,) = payload._samples(runs, 0.7 * size)
    assert {(one["run"], one["step"]) for one in shown} == {(r, s) for r in (0, 1) for s in (1, 40, 60, 100)}
    assert len(shown) == 2 * 4 * 3
    assert [one["prompt"] for one in shown[:3]] == [runs[0].samples[i]["prompt"] for i in range(3)]
    assert said == "24 of 36 samples are shown: those of 4 of 6 steps, evenly over each run."
    shown, (said,) = payload._samples(runs, 0.25 * size)
    assert sorted({one["step"] for one in shown}) == [1, 100]
    assert said == "8 of 36 samples are shown: at most 2 of a step, evenly over each run."
    assert payload._samples(runs, 0)[0] == []


def test_samples_get_the_room_that_curves_leave(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a", steps=20, samples=100)
    monkeypatch.setattr(payload, "SAMPLES", 1000)
    data, left_out = drawn([run])
    assert (len(data["samples"]), left_out) == (200, [])


def test_of_a_cut_response_all_thoughts_are_counted(tmp_path):
    folder = write_run(tmp_path / "a", steps=1)
    line = sample(1, 0, 10, "wait " * 3000) | {"thoughts": [[5 * i, 5 * i + 4, "reflection"] for i in range(3000)]}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(sample(1, 1, 10)) + "\n")
    data, _ = drawn([folder])
    long, short = data["samples"]
    assert (len(long["thoughts"]), long["counts"]) == (1600, {"reflection": 3000})  # 8,000 characters of 5 each
    assert short["counts"] is None
    assert short["objective"] == "NSR-PreRL"


def test_values_that_are_not_finite_are_counted(tmp_path):
    folder = write_run(tmp_path / "a", steps=3)
    write_metrics(folder, [{"optim/step": s, "optim/loss": math.nan if s == 2 else 0.5} for s in (1, 2, 3)])
    data, left_out = drawn([folder])
    assert left_out == ["Values that are not finite are left out: 1 of optim/loss."]
    assert data["runs"][0]["tables"][0]["columns"]["optim/loss"] == [0.5, None, 0.5]


def test_json_within_the_page_cannot_end_its_element():
    text = payload.to_json({"a": HOSTILE, "b": "\ud800"})
    assert "<" not in text
    assert json.loads(text)["a"] == HOSTILE
    assert json.loads(text)["b"] == "?"
    assert "</script" not in vega()


def test_tables_say_what_the_files_say(tmp_path):
    runs = [read_run(write_run(tmp_path / "a" / f"version_{seed}", seed=seed)) for seed in range(2)]
    (group,) = compare.group(runs)
    text = re.sub("<.*?>", "", " ".join(cells(tables.thought_table([group], ["transition", "reflection"]))))
    transition = "1.25\u00d7 (1.25 to 1.25) → 2.5\u00d7 (2.5 to 2.5)0.2 → 0.25 → 0.5 a response"
    assert text.startswith(f"{transition} 1.5\u00d7 (")  # 1 + 10/40 and 1 + 60/40; 1 + 20/40
    assert "0.360 to 0.370" in headline.overview([group])
    shares = cells(background.time_table([group]))
    assert shares[1] == "1.81"
    assert "0.9<small>49.7%</small>" in shares  # rollout
    assert shares[-2] == "0.08"  # alignment took 0.4 seconds in every fifth step
    # 60 steps of 1.76 and 0.05 seconds in 123 seconds: (123 - 108.6) / 60
    assert shares[-1] == "0.24<small>11.7% of the wall time</small>"


def test_the_thought_table_is_of_one_source_which_it_names(tmp_path):
    """Held-out ratios of transition alone; the training rows have more, and are not mixed in."""
    rows = [{"optim/step": 10, "thoughts/transition_ratio": 9.0, "thoughts/subgoal_ratio": 8.0}]
    runs = []
    for i in range(3):
        folder = write_run(tmp_path / "a" / f"version_{i}", steps=10, switch=0, seed=i)
        write_metrics(
            folder,
            [*rows, {"val/step": 10, "val/avg@8": 0.5} | ({"val/thoughts/transition_ratio": 2.0} if i == 1 else {})],
        )
        runs.append(read_run(folder))
    (group,) = compare.group(runs)
    html = tables.thought_table([group], ["transition", "subgoal"])
    assert cells(html) == ['<span title="step 10">2\u00d7 (1 of 3 runs)</span>']
    assert "Thoughts a held-out response" in html
    assert "as of subgoal" in html
    assert "metrics.csv: val/thoughts/transition_ratio<" in html
    for run in runs:
        write_metrics(run.folder, rows)
    (group,) = compare.group(read_run(run.folder) for run in runs)
    html = tables.thought_table([group], ["transition", "subgoal"])
    assert "Thoughts a training response" in html
    assert "metrics.csv: thoughts/transition_ratio, thoughts/subgoal_ratio<" in html
    assert re.findall(r">([\d.]+)\u00d7", html) == ["9", "8"]


def test_a_ratio_of_rare_thoughts_is_said_as_such(tmp_path):
    run = write_run(tmp_path / "a" / "version_0", steps=10, switch=0)
    values = {0: (0.05, 1.0, 0.22), 10: (0.34, 6.8, 0.64)}
    rows = [{"val/step": s, "val/thoughts/wait": n, "val/thoughts/wait_ratio": r, "val/avg@8": v} for s, (n, r, v) in
            values.items()]  # fmt: skip
    rare = {"val/thoughts/never": 0.001, "val/thoughts/never_ratio": 90.0}
    write_metrics(run, [{"optim/step": 10, "reward/mean": 0.5}, rows[0], rows[1] | rare])
    (group,) = compare.group([read_run(run)])
    assert cells(tables.thought_table([group], ["wait"])) == [
        '<span title="step 10">6.8\u00d7</span><small>0.05 → 0.34 a response</small>'
    ]
    thoughts = ("thoughts", "wait 0.05 -> 0.34 a response (x 6.8)")
    assert words.moved(group.runs[0]) == [("held out", "avg@8 0.22 -> 0.64"), thoughts]
    write_metrics(run, [{"optim/step": 1, "reward/mean": 0.5}, rows[0]])
    assert words.moved(read_run(run)) == []


def ratio_run(folder, seed, ratio, interval, start=2):
    """A run's validations at steps 0 and 10: ``wait`` in each of four problems' answers, so many times as often."""
    write_run(folder, steps=10, switch=0, seed=seed)
    ends = {f"val/thoughts/wait_ratio/{end}": value for end, value in zip(("low", "high"), interval, strict=False)}
    rows = [{"val/step": 0, "val/thoughts/wait": start, "val/thoughts/wait_ratio": 1.0}]
    rows.append({"val/step": 10, "val/thoughts/wait": start * ratio, "val/thoughts/wait_ratio": ratio} | ends)
    write_metrics(folder, [{"optim/step": 10, "reward/mean": 0.5}, *rows])
    four: dict[str, object] = {"k": 1, "rows": [0, 1, 2, 3], "score": [1] * 4, "right": [1] * 4}
    lines = [{"step": s, **four, "thoughts": {"wait": [n] * 4}} for s, n in ((0, start), (10, start * ratio))]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


@pytest.mark.parametrize(
    ("interval", "said"), [((1.259, 2.58), " [1.26, 2.58]"), ((0.94,), " [0.94, \u221e]"), ((), "")]
)
def test_the_interval_of_a_ratio_is_the_columns(tmp_path, interval, said):
    """And none beside it of the page's own."""
    (group,) = compare.group([ratio_run(tmp_path / "a", 0, 1.5, interval)])
    html = tables.thought_table([group], ["wait"])
    assert cells(html) == [f'<span title="step 10">1.5\u00d7{said}</span><small>2 → 3 a response</small>']
    assert "[ ]: one run&#x27;s 95 % interval over problems" in html
    assert ("val/thoughts/wait_ratio, of each /low and /high<" in html) == bool(interval)


def test_the_ratio_of_several_runs_has_their_range(tmp_path):
    """As their accuracy and the figure's band have; intervals over problems are of one run."""
    runs = [ratio_run(tmp_path / "a" / f"version_{i}", i, ratio, (1.0, 9.0)) for i, ratio in enumerate((1.5, 2.5))]
    (group,) = compare.group(runs)
    (cell,) = cells(tables.thought_table([group], ["wait"]))
    assert cell == '<span title="step 10">2\u00d7 (1.5 to 2.5)</span><small>2 → 4 a response</small>'


def test_alignment_by_life(tmp_path):
    folder = write_run(tmp_path / "a", steps=20)
    (group,) = compare.group([read_run(folder)])  # at steps 5 and 10, 15 and 20
    cosine = "0.9170.900 to 0.935"
    assert rows(tables.alignment_table([group])) == [
        ["a", "1, NSR-PreRL", cosine, "0 of 16"],
        ["a", "2, GRPO", cosine, "0 of 16"],
    ]
    lines = [{"step": 1, "cosine": c, "reward": 1, "inner_product": c} for c in (0.5, -0.1)]
    (folder / "alignment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = compare.group([read_run(folder)])  # as older versions wrote it
    assert rows(tables.alignment_table([group])) == [["a", "1", "0.200-0.100 to 0.500", "1 of 2"]]


def test_alignment_by_position_probability_and_length(tmp_path):
    """In order of position and of probability; a response's dot has its tokens."""
    folder = write_run(tmp_path / "a", steps=10)
    names = [f"position/{i}_of_4" for i in (1, 2, 3, 4)]
    names += [f"probability/{ends}" for ends in ("0_to_0.5", "0.5_to_0.9", "0.9_to_0.99", "0.99_to_1")]
    write_metrics(folder, [{"optim/step": 10} | {f"alignment/{n}": i / 10 for i, n in enumerate(reversed(names))}])
    run = read_run(folder)
    drawn = figures([run])
    found = {f.key: f for f in drawn}
    assert [c for _, c in found["cosine-position"].series] == [f"alignment/{n}" for n in names[:4]]
    assert [label for label, _ in found["cosine-position"].series][:2] == ["1 of 4", "2 of 4"]
    assert {c for _, c in found["cosine-probability"].series} == {f"alignment/{n}" for n in names[4:]}
    assert [label for label, _ in found["cosine-probability"].series] == [
        "0 to 0.5", "0.5 to 0.9", "0.9 to 0.99", "0.99 to 1",
    ]  # fmt: skip
    assert not [f.key for f in drawn if f.section == "other"]
    data, _ = payload.payload(compare.group([run]), drawn, [])
    assert data["runs"][0]["points"][0] == [5, 0.9, 0, 24]
    assert data["figures"]["cosine-length"]["kind"] == "lengths"


def test_a_part_of_responses_says_of_how_many_tokens_it_is(tmp_path):
    """One of three responses has a likely token, and it is the only one."""
    folder = write_run(tmp_path / "a", steps=10)
    columns = {"alignment/position/1_of_2": 0.3, "alignment/probability/0.9_to_0.99": 0.5}
    write_metrics(folder, [{"optim/step": 10, "reward/mean": 0.5} | columns])
    line = {"step": 10, "cosine": 0.4, "reward": 1, "position": {"1_of_2": {"tokens": 6, "cosine": 0.2}}}
    line["probability"] = {"0_to_0.5": {"tokens": 8, "cosine": 0.1}}
    likely = line | {"position": {"1_of_2": {"tokens": 7, "cosine": 0.5}}}
    likely["probability"] = {"0.9_to_0.99": {"tokens": 1, "cosine": 0.5}, "0_to_0.5": {"tokens": 5, "cosine": 0.3}}
    whole = {"step": 10, "cosine": 0.4, "reward": 1, "position": {"1_of_2": "odd"}, "probability": {}}
    (folder / "alignment.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (line, likely, line, whole)))
    run = read_run(folder)
    (group,) = compare.group([run])
    assert rows(tables.part_table([group])) == [
        ["a", "position", "1 of 2", "3 of 4", "6.3", "0.3000.200 to 0.500"],
        ["a", "probability", "0 to 0.5", "3 of 3", "7.0", "0.1670.100 to 0.300"],
        ["a", "probability", "0.9 to 0.99", "1 of 3", "1.0", "0.5000.500 to 0.500"],
    ]
    assert "alignment.jsonl: position, probability" in page([run])
    notes = {f.key: f.note for f in figures([run])}
    assert notes["cosine-probability"] == "p(y_t | x, y_<t); of how many tokens: the table below"
    assert tables.part_table([replace(group, runs=(replace(run, alignment=()),))]) == ""


def test_alignment_says_of_how_many_responses_it_is(tmp_path):
    notes = {f.key: f.note for f in figures([read_run(write_run(tmp_path / "a", steps=10))])}
    assert (
        notes["cosine"] == "mean over the 8 responses measured in a step; the line, 0.92, is of a write-up of the paper"
    )
    assert notes["cosine-policy"] == "of the 8 responses measured, weighted with r \u2212 mean"
    assert notes["marginal"] == "of some responses of a step"
    run = read_run(write_run(tmp_path / "b", steps=10, files=()))
    assert {f.key: f.note for f in figures([run])}["negative"] == "of the responses measured"
    known = replace(run, config={"alignment": {"likelihoods": 16}})
    assert {f.key: f.note for f in figures([known])}["marginal"] == "of 16 responses of a step"


def test_figures_that_would_be_flat_at_zero_are_one_line(tmp_path):
    run = read_run(write_run(tmp_path / "a", steps=3))
    drawn_, flat = split_flat(figures([run]), [run])
    assert [f.key for f in flat] == ["failures"]  # no timeouts, no errors
    assert "failures" not in {f.key for f in drawn_}
    html = page([run])
    assert re.search(r"Zero throughout: <span[^>]*reward/timeouts, reward/errors[^>]*>Verifications that failed", html)
    assert 'data-figure="failures"' not in html


def test_runs_of_a_group_that_end_at_different_steps_are_pointed_out(tmp_path):
    folders = [write_run(tmp_path / "a" / f"version_{s}", seed=s, steps=60) for s in range(2)]
    write_metrics(folders[1], [{"optim/step": 1, "reward/mean": 0.5}])
    (group,) = compare.group(map(read_run, folders))
    assert "beyond step 1 its means are over fewer runs" in headline.states([group], 0)


def test_very_many_runs_lose_figures_and_not_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "CURVES", 60_000)
    data, (said, *_) = drawn([write_run(tmp_path / f"a{i}", steps=40, files=("config.yaml",)) for i in range(4)])
    assert said == "There are so many runs that the figures of these parts are left out: other, time."
    assert len(json.dumps(data["runs"])) < 120_000
    names = {name for table in data["runs"][0]["tables"] for name in table["columns"]}
    assert {"reward/mean", "alignment/cosine"} <= names
    assert "time/rollout" not in names


def test_the_commands_start_without_torch():
    code = "import sys, prerl_lightning.report.page, prerl_lightning.report.watch; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_headline_without_run_json_or_config(tmp_path):
    (group,) = compare.group([read_run(write_run(tmp_path / "mine", steps=1, files=()))])
    assert "The model unknown model was trained with life 1 for 1 step." in headline.lead([group], group)
    assert "0.360" in headline.tiles(group)
