"""The engine samples from the policy that is trained, or the run does not start."""

from pathlib import Path

import pytest
import torch
from architectures import MIXTURES, make
from parity import parity_reward
from safetensors.torch import load_file
from test_update import attached, close, gradient
from trainers import quiet_trainer

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import InputError
from prerl_lightning.evaluation.weights import checkpoint_weights
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.policy.model import Policy, load_tokenizer
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout import vllm_engine
from prerl_lightning.rollout.engine import Sampling
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.types import Response, Rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of a family, of sizes that vLLM takes on a CPU."""

    def found(family):
        path = tmp_path_factory.mktemp(family)
        tokenizer = load_tokenizer("embedded-sums")
        make(family, vocab_size=len(tokenizer), head_dim=32, hidden_size=128).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return found


def fit(model, engine, steps=1, val=None, **sampling):
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=parity_reward,
        verification=Verification(workers=0),
        val=val,
        sampling=Sampling(group_size=3, max_new_tokens=12, **sampling),
        engine=engine,
        prompts_per_step=4,
        val_samples=1,
    )
    trainer = quiet_trainer(
        max_steps=steps,
        val_check_interval=100,
    )
    trainer.fit(model, datamodule=data)
    return trainer


def small_engine():
    return VLLMEngine(max_model_len=64, kv_cache_mib=32)


SOON = "mixtral"  # the others take half a minute each


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family == SOON else pytest.mark.slow)
        for family, outcome in MIXTURES.items()
        if outcome == "agrees"
    ],
)
def test_a_mixture_of_experts_is_sampled_as_it_is_trained(folder, caplog, family):
    """Over several updates, of which vLLM's own reload makes noise on a CPU."""
    model = GRPO(model=folder(family), lr=1e-2, mismatch_samples=4)
    with caplog.at_level("WARNING"):
        trainer = fit(model, small_engine(), steps=3)
    assert float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-4
    assert "differ by" not in caplog.text


def test_a_corrupting_update_stops_the_run_before_it_samples_and_is_named(folder, monkeypatch):
    """Experts left as vLLM reloads them."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    engine, reload = small_engine(), vllm_engine._reload

    def without_packing(worker, named_weights):
        with monkeypatch.context() as patch:
            patch.setattr(CPUUnquantizedExperts, "process_weights_after_loading", lambda self, layer: None)
            return reload(worker, named_weights)

    monkeypatch.setattr(vllm_engine, "_reload", without_packing)
    monkeypatch.setattr(RolloutDataModule, "evaluate", None)
    model = GRPO(model=folder("qwen3_moe"))
    with pytest.raises(InputError, match=r"another policy .* nats apart .*experts\S*w13_weight.*suspected"):
        fit(model, engine, val=ArithmeticProblems("held_out", 4))
    assert model.rollout is None


def test_weights_that_vllm_leaves_as_they_are_stop_the_run(folder):
    """Experts and sinks of gpt-oss: equal to the policy's at the start, and never again."""
    with pytest.raises(InputError, match="does not take over new weights of GptOssRoutedExperts"):
        fit(GRPO(model=folder("gpt_oss")), small_engine())


@pytest.fixture(scope="module")
def llama_engine():
    return small_engine()


def test_each_life_is_checked_and_the_bound_is_a_setting(model_folder, llama_engine, monkeypatch):
    from prerl_lightning.callbacks.reincarnation import PolicyReincarnation
    from prerl_lightning.objectives import agreement

    checked = []
    plain = agreement.check
    monkeypatch.setattr(agreement, "check", lambda module: (checked.append(type(module).__name__), plain(module)))
    first, second = NSRPreRL(model=model_folder("llama-tied"), lr=1e-3), GRPO(lr=1e-3)
    trainer = quiet_trainer(
        max_steps=3,
        callbacks=[PolicyReincarnation(at_step=1, successor=second)],
    )
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=parity_reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=3, max_new_tokens=12),
        engine=llama_engine,
        prompts_per_step=4,
    )
    trainer.fit(first, datamodule=data)
    assert checked == ["NSRPreRL", "GRPO"]
    with pytest.raises(InputError, match="1e-12 are allowed"):
        fit(GRPO(model=model_folder("llama-tied"), mismatch_bound=1e-12), llama_engine)


