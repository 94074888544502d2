"""Policy reincarnation on a single device, ddp and fsdp2 with 2 CPU processes: real engines, real checkpoints.

Also the equality of 1 rank and 2, and of ddp and fsdp2: all use the same seeds by position in the global batch.
"""

import csv
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Forked, finish_together

from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, NSRPreRL

STRATEGIES = {"auto": 1, "ddp": 2, "fsdp2": 2}


class Runs:
    """Called with a strategy it gives the folder with its runs. Those of two ranks go on with a run of one rank's; the
    process of one rank waits for `end`, to go on with theirs."""

    def __init__(self, made, model: str) -> None:
        self.made, self.model = made, model
        self.folders: dict[str, Path] = {}
        self.processes: dict[str, list[Forked]] = {}

    def __call__(self, strategy: str) -> Path:
        if strategy not in self.folders:
            if strategy != "auto":
                self("auto")
            out = self.folders[strategy] = self.made.mktemp(strategy, numbered=False)
            worker = Path(__file__).with_name("lives_worker.py")
            processes = [Forked([worker, out, self.model, strategy], env=env) for env in self._ranks(strategy)]
            self.processes[strategy] = processes
            while strategy == "auto" and not (out / "done_0").exists():
                assert processes[0].poll() is None, processes[0].said()[-3000:]
                time.sleep(0.1)
            if strategy != "auto":
                self.end(strategy, ["auto"])
        return self.folders[strategy]

    def _ranks(self, strategy: str) -> list[dict[str, str]]:
        """Their variables."""
        n = STRATEGIES[strategy]
        if n == 1:
            return [{**os.environ}]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": 1, "TORCHELASTIC_RUN_ID": "test"}
        ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
        return [{**os.environ, **{k: str(v) for k, v in rank.items()}} for rank in ranks]

    def end(self, strategy: str, others=()) -> None:
        """Behind the runs of its own and those that go on with a run of each of the others."""
        folders = "".join(f"{self(other)}\n" for other in others)
        new = self.folders[strategy] / "others.new"
        new.write_text(folders)
        new.rename(self.folders[strategy] / "others")
        finish_together(self.processes.pop(strategy), 600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    made = Runs(tmp_path_factory, model_folder("llama-tied"))
    yield made
    if "auto" in made.processes:
        made.end("auto")


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.flatten() for t in torch.load(folder / "weights.pt").values()]).double()


def start(folder: Path) -> torch.Tensor:
    from prerl_lightning.policy.model import Policy

    return torch.cat([t.flatten() for _, t in Policy.from_pretrained(str(folder)).named_weights()]).double()


