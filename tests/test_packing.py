"""Packs against sequences alone: the same log-probs and gradients, whatever shares a pack or a prompt."""

import pytest
import torch
from conftest import SHAPES
from test_update import attached, close, gradient

from prerl_lightning.objectives import GRPO, MixedRL, NSRPreRL
from prerl_lightning.policy import packing
from prerl_lightning.policy.attention import Segment, plan_attention
from prerl_lightning.policy.packing import families, micro_batches
from prerl_lightning.types import Sequences


@pytest.fixture(autouse=True)
def _share_short_prompts_too(monkeypatch):
    monkeypatch.setattr(packing, "SHARE_MIN_TOKENS", 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", ["post-train", "pre-train"])
def test_packed_equals_alone(model_folder, make_rollout, shape, space):
    rollout = make_rollout(6, 4)
    everything = torch.ones(len(rollout), dtype=torch.bool)
    module = attached(GRPO, model_folder(shape))
    assert module.policy.can_pack
    packed = module.make_passes(rollout, module.prefix_id).log_probs(space, everything)
    one_by_one = attached(GRPO, model_folder(shape), packing=False, micro_batch_size=1)
    alone = one_by_one.make_passes(rollout, module.prefix_id)
    torch.testing.assert_close(packed, alone.log_probs(space, everything), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL, MixedRL])
