"""The chunked head against autograd over all logits at once, and against fp64."""

import pytest
import torch
import torch.nn.functional as F

from prerl_lightning.policy import head
from prerl_lightning.policy.head import head_log_probs, log_probs_of

V, H, T = 2500, 24, 37


def inputs(bias, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)
    offset = torch.randn(V, generator=generator) if bias else None
    targets = torch.randint(V, (T,), generator=generator)
    targets[:3] = torch.tensor([0, 1023, V - 1])  # edges of the blocks
    leaves = [x.to(dtype).requires_grad_() if x is not None else None for x in (hidden, weight, offset)]
    return *leaves, targets, torch.randn(T, generator=generator)


def gradients(function, leaves, slope):
    value = function()
    found = torch.autograd.grad((value * slope).sum(), [x for x in leaves if x is not None])
    return [value.detach(), *found]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_equals_fp64_and_autograd(monkeypatch, bias, softcap):
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1)  # blocks of 1024: three of them, the last one short
    *leaves, targets, slope = inputs(bias)
    found = gradients(lambda: head_log_probs(*leaves, targets, 0.7, softcap)[0], leaves, slope)

    def all_at_once():
        logits = F.linear(*leaves)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return log_probs_of(logits, targets, 0.7, entropy=False)[0]

    plain = gradients(all_at_once, leaves, slope)

    *double, targets, slope = inputs(bias, torch.float64)

    def exact():
        logits = F.linear(*double)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return F.log_softmax(0.7 * logits, -1).gather(1, targets[:, None])[:, 0]

    for ours, autograd, expected in zip(found, plain, gradients(exact, double, slope), strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 2e-6
        assert float((autograd - expected).norm() / expected.norm()) < 2e-6


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.linspace(-1, 1, V)[:, None].requires_grad_()
    log_probs, _ = head_log_probs(hidden, weight, None, torch.tensor([V - 1, V - 1]))
    assert torch.isfinite(log_probs).all()
    assert float(log_probs[1].detach()) == pytest.approx(-2000, rel=0.01)
    log_probs.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_under_autocast_sums_are_kept_in_fp32(monkeypatch):
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1)
    *leaves, targets, slope = inputs(False)
    exact = gradients(lambda: head_log_probs(*leaves, targets)[0], leaves, slope)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda: head_log_probs(*leaves, targets)[0], leaves, slope)
    for ours, expected in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm() / expected.norm()) < 0.01


def test_no_tensor_of_tokens_times_vocabulary_is_kept(monkeypatch):
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1)
    *leaves, targets, _ = inputs(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head_log_probs(*leaves, targets)
        assert max(kept) == V * H
        kept.clear()
        log_probs_of(F.linear(*leaves), targets, 1.0, entropy=False)
        assert max(kept) == T * V


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy_and_its_gradient_equal_fp64(monkeypatch, chunked, softcap):
    """Alone, beside the log-probs', and where only the value is looked at, which leaves the log-probs' as it is."""
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1)

    def both(leaves, entropy=True):
        if chunked:
            return head_log_probs(*leaves, targets, 0.7, softcap, entropy)
        logits = F.linear(*leaves)
        return log_probs_of(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, 0.7, entropy)

    def exact():
        logits = F.linear(*double)
        log_p = F.log_softmax(0.7 * (softcap * torch.tanh(logits / softcap) if softcap else logits), -1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    *leaves, targets, slope = inputs(True)
    *double, _, _ = inputs(True, torch.float64)
    mixtures = (lambda log_probs, entropies: entropies, lambda log_probs, entropies: log_probs + 3 * entropies.flip(0))
    for mixed in mixtures:
        ours = gradients(lambda m=mixed: m(*both(leaves)), leaves, slope)
        in_fp64 = gradients(lambda m=mixed: m(*both(double)), double, slope)
        for found, close, expected in zip(
            ours, in_fp64, gradients(lambda m=mixed: m(*exact()), double, slope), strict=True
        ):
            assert float((found - expected).norm() / expected.norm()) < 5e-6
            assert close.dtype == torch.float64
            assert float((close - expected).norm() / expected.norm()) < 1e-13
    without = gradients(lambda: both(leaves, entropy=False)[0], leaves, slope)
    for found, expected in zip(gradients(lambda: both(leaves)[0], leaves, slope), without, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_gradient_written_in_place_is_autograds(monkeypatch, tied, autocast):
    """Two backward passes through one weight that is both embedding and head, and one through a head alone."""
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1)
    found = []
    for into_grad in ("no", "also" if tied else "only"):
        _, weight, bias, targets, slope = inputs(True)
        hooked = []
        weight.register_post_accumulate_grad_hook(lambda w, hooked=hooked: hooked.append(w.grad.clone()))
        for _ in range(2):
            hidden = F.embedding(targets, weight if tied else weight.detach()).tanh()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                log_probs, _ = head_log_probs(hidden, weight, bias, targets, into_grad=into_grad)
            (log_probs * slope).sum().backward()
        assert len(hooked) == 2  # what DDP and FSDP2 wait for, with the whole gradient there
        assert torch.equal(hooked[1], weight.grad)
        found.append((weight.grad, bias.grad))
    for autograds, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-5)
