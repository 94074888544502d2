"""Runs side by side, and what is said of them, by hand."""

import io
import math
import re

import pytest
from report_runs import cells, curve_run, rows, write_metrics, write_run
from rich.console import Console

from prerl_lightning.report import compare, headline, tables, words
from prerl_lightning.report.frame import frame
from prerl_lightning.report.reading import read_run


def test_steps_to_a_share_of_a_gain_lie_between_evaluated_steps():
    curve = {0: 0.1, 10: 0.3, 20: 0.2, 30: 0.5}
    assert compare.target(curve, 0.5) == pytest.approx(0.3)
    assert [compare.steps_to(curve, t) for t in (0.1, 0.2, 0.3, 0.35, 0.6)] == [0, 5, 10, 25, None]
    assert compare.target({0: 0.3, 10: 0.2}, 0.5) is None
    assert compare.target({}, 0.5) is None
    assert compare.mean_curve([{1: 0.2, 2: 0.4}, {1: 0.4}]) == {1: pytest.approx(0.3), 2: 0.4}


def test_runs_that_differ_in_seeds_alone_are_one_group(tmp_path):
    folders = [write_run(tmp_path / "a" / f"version_{s}", steps=2, seed=s) for s in range(3)]
    folders.append(write_run(tmp_path / "a" / "version_3", steps=2, lr=3.0000000000000004e-05))
    folders += [write_run(tmp_path / "b" / f"version_{s}", steps=2, files=()) for s in range(2)]
    groups = compare.group([read_run(folder) for folder in folders])
    assert [(g.name, len(g.runs)) for g in groups] == [
        ("a (lr 5e-05)", 3),
        ("a (lr 3e-05)", 1),
        ("b version_0", 1),
        ("b version_1", 1),
    ]
    assert compare.diff([g.settings for g in groups[:2]]) == [("model.lr", ["5e-05", "3.0000000000000004e-05"])]


def test_configurations_are_told_apart_key_by_key():
    callback = {"class_path": "prerl_lightning.callbacks.PolicyReincarnation", "init_args": {"at_step": 10}}
    config = {
        "trainer": {"callbacks": [callback, callback], "devices": [0, 1]},
        "model": {"class_path": "mine.GRPO", "init_args": {"lr": 1.0, "inner": {"class_path": "torch.optim.AdamW"}}},
    }
    assert compare.flatten(config) == {
        "trainer.callbacks": "PolicyReincarnation, PolicyReincarnation",
        "trainer.callbacks.PolicyReincarnation.at_step": "10",
        "trainer.callbacks.PolicyReincarnation#2.at_step": "10",
        "trainer.devices": "[0, 1]",
        "model": "mine.GRPO",
        "model.lr": "1.0",
        "model.inner": "AdamW",
    }
    key = "trainer.callbacks.PolicyReincarnation.successor.clip"
    assert compare.inherited(key, [{key: "0.2", "model.clip": "0.2"}, {"model.clip": "0.2"}])
    assert not compare.inherited(key, [{key: "0.3", "model.clip": "0.2"}, {"model.clip": "0.2"}])
    assert not compare.inherited(key, [{key: "0.2", "model.clip": "0.2"}] * 2)


def settings(tmp_path, **curves: dict[int, dict[int, float]]) -> list[compare.Group]:
    """A setting for each name: seed to held-out accuracy; a step of the first takes 2 seconds, of others 1."""
    for i, (name, seeds) in enumerate(curves.items()):
        for seed, curve in seeds.items():
            curve_run(tmp_path / name / f"version_{seed}", 10 * i, seed, curve, 1.0 if i else 2.0)
    return [
        compare.Group(name, tuple(read_run(tmp_path / name / f"version_{s}") for s in seeds), {})
        for name, seeds in curves.items()
    ]


def headlined(groups: list[compare.Group]) -> str:
    return re.sub("<.*?>", "", headline.lead(groups, compare.baseline(groups)))


GRPO = {0: 0.2, 10: 0.4, 20: 0.5, 30: 0.6}


