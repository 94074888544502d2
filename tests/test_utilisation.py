"""The FLOPs behind train/mfu against torch's own counter."""

import pytest
import torch
from test_update import attached
from torch.utils.flop_counter import FlopCounterMode

from prerl_lightning.metrics.utilisation import TrainingFlops, attended_tokens
from prerl_lightning.objectives import GRPO
from prerl_lightning.policy.packing import Family, micro_batches

MADE = [Family(tuple(range(3, 23)), ((0, (5,) * 30), (1, (6,) * 12)), shared=True), Family((1,), ((2, (7,) * 9),))]


@pytest.mark.parametrize("shape", ["llama-tied", "qwen3-untied"])
@pytest.mark.parametrize("packed", [True, False])
def test_flops_equal_those_counted(model_folder, shape, packed):
    policy = attached(GRPO, model_folder(shape), chunked_head=False).live_policy
    (batch,) = micro_batches(MADE, 200, packed=packed)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(batch)
    counted = counter.get_total_flops()
    attended = attended_tokens(batch)
    if not packed:  # the counter sees padding
        counted *= len(attended) / batch.input_ids.numel()
    assert 3 * counted == pytest.approx(TrainingFlops(policy)(attended, len(batch.targets)), rel=0.1)


def test_attended_tokens():
    packed, padded = (micro_batches(MADE, 200, packed=p)[0] for p in (True, False))
    own = lambda first, n: list(range(first, first + n))  # noqa: E731
    assert sorted(attended_tokens(packed).tolist()) == sorted(own(1, 20) + own(21, 29) + own(21, 11) + own(1, 9))
    assert sorted(attended_tokens(padded).tolist()) == sorted(own(1, 49) + own(1, 31) + own(1, 9))
