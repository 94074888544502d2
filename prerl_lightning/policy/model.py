"""The policy: a causal LM whose forward returns token log-probs.

Everything that touches parameters happens inside `Policy.forward`, because DDP and FSDP2 hook the forward of the
module they wrap: an output head called from outside would see a shard.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import torch.distributed as dist
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from prerl_lightning import hub, ranks
from prerl_lightning.errors import InputError, in_one_line, nearest
from prerl_lightning.policy import attention, probe, sharded
from prerl_lightning.policy.head import head_log_probs, log_probs_of
from prerl_lightning.policy.lora import Adapters, Lora
from prerl_lightning.policy.packing import MicroBatch
from prerl_lightning.terminal import no_bars

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"embedded": ASSETS / "countdown", "embedded-sums": ASSETS / "sums"}  # data/tasks/


def model_path(model: str) -> str:
    """``embedded`` and ``embedded-sums`` are the package's tiny models; all else goes to `from_pretrained`."""
    return str(EMBEDDED.get(model, model))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Of a Hugging Face folder or hub id, or an embedded model. Raises InputError where there is none."""
    return _load(AutoTokenizer, model)


def load_config(model: str) -> PretrainedConfig:
    """Of the language model, where there are more parts."""
    return _load(AutoConfig, model).get_text_config()


def _load(loader: Any, model: str, **options: Any) -> Any:
    """``loader.from_pretrained``; what is wrong with a folder or hub id becomes an InputError."""
    path = _existing(model)
    try:
        # said, or transformers asks at the terminal whether to run the model's own code
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # safetensors, json, transformers and the hub each raise their own
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model: {model!r} brings code of its own (auto_map in its config.json), which is not run here. Give a "
                "model of an architecture that transformers has."
            ) from error
        if isinstance(error, UnpicklingError):
            raise InputError(
                f"model: {model!r}: its pickled weights are damaged or hold more than tensors, which could run any "
                "code. Take a model whose weights are in safetensors."
            ) from error
        if Path(path).is_dir():
            mend = "The folder is damaged or not whole; fetch or export it again."
        elif constants.is_offline_mode():
            raise InputError(
                f"model: {model!r} is no folder here, and the hub, from which it was not fetched before, cannot be "
                "reached. Give a folder that holds the model."
            ) from error
        else:
            mend = (
                "Give a Hugging Face model folder, a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or 'embedded'."
            )
        raise InputError(f"model: {model!r} cannot be loaded: {in_one_line(error, 200)} {mend}") from error


def _existing(model: str) -> str:
    path = model_path(model)
    if (Path(path).expanduser() / "adapter_config.json").is_file():
        raise InputError(f"model: {model!r} holds adapters alone. Give the whole model; a run's is model, beside it.")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise InputError(
            f"model: {model!r} is no folder with a config.json. Give a Hugging Face model folder, a hub id "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct, or 'embedded'."
        )
    if looks_local or Path(path).exists():
        return str(Path(path).expanduser())
    if "/" not in path and (meant := nearest(path, EMBEDDED)):
        raise InputError(f"model: there is no {model!r}.{meant}")
    hub.look()
    return path


def load_model(model: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """In fp32. Raises InputError, by name, for weights that the folder lacks or has too many, of another shape, or not
    finite: transformers draws what is missing at random."""
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with no_bars():  # of "Loading weights"
            lm, found = _load(AutoModelForCausalLM, model, **options, **kwargs)
    except InputError as error:
        if not attn_implementation or not isinstance(error.__cause__, (ImportError, ValueError)):
            raise
        said = in_one_line(error.__cause__)
        raise InputError(
            f"model.init_args.attn_implementation: {attn_implementation!r} does not work here: {said}"
        ) from error
    shapes = [n if isinstance(n, str) else n[0] for n in found["mismatched_keys"]]
    wrong = {
        "are missing": found["missing_keys"],
        # causal masks, which GPT-2 and GPT-J once stored
        "are none of this model's": [
            n for n in found["unexpected_keys"] if not re.search(r"\.attn\.(masked_)?bias$", n)
        ],
        "have another shape than its config.json says": shapes,
        "are not finite": [name for name, p in _held(lm) if p.is_floating_point() and not p.isfinite().all()],
    }
    for what, names in wrong.items():
        _refuse(model, lm, what, names)
    return lm


def _refuse(model: str, lm: PreTrainedModel, what: str, names: Iterable[str]) -> None:
    if named := sorted(names):
        shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        raise InputError(
            f"model: {model!r}: weights of {type(lm).__name__} {what}: {shown}. The folder is damaged or belongs "
            "to another architecture; fetch or export it again."
        )


def empty_model(model: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """As `load_model` has it, its parameters on the meta device; buffers that are in no file (rotary frequencies) are
    computed."""
    config = _load(AutoConfig, model)
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}

    def on_meta(module: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
        known = parameter is None or parameter.is_meta  # as a tied one is
        return None if known else nn.Parameter(cast(Tensor, parameter).to("meta"))

    hook = register_module_parameter_registration_hook(cast(Callable[..., None], on_meta))  # so torch has its type
    try:
        lm = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs))
    finally:
        hook.remove()
    with suppress(OSError):
        lm.generation_config = GenerationConfig.from_pretrained(_existing(model))
    return lm


def given_prefix(prefix: str | int | None) -> str | int | None:
    """As it was meant on a command line: digits are an id, double quotes around a text are not part of it."""
    if isinstance(prefix, str) and prefix.isdecimal():
        return int(prefix)
    quoted = isinstance(prefix, str) and len(prefix) > 2 and prefix[0] == prefix[-1] == '"'
    return prefix[1:-1] if isinstance(prefix, str) and quoted else prefix


def prefix_token(tokenizer: PreTrainedTokenizerBase, prefix: str | int | None) -> int:
    """The id of the token in front of y in log p(y).

    Default: BOS where the tokenizer has one, else the first token of its chat format, which stands in for it.

    Raises:
        InputError: ``prefix`` is not one token, or there is no default.
    """
    if isinstance(prefix, int):
        if not 0 <= prefix < len(tokenizer):
            raise InputError(f"prefix: id {prefix} is outside the tokenizer's {len(tokenizer)} tokens.")
        return prefix
    if prefix is None:
        if tokenizer.bos_token_id is not None:
            return int(tokenizer.bos_token_id)
        if not tokenizer.chat_template:
            raise InputError(
                "prefix: the tokenizer has neither a BOS token nor a chat template, so give model.init_args.prefix "
                "the token (string or id) that log p(y) shall start from."
            )
        prefix = str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
        return int(tokenizer(prefix, add_special_tokens=False)["input_ids"][0])
    ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"prefix: {prefix!r} is {len(ids)} tokens for this tokenizer; it must be one.")
    return int(ids[0])


def _held(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and persistent buffers."""
    yield from lm.named_parameters()
    for prefix, module in lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def as_on_disk(
    lm: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], made: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """The weights of ``lm``, which may be on the meta device, by their names on disk, each behind ``made``.

    A layer's are made at a time, since transformers may hold in one parameter what is several on disk (experts); in an
    order by names, however ``lm`` was made.
    """
    by_layer = sorted(weights, key=lambda entry: _layer(entry[0]))
    for _, layer in groupby(by_layer, key=lambda entry: _layer(entry[0])):
        yield from sorted(revert_weight_conversion(lm, {name: made(held) for name, held in layer}).items())


