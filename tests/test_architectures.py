"""Many model families: `Policy` gives what the model's own logits give, or refuses; what it exports is the folder."""

from pathlib import Path

import pytest
import torch
from architectures import BOTH_WAYS, CHANGES, END, FAMILIES, HEAD, START, make, table
from safetensors.torch import load_file, save_file

from prerl_lightning.callbacks.saving import export_policy
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import families, micro_batches
from prerl_lightning.types import Sequences

CONTEXTS = Sequences.of([(5, 6, 7, 8, 9, 10, 11, 12), (3,)])
RESPONSES = Sequences.of([tuple(range(20, 29)), (40, 41, 42), (50,) * 5, tuple(range(60, 80)), (90, 91)])
CONTEXT_OF = [0, 0, 0, 1, 1]
T = len(RESPONSES.tokens)


def disk(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def own_log_probs(model, temperature: float) -> torch.Tensor:
    """By plain words: one sequence at a time, the model's own logits, fp64 behind them."""
    found = []
    for number, context in enumerate(CONTEXT_OF):
        ids = torch.tensor([*CONTEXTS[context].tolist(), *RESPONSES[number].tolist()])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double() / temperature
        start = len(CONTEXTS[context])
        found += [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))]
    return torch.stack(found)


def by_policy(policy: Policy, temperature: float) -> torch.Tensor:
    made = families(CONTEXTS, CONTEXT_OF, RESPONSES, range(5), policy.can_share, 1000)
    found = []
    for batch in micro_batches(made, RESPONSES, 1000, packed=policy.can_pack):
        found.append((batch.source, policy(batch, temperature)[0]))
    values = torch.cat([v for _, v in found])
    return values.new_zeros(T).index_copy(0, torch.cat([s for s, _ in found]), values)