def test_the_check_changes_no_sample(model_folder, llama_engine, monkeypatch):
    found = []
    for check in (True, False):
        if not check:
            monkeypatch.setattr("prerl_lightning.objectives.agreement.check", lambda module: None)
        model = GRPO(model=model_folder("llama-tied"))
        fit(model, llama_engine)
        found.append(model.rollout)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].log_probs, found[1].log_probs)


def test_a_step_beyond_the_bound_is_warned_of(model_folder, llama_engine, caplog):
    model = GRPO(model=model_folder("llama-tied"), mismatch_bound=0.05)
    with caplog.at_level("WARNING"):
        fit(model, llama_engine, steps=2, top_p=0.3)  # the engine's log-probs are those of the cut distribution
    assert caplog.text.count("engine and trainer differ by") == 1
    assert "top_p and top_k" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_responses_whose_log_probs_are_not_finite_are_left_out(model_folder, make_rollout, bad):
    rollout = make_rollout(4, 4, rewards=[0.0, 1.0] * 8)
    log_probs = [r.log_probs.copy() for r in rollout.responses]
    log_probs[5][0] = bad
    given = Rollout.of(
        rollout.prompts,
        [Response(r.token_ids, p, "", False) for r, p in zip(rollout.responses, log_probs, strict=True)],
        group_ids=rollout.group_ids,
        rewards=rollout.rewards,
        policy_version=0,
        temperature=0.7,
    )
    # the same without it: an empty response has no token in the loss, its reward is still its group's
    without = Rollout.of(
        rollout.prompts,
        [Response([], [], "", False) if i == 5 else r for i, r in enumerate(rollout.responses)],
        group_ids=rollout.group_ids,
        rewards=rollout.rewards,
        policy_version=0,
        temperature=0.7,
    )
    for objective in (GRPO, NSRPreRL):
        options = {"importance_sampling": "token", "minibatches": 2}
        module = attached(objective, model_folder("llama-tied"), **options)
        ours, expected = (gradient(module, r) for r in (given, without))
        assert ours.isfinite().all()
        close(ours, expected)
    assert int((~module.make_passes(given).sound).sum()) == 1


def test_untrained_weights_have_the_folder_s_names_and_values(tmp_path, folder):
    """What the engine is given, in a run and by `prerl evaluate --ckpt_path`."""
    path = folder("mixtral")
    disk = load_file(Path(path) / "model.safetensors")
    policy = Policy.from_pretrained(path)
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"policy.{name}": t for name, t in policy.state_dict().items()}}, checkpoint)
    for given in (dict(policy.named_weights()), dict(checkpoint_weights(checkpoint, path))):
        assert given.keys() == disk.keys()
        assert all(torch.equal(given[name], disk[name]) for name in disk)


def test_the_check_is_no_inference(model_folder, monkeypatch):
    """Lightning validates in inference mode on a GPU, where FSDP2's first forward would spoil all that follow."""
    from plain_engine import PlainEngine

    from prerl_lightning.objectives import agreement

    seen = []

    class Seeing(PlainEngine):
        def generate(self, *args, **kwargs):
            seen.append(torch.is_inference_mode_enabled())
            return super().generate(*args, **kwargs)

    plain = agreement.check

    def as_on_a_gpu(module):
        with torch.inference_mode():
            plain(module)

    monkeypatch.setattr(agreement, "check", as_on_a_gpu)
    fit(GRPO(model=model_folder("llama-tied")), Seeing())
    assert seen == [False, False]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_that_one_of_two_rounds_the_weights_is_said_once(model_folder, caplog, precision):
    """Most of an update of 1e-5 is nothing in 16 bits: where one side alone has it, they part from step to step."""
    from lora_runs import fit

    engine = VLLMEngine(max_model_len=64, kv_cache_mib=32, dtype="bfloat16")
    fit(GRPO(model=model_folder("llama-tied"), lr=1e-5, mismatch_bound=1.0), engine, steps=2, precision=precision)
    said = [r.getMessage() for r in caplog.records if "rounds the weights" in r.getMessage()]
    assert len(said) == (precision == "32-true")
