"""SEAL's rule on responses labelled by hand, and through the report."""

import re
from html import unescape

import pytest
from report_runs import write_metrics, write_run

from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.seal import SealLabels
from prerl_lightning.metrics.thoughts import ThoughtFinder, load_families
from prerl_lightning.report import compare, payload, tables
from prerl_lightning.report.figures import by_rule, families, figures
from prerl_lightning.report.page import page
from prerl_lightning.report.reading import read_run

R, T, X = range(3)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("We add 2 and 3.\n\nWait, 2 is even.\n\nAlternatively, factor it.", [X, R, T]),
        ("We wait.\nWait: one line break cuts nothing.", [X]),
        ("x\n \t\n\n\nwait", [X, R]),
        ("x\n \nwait", [X]),  # a line of spaces is not blank to SEAL
        ("\n\n  WAITING for it\n\n\n", [R]),  # begins so, whatever follows
        ("Alternatively, let me check the other case.", [R]),  # reflection is tested first
        ("wait, another way: think differently", [R]),
        ("There is another  way.", [X]),
        ("Try another approach\n\nanother method\n\nAnother Solution\n\nanother strategy, another technique", [T] * 4),
        ("This is another way.\n\nWe think differently.\n\nnot alternatively", [T, T, X]),
        ("It\u2019s correct.\n\nThat's incorrect\n\nis correct", [R, R, X]),
        ("To verify\n\nverifying\n\nverified\n\nmake sure\n\nhold on\n\nthink again\n\nthat seems right",
         [R, R, X, R, R, R, R]),
        ("", []),
        (" \n\n ", []),
    ],
)  # fmt: skip
def test_pieces_are_labelled_as_by_hand(text, labels):
    rule = SealLabels()
    assert rule.labels(text) == labels
    assert rule.counts(text) == [labels.count(i) for i in range(3)]
    assert rule.families == ("seal/reflection", "seal/transition", "seal/execution")


def test_families_as_they_are_count_the_demo_s_own_tokens(tmp_path):
    answer = "3,5,7>26;3*5=15+7=22;wait 3*7=21+5=26;so#3*7+5"
    found = load_families({"transition": ["wait"], "conclusion": ["so"]})
    assert ThoughtFinder(found).counts(answer) == [1, 1]
    path = tmp_path / "families.yaml"
    path.write_text("transition: [wait]\nconclusion: [so]\n")
    assert load_families(path) == found == Thoughts(found).families
    for wrong in ({}, {"a": []}, {"a b": ["x"]}, {"a": ["*"]}, {"a": ["x"], "b": ["X"]}):
        with pytest.raises(InputError, match=r"thoughts\.families"):
            load_families(wrong)
    with pytest.raises(InputError, match=r"thoughts\.rule: 'SEAL'; give seal, or phrases"):
        Thoughts(rule="SEAL")


def seal_run(folder):
    """1.5 reflections of 0.3, with an interval that is open above for transitions."""
    rows = [{"optim/step": 10, "reward/mean": 0.5, "time/since_start": 9.0}]
    for step, by in ((0, 1.0), (10, 5.0)):
        row = {"val/step": step, "val/avg@8": 0.5}
        for name, start in (("reflection", 0.2), ("seal/reflection", 0.3), ("seal/transition", 0.05)):
            key = f"val/thoughts/{name}"
            row |= {key: start * by, f"{key}/right": start * by, f"{key}_ratio": by, f"{key}_ratio/low": by / 2}
            row |= {f"{key}_ratio/high": by * 2} if name != "seal/transition" else {}
        rows.append(row | {"val/thoughts/seal/execution": 4.0, "val/thoughts/seal/execution_ratio": 1.0})
    write_run(folder, steps=10, switch=0)
    write_metrics(folder, rows)
    return read_run(folder)


def test_the_report_tells_the_rules_apart(tmp_path):
    run = seal_run(tmp_path / "a" / "version_0")
    names = families([run])
    phrases, seal = by_rule(names)
    assert seal == ["seal/execution", "seal/reflection", "seal/transition"]
    assert "reflection" in phrases
    (group,) = compare.group([run])
    table = tables.thought_table([group], seal)
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", table)]
    assert cells == [
        "1\u00d74 \u2192 4 a response",
        "5\u00d7 [2.5, 10]0.3 \u2192 1.5 a response",
        "5\u00d7 [2.5, \u221e]0.05 \u2192 0.25 a response",
    ]
    assert "Pieces by SEAL's label a held-out response" in unescape(table)
    own = tables.thought_table([group], phrases)
    assert "5\u00d7" in own
    assert "0.2 \u2192 1 a response" in own
    assert "SEAL" not in own
    drawn = {f.key: f for f in figures([run])}
    assert drawn["thoughts-seal-reflection"].title == "SEAL: reflection"
    assert drawn["thoughts-reflection"].title == "reflection"
    assert "held-out-ratio-all" in drawn["thoughts-seal-transition"].views
    assert not [f.key for f in drawn.values() if f.section == "other"]
    data, _ = payload.payload([group], list(drawn.values()), phrases)
    columns = {name for one in data["runs"][0]["tables"] for name in one["columns"]}
    assert {"val/thoughts/seal/reflection_ratio/low", "val/thoughts/seal/reflection_ratio/high"} <= columns
    assert not [name for name in data["families"] if "seal" in name]  # the browser of samples marks phrases
    html = unescape(page([run]))
    assert html.count('class="caption">Thoughts a held-out') == html.count('class="caption">Pieces by SEAL') == 1
