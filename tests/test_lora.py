"""LoRA: what is computed, trained, kept, handed over and exported, against models with all their weights."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from forked import Forked, finish_together
from lora_runs import LORA, fit, two_lives, weights
from safetensors.torch import load_file
from test_update import attached, gradient

from prerl_lightning import resume
from prerl_lightning.budget import ModelShape, checkpoint_bytes, training_bytes
from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.saving import export
from prerl_lightning.callbacks.weights import weight_sketch
from prerl_lightning.errors import InputError
from prerl_lightning.evaluation.weights import checkpoint_weights
from prerl_lightning.metrics.utilisation import TrainingFlops
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy, load_config, load_tokenizer
from prerl_lightning.policy.reference import Reference
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.settings import described

SHAPES = ("llama-tied", "qwen3-untied")


def moved(folder, objective=GRPO, **options):
    """A module whose adapters are no longer zero."""
    module = attached(objective, folder, lora=options.pop("lora", LORA), **options)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in module.policy.trained():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return module


def close(a, b, most=1e-5):
    assert float((a - b).detach().norm()) < most * float(b.detach().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_gradients_are_the_merged_model_s(tmp_path, model_folder, make_rollout, shape):
    """In both spaces: dA = s B^T dW, dB = s dW A^T; nothing else has a gradient."""
    folder, rollout = model_folder(shape), make_rollout()
    for objective in (GRPO, NSRPreRL):
        module = moved(folder, objective)
        export(module, tmp_path / "model", torch.float32)
        plain = attached(objective, str(tmp_path / "model"))
        some = torch.ones(len(rollout), dtype=torch.bool)
        space = module.terms[0].space
        ours, whole, base = (
            m.make_passes(rollout).log_probs(space, some) for m in (module, plain, attached(objective, folder))
        )
        assert float((ours - whole).abs().max()) < 1e-4
        assert float((ours - base).abs().max()) > 0.1
        gradient(module, rollout)
        gradient(plain, rollout)
        of_whole = dict(plain.policy.model.named_modules())
        for name, layer in module.policy.adapters.layers.items():
            by_weight = of_whole[name].weight.grad
            close(layer.lora_A.grad, layer.scale * layer.lora_B.T @ by_weight, 1e-4)
            close(layer.lora_B.grad, layer.scale * by_weight @ layer.lora_A.T, 1e-4)
        trained = {name for name, p in module.policy.named_parameters() if p.grad is not None}
        assert trained == {f"model.{name}" for name in module.policy.adapters.parameters()}


def test_merged_weights_are_fp32_whatever_the_precision(model_folder):
    policy = moved(model_folder("llama-tied"), GRPO).policy
    alone = {name: weight.clone() for name, weight in policy.named_weights()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(weight, alone[name]) for name, weight in policy.named_weights())


def test_new_adapters_change_nothing(model_folder):
    folder = model_folder("llama-tied")
    policy, plain = Policy.from_pretrained(folder, lora=LORA), Policy.from_pretrained(folder)
    for (name, ours), (other, theirs) in zip(policy.named_weights(), plain.named_weights(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert torch.equal(weight_sketch(policy), weight_sketch(plain))
    # forward, and backward without the weights' own gradients
    assert 3 * TrainingFlops(policy).training(0, 0, 1) == 2 * TrainingFlops(plain).training(0, 0, 1) > 0


def test_the_reference_is_the_model_without_adapters(model_folder, make_rollout):
    folder, rollout = model_folder("llama-tied"), make_rollout()
    module = attached(GRPO, folder, lora=LORA)
    reference = Reference(module.policy)
    module.policy.adapters.put(moved(folder).policy.adapters.values())
    some = torch.ones(len(rollout), dtype=torch.bool)
    with reference.in_place(module.policy):
        ours = module.make_passes(rollout).log_probs("post-train", some)
    assert torch.equal(ours, attached(GRPO, folder).make_passes(rollout).log_probs("post-train", some))
    assert reference.state_dict(module.policy).keys() == dict(module.policy.trained()).keys()  # no copy of the base


def test_a_base_that_rests_in_16_bits(model_folder, make_rollout):
    """Its gradients are as far from those in fp32 as those of an fp32 base in bf16-mixed are."""
    folder, rollout = model_folder("llama-tied"), make_rollout()
    exact = gradient(moved(folder), rollout)
    found = {}
    for base in ("float32", "bfloat16"):
        module = moved(folder, lora=Lora(4, 8, base=base))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found[base] = gradient(module, rollout)
    held = module.policy.model.get_input_embeddings().weight, module.policy.model.model.norm.weight
    assert [w.dtype for w in held] == [torch.bfloat16, torch.float32]
    errors = {base: float((g - exact).norm() / exact.norm()) for base, g in found.items()}
    assert errors["bfloat16"] < 2 * errors["float32"] < 0.2


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    """A run of two lives with a KL penalty, in this process: its folder and its module."""
    out = tmp_path_factory.mktemp("lora")
    return out, two_lives(model_folder("llama-tied"), out, kl=0.1)


def test_a_checkpoint_holds_the_adapters_alone(run, model_folder):
    out, module = run
    checkpoint = torch.load(out / "step=1.ckpt", weights_only=True)
    names = dict(module.policy.trained())
    assert checkpoint["state_dict"].keys() == {f"policy.{name}" for name in names}
    assert checkpoint["lora"]["folded"] == []
    trained = sum(p.numel() for p in names.values())
    assert trained < sum(p.numel() for p in module.policy.parameters()) / 3
    shape = ModelShape.of_config(load_config(model_folder("llama-tied")), LORA)
    assert shape.trained == trained
    assert checkpoint_bytes(shape) == trained * 12 * 101 // 100


@pytest.mark.parametrize("start", [1, 3])
def test_resumed_in_either_life_equals_uninterrupted(run, tmp_path, model_folder, start):
    """Behind the merge too, where the base is no longer the folder's."""
    out, module = run
    again = weights(two_lives(model_folder("llama-tied"), tmp_path, out / f"step={start}.ckpt", kl=0.1))
    whole, base = weights(module), weights(attached(GRPO, model_folder("llama-tied")))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert any(float((whole[name] - base[name]).norm()) > 1e-2 * float(base[name].norm()) for name in whole)


