"""docs/guides/watching.md: it explains every field of the files that a run leaves, and its watcher watches."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from prerl_lightning import Watcher
from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.samples import Samples
from prerl_lightning.metrics.alignment import Part, Products, ResponseAlignment
from prerl_lightning.metrics.thoughts import ThoughtFinder, load_families

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "watching.md").read_text(encoding="utf-8")
TRAINER = SimpleNamespace(global_step=1)
MODULE = SimpleNamespace(acting=SimpleNamespace(life=1, title="GRPO"))


def described(file):
    """The fields in the first column of the file's table."""
    _, found, text = GUIDE.partition(f"\n`{file}`, a line for each")
    assert found
    rows = re.search(r"\n\| field .*\n\| ---.*\n((?:\|.*\n)+)", text)[1].splitlines()
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]


def test_every_field_of_alignment_jsonl_is_explained(make_rollout):
    products = Products(*torch.ones(3, 5, dtype=torch.float64))
    part = {"1_of_2": Part(3, products)}
    found = ResponseAlignment(0, products, -1.0, -2.0, part, part)
    row = GradientAlignment()._row(TRAINER, MODULE, make_rollout(), found, 0.5, 0)
    assert described("alignment.jsonl") != []
    assert sorted(described("alignment.jsonl")) == sorted(row)


def test_every_field_of_samples_jsonl_is_explained(make_rollout):
    samples, rollout = Samples(), make_rollout()
    samples.finder = ThoughtFinder(load_families())
    row = samples._row(TRAINER, MODULE, "best", rollout.prompts[0], rollout.responses[0], 1.0)
    assert sorted(described("samples.jsonl")) == sorted(row)


def test_the_guides_watcher_watches(make_rollout):
    (code,) = re.findall(r"```python\n(# my_watchers.py.*?)```", GUIDE, re.S)
    names = {}
    exec(code, names)
    watcher = names["Equations"](every_n_steps=10)
    assert isinstance(watcher, Watcher)
    rollout = make_rollout(n_prompts=1, group_size=4)
    rollout = replace(rollout, texts=("1+1=2", "a=b=c", "", "="))
    due = SimpleNamespace(rollout=rollout, whole_rollout=rollout, due=lambda every: every == 10)
    assert watcher.watch(TRAINER, due) == {"mine/equations": 1.0, "mine/longest": float(rollout.lengths.max())}
    assert watcher.watch(TRAINER, SimpleNamespace(due=lambda every: False)) == {}