def distance(a, b, origin):
    """Relative to how far training went."""
    return float((a - b).norm() / (b - origin).norm())


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestLives:
    def test_resumed_in_either_life_equals_uninterrupted(self, runs, model_folder, strategy):
        out, origin = runs(strategy), start(model_folder("llama-tied"))
        whole = weights(out / "whole")
        assert float((whole - origin).norm()) > 1e-3
        for step in (1, 2, 3):
            assert distance(weights(out / f"resumed_{step}"), whole, origin) < 1e-5, step
        assert distance(weights(out / "kl_resumed"), weights(out / "kl"), origin) < 1e-5

    def test_equals_two_separate_runs(self, runs, model_folder, strategy):
        out, origin = runs(strategy), start(model_folder("llama-tied"))
        assert distance(weights(out / "sequential"), weights(out / "whole"), origin) < 1e-5

    def test_what_is_told_apart(self, runs, model_folder, strategy):
        """The comparisons above would see a lost optimizer state, or a lost reference."""
        out, origin = runs(strategy), start(model_folder("llama-tied"))
        assert distance(weights(out / "reset"), weights(out / "whole"), origin) > 1e-2
        assert distance(weights(out / "kl"), weights(out / "whole"), origin) > 1e-4

    def test_the_gradient_does_not_depend_on_ranks(self, runs, model_folder, strategy):
        """One process with whole micro-batches against two with one response each, unequal work between them."""
        origin = start(model_folder("llama-tied"))
        assert distance(weights(runs(strategy) / "gradient"), weights(runs("auto") / "gradient"), origin) < 1e-5

    def test_same_as_one_process(self, runs, model_folder, strategy):
        origin = start(model_folder("llama-tied"))
        assert distance(weights(runs(strategy) / "whole"), weights(runs("auto") / "whole"), origin) < 1e-3
        columns = ("reward/mean", "val/avg@2", "val/pass@2", "val/greedy", "rollout/contributing", "optim/loss")
        for name in columns:
            found, expected = (_column(runs(s) / "whole" / "metrics.csv", name) for s in (strategy, "auto"))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name

    def test_the_log_goes_on_in_one_series(self, runs, strategy):
        file = runs(strategy) / "whole" / "metrics.csv"
        assert _column(file, "life") == [1, 1, 2, 2]
        assert _column(file, "optim/lr") == pytest.approx([1e-3, 1e-3, 2e-3, 2e-3])
        assert [int(x) for x in _column(runs(strategy) / "resumed_2" / "metrics.csv", "step")] == [3, 4, 4]

    def test_no_validation_is_lost(self, runs, strategy):
        """Of the last step, and of one whose checkpoint was written before it."""
        out = runs(strategy)
        steps, odd = (_column(out / "odd" / "metrics.csv", name) for name in ("val/step", "val/length"))
        assert steps == [0, 2, 3]
        for first, validated in ((2, [2, 3]), (3, [3])):
            found = out / f"owed_{first}"
            assert _column(found / "metrics.csv", "val/step") == validated
            assert _column(found / "metrics.csv", "val/length") == pytest.approx(odd[-len(validated) :], rel=1e-3)
            assert json.loads((found / "run.json").read_text())["status"] == "finished"
            assert (found / "model" / "model.safetensors").is_file()
        best = torch.load(out / "odd" / "checkpoints" / f"step={2 if odd[1] >= odd[2] else 3}.ckpt", weights_only=False)
        assert best["validation"] == {"step": best["global_step"], "due": False}

    def test_engine_and_trainer_agree(self, runs, strategy):
        differences = _column(runs(strategy) / "whole" / "metrics.csv", "mismatch/log_prob_difference")
        assert len(differences) == 4
        assert max(differences) < 1e-4

    def test_a_ruined_policy_ends_all_ranks_together(self, runs, strategy):
        folder = runs(strategy) / "ruined"
        for rank in range(STRATEGIES[strategy]):
            assert "the policy's weights are not finite any more" in (folder / f"error_{rank}").read_text()
        assert json.loads((folder / "run.json").read_text())["status"] == "failed"
        assert len((folder / "ruin.jsonl").read_text().splitlines()) == 12  # of all ranks
        assert not (folder / "model").exists()
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 1

    def test_watching_changes_nothing(self, runs, strategy):
        out = runs(strategy)
        watched, whole = (torch.load(out / name / "weights.pt") for name in ("watched", "whole"))
        assert all(torch.equal(watched[name], whole[name]) for name in whole)

    def test_what_is_watched_does_not_depend_on_ranks(self, runs, model_folder, strategy):
        files = [runs(s) / "watched" / "metrics.csv" for s in (strategy, "auto")]
        for name in (
            *("thoughts/equals", "thoughts/plus_per_1k/wrong", "thoughts/equals_ratio", "val/thoughts/equals_ratio"),
            *("val/thoughts/equals_ratio/low", "val/thoughts/equals_ratio/high", "val/thoughts/seal/execution_ratio"),
            *("alignment/position/1_of_2", "alignment/position/2_of_2"),
            *("rollout/entropy", "rollout/repetition", "rollout/pass@2", "rollout/response_length/right"),
            *("rollout/marginal_log_prob/right", "rollout/marginal_log_prob/wrong"),
            *("weights/change", "alignment/cosine", "alignment/policy_gradient/cosine", "alignment/layers/first"),
        ):
            found, expected = (_column(file, name) for file in files)
            assert len(expected) >= 3, name
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), name
        found, expected = (_lines(file.with_name("alignment.jsonl")) for file in files)
        assert [(r["step"], r["life"], r["tokens"]) for r in found] == [
            (r["step"], r["life"], r["tokens"]) for r in expected
        ]
        assert [r["cosine"] for r in found] == pytest.approx([r["cosine"] for r in expected], abs=2e-3)
        sketched = _column(runs(strategy) / "sketched" / "metrics.csv", "alignment/cosine")
        assert sketched == pytest.approx(_column(files[1], "alignment/cosine")[:1], abs=0.05)

    def test_what_is_watched_goes_on_after_a_resume(self, runs, model_folder, strategy):
        folders = [runs(strategy) / name for name in ("watched", "watched_resumed")]
        ratio = "val/thoughts/equals_ratio"
        for name in ("weights/change", "thoughts/equals_ratio", ratio, f"{ratio}/low"):
            whole, resumed = (_column(folder / "metrics.csv", name) for folder in folders)
            assert resumed == pytest.approx(whole[-1:], rel=1e-3), name
        earlier, again = ([r for r in _lines(f / "samples.jsonl") if r["kind"] == "held_out"] for f in folders)
        assert again[-1]["previous"] is not None
        assert again[-1]["previous"] == earlier[-1]["previous"]
        whole = _column(folders[0] / "metrics.csv", "weights/change")
        assert len(whole) == 4
        assert whole[2] < whole[1]  # a new life began
        moved = weights(runs(strategy) / "life_1") - start(model_folder("llama-tied"))
        assert whole[1] == pytest.approx(float(moved.norm()), rel=0.02)

    def test_samples_and_record(self, runs, strategy):
        folder = runs(strategy) / "watched"
        rows = _lines(folder / "samples.jsonl")
        held_out = [r for r in rows if r["kind"] == "held_out"]
        assert [r["step"] for r in held_out] == [0, 0, 2, 2, 4, 4]
        one_rank = _lines(runs("auto") / "watched" / "samples.jsonl")
        key = ("step", "row", "response", "previous")
        assert [[r[k] for k in key] for r in held_out] == [
            [r[k] for k in key] for r in one_rank if r["kind"] == "held_out"
        ]
        for kind in ("best", "worst"):
            found, expected = ([r["reward"] for r in some if r["kind"] == kind] for some in (rows, one_rank))
            assert found == expected
        assert held_out[2]["previous"] == {k: held_out[0][k] for k in ("step", "response", "reward")}
        best, worst = ([r for r in rows if r["kind"] == kind] for kind in ("best", "worst"))
        assert [r["step"] for r in best] == [r["step"] for r in worst] == [1, 2, 3, 4]
        assert all(b["reward"] >= w["reward"] for b, w in zip(best, worst, strict=True))
        for row in rows:
            assert [row["response"][a:b] for a, b, _ in row["thoughts"]] == re.findall("[=+]", row["response"])
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["world_size"] == STRATEGIES[strategy]
        assert record["lives"] == [["NSRPreRL", 0], ["GRPO", 2]]
        assert record["resumed_from"] is None
        again = json.loads((folder.parent / "watched_resumed" / "run.json").read_text())
        assert again["resumed_from"].endswith("step=3.ckpt")
        assert record["endings"]["1"].startswith("weights/change is ")  # on all ranks at the same step
        assert again["endings"] == record["endings"]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _column(file: Path, name: str) -> list[float]:
    with file.open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def test_a_checkpoint_of_other_lives_is_refused(runs, model_folder):
    sys.path.insert(0, str(Path(__file__).parent))
    from lives_worker import fit, lives

    folder = model_folder("llama-tied")
    path = runs("auto") / "whole" / "checkpoints" / "step=3.ckpt"
    for module, callbacks, words in (
        (GRPO(model=folder), [], "NSRPreRL from step 0, then GRPO from step 2, the configuration's GRPO from step 0"),
        (NSRPreRL(model=folder), [PolicyReincarnation(at_step=3, successor=GRPO())], "GRPO from step 3"),
    ):
        with pytest.raises(InputError, match=words):
            fit(runs("auto") / "refused", "auto", module, callbacks, ckpt_path=path)
    assert lives


