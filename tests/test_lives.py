"""Policy reincarnation on a single device, ddp and fsdp2 with 2 CPU processes: real engines, real checkpoints.

Also the equality of 1 rank and 2, and of ddp and fsdp2: all use the same seeds by position in the global batch.
"""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, NSRPreRL

STRATEGIES = {"auto": 1, "ddp": 2, "fsdp2": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """A function from a strategy to the folder with its runs."""
    done = {}

    def run(strategy: str) -> Path:
        if strategy not in done:
            out = tmp_path_factory.mktemp(strategy)
            n = STRATEGIES[strategy]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            command = [sys.executable, str(Path(__file__).with_name("lives_worker.py"))]
            command += [str(out), model_folder("llama-tied"), strategy]
            processes = []
            for rank in range(n):
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
                env = {**os.environ, **{k: str(v) for k, v in ranks.items()}, "TORCHELASTIC_RUN_ID": "test"}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
                log = (out / f"log_{rank}").open("w")
                processes.append(
                    subprocess.Popen(command, env=env if n > 1 else {**os.environ}, stdout=log, stderr=log)
                )
            codes = [p.wait(timeout=600) for p in processes]
            logs = "".join((out / f"log_{rank}").read_text()[-3000:] for rank in range(n))
            assert codes == [0] * n, logs
            done[strategy] = out
        return done[strategy]

    return run


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
        assert [int(x) for x in _column(runs(strategy) / "resumed_2" / "metrics.csv", "step")] == [2, 3, 3]

    def test_engine_and_trainer_agree(self, runs, strategy):
        differences = _column(runs(strategy) / "whole" / "metrics.csv", "mismatch/log_prob_difference")
        assert len(differences) == 4
        assert max(differences) < 1e-4


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
        return torch.optim.SGD(parameters, lr=1.0)

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
    with pytest.raises(InputError, match="names the model 'other'"):
        fit(runs("auto") / "refused", "auto", NSRPreRL(model=folder), callbacks)