def test_what_was_learned_before_a_merge_is_kept(run):
    """The two lives' adapters together make the model of the end."""
    out, _ = run
    first, last = (torch.load(out / f"step={n}.ckpt", weights_only=True) for n in (2, 4))
    (folded,) = last["lora"]["folded"]
    assert all(torch.equal(folded[n], first["state_dict"][f"policy.model.{n}"]) for n in folded)


def test_a_checkpoint_s_weights_for_an_evaluation(run, model_folder):
    out, module = run
    found = dict(checkpoint_weights(out / "step=4.ckpt", model_folder("llama-tied")))
    assert all(torch.equal(found[name], weight) for name, weight in weights(module).items())


def test_two_ranks_train_and_keep_the_same(run, tmp_path, model_folder):
    out, module = run
    model = model_folder("llama-tied")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1, "TORCHELASTIC_RUN_ID": "test"}
    worker = Path(__file__).with_name("lora_runs.py")
    environments = [
        os.environ | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in (0, 1)
    ]
    finish_together([Forked([worker, r, tmp_path, model], env=env) for r, env in enumerate(environments)])
    whole, base = weights(module), weights(attached(GRPO, model))
    kept = torch.load(out / "step=4.ckpt", weights_only=True)
    for name in ("ddp", "fsdp2", "ddp_resumed", "fsdp2_resumed"):
        folder = tmp_path / name
        found, exported = torch.load(folder / "weights.pt"), load_file(folder / "model" / "model.safetensors")
        for key, weight in whole.items():
            assert float((found[key] - weight).norm()) <= 1e-4 * float((weight - base[key]).norm()), (name, key)
            assert torch.equal(exported[key], found[key])
        theirs = torch.load(folder / "step=4.ckpt", weights_only=True)
        assert theirs["state_dict"].keys() == kept["state_dict"].keys()
        assert len(theirs["lora"]["folded"]) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_rollouts_are_the_adapted_policy_s(model_folder, shape):
    """vLLM's, after updates: far from the base, and as the trainer has them."""
    model = GRPO(model=model_folder(shape), lr=2e-2, lora=LORA)
    trainer = fit(model, VLLMEngine(max_model_len=64, kv_cache_mib=32), steps=3)
    assert float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-4
    rollout, some = model.rollout, torch.ones(len(model.rollout), dtype=torch.bool)
    base = attached(GRPO, model_folder(shape)).make_passes(rollout).log_probs("post-train", some)
    assert float((base - rollout.log_probs).abs().mean()) > 0.05


# ---------------------------------------------------------------------- exports