def _layer(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.weight``; of what is in no layer the name itself."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class Policy(nn.Module):
    """Wraps a Hugging Face causal LM. Parameter names are the model's behind ``model.``.

    The model stays in eval mode in training too, whatever is called: the log-probs of a sampled response must be those
    it was sampled with, without dropout or a router's noise.

    Args:
        model: the LM.
        chunked_head: no tokens x vocabulary tensor (policy/head.py); False: the model's own logits, all at once.
    """

    def __init__(self, model: PreTrainedModel, chunked_head: bool = True) -> None:
        super().__init__()
        self.model = model
        self.logit_scale, self.logit_softcap = 1.0, cast(float | None, None)  # log-probs of scale * cap(logits)
        self.can_pack = self.can_share = False  # responses in one row; and of one prompt behind one pass over it
        self.head_shapes: set[tuple[int, int, int, int]] = set()  # of its attention, as packs were seen to have them
        self.chunked_head = chunked_head
        self.recomputes = False
        self.adapters: Adapters | None = None  # None: all weights are trained
        self.compute_device: torch.device | None = None  # where it is not its parameters'
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        attn_implementation: str | None = None,
        gradient_checkpointing: int = False,
        chunked_head: bool = True,
        longest: int | None = None,
        lora: Lora | None = None,
        sharding: sharded.Sharding | None = None,
    ) -> "Policy":
        """fp32 master weights, on the CPU; or of these each rank its shards, where ``sharding`` has them.

        Whatever device is the default around it (Lightning's `configure_model` makes the rank's GPU it): transformers
        would ask for accelerate there, and TF32 would blur what packs are compared by.

        Args:
            longest: tokens of a sequence, at most, for models whose rotary frequencies depend on it.
            lora: train adapters alone. None: all weights.
            sharding: a strategy that shards; then collective.

        Raises:
            InputError: ``model`` is no model folder, its weights are not all there and finite, `Policy` would not
                give what the model gives (policy/probe.py), or it has not the layers that ``lora`` targets.
        """
        # for every new shape cuDNN makes a plan, which takes a second, and packs have new shapes at every step
        torch.backends.cuda.enable_cudnn_sdp(False)
        with torch.device("cpu"):

            def made(lm: PreTrainedModel) -> Policy:
                policy = cls(lm, chunked_head)
                probe.fix_rotary(policy, longest)
                return policy

            def empty() -> Policy:
                return made(empty_model(model, attn_implementation))

            found = sharding and sharded.load(empty, probe.prepare, _existing(model), sharding, lora)
            if found:
                policy, broken = found
                _refuse(model, policy.model, "are not finite", broken)
            else:
                policy = made(load_model(model, attn_implementation))
                probe.prepare(policy)
                if lora is not None:
                    policy.adapt(lora)
        policy.checkpoint_activations(gradient_checkpointing)
        return policy

    def adapt(self, lora: Lora) -> None:
        """Put adapters in place, and freeze all else. From now on `state_dict` holds the adapters alone.

        Raises:
            InputError: the model has not the layers that ``lora`` targets.
        """
        self.adapters = Adapters(self.model, lora)
        self.register_state_dict_post_hook(_without_base)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters that training changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        return self.compute_device or next(self.parameters()).device

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, tied ones once, and persistent buffers, by the model's own names."""
        return _held(self.model)

    def as_stored(self, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What `held` gives, by names on disk."""
        return as_on_disk(self.model, held.items())

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, L, V), by the model alone."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    def take_choices(self, other: "Policy") -> None:
        """How ``other``, of the same model, was found to be computed (policy/probe.py)."""
        for name in ("logit_scale", "logit_softcap", "can_pack", "can_share", "head_shapes"):
            setattr(self, name, getattr(other, name))
        if self.model.config._attn_implementation != (theirs := other.model.config._attn_implementation):
            self.model.set_attn_implementation(theirs)

    def train(self, mode: bool = True) -> "Policy":
        """Eval mode, always."""
        return super().train(False)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all trained weights are: by their norm, which keeps no copy. The same on all ranks; collective."""
        total = torch.nn.utils.get_total_norm([p for _, p in self.trained()])
        broken = (~torch.isfinite(ranks.full(total))).to("cpu", torch.int64)
        return not int(ranks.all_reduce(broken, dist.ReduceOp.MAX))

    def checkpoint_activations(self, every: int) -> None:
        """Recompute the activations of every so manieth layer in the backward pass; 0: keep all. Of transformers'
        layers, but without its own switch, which asks for training mode."""
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if every and not layers:
            raise InputError(
                f"model.init_args.gradient_checkpointing: {type(self.model).__name__} does not say which of its "
                "modules can be recomputed."
            )
        for i, layer in enumerate(layers):
            layer.__dict__.pop("forward", None)
            if every and i % every == 0:
                layer.forward = partial(_recomputed, layer.forward)  # type: ignore[method-assign]
        self.recomputes = bool(every)

    def attention_kernel(self, device: torch.device) -> attention.Kernel:
        """What packs are to be planned for: on a GPU in 16 bits the variable-length kernel, if it works there."""
        if device.type != "cuda" or not torch.is_autocast_enabled("cuda") or not self.head_shapes:
            return "sdpa"
        dtype = torch.get_autocast_dtype("cuda")
        return "varlen" if all(attention.varlen_works(device, dtype, *s) for s in self.head_shapes) else "sdpa"

    def forward(
        self,
        batch: MicroBatch,
        temperature: float = 1.0,
        entropy: bool = False,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(T,) fp32 log-probs of ``batch.targets``, fp64 of a model in it, logits divided by ``temperature`` as in
        sampling; and, where asked for, the (T,) entropies of their distributions.

        For ``backward()``, which finds the head's gradient already in place (`head_log_probs`, ``into_grad``).

        Args:
            read: what is returned instead of log-probs, of the (T, H) last hidden states in front of the targets.
        """
        packed: dict[str, Any] = {} if batch.plan is None else {"position_ids": batch.positions}
        if self.can_share and batch.plan is not None:
            packed["plan"] = batch.plan
        if not self.chunked_head and read is None:
            logits = self.model(input_ids=batch.input_ids, use_cache=False, **packed).logits
            return log_probs_of(logits.flatten(0, 1)[batch.predictors], batch.targets, 1 / temperature, entropy)
        body: Any = self.model.base_model
        if body is self.model:  # Llama 4 calls its body otherwise than it says
            body = next(m for m in self.model.children() if isinstance(m, PreTrainedModel))
        hidden = body(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predictors)
        if read is not None:
            return read(hidden), None
        head = cast(nn.Linear, self.model.get_output_embeddings())
        tied = head.weight is self.model.get_input_embeddings().weight
        return head_log_probs(
            hidden,
            head.weight,
            head.bias,
            batch.targets,
            self.logit_scale / temperature,
            self.logit_softcap,
            entropy,
            into_grad="no" if not head.weight.is_leaf else "also" if tied else "only",
        )

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights by the names that they have on disk, full tensors, tied ones once, adapters folded in: parameters
        in ``dtype``, and persistent buffers as they are.

        Under FSDP2 each is cast on its shard and then gathered, so that no second full copy of the model exists.
        The gathers are collective: every rank iterates to the end.
        """

        def whole(held: Tensor) -> Tensor:
            tensor = self._effective(held)
            if dtype is not None and isinstance(held, nn.Parameter):
                tensor = tensor.to(dtype)
            return ranks.full(tensor.to(self.device))

        return as_on_disk(self.model, self._base(), whole)

    def weights(self) -> Iterator[Tensor]:
        """What it computes with, tied ones once, adapters folded in, in an order that stays; under FSDP2 sharded."""
        return (self._effective(held) for _, held in self._base() if isinstance(held, nn.Parameter))

    def _base(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, held) for name, held in _held(self.model) if self.adapters is None or not held.requires_grad)

    def _effective(self, held: Tensor) -> Tensor:
        return held.detach() if self.adapters is None else self.adapters.merged(held)


def _without_base(policy: Policy, state: dict[str, Any], prefix: str, _: Any) -> None:
    trained = {prefix + name for name, _ in policy.trained()}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]
