"""`prerl plan`: sizes against models as transformers builds them and public counts, work against what an update counts,
memory against what the run itself reckons, and what is said of runs that do not fit. Peaks: benchmarks/plan.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from test_update import attached

from prerl_lightning import planning
from prerl_lightning.budget import GIB, ModelShape, pass_bytes, rank_budget
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.alignment import comparison_bytes
from prerl_lightning.metrics.utilisation import TrainingFlops, attended_tokens
from prerl_lightning.objectives import GRPO, MixedRL
from prerl_lightning.planning.memory import Memory, lowered
from prerl_lightning.planning.parts import Asked, known_shape, planned
from prerl_lightning.planning.work import CARDS, Rollouts, card, step_tokens, work
from prerl_lightning.policy.model import Policy
from prerl_lightning.rollout.engine import EngineSizes
from prerl_lightning.types import Prompt, Response, Rollout

DSRL = str(Path(__file__).parents[1] / "configs" / "dsrl.yaml")
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}
PUBLIC = {  # class, options, layers, hidden, intermediate, heads, parameters
    "SmolLM2-135M": (
        *("LlamaConfig", {"vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True}),
        *(30, 576, 1536, 9, 134_515_008),
    ),
    "Llama-3.1-8B": ("LlamaConfig", LLAMA, 32, 4096, 14336, 32, 8_030_261_248),
    "Llama-3.1-70B": ("LlamaConfig", LLAMA, 80, 8192, 28672, 64, 70_553_706_496),
    "Qwen2.5-0.5B": (
        *("Qwen2Config", {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}),
        *(24, 896, 4864, 14, 494_032_768),
    ),
    "Qwen3-4B": ("Qwen3Config", QWEN3 | {"tie_word_embeddings": True}, 36, 2560, 9728, 32, 4_022_468_096),
    "Qwen3-8B": ("Qwen3Config", QWEN3, 36, 4096, 12288, 32, 8_190_735_360),
    "Qwen3-32B": ("Qwen3Config", QWEN3, 64, 5120, 25600, 64, 32_762_123_264),
    "Qwen3-30B-A3B": (
        *("Qwen3MoeConfig", QWEN3 | {"num_key_value_heads": 4, "moe_intermediate_size": 768}),
        *(48, 2048, 6144, 32, 30_532_122_624),
    ),
}


def config_of(name):
    kind, options, layers, hidden, intermediate, heads, _ = PUBLIC[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    experts = {"num_experts": 128, "num_experts_per_tok": 8} if "moe_intermediate_size" in options else {}
    return getattr(transformers, kind)(num_attention_heads=heads, **sizes, **options, **experts)


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_those_of_the_public_model(name):
    shape = ModelShape.of_config(config_of(name))
    assert shape.parameters == PUBLIC[name][-1]
    if "A3B" in name:  # 120 of 128 experts, of three matrices each
        assert shape.idle_parameters == 48 * 120 * 3 * 2048 * 768
        assert TrainingFlops(shape).body + TrainingFlops(shape).head == pytest.approx(3.04e9, rel=0.01)
    else:
        assert shape.idle_parameters == 0


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "options"), [("Llama", {}), ("Qwen2", {}), ("Qwen3", {}), ("Qwen3Moe", MOE)])
def test_a_shape_and_a_policy_count_the_same_flops(kind, options, tied):
    config = getattr(transformers, f"{kind}Config")(
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, **SMALL, **options
    )
    with torch.device("meta"):
        policy = Policy(transformers.AutoModelForCausalLM.from_config(config))
    assert vars(TrainingFlops(ModelShape.of_config(config))) == vars(TrainingFlops(policy))


@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"epochs": 2}])
@pytest.mark.parametrize("objective", [GRPO, MixedRL])
def test_work_is_what_an_update_counts(model_folder, objective, options):
    """Of a rollout in which all responses are equally long and contribute."""
    module = attached(objective, model_folder("llama-tied"), max_tokens_per_microbatch=256, **options)
    sizes = Rollouts(prompts=3, prompt=40, group=4, response=12)
    rollout = Rollout.of(
        [Prompt(i, (1, *range(3, 42)), "", "") for i in range(3)],
        [Response(range(3, 15), [-2.0] * 12, "", False) for _ in range(12)],
        group_ids=torch.arange(3).repeat_interleave(4),
        rewards=torch.tensor([0.0, 1.0, 0.0, 1.0] * 3, dtype=torch.float64),
        policy_version=0,
        temperature=1.0,
    )
    update = module.make_update(rollout)
    flops, tokens, passes = 0.0, 0, 0
    for term in module.terms:
        batches = update.passes.micro_batches(term.space, torch.ones(12, dtype=torch.bool))
        attended = [attended_tokens(batch) for batch in batches]
        tokens += sum(map(len, attended))
        passes += len(batches)
        flops += sum(update.flops(a, len(b.targets)) for a, b in zip(attended, batches, strict=True))
    shape = ModelShape.of_config(module.live_policy.model.config)
    found = work(module, shape, sizes, "single", 1, "32-true", 256, False, on_gpu=False)
    epochs = options.get("epochs", 1)
    assert step_tokens(module, sizes, 256, on_gpu=False) == found.once == tokens
    assert found.tokens == epochs * tokens
    once_more = 1 / 3 if epochs > 1 else 0.0  # the forward pass for old log-probs
    assert found.training == pytest.approx((epochs + once_more) * flops)
    assert epochs * passes >= found.passes > 0.6 * epochs * passes


def test_an_entropy_s_block_makes_packs_smaller():
    shape = ModelShape.of_config(config_of("Qwen2.5-0.5B"))
    terms = ("bf16-mixed", True)
    assert pass_bytes(replace(shape, entropy=True), 8192, *terms) > 1.02 * pass_bytes(shape, 8192, *terms)


def test_a_comparison_of_gradients_that_does_not_fit_is_refused():
    shape = ModelShape.of_config(config_of("SmolLM2-135M"))
    needed = comparison_bytes(shape.parameters, None, 0)
    assert needed == 16 * shape.parameters
    assert comparison_bytes(1 << 29, None, 0) == comparison_bytes(shape.parameters, 499979, 0) == 0
    options = {"longest": 512, "checkpointing": True, "max_tokens": 512, "precision": "bf16-mixed"}
    without = rank_budget(shape, 12 * GIB, (GIB, 0), **options)
    assert rank_budget(shape, 12 * GIB, (GIB, 0), **options, watching=needed).comparison > without.peak
    with pytest.raises(InputError, match=r"comparing gradients needs .* alignment.every_n_steps: 0"):
        rank_budget(shape, without.peak + (1 << 20), (GIB, 0), **options, watching=needed)


# ---------------------------------------------------------------------- of a configuration


@pytest.fixture
def of(tmp_path, monkeypatch):
    """A function that plans configs/dsrl.yaml with changes, for a model by its config.json alone."""
    monkeypatch.setattr("sys.argv", ["prerl"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")

    def files(text="{}", model=None):
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(text)
        if model:
            config_of(model).save_pretrained(tmp_path / model)
            (tmp_path / "model.yaml").write_text(
                f"model: {{class_path: NSRPreRL, init_args: {{model: {tmp_path / model}}}}}"
            )
        return [DSRL, *([str(tmp_path / "model.yaml")] if model else []), str(overlay)]

    return files


ENGINE = "engine: {class_path: VLLMEngine, init_args: {max_model_len: 4096}}"
LONG = f"sampling: {{group_size: 8, max_new_tokens: 3072}}, {ENGINE}"


def test_a_plan_for_gpus_is_what_the_run_reckons(of):
    callbacks = (
        "[{class_path: PolicyReincarnation, init_args: {at_step: 2, successor: {class_path: GRPO, init_args: "
        "{kl_coefficient: 0.1, entropy_coefficient: 0.01}}}}]"
    )
    trainer = f"trainer: {{accelerator: gpu, devices: 8, strategy: fsdp2, callbacks: {callbacks}}}"
    run = Asked.of_files(of(f"data: {{{LONG}}}\n{trainer}", "Qwen3-4B"), on_gpu=True)
    found = planned(run, "H100")
    shape, total = replace(ModelShape.of_config(config_of("Qwen3-4B")), entropy=True), int(78.5 * GIB)
    same = rank_budget(shape, total, (total // 2, 0), 3072 + 512, "fsdp2", 8, "bf16-mixed", copies=1)
    assert found.memory.budget == same
    assert {phase: sum(parts.values()) for phase, parts in found.memory.phases.items()} == {
        "rollout": same.rollout,
        "training": same.step,
    }  # of 503 M weights a rank the comparison is by sketches
    assert found.fits
    assert found.host == {"loading": 0, "checkpoint": 12 * shape.parameters}
    assert found.work.training > 3 * found.work.sampling > 0
    assert 0 < found.seconds.sampling < found.seconds.step

    told = json.loads(json.dumps(planning.as_json(planned(run, "h100", 32))))
    assert told["ranks"] == 32
    assert told["fits"] is True
    assert told["memory_bytes"]["training"]["moments"] == 8 * shape.parameters // 32
    assert told["step"]["sampled_tokens"] == 32 * 8 * 3072
    # of 126 M weights a rank it is exact
    assert told["memory_bytes"]["comparing"]["comparison"] > 16 * shape.parameters // 32
    with pytest.raises(InputError, match="do not divide over 3 ranks"):
        planned(run, "H100", 3)


def test_what_does_not_fit_says_what_to_lower_first(of):
    text = f"data: {{{LONG}}}\nmodel: {{class_path: NSRPreRL, init_args: {{chunked_head: false}}}}"
    run = Asked.of_files(of(text, "Qwen3-8B"), on_gpu=True)
    found = planned(run, "H100", 2)
    assert found.memory.problem.startswith("GPU memory: ")
    assert not found.fits
    lines = planning.lines(found)
    assert "It DOES NOT FIT" in "\n".join(lines)
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    options = {words.split(":")[0]: fits for words, _, fits in found.lower}
    assert next(iter(options)) == "model.init_args.chunked_head"
    assert list(options)[-2:] == ["trainer.strategy", "trainer.devices"]
    assert [option for option, fits in options.items() if fits] == ["trainer.devices"]
    number = int(found.lower[-1][0].split()[1].strip(","))
    chunked = replace(found.setup, shape=replace(found.setup.shape, whole_logits=False), strategy="fsdp2")
    assert Memory(replace(chunked, world_size=number)).fits(found.free)
    assert not Memory(replace(chunked, world_size=number // 2)).fits(found.free)
    without = replace(found.setup, total=GIB, engine=replace(found.setup.engine, kv_cache=0))
    assert lowered(without, GIB, prompts=32) == []  # nothing makes room for the engine


def test_a_plan_of_the_demo_on_this_cpu(of, capsys):
    planning.plan([f"--config={DSRL}"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:2] == ["NSRPreRL -> GRPO on embedded: 867,968 parameters", "this CPU, single, 32-true"]
    run = Asked.of_files(of("trainer: {strategy: fsdp2}"), on_gpu=False)
    found = planned(run, devices=2)
    assert found.setup.longest == 144
    assert found.setup.engine.kv_tokens * 4096 == 128 << 20
    assert found.seconds is None
    assert found.memory.phases["checkpoint"]["checkpoint"] == 12 * 867_968
    assert found.memory.phases["training"]["moments"] == 4 * 867_968
    assert "buckets" in Memory(replace(found.setup, strategy="ddp")).phases["training"]


def test_a_plan_takes_the_keys_of_a_run(of, capsys, refused):
    """Of files and keys the later wins, as in a run."""
    later = of("data: {prompts_per_step: 4}")[-1]
    keys = ["--data.sampling.group_size", "2", "--trainer.precision", "bf16-mixed", "--data.prompts_per_step=8"]
    planning.plan([*keys, "--config", "dsrl.yaml", "--config", later, "--data.sampling.max_new_tokens=10", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["precision"], found["step"]["group"]) == ("bf16-mixed", 8)
    assert found["step"]["sampled_tokens"] == 4 * 8 * 10
    planning.plan([f"--config={DSRL}", *keys, "--json"])
    found = json.loads(capsys.readouterr().out)["step"]
    assert (found["prompts"], found["group"]) == (8, 2)
    assert "Did you mean response_tokens?" in refused("plan", f"--config={DSRL}", "--response_token=3")
    assert "prerl plan: give --config FILE" in refused("plan", "--gpu=H100")


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_frozen_base_is_reckoned_in_what_it_rests_in(of, tmp_path, base):
    """Which is not what the model's files are in."""
    lora = f"model: {{class_path: NSRPreRL, init_args: {{lora: {{base: {base}}}}}}}"
    files = of(f"{lora}\ntrainer: {{precision: bf16-mixed}}", "SmolLM2-135M")
    config = json.loads((tmp_path / "SmolLM2-135M" / "config.json").read_text())
    (tmp_path / "SmolLM2-135M" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    shape = Asked.of_files(files, on_gpu=False).shape
    norms = 576 * (2 * 30 + 1)
    assert shape.frozen_bytes == (4 * shape.parameters if base == "float32" else 2 * (shape.parameters + norms))


def test_an_engine_whose_share_holds_no_sequence_is_refused(of):
    """Engines go over no several GPUs, however many there are."""
    run = Asked.of_files(of(f"data: {{{LONG}}}\ntrainer: {{strategy: fsdp2}}", "Qwen3-32B"), on_gpu=True)
    found = planned(run, "H100", 32)
    assert "its share has room for 0 tokens" in found.memory.problem
    ((words, _, fits),) = found.lower
    assert words.startswith("data.engine.init_args.gpu_memory_utilization: 0.8")
    assert fits
    with pytest.raises(InputError, match="room for 10 tokens"):
        EngineSizes(weights=GIB, kv_cache=100, kv_token=10).check(11)
    EngineSizes().check(11)


def test_what_is_not_known_is_refused_in_a_line(of, refused, tmp_path):
    transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=90).save_pretrained(tmp_path / "mamba")
    files = of(f"model: {{class_path: NSRPreRL, init_args: {{model: {tmp_path / 'mamba'}}}}}")
    said = refused("plan", *(f"--config={file}" for file in files))
    assert "no plan can be made for mamba (no attention)" in said
    assert len(said.splitlines()) == 1
    custom = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}, "hidden_size": 32}
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "config.json").write_text(json.dumps(custom))
    with pytest.raises(InputError, match="brings code of its own"):
        known_shape(GRPO(model=str(tmp_path / "custom")), [])
    transformers.Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path / "mixed")
    with pytest.raises(InputError, match=r"qwen3_next \(layers of linear_attention\)"):
        known_shape(GRPO(model=str(tmp_path / "mixed")), [])
    assert "Did you mean H100?" in refused("plan", "--config", DSRL, "--gpu", "H10")
    assert "--devices 0: give 1 or more" in refused("plan", "--config", DSRL, "--devices", "0")
    assert "no such file" in refused("plan", "--config", "nowhere.yaml")


def test_every_card_has_a_peak():
    assert all(each.flops > 1e13 and each.gib > 20 for each in CARDS.values())
    assert card("a100-40") is CARDS["A100-40"]


@pytest.mark.parametrize(("gpu", "sequences"), [("H100", 1024), ("B200", 1024), ("A100", 256), ("L40S", 256)])
def test_vllm_decodes_so_many_at_a_time(gpu, sequences):
    """By vLLM's arg_utils.py, of the card's name and memory."""
    assert CARDS[gpu].sequences == sequences