@pytest.mark.parametrize("shape", ["llama-tied", "qwen3-untied"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_pack_is_that_of_its_sequences(model_folder, make_rollout, objective, shape, checkpointing):
    rollout, folder = make_rollout(6, 4), model_folder(shape)
    alone = gradient(attached(objective, folder, packing=False, micro_batch_size=1), rollout)
    for options in ({}, {"share_prompts": False}, {"packing": False}, {"max_tokens_per_microbatch": 50}):
        close(gradient(attached(objective, folder, gradient_checkpointing=checkpointing, **options), rollout), alone)


def test_a_pack_does_not_see_its_neighbours(model_folder):
    """Other tokens in all but one response: its log-probs do not move, neither with its prompt shared nor without."""
    module = attached(GRPO, model_folder("llama-tied"))
    prompt, found = (5, 6, 7, 8), {}
    for share in (True, False):
        for other in (9, 20):
            responses = Sequences.of([(3, 4, 5, 6), (other,) * 7, (other, other)])
            made = families(Sequences.of([prompt]), [0, 0, 0], responses, [0, 1, 2], share, 100)
            (batch,) = micro_batches(made, responses, 100)
            assert batch.input_ids.shape == (1, (4 + 3 + 6 + 1) if share else (4 * 3 + 3 + 6 + 1))
            log_probs = module.policy(batch)[0].detach()
            found[share, other] = log_probs[batch.sequence == 0]
    for values in found.values():
        torch.testing.assert_close(values, found[True, 9], rtol=1e-5, atol=1e-5)


def test_under_autocast_a_pack_gives_what_its_sequences_give(model_folder, make_rollout):
    """Attention of packs runs in fp32 on a CPU: bf16 packs are as near to fp32 as bf16 rows are."""
    rollout, folder = make_rollout(6, 4), model_folder("qwen2-tied")
    exact = gradient(attached(GRPO, folder, packing=False), rollout)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        packed, padded = (gradient(attached(GRPO, folder, packing=p), rollout) for p in (True, False))
    assert (packed - exact).norm() <= 1.2 * (padded - exact).norm()
    close(packed, exact, 0.05)


def test_a_pack_cut_by_its_positions_alone(model_folder, make_rollout):
    """What flash attention gets, here through the block-diagonal mask that transformers makes of the same positions."""
    rollout = make_rollout(4, 3)
    everything = torch.ones(len(rollout), dtype=torch.bool)
    module = attached(GRPO, model_folder("qwen3-untied"))
    expected = module.make_passes(rollout).log_probs("post-train", everything)
    module.policy.can_share = False
    module.policy.model.set_attn_implementation("sdpa")
    found = module.make_passes(rollout).log_probs("post-train", everything)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sharing_follows_its_rule_and_the_budget(monkeypatch):
    monkeypatch.setattr(packing, "SHARE_MIN_TOKENS", 64)
    long, short = tuple(range(100)), (1, 2)

    def shared(context, n, max_tokens=10_000, max_keys=None):
        responses = Sequences.of([(3,) * 20] * n)
        made = families(Sequences.of([context]), [0] * n, responses, range(n), True, max_tokens, max_keys)
        return [(f.shared, len(f.numbers)) for f in made]

    assert shared(long, 8) == [(True, 8)]
    assert shared(short, 8) == [(False, 1)] * 8
    assert shared(long, 1) == [(False, 1)]
    assert shared(long, 8, 200) == [(True, 5), (True, 3)]
    full = 100 + 8 * 19  # the last token of a response is no input
    assert [shared(long, 8, n) for n in (full, full - 1)] == [[(True, 8)], [(True, 7), (False, 1)]]
    keys = full + 8 * 100  # each has the prompt's keys
    assert [shared(long, 8, max_keys=n) for n in (keys, keys - 1)] == [[(True, 8)], [(True, 7), (False, 1)]]
    assert families(Sequences.of([long]), [0, 0], Sequences.of([(), ()]), [0, 1], True, 100) == []


def test_packs_keep_to_the_budget_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (50,), generator=generator).tolist()
    contexts, context_of = Sequences.of([(1,) * 30, (2,) * 3]), [int(i >= 25) for i in range(50)]
    responses = Sequences.of([(7,) * n for n in lengths])
    for packed in (True, False):
        made = families(contexts, context_of, responses, range(50), packed, 200)
        batches = micro_batches(made, responses, 200, packed=packed)
        assert all(b.input_ids.numel() <= 200 for b in batches)
        counts = torch.cat([b.sequence for b in batches]).bincount().tolist()
        assert counts == lengths
        assert sorted(torch.cat([b.source for b in batches]).tolist()) == list(range(sum(lengths)))
    assert len(micro_batches(made, responses, 200, max_responses=1)) == 50
    equal = families(Sequences.of([(1,)]), [0] * 5, Sequences.of([(7,) * 100] * 5), range(5), False, 200)
    for packed in (True, False):  # full to the last token
        assert len(micro_batches(equal, Sequences.of([(7,) * 100] * 5), 200, packed=packed)) == 3
    (widest,) = micro_batches(made[:1], responses, 200, packed=False)
    assert widest.input_ids.shape == (1, 30 + lengths[0] - 1)  # no column of padding alone


def test_ranks_get_equal_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (50,), generator=generator).tolist()
    responses = Sequences.of([(7,) * n for n in lengths])
    made = families(Sequences.of([(1,)]), [0] * 50, responses, range(50), False, 200)
    shares = packing.balanced(made, 4)
    assert sorted(f.numbers[0] for share in shares for f in share) == list(range(50))
    tokens = [sum(f.n_tokens for f in share) for share in shares]
    assert max(tokens) - min(tokens) < 0.02 * sum(tokens)
    assert packing.balanced([], 2) == [[], []]


def test_an_attention_plan_restores_the_order_of_tokens():
    root = Segment(0, 5)
    segments = [root, Segment(5, 3, root), Segment(8, 700), Segment(708, 2, root), Segment(710, 1)]
    plan = plan_attention(segments)
    assert torch.equal(plan.gather[plan.restore], torch.arange(711))
    assert sorted([*plan.restore.tolist(), *plan.padding.tolist()]) == list(range(len(plan.gather)))
    assert torch.equal(plan.parents, torch.arange(5))
    assert len(plan.gather) < 2 * 711  # 700 and 1 are not padded to each other


def test_a_model_whose_attention_packs_cannot_express_is_padded(tmp_path, caplog, make_rollout):
    from transformers import MistralConfig, MistralForCausalLM

    from prerl_lightning.policy.model import load_tokenizer

    tokenizer = load_tokenizer("embedded-sums")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MistralConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, sliding_window=4, **sizes
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        module = attached(GRPO, str(tmp_path))
    assert not module.policy.can_pack
    assert "instead of packed" in caplog.text
    assert (
        "not all of its layers have full attention (sliding_window)" in caplog.text
    )  # looked up, whatever a probe says
    assert gradient(module, make_rollout()).isfinite().all()