def test_the_adapter_s_folder_is_peft_s(run, tmp_path, model_folder):
    """Over the folder's own weights, though a life was merged: its product is in it, as more rank."""
    _, module = run
    export(module, tmp_path / "model", torch.float32)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    assert config["base_model_name_or_path"] == model_folder("llama-tied")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = weights(attached(GRPO, model_folder("llama-tied")))
    for name in module.policy.adapters.layers:
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{k}.weight") for k in "AB")
        close(base[f"{name}.weight"] + 2 * b @ a, load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"])
    assert not tensors


def test_peft_and_transformers_read_the_folder(run, tmp_path, model_folder):
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    _, module = run
    export(module, tmp_path / "model", torch.float32)
    ids = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama-tied"), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)


# ---------------------------------------------------------------------- what is refused


def test_an_adapter_s_folder_is_no_model(run, tmp_path):
    export(run[1], tmp_path / "model", torch.float32)
    with pytest.raises(InputError, match=r"adapter' holds adapters alone\. Give the whole model"):
        Policy.from_pretrained(str(tmp_path / "adapter"))


def test_checkpoints_of_other_runs_are_refused(run, tmp_path, model_folder):
    out, _ = run
    model, path = model_folder("llama-tied"), out / "step=1.ckpt"
    resume.check_weights(path, model, LORA)
    with pytest.raises(InputError, match=r"holds adapters alone \(LoRA\): give model\.init_args\.lora as its run had"):
        resume.check_weights(path, model)
    with pytest.raises(
        InputError, match=r"of another model or model\.init_args\.lora: .*lora_A is \(4, 64\).*\(8, 64\)"
    ):
        resume.check_weights(path, model, Lora(rank=8))
    with pytest.raises(InputError, match=r"lora_A is \(4, 64\) in it, and absent in"):
        resume.check_weights(path, model, Lora(rank=4, targets=["q_proj"]))
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {}, "loops": {}, "pytorch-lightning_version": "2"}, whole)
    with pytest.raises(InputError, match="holds all weights, and this run trains adapters: leave"):
        resume.check_weights(whole, model, LORA)
    # the same shapes, other weights
    policy = Policy.from_pretrained(model)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    policy.model.save_pretrained(tmp_path / "other")
    load_tokenizer(model).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"step=1\.ckpt holds adapters of a base with other weights\. Give the model"):
        two_lives(str(tmp_path / "other"), tmp_path / "runs", path, kl=0.1)
    with pytest.raises(InputError, match="holds adapters of a base with other weights"):
        checkpoint_weights(path, str(tmp_path / "other"))
    with pytest.raises(
        InputError, match=r"has adapters of \(rank, alpha\) \(4, 8\), model\.init_args\.lora is of \(4, 4"
    ):
        two_lives(model, tmp_path / "runs", path, lora=Lora(4, 4))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, r"lora\.rank: 0 must be"),
        ({"alpha": 0}, r"lora\.alpha: 0 must be"),
        ({"dropout": 0.1}, r"lora\.dropout: 0\.1: .* Write 0"),
        (
            {"targets": ["q_porj"]},
            r"targets: 'q_porj' names no linear layer of LlamaForCausalLM.* Did you mean q_proj\?",
        ),
        ({"targets": ["lm_head"]}, r"targets: 'lm_head' names no linear layer .* but the output head's"),
        ({"targets": []}, r"targets: \[\] is no layer"),
        (
            {"base": "bfloat16"},
            r"base: bfloat16 while trainer\.precision is 32-true.* Write trainer\.precision: bf16-mixed",
        ),
    ],
)
def test_what_no_adapters_can_be_made_of(model_folder, lora, said):
    with pytest.raises(InputError, match=said):
        fit(GRPO(model=model_folder("llama-tied"), lora=Lora(**lora)), VLLMEngine(max_model_len=64))


def test_merges_and_successors(model_folder):
    model, engine = model_folder("llama-tied"), VLLMEngine(max_model_len=64)
    with pytest.raises(
        InputError, match=r"merge: the optimizer's state is of the old adapters\. Write optimizer: reset"
    ):
        PolicyReincarnation(1, GRPO(), merge=True)
    merge = PolicyReincarnation(1, GRPO(), optimizer="reset", merge=True)
    with pytest.raises(InputError, match=r"merge: at step 1 there are no adapters\. Leave merge out\."):
        fit(GRPO(model=model), engine, callbacks=[merge])
    with pytest.raises(InputError, match=r"merge: at step 1 bfloat16 would round .*lora\.base: float32"):
        fit(GRPO(model=model, lora=Lora(base="bfloat16")), engine, callbacks=[merge], precision="bf16-mixed")
    other = PolicyReincarnation(1, GRPO(lora=Lora(rank=2)))
    with pytest.raises(InputError, match="leave its lora out"):
        fit(GRPO(model=model, lora=LORA), engine, callbacks=[other])


def test_of_python_the_configuration_is_that_of_yaml():
    found = described(GRPO(model="embedded", lora=Lora(targets=["q_proj"])))["init_args"]["lora"]
    assert found == {"rank": 16, "alpha": 32.0, "targets": ["q_proj"], "dropout": 0.0, "base": "float32"}


# ---------------------------------------------------------------------- memory


def test_what_a_run_of_adapters_holds(model_folder):
    config = load_config(model_folder("llama-tied"))
    shape = ModelShape.of_config(config)
    adapted = ModelShape.of_config(config, LORA)
    halved = ModelShape.of_config(config, Lora(4, 8, base="bfloat16"))
    own = 4 * adapted.adapters
    held = training_bytes(adapted, "ddp", 2, "bf16-mixed", copies=1)
    assert (held.weights, held.gradients, held.moments) == (4 * shape.parameters + own, own, 2 * own)
    assert (held.copies, held.buckets) == (own, own)
    one_dimensional = 5 * 64  # norms
    assert halved.frozen_bytes == 2 * shape.parameters + 2 * one_dimensional
    assert training_bytes(halved, "fsdp2", 2, "bf16-mixed").weights == (halved.frozen_bytes // 2) + own // 2
