"""The FLOPs behind train/mfu against torch's own counter."""

import numpy as np
import pytest
import torch
from test_update import attached
from torch.utils.flop_counter import FlopCounterMode

from prerl_lightning.metrics.utilisation import PEAK_FLOPS, TrainingFlops, attended_tokens, peak_flops
from prerl_lightning.objectives import GRPO
from prerl_lightning.policy.packing import Family, micro_batches
from prerl_lightning.types import Sequences

RESPONSES = Sequences.of([(5,) * 30, (6,) * 12, (7,) * 9])
MADE = [Family(np.arange(3, 23), (0, 1), (30, 12), shared=True), Family(np.array([1]), (2,), (9,))]


@pytest.mark.parametrize("shape", ["llama-tied", "qwen3-untied"])
@pytest.mark.parametrize("packed", [True, False])
def test_flops_equal_those_counted(model_folder, shape, packed):
    policy = attached(GRPO, model_folder(shape), chunked_head=False).live_policy
    (batch,) = micro_batches(MADE, RESPONSES, 200, packed=packed)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(batch)
    counted = counter.get_total_flops()
    attended = attended_tokens(batch)
    if not packed:  # the counter sees padding
        counted *= len(attended) / batch.input_ids.numel()
    assert 3 * counted == pytest.approx(TrainingFlops(policy)(attended, len(batch.targets)), rel=0.1)


def test_attended_tokens():
    packed, padded = (micro_batches(MADE, RESPONSES, 200, packed=p)[0] for p in (True, False))
    own = lambda first, n: list(range(first, first + n))  # noqa: E731
    assert sorted(attended_tokens(packed).tolist()) == sorted(own(1, 20) + own(21, 29) + own(21, 11) + own(1, 9))
    assert sorted(attended_tokens(padded).tolist()) == sorted(own(1, 49) + own(1, 31) + own(1, 9))


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA L400", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(monkeypatch, name, teraflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == (teraflops and teraflops * 1e12)
    assert all(key.startswith("NVIDIA ") for key in PEAK_FLOPS)
