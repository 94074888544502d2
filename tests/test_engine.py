"""Real vLLM in this process: weights arrive, log-probs agree, seeds hold. What silently went wrong in other trainers
is left out on purpose here, to see that these tests would notice."""

import gc
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch

from prerl_lightning.policy.model import Policy
from prerl_lightning.rollout import vllm_engine
from prerl_lightning.rollout.engine import Place, Sampling
from prerl_lightning.rollout.vllm_arguments import llm_arguments
from prerl_lightning.rollout.vllm_engine import VLLMEngine

SHAPES = ["llama-tied", "llama-untied", "qwen2-tied", "qwen3-untied"]
# the second prompt is longer than a cache block of vLLM's CPU attention (128 tokens)
PROMPTS = [[1, 5, 6, 7], [1, *(3 + i % 26 for i in range(150))]]
SAMPLING = Sampling(group_size=4, temperature=0.8, max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(request, model_folder):
    folder = model_folder(request.param)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    engine = VLLMEngine(dtype="float32", max_model_len=256, kv_cache_mib=64)
    engine.start(folder, 0, Place(device=torch.device("cpu")))
    engine.folder = folder
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return engine


def moved_policy(folder, scale=0.05, seed=1):
    policy = Policy.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy


def difference(engine, policy):
    """Largest |engine - Hugging Face| over the log-probs of freshly sampled tokens."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING, [3, 10**9]), strict=True):
        for response in group:
            ids = torch.tensor([[*prompt, *response.token_ids]])
            with torch.no_grad():
                logits = policy.model(ids).logits[0, len(prompt) - 1 : -1] / SAMPLING.temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response.token_ids).long()[:, None])[:, 0]
            worst = max(worst, float((expected - torch.tensor(response.log_probs)).abs().max()))
    return worst


@pytest.mark.parametrize("engine", SHAPES, indirect=True)
class TestEngine:
    def test_groups_are_handed_on_while_others_are_sampled(self, engine):
        found = {}

        def on_group(i, group):
            found[i] = group, engine._llm.llm_engine.has_unfinished_requests()

        prompts = [PROMPTS[0], *[PROMPTS[0]] * 300]  # more than max_num_seqs, so that not all end in one step
        groups = engine.generate(prompts, SAMPLING, range(0, 9 * len(prompts), 9), on_group=on_group)
        assert [found[i][0] for i in range(len(prompts))] == groups
        assert sum(unfinished for _, unfinished in found.values()) > len(prompts) / 2

    def test_log_probs_agree_before_and_after_updates(self, engine):
        for seed in (1, 2):
            policy = moved_policy(engine.folder, seed=seed)
            engine.generate(PROMPTS, SAMPLING, [1, 2])  # fills the prefix cache with the old weights' values
            if seed == 1:
                assert difference(engine, policy) > 1e-2
            engine.update_weights(policy.named_weights(), policy_version=seed)
            assert engine.policy_version == seed
            assert difference(engine, policy) < 1e-4

    def test_it_would_be_seen_if_the_prefix_cache_were_not_reset(self, engine, monkeypatch):
        engine.generate(PROMPTS, SAMPLING, [1, 2])
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        policy = moved_policy(engine.folder, seed=3)
        engine.update_weights(policy.named_weights(), 3)
        assert difference(engine, policy) > 1e-2
        monkeypatch.undo()
        engine.update_weights(policy.named_weights(), 3)
        assert difference(engine, policy) < 1e-4

    def test_same_seed_same_responses_whatever_the_batch(self, engine):
        a = engine.generate(PROMPTS, SAMPLING, [11, 10**12])
        b = engine.generate([*PROMPTS[::-1], [1, 4]], SAMPLING, [10**12, 11, 5])
        assert [r.token_ids.tolist() for r in a[0]] == [r.token_ids.tolist() for r in b[1]]
        assert [r.token_ids.tolist() for r in a[1]] == [r.token_ids.tolist() for r in b[0]]
        assert len({tuple(r.token_ids) for r in a[0]}) > 1

    def test_many_long_prompts_with_seeds(self, engine):
        """Chunked prefill of a seeded request crashes vLLM on CPU, so prompts are never split."""
        prompts = [[1, *(3 + (i * j) % 26 for i in range(200))] for j in range(1, 65)]
        found = engine.generate(prompts, Sampling(group_size=2, max_new_tokens=4), list(range(64)))
        assert len(found) == 64
        assert all(len(group) == 2 for group in found)

    def test_how_responses_end(self, engine):
        found = engine.generate(PROMPTS[:1], Sampling(group_size=32, max_new_tokens=3), [7])[0]
        assert all(r.truncated == (len(r.token_ids) == 3 and r.token_ids[-1] != 2) for r in found)
        assert all(len(r.log_probs) == len(r.token_ids) for r in found)
        stopped = engine.generate(PROMPTS[:1], Sampling(group_size=32, max_new_tokens=40, stop=["1"]), [7])[0]
        assert any(not r.truncated for r in stopped)
        assert all("1" not in r.text for r in stopped)

    def test_texts_are_those_that_vllm_decodes_token_by_token(self, engine):
        from vllm import SamplingParams, TokensPrompt

        sampling = Sampling(group_size=4, max_new_tokens=12)
        found = engine.generate(PROMPTS, sampling, [11, 12])
        for prompt, seed, group in zip(PROMPTS, (11, 12), found, strict=True):
            params = SamplingParams(n=4, max_tokens=12, temperature=1.0, seed=seed)
            (output,) = engine._llm.generate([TokensPrompt(prompt_token_ids=list(prompt))], params, use_tqdm=False)
            assert [c.text for c in output.outputs] == [r.text for r in group]
            assert any(r.text for r in group)

    def test_an_interrupt_leaves_the_engine_usable(self, engine, monkeypatch):
        steps = iter(range(3))

        def interrupted(*args, **kwargs):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        step = engine._llm.llm_engine.step
        monkeypatch.setattr(engine._llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, SAMPLING, [1, 2])
        monkeypatch.undo()
        assert len(engine.generate(PROMPTS, SAMPLING, [1, 2])) == 2


@pytest.mark.parametrize("engine", ["llama-tied"], indirect=True)
def test_it_would_be_seen_if_a_tied_head_were_not_repacked(engine, monkeypatch):
    policy = moved_policy(engine.folder, seed=4)
    monkeypatch.setattr(
        vllm_engine, "_reload", lambda worker, named: worker.model_runner.reload_weights(weights_iterator=named)
    )
    engine.update_weights(policy.named_weights(), 4)
    assert difference(engine, policy) > 1e-2
    monkeypatch.undo()
    engine.update_weights(policy.named_weights(), 4)
    assert difference(engine, policy) < 1e-4


def test_a_text_stands_as_it_does_behind_its_prompt():
    """A tokenizer whose first word loses its space when it is decoded alone, as those of Llama 2 and Mistral do."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "\u2581a": 1, "\u2581b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert fast.decode([2, 3]) == "bc"
    assert vllm_engine.decode(fast, [0, 1], [[2, 3], [3], []]) == [" bc", "c", ""]
    assert vllm_engine.decode(fast, [0], [[2, 3]]) == ["bc"]


def test_one_engine_runs_in_a_process(model_folder):
    """An engine that ends takes vLLM's process groups from any other, at a moment that Python's collector chooses."""
    first, second = (VLLMEngine(dtype="float32", max_model_len=64, kv_cache_mib=32) for _ in range(2))
    first.start(model_folder("llama-tied"), 0, Place())
    said = first.generate(PROMPTS[:1], SAMPLING, [3])
    second.start(model_folder("qwen2-tied"), 0, Place())
    with pytest.raises(RuntimeError, match="does not run: call start"):
        first.generate(PROMPTS[:1], SAMPLING, [3])
    other = second.generate(PROMPTS[:1], SAMPLING, [3])
    first.start(model_folder("llama-tied"), 0, Place())  # starts anew, whatever it was started with before
    assert [r.text for r in first.generate(PROMPTS[:1], SAMPLING, [3])[0]] == [r.text for r in said[0]]
    second.start(model_folder("qwen2-tied"), 0, Place())
    del first
    gc.collect()
    assert [r.text for r in second.generate(PROMPTS[:1], SAMPLING, [3])[0]] == [r.text for r in other[0]]
    second.stop()


def test_engines_of_one_process_agree_whatever_the_number_of_threads_has_become(model_folder):
    """oneDNN keeps kernels for the packing of the first: seen 2 nats off with 2 threads after 1, or 1 after 2."""
    policy, before = moved_policy(model_folder("llama-tied")), torch.get_num_threads()
    engine = VLLMEngine(dtype="float32", max_model_len=256, kv_cache_mib=64)
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            engine.stop()
            engine.start(model_folder("llama-tied"), 0, Place())
            engine.update_weights(policy.named_weights(), 1)
            assert difference(engine, policy) < 1e-4
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        engine.stop()


def test_the_arguments_read_in_vllm_s_source_are_those_that_it_takes():
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    taken = {field.name for field in fields(EngineArgs)} | set(signature(vllm.LLM).parameters)
    assert llm_arguments(Path(vllm.__file__).parent) == taken - {"kwargs"}
