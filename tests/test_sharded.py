"""fsdp2 on two processes, in fp32 and in bf16, with and without recomputation, tied and untied, one rank without work:
gradients against those of one process in fp32."""

import os
from pathlib import Path

import pytest
import torch
from forked import Forked, finish_together
from test_update import attached, gradient

from prerl_lightning.objectives import GRPO, NSRPreRL

SHAPES = ("llama-tied", "qwen3-untied")


@pytest.fixture(scope="module")
def folders(model_folder):
    return {shape: model_folder(shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folders, make_rollout):
    out = tmp_path_factory.mktemp("sharded")
    # of one prompt, two responses contribute, and one of them, a negative, under NSR-PreRL: a rank has nothing to do
    rollout = make_rollout(2, 2, rewards=[1, 0, 1, 1])
    torch.save((folders, rollout), out / "input")
    worker, env = Path(__file__).with_name("sharded_worker.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    finish_together([Forked([worker, rank, out], env=env) for rank in range(2)])
    return out, rollout


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_gradients(sharded, folders, shape, precision, checkpointing, objective):
    out, rollout = sharded
    name = f"{shape}-{precision}-{checkpointing}-{objective.__name__}"
    ranks = [torch.load(out / f"{name}.{rank}") for rank in range(2)]
    assert sorted(rank["own"] for rank in ranks) == ([0, 1] if objective is NSRPreRL else [1, 1])
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"])
    exact = gradient(attached(objective, folders[shape]), rollout)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
        of_one = gradient(attached(objective, folders[shape]), rollout)
    error, error_of_one = (float((g - exact).norm() / exact.norm()) for g in (ranks[0]["gradient"], of_one))
    assert error < 1e-5 + 1.5 * error_of_one
    assert error_of_one < 0.1
