"""The arithmetic of bytes against what autograd keeps and what is alive at the peak, for tiny models; and the choices
that follow from it."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config

from prerl_lightning import budget
from prerl_lightning.budget import (
    GIB,
    ModelShape,
    activation_bytes_per_token,
    choose_pack,
    pack_bytes,
    rank_budget,
    training_bytes,
)
from prerl_lightning.errors import InputError
from prerl_lightning.policy import attention, head
from prerl_lightning.policy.model import Policy

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "vocab_size": 64}
FAMILIES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}, 1.2),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}, 1.2),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}, 1.2),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 64}, 1.2),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 512}, 1.2),
    "gpt-neox": ("GPTNeoXConfig", {}, 2.0),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}, 2.0),
}
PRECISIONS = ("32-true", "bf16-mixed")


def tiny(family, layers=2, **more):
    name, options, _ = FAMILIES[family]
    config = getattr(transformers, name)(num_hidden_layers=layers, **(SIZES | options | more))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def autocast(precision):
    """As Lightning's plugin for mixed precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


def body(model, tokens, **options):
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state


def kept(model, tokens, precision, **options):
    """Bytes of storages that autograd keeps, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision):
        body(model, tokens, **options)
    return sum(storage.nbytes() for storage in found.values())


class Alive(TorchDispatchMode):
    """Bytes of storages made within and still alive, and their peak."""

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, more):
        self.now += more
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family, precision):
    measured = {(n, t): kept(tiny(family, n), t, precision) for n in (2, 4) for t in (64, 192)}
    per_token = {n: (measured[n, 192] - measured[n, 64]) / 128 for n in (2, 4)}
    shapes = {n: ModelShape.of_config(tiny(family, n).config) for n in (2, 4)}
    computed = {n: activation_bytes_per_token(shape, precision, False) for n, shape in shapes.items()}
    for found, expected in ((computed[4], per_token[4]), (computed[4] - computed[2], per_token[4] - per_token[2])):
        print(f"{family:10} {precision:10} measured {expected:8.0f} computed {found:8.0f} {found / expected:.3f}")
        assert 0.95 * expected <= found <= FAMILIES[family][2] * expected
    rest = measured[4, 192] - 192 * per_token[4]  # what does not depend on tokens: weights in 16 bits
    copies = budget.weight_copy_bytes(shapes[4], precision)
    assert copies >= 0.95 * rest - 1e4
    if "moe" not in family and precision == "bf16-mixed":
        assert copies <= 1.05 * rest


@pytest.mark.parametrize("shared", [False, True])
def test_activations_of_padded_calls(shared):
    parent = attention.Segment(0, 50) if shared else None
    ends = list(itertools.accumulate([400, 350, 300, 250], initial=50 if shared else 0))
    segments = [attention.Segment(a, b - a, parent) for a, b in itertools.pairwise(ends)]
    plan = attention.plan_attention([parent, *segments] if shared else segments)
    model = tiny("llama", 4)
    model.set_attn_implementation(attention.NAME)
    measured = kept(model, ends[-1], "32-true", plan=plan, position_ids=torch.zeros(1, ends[-1], dtype=torch.long))
    found = activation_bytes_per_token(ModelShape.of_config(model.config), "32-true", False, padded=True) * ends[-1]
    print(f"padded, shared {shared}: measured {measured} computed {found} {found / measured:.3f}")
    assert 0.95 * measured <= found <= 1.25 * measured


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("vocab", [64, 3072])
def test_the_peak_of_a_pass(precision, checkpointing, vocab, monkeypatch):
    """The body's with the small vocabulary, the head's, mostly, with the larger one, which is three blocks."""
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1 << 18)
    model = tiny("qwen3", 3, vocab_size=vocab, tie_word_embeddings=True)
    weight = model.get_output_embeddings().weight
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Policy(model).checkpoint_activations(checkpointing)
    peaks = []
    for tokens in (80, 256):
        with autocast(precision), Alive() as alive:
            hidden = body(model, tokens).flatten(0, 1).index_select(0, torch.arange(tokens))
            targets = torch.arange(tokens) % vocab
            head.head_log_probs(hidden, weight, None, targets, 0.9, entropy=True, into_grad="also")[0].sum().backward()
        peaks.append(alive.peak)
    shape = ModelShape.of_config(model.config)
    peak, computed = max(peaks), pack_bytes(shape, 256, precision, checkpointing, on_cpu=True)
    print(f"{precision:10} {checkpointing} {vocab} measured {peaks} computed {computed:9} {computed / peak:.3f}")
    assert 0.95 * peak <= computed <= 1.35 * peak


@pytest.mark.parametrize(("chunked", "softcap"), [(True, None), (True, 30.0), (False, None)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_peak_of_the_head(precision, entropy, chunked, softcap, monkeypatch):
    """``entropy``: with its gradient, for a term of the loss."""
    tokens, hidden, vocab = 256, 64, 8192
    monkeypatch.setattr(head, "CPU_BLOCK_ELEMENTS", 1 << 19)
    weight = torch.nn.Parameter(torch.zeros(vocab, hidden))
    weight.grad = torch.zeros_like(weight)
    inputs, targets = torch.zeros(tokens, hidden, requires_grad=True), torch.arange(tokens)
    with autocast(precision), Alive() as alive:
        if chunked:
            found = head.head_log_probs(inputs, weight, None, targets, 0.9, softcap, entropy=True, into_grad="also")
        else:
            logits = torch.nn.functional.linear(inputs, weight)[torch.arange(tokens)]  # as `Policy.forward` has them
            found = head.log_probs_of(logits, targets, 0.9, entropy)
        (found[0].sum() + (found[1].sum() if entropy else 0.0)).backward()
    options = {"softcap": softcap is not None, "entropy": entropy, "whole_logits": not chunked}
    shape = ModelShape(0, 0, 0, 1, hidden, 0, 1, 1, 1, vocab, True, **options)
    computed = budget.head_bytes(shape, tokens, on_cpu=True)
    print(
        f"{precision} entropy {entropy} chunked {chunked} {softcap}: {alive.peak / tokens / vocab:.1f} a logit, "
        f"computed {computed / alive.peak:.3f}"
    )
    assert 0.95 * alive.peak <= computed <= 1.35 * alive.peak


def qwen3(layers, hidden, intermediate, heads, tied):
    return ModelShape.of_config(
        Qwen3Config(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=tied,
        )
    )


QWEN3 = {
    "0.6B": qwen3(28, 1024, 3072, 16, True),
    "4B": qwen3(36, 2560, 9728, 32, True),
    "8B": qwen3(36, 4096, 12288, 32, False),
}
GB80 = 80 * 10**9


def test_counts_and_what_follows():
    assert [s.parameters for s in QWEN3.values()] == [596_049_920, 4_022_468_096, 8_190_735_360]
    assert [s.tied for s in QWEN3.values()] == [True, True, False]
    small = QWEN3["0.6B"]
    assert small.block_parameters == 28 * small.largest_block
    assert (small.norms, small.qk_norm, small.experts) == (2, True, 0)
    assert budget.kv_bytes_per_token(small) == 2 * 28 * 8 * 128 * 2
    assert budget.checkpoint_bytes(small) == pytest.approx(12 * small.parameters * 1.01)
    n = 4 * small.parameters
    assert training_bytes(small, "single", 1, "bf16-mixed").total == 4 * n
    assert training_bytes(small, "ddp", 8, "bf16-mixed", copies=1).total == 6 * n
    sharded = training_bytes(small, "fsdp2", 8, "bf16-mixed")
    assert sharded.total - sharded.gathered == pytest.approx(4 * n / 8)
    assert 2 * small.largest_block < sharded.gathered < n


@pytest.mark.parametrize(
    ("model", "strategy", "ranks", "tokens", "checkpointing"),
    [
        ("0.6B", "single", 1, 16384, False),
        ("0.6B", "ddp", 8, 16384, False),
        ("4B", "single", 1, 16384, True),
        ("4B", "fsdp2", 8, 8192, False),
        ("8B", "fsdp2", 4, 16384, True),
        ("8B", "fsdp2", 8, 16384, True),
    ],
)
def test_the_pack_on_80_gb(model, strategy, ranks, tokens, checkpointing):
    shape = QWEN3[model]
    free = GB80 - training_bytes(shape, strategy, ranks, "bf16-mixed").total
    choice = choose_pack(shape, free, 4096, "bf16-mixed", sharded=strategy == "fsdp2")
    print(f"{model} {strategy} x {ranks}: {free / 1e9:.1f} GB free, {choice}")
    assert (choice.tokens, choice.checkpointing) == (tokens, checkpointing)
    assert choice.bytes <= free


def test_whole_logits_make_packs_smaller():
    """`chunked_head: false`: tokens x vocabulary, several times over."""
    shape, free = replace(QWEN3["0.6B"], whole_logits=True), 40 * 10**9
    assert choose_pack(QWEN3["0.6B"], free, 4096, "bf16-mixed", checkpointing=True).tokens == 16384
    choice = choose_pack(shape, free, 4096, "bf16-mixed", checkpointing=True)
    assert 4096 <= choice.tokens < 16384
    assert choice.tokens * shape.vocab * 14 < choice.bytes <= free  # fp32 logits, their log-softmax, its gradient


def test_the_pack_shrinks_before_it_recomputes_and_holds_the_longest_response():
    shape, gb = QWEN3["0.6B"], 10**9
    for free, longest, expected in (
        (40, 4096, (13312, False)),
        (40, 16000, (16384, True)),
        (20, 4096, (16384, True)),
        (60, 20000, (20480, False)),
        (40, 20000, (20480, True)),
        (4, 4096, (15360, True)),
    ):
        choice = choose_pack(shape, free * gb, longest, "bf16-mixed")
        assert (choice.tokens, choice.checkpointing) == expected, free
    # more memory never means a smaller pack
    sizes = [choose_pack(shape, free * gb, 1024, "bf16-mixed", checkpointing=False).tokens for free in range(8, 60, 4)]
    assert sizes == sorted(sizes)


def test_the_users_own_choice_is_kept():
    shape, gb = QWEN3["0.6B"], 10**9
    assert choose_pack(shape, 60 * gb, 4096, "bf16-mixed", checkpointing=True).checkpointing
    assert choose_pack(shape, 20 * gb, 4096, "bf16-mixed", checkpointing=False).tokens == 6144
    assert choose_pack(shape, 60 * gb, 4096, "bf16-mixed", max_tokens=3000).tokens == 3000
    assert choose_pack(shape, 20 * gb, 4096, "bf16-mixed", max_tokens=12000).checkpointing
    both = choose_pack(shape, gb, 4096, "bf16-mixed", checkpointing=False, max_tokens=30000)
    assert (both.tokens, both.checkpointing) == (30000, False)
    assert both.bytes > gb


def test_what_does_not_fit_is_refused_with_the_mends():
    shape = QWEN3["8B"]
    with pytest.raises(
        InputError, match=r"32,768 tokens .* needs \d+\.\d GiB, .* 5\.0 GiB.*max_new_tokens.*fsdp2"
    ) as e:
        choose_pack(shape, 5 << 30, 32000, "bf16-mixed")
    assert "gradient_checkpointing" not in str(e.value)
    with pytest.raises(InputError, match="gradient_checkpointing: true"):
        choose_pack(shape, 20 << 30, 32000, "bf16-mixed", checkpointing=False)
    with pytest.raises(InputError, match=r"smaller model\.init_args.max_tokens_per_microbatch"):
        choose_pack(shape, 9 << 30, 4000, "bf16-mixed", max_tokens=50000)
    with pytest.raises(InputError, match="smaller model") as e:
        choose_pack(shape, -1, 4000, "bf16-mixed")
    assert "max_new_tokens" not in str(e.value)


def test_what_a_rank_s_gpu_holds():
    shape, gpu = QWEN3["4B"], 80 * GIB
    engine = (int(0.4 * gpu), 0)
    found = rank_budget(shape, gpu, engine, 4096, "fsdp2", 8)
    assert (found.pack.tokens, found.pack.checkpointing) == (8192, False)
    assert found.rollout < found.step < gpu
    assert found.rollout == pytest.approx(3 * GIB + engine[0] + found.held.total * 0.6, rel=0.25)
    assert rank_budget(shape, gpu, (engine[0], engine[0]), 4096, "fsdp2", 8).pack.checkpointing  # it does not sleep
    for model, strategy, world_size, share, words in (
        ("4B", "single", 1, 0.5, r"a rollout \(40.0 GiB for the engine\) needs 8\d.*gpu_memory_utilization"),
        ("8B", "ddp", 8, 0.4, r"training, packs aside, needs .* GiB a GPU.* fsdp2 with more GPUs"),
    ):
        with pytest.raises(InputError, match=words):
            rank_budget(QWEN3[model], gpu, (int(share * gpu), 0), 4096, strategy, world_size)
    with_reference = rank_budget(shape, gpu, engine, 4096, "fsdp2", 8, copies=1)
    assert with_reference.held.total - found.held.total == 4 * shape.parameters // 8