def test_one_lucky_seed_against_three_is_compared_with_its_own_seed(tmp_path):
    """The baseline's mean, of three seeds, ends at 0.63; its seed 0 is ahead of the other setting all the way."""
    grpo = {0: {0: 0.24, 10: 0.45, 20: 0.57, 40: 0.66, 50: 0.67, 60: 0.68},
            1: {0: 0.21, 10: 0.39, 20: 0.53, 40: 0.58, 50: 0.59, 60: 0.60},
            2: {0: 0.22, 10: 0.38, 20: 0.52, 40: 0.59, 50: 0.60, 60: 0.61}}  # fmt: skip
    groups = settings(tmp_path, grpo=grpo, psr={0: {0: 0.24, 10: 0.36, 20: 0.52, 40: 0.61, 50: 0.64, 60: 0.65}})
    assert [s.order for s in compare.sooner(*groups)] == [-1, -1, -1]
    said = headlined(groups)
    assert "To 50, 80 and 95 % of grpo's gain in held-out accuracy (0.223 to 0.630) psr is later: 0.63" in said
    assert said.endswith("over 1 pair of seeds, which tells little. It ends 0.03 below grpo.")
    assert not re.search(r"1\.[0-9]+\u00d7", said)


def test_steps_to_accuracy_by_hand(tmp_path):
    """Targets 0.4, 0.52 and 0.58; seed 0 has them at half the baseline's steps, seed 1 at the same and the last never;
    seed 7 has no partner."""
    half = {s // 2: v for s, v in GRPO.items()}
    short = {0: 0.2, 10: 0.4, 20: 0.5, 30: 0.57}
    grpo, dsrl = settings(tmp_path, grpo={0: GRPO, 1: GRPO}, dsrl={0: half, 1: short, 7: half})
    found = compare.sooner(grpo, dsrl)
    assert [s.target for s in found] == [pytest.approx(t) for t in (0.4, 0.52, 0.58)]
    assert [s.seeds for s in found] == [(0, 1)] * 3
    first, _, last = found
    assert (first.pairs[0].baseline, first.pairs[0].group, first.ratios) == (10, 5, [2, 1])
    assert first.mean == pytest.approx(2**0.5)
    assert first.pairs[0].seconds == 4  # 10 steps of 2 seconds over 5 of 1
    assert (last.pairs[1].group, last.ratios) == (None, [pytest.approx(2)])
    assert [[p.order for p in s.pairs] for s in found] == [[1, 0], [1, -1], [1, -1]]
    html = tables.ratio_table([grpo, dsrl], grpo)
    first_row = ["10.0", "7.5", "1.41\u00d7 (1.00 to 2.00)", "2.83\u00d7", "seed 0, 1", "undecided"]
    assert rows(html)[0] == ["dsrl", "50 %: 0.400", *first_row]
    assert rows(html)[2][2:5] == ["28.0", "14.0", "2.00\u00d7 (never in 1 of 2)"]
    assert "dsrl is undecided: 1.41\u00d7 (1.00 to 2.00), " in headlined([grpo, dsrl])


def test_sooner_at_some_shares_is_called_so_at_those(tmp_path):
    groups = settings(tmp_path, grpo={3: GRPO}, dsrl={3: {0: 0.2, 10: 0.45, 20: 0.5, 30: 0.55}})
    assert "dsrl is sooner at 50 %, later at 80 and 95 %: 1.25\u00d7, 0.92\u00d7, never" in headlined(groups)


def test_without_a_common_seed_nothing_is_called_sooner(tmp_path):
    groups = settings(tmp_path, grpo={0: GRPO}, dsrl={1: {0: 0.2, 10: 0.6}})
    assert "dsrl has no seed in common with grpo and is called neither sooner nor later" in headlined(groups)
    row = rows(tables.ratio_table(groups, groups[0]))[0]
    assert row[4:] == ["2.00\u00d7", "4.00\u00d7", "none: mean curves", "\u2013"]


def test_a_run_that_ended_before_tells_nothing(tmp_path):
    """It has not reached the target in 5 steps, the other only after 10."""
    grpo, dsrl = settings(tmp_path, grpo={0: GRPO}, dsrl={0: {0: 0.2, 5: 0.2}})
    assert [s.order for s in compare.sooner(grpo, dsrl)] == [0, 0, 0]
    assert compare.sooner(dsrl, grpo) == []  # that never gains anything


def test_of_many_settings_the_soonest_are_named(tmp_path):
    faster = {f"a{i}": {0: {round(s / f): v for s, v in GRPO.items()}} for i, f in enumerate((2, 0.5, 5, 10, 1, 1.1))}
    said = headlined(settings(tmp_path, base={0: GRPO}, **faster))
    assert "4 of 6 settings are sooner, 1 later; soonest a3 (10.00\u00d7), a2 (5.00\u00d7), a0 (2.00\u00d7)." in said
    assert said.endswith("Baseline: base, GRPO throughout.")


def shown(run) -> str:
    """Its picture in the terminal."""
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(frame(run, 140, 60))
    return console.export_text()


def fallen(folder, seed: int, ends: dict[int, tuple[float, float]], **options) -> compare.Run:
    """A run with these values of held-out accuracy and half their intervals' widths."""
    write_run(folder, seed=seed, steps=max(ends), **options)
    rows = [
        {"val/step": s, "val/avg@8": v, "val/avg@8/low": v - h, "val/avg@8/high": v + h} for s, (v, h) in ends.items()
    ]
    write_metrics(folder, [*rows, *({"optim/step": s, "reward/mean": 0.1} for s in range(1, max(ends) + 1))])
    return read_run(folder)


def test_a_fall_is_headlined(tmp_path):
    """Where the last interval lies below the best one; with it what health.py warned of, and both in the terminal."""
    falls = {0: (0.22, 0.05), 10: (0.27, 0.05), 20: (0.03, 0.02)}
    warning = "Step 20: held-out avg@8 is 0.03, and was 0.22 at the start."
    bad = fallen(tmp_path / "nsr" / "version_0", 0, falls, warnings=[warning])
    (group,) = compare.group([bad])
    sentence = "held-out avg@8 fell from 0.270 [0.220, 0.320] at step 10 to 0.030 [0.010, 0.050] at step 20"
    assert f"nsr: {sentence}." in headlined([group])
    assert f"warned: {warning}" in headline.states([group], 0)
    assert sentence in shown(bad)
    assert warning in shown(bad)
    milder = fallen(tmp_path / "nsr" / "version_1", 1, falls | {20: (0.1, 0.02)})
    well = fallen(tmp_path / "nsr" / "version_2", 2, {0: (0.22, 0.05), 10: (0.5, 0.05), 20: (0.45, 0.05)})
    group = compare.Group("nsr", (milder, well, bad), {})
    assert f"{sentence}, in 2 of 3 runs, here the worst." in headlined([group])
    assert "fell" not in headlined([compare.Group("x", (well,), {})])
    assert "fell" not in shown(well)
    html = headline.states([compare.Group("x", (bad,) * 7, {})], 0)
    assert "<summary>7 runs: 7 finished; 7 with warnings</summary>" in html


def test_a_group_is_described_by_its_longest_run(tmp_path):
    """Of three seeds the first failed at step 8, before the reincarnation."""
    folders = [write_run(tmp_path / "dsrl" / "version_0", steps=8, status="failed", error="no")]
    folders += [write_run(tmp_path / "dsrl" / f"version_{s}", seed=s, steps=60) for s in (1, 2)]
    group = compare.Group("dsrl", tuple(map(read_run, folders)), {})
    assert group.longest.folder == folders[1]
    lead = headline.lead([group], group)
    assert "with NSR-PreRL for 10 steps and then, reincarnated, with GRPO for 50 steps" in lead
    assert "60 steps and 15,360 responses each took 2 min 3 s on Testium, 2 cores, 23.4 GiB (2 of 3 runs)." in lead
    text = re.sub("<.*?>", "", " ".join(cells(tables.thought_table([group], ["transition"]))))
    some = "; 2 of 3 runs"
    assert text.startswith(f"1.25\u00d7 (1.25 to 1.25{some}) → 2.5\u00d7 (2.5 to 2.5{some})0.2 → 0.25 → 0.5 a response")
    assert "NSR-PreRL → GRPO" in headline.overview([group])
    failed = write_run(tmp_path / "x" / "version_0", steps=3, switch=0)
    late = write_run(tmp_path / "x" / "version_1", steps=60)
    mixed = compare.Group("x", (read_run(failed), read_run(late)), {})
    assert compare.baseline([group, mixed]) is group  # its longest run is no GRPO throughout


def test_a_run_that_did_not_finish_is_no_part_of_what_a_setting_takes(tmp_path):
    """It died in its first step, or its fifth; nor is its last accuracy beside a finished run's. Where none finished,
    those count that began."""
    died = write_run(tmp_path / "t1" / "version_0", steps=20, status="failed", error="no")
    write_metrics(died, [{"val/step": 0, "val/avg@8": 0.2}])
    late = write_run(tmp_path / "t1" / "version_1", steps=5, status="interrupted")
    done = write_run(tmp_path / "t1" / "version_2", steps=20, stopped="accuracy")
    beside = write_run(tmp_path / "t2" / "version_0", steps=20)
    died, late, done, beside = map(read_run, (died, late, done, beside))
    two, other = compare.Group("t1", (died, done), {}), compare.Group("t2", (beside,), {})
    taken = (20, 20 * 256, 2.0 * 20 + 3)
    assert (
        words.totals(two) == words.totals(compare.Group("t1", (died, late, done), {})) == words.totals(other) == taken
    )
    html = headline.overview([two, other])
    assert [row[-2:] for row in rows(html)] == [["5,1201 of 2 runs", "43 s1 of 2 runs"], ["5,120", "43 s"]]
    assert "of the runs that finished; where none did, of those with a step" in html
    assert "of the runs that finished" not in headline.overview([compare.Group("t1", (done,), {}), other])
    assert headline.tiles(two).count("; 1 of 2 runs") == 2
    assert words.totals(compare.Group("t1", (died, late), {})) == (5, 5 * 256, 2.0 * 5 + 3)
    assert words.totals(compare.Group("t1", (died,), {})) == (0, 0, 0)
    assert compare.last_differences(other, two) == [0.0]


def test_first_and_last_are_of_one_step(tmp_path):
    folders = [write_run(tmp_path / f"version_{s}", seed=s, steps=(10, 30, 60)[s]) for s in range(3)]
    for folder, values in zip(folders, ({0: 0.1, 10: 0.9}, {0: 0.2, 30: 0.5}, {0: 0.3, 60: 0.6}), strict=True):
        write_metrics(folder, [{"val/step": s, "val/avg@8": v, "val/avg@8/low": v - 0.1, "val/avg@8/high": v + 0.1}
                               for s, v in values.items()])  # fmt: skip
    group = compare.Group("a", tuple(map(read_run, folders)), {})
    assert words.ends(group, "val/avg@8") == [(0, [0.1, 0.2, 0.3]), (60, [0.6])]
    assert words.around(group, "val/avg@8", 0, [0.1, 0.2, 0.3]) == "(0.100 to 0.300)"
    assert words.around(group, "val/avg@8", 60, [0.6]) == "[0.500, 0.700] (1 of 3 runs)"
    assert words.around(group, "val/avg@8", 10, [0.2, 0.4]) == "(0.200 to 0.400; 2 of 3 runs)"
    assert "0.200 → 0.600" in headline.overview([group])


def test_words():
    assert [words.duration(s) for s in (3.21, 59, 65, 3700, 200000)] == [
        "3.2 s",
        "59 s",
        "1 min 5 s",
        "1 h 2 min",
        "2 d 7 h",
    ]
    assert [words.count(n) for n in (512, 857344, 4.02e9)] == ["512", "0.857 M", "4.02 B"]
    assert [words.figure(v) for v in (0.36328, 1e-8, 24.5, 15360.0, math.nan)] == [
        "0.363", "1.00e-08", "24.500", "15,360", "\u2013",
    ]  # fmt: skip