def gradient(model, log_probs: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    slope = torch.linspace(-1, 1, T)
    (log_probs.float() * slope).sum().backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_right_or_refused(tmp_path, monkeypatch, family):
    monkeypatch.setattr("prerl_lightning.policy.packing.SHARE_MIN_TOKENS", 1)
    outcome = FAMILIES[family][0]
    folder = tmp_path / "model"
    make(family).save_pretrained(folder)
    if outcome.startswith("refused"):
        said = {BOTH_WAYS: "not causal", CHANGES: "changes its weights", HEAD: "chunked_head: false"}
        with pytest.raises(InputError, match=said[outcome.removeprefix("refused: ")]):
            Policy.from_pretrained(str(folder), chunked_head=outcome.endswith((HEAD, CHANGES)))
        if not outcome.endswith(HEAD):
            return
    policy = Policy.from_pretrained(str(folder), chunked_head=not outcome.endswith(HEAD))
    policy.train()  # as a Trainer may say
    if outcome in ("packed", "padded"):
        assert policy.can_pack == (outcome == "packed")
    expected, found = own_log_probs(policy.model, 0.7), by_policy(policy, 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    theirs, ours = gradient(policy.model, expected), gradient(policy.model, found)
    assert len(theirs) == len(ours)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3

    export_policy(policy, tmp_path / "export", torch.float32)
    before, after = disk(folder), disk(tmp_path / "export")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = {name for name, _ in policy.named_weights()}
    assert names == before.keys(), names ^ before.keys()


def test_the_documentation_has_the_table():
    page = (Path(__file__).parents[1] / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == table()
    assert len(FAMILIES) >= 40


@pytest.mark.parametrize(("family", "cap"), [("gemma2", 30.0), ("nanochat", 15.0)])
def test_a_cap_is_found_under_small_logits_too(tmp_path, family, cap):
    """Those of a model that is not trained yet change by less than the tolerance."""
    make(family, initializer_range=0.02, final_logit_softcapping=cap).save_pretrained(tmp_path)
    assert Policy.from_pretrained(str(tmp_path)).logit_softcap == cap


def test_a_model_that_draws_in_its_forward_pass_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    make("llama").save_pretrained(tmp_path)
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x + 0.1 * torch.randn_like(x)))
    with pytest.raises(InputError, match="other logits each time"):
        Policy.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_s_weight_is_announced_to_whoever_waits_for_its_gradient(tmp_path, tied):
    """DDP and FSDP2 do, for each parameter once a backward pass."""
    make("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    policy, seen = Policy.from_pretrained(str(tmp_path)), []
    for name, parameter in policy.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    by_policy(policy, 1.0).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in policy.named_parameters())


def test_masks_that_old_folders_hold_are_let_through(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    layer = next(name for name in weights if name.endswith("h.0.attn.c_attn.bias")).removesuffix("c_attn.bias")
    weights |= {f"{layer}bias": torch.ones(1, 1, 8, 8), f"{layer}masked_bias": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    Policy.from_pretrained(str(tmp_path))
    weights["h.0.attn.c_attn.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"c_attn\.extra"):
        Policy.from_pretrained(str(tmp_path))


# ---------------------------------------------------------------------- flash attention, rotary frequencies


@pytest.mark.parametrize(("family", "packs"), [("llama", True), ("lfm2", False), ("qwen3_next", False)])
def test_flash_attention_packs_only_what_keeps_nothing_between_sequences(tmp_path, family, packs):
    """Its kernel is not here: the check runs on SDPA, with the row cut at the same places."""
    from prerl_lightning.policy import probe

    make(family).save_pretrained(tmp_path)
    policy = Policy.from_pretrained(str(tmp_path))
    policy.model.config._attn_implementation = "flash_attention_2"
    policy.can_pack = policy.can_share = False
    probe.prepare(policy)
    assert policy.can_pack == packs
    assert not policy.can_share
    assert policy.model.config._attn_implementation == "flash_attention_2"


def rope(kind: str) -> dict:
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8} if kind == "longrope" else {}
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **factors}


@pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
def test_log_probs_do_not_depend_on_the_longest_sequence_beside_them(tmp_path, family, kind):
    limits = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "sliding_window": None}
    options = limits if kind == "longrope" else {"max_position_embeddings": 16}
    make(family, rope_parameters=rope(kind), **options).save_pretrained(tmp_path)
    long = Sequences.of([(5, 6, 7), tuple(range(8, 40))])

    def first(policy, numbers):
        made = families(Sequences.of([(3,)]), [0, 0], long, numbers, False, 1000)
        (batch,) = micro_batches(made, long, 1000, packed=policy.can_pack)
        return policy(batch)[0][batch.sequence == 0].detach()

    if kind == "dynamic":
        with pytest.raises(InputError, match="max_model_len: 16"):
            Policy.from_pretrained(str(tmp_path), longest=40)
        policy = Policy.from_pretrained(str(tmp_path), longest=16)
    else:
        short, policy = (Policy.from_pretrained(str(tmp_path), longest=n) for n in (16, 40))
        assert (first(short, [0]) - first(policy, [0])).abs().max() > 0.1  # other factors, as the engine has
    torch.testing.assert_close(first(policy, [0, 1]), first(policy, [0]), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- folders


def damaged(folder: Path, change) -> str:
    make("qwen2").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(NORM), f"are missing: {NORM}"),
        (
            lambda w: w.update({"model.layers.1.extra.weight": torch.zeros(3)}),
            "none of this model's: model.layers.1.ex",
        ),
        (lambda w: w.update({NORM: torch.ones(7)}), f"another shape .*: {NORM}"),
        (lambda w: w[NORM].fill_(float("nan")), f"are not finite: {NORM}"),
        (lambda w: w[NORM][3:4].fill_(float("inf")), f"are not finite: {NORM}"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        Policy.from_pretrained(damaged(tmp_path, change))


@pytest.mark.parametrize("family", ["opt", "gpt_bigcode", "falcon_h1"])
def test_recomputed_activations_change_no_gradient(tmp_path, family):
    """Without training mode, in which these drop out."""
    make(family).save_pretrained(tmp_path)
    policy = Policy.from_pretrained(str(tmp_path))
    kept = gradient(policy.model, by_policy(policy, 1.0))
    for every in (1, 2):
        policy.checkpoint_activations(every)
        found = gradient(policy.model, by_policy(policy, 1.0))
        assert float((kept - found).norm() / kept.norm()) < 1e-5
        recomputed = sum("forward" in vars(m) for m in policy.modules())
        assert recomputed == -(-policy.model.config.num_hidden_layers // every)
    assert not any(m.training for m in policy.modules())