def test_wrong_successors_are_refused(runs, model_folder):
    sys.path.insert(0, str(Path(__file__).parent))
    from lives_worker import fit

    def sgd(parameters):
        return torch.optim.SGD(parameters)

    folder = model_folder("llama-tied")
    with pytest.raises(InputError, match="at least 1"):
        PolicyReincarnation(at_step=0, successor=GRPO())
    for callbacks, words in (
        ([PolicyReincarnation(at_step=1, successor=GRPO(optimizer=sgd))], "AdamW cannot be carried into SGD"),
        ([PolicyReincarnation(at_step=1, successor=GRPO()) for _ in range(2)], "two lives begin at the same step"),
    ):
        with pytest.raises(InputError, match=words):
            fit(runs("auto") / "refused", "auto", NSRPreRL(model=folder), callbacks)
    callbacks = [PolicyReincarnation(at_step=1, successor=GRPO(model="other"))]
    with pytest.raises(InputError, match=r"GRPO\.model: 'other', while the run trains"):
        fit(runs("auto") / "refused", "auto", NSRPreRL(model=folder), callbacks)


def test_resumed_on_another_number_of_ranks_and_strategy(runs, model_folder):
    """In the first life: the same prompts in the same order, at the same places of the global batch, and weights that
    differ by rounding; as `test_same_as_one_process`."""
    runs.end("auto", ["ddp", "fsdp2"])
    origin, whole = start(model_folder("llama-tied")), runs("auto") / "whole"
    assert [step for step, _ in _drawn(whole)] == [0, 1, 2, 3]
    for strategy, other in (("auto", "ddp"), ("auto", "fsdp2"), ("ddp", "auto"), ("fsdp2", "auto")):
        found = runs(strategy) / f"from_{other}"
        assert _drawn(found) == _drawn(whole)[1:], (strategy, other)
        assert distance(weights(found), weights(whole), origin) < 1e-3, (strategy, other)
        assert _column(found / "metrics.csv", "life") == [1, 2, 2]
        for name in ("reward/mean", "val/avg@2", "optim/loss"):
            expected = _column(whole / "metrics.csv", name)
            values = _column(found / "metrics.csv", name)
            assert values == pytest.approx(expected[-len(values) :], rel=1e-4, abs=1e-6), (strategy, other, name)


def _drawn(folder: Path) -> list[tuple[int, list[int]]]:
    """Of each step the rows of the global batch."""
    ranks = [_lines(path) for path in sorted(folder.glob("drawn_*.jsonl"))]
    return [(steps[0][0], [row for _, rows in steps for row in rows]) for steps in zip(*ranks, strict=True)]
