"""The policy: a causal LM whose forward returns token log-probs.

Everything that touches parameters happens inside `Policy.forward`, because DDP and FSDP2 hook the forward of the
module they wrap: an output head called from outside would see a shard.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prerl_lightning.errors import InputError
from prerl_lightning.policy import attention
from prerl_lightning.policy.head import head_log_probs
from prerl_lightning.policy.packing import Family, MicroBatch, micro_batches
from prerl_lightning.types import Sequences

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[1] / "assets" / "arithmetic"


def model_path(model: str) -> str:
    """``"embedded"`` is the tiny model shipped with the package; all else goes to `from_pretrained` as it is."""
    return str(EMBEDDED) if model == "embedded" else model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    return _load(AutoTokenizer, model)


def load_config(model: str) -> PretrainedConfig:
    """Of the language model, where there are more parts."""
    return _load(AutoConfig, model).get_text_config()


def _load(loader: Any, model: str, **options: Any) -> Any:
    """``loader.from_pretrained``; what is wrong with a folder or hub id becomes an InputError."""
    try:
        return loader.from_pretrained(_existing(model), **options)
    except OSError as error:
        raise InputError(f"model: {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def _existing(model: str) -> str:
    path = model_path(model)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise InputError(
            f"model: {model!r} is no folder with a config.json. Give a Hugging Face model folder, a hub id "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct, or 'embedded'."
        )
    return str(Path(path).expanduser()) if looks_local else path


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


@dataclass(frozen=True)
class _WatchedPlan(attention.AttentionPlan):
    """Notes heads of queries and of keys, and their sizes."""

    plan: attention.AttentionPlan
    shapes: set[tuple[int, int, int, int]] = field(default_factory=set)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        self.shapes.add((query.shape[1], key.shape[1], query.shape[2], value.shape[2]))
        return self.plan.attend(query, key, value, scaling)


class Policy(nn.Module):
    """Wraps a Hugging Face causal LM. Parameter names are the model's behind ``model.``.

    Args:
        model: the LM; its dropout is switched off, since the log-probs of a sampled response must be those it was
            sampled with.
        chunked_head: no tokens x vocabulary tensor (policy/head.py); False: all logits at once.
    """

    def __init__(self, model: PreTrainedModel, chunked_head: bool = True) -> None:
        super().__init__()
        self.model = model.train()  # gradient checkpointing asks for it
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]
        config = model.config.get_text_config()
        # the names under which model families put a scale or a soft cap on their logits (Cohere, Granite, Gemma)
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.logit_softcap = getattr(config, "final_logit_softcapping", None)
        if self.logit_softcap and self.logit_scale != 1:
            raise InputError(f"model: {type(model).__name__} both scales and caps its logits: not implemented.")
        self.can_pack = self.can_share = False  # responses in one row; and of one prompt behind one pass over it
        self._head_shapes: set[tuple[int, int, int, int]] = set()  # of its attention, as packs were seen to have them
        self.chunked_head = chunked_head

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chunked_head: bool = True,
    ) -> "Policy":
        """fp32 master weights, on the CPU. Raises InputError, with the mend, where ``model`` is no model folder.

        Whatever device is the default around it (Lightning's `configure_model` makes the rank's GPU it): transformers
        would ask for accelerate there, and TF32 would blur what packs are compared by.
        """
        # for every new shape cuDNN makes a plan, which takes a second, and packs have new shapes at every step
        torch.backends.cuda.enable_cudnn_sdp(False)
        kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("cpu"):
            try:
                lm = _load(AutoModelForCausalLM, model, dtype=torch.float32, **kwargs)
            except (ImportError, ValueError) as error:
                if not attn_implementation:
                    raise
                raise InputError(f"attn_implementation: {attn_implementation!r} does not work here: {error}") from error
            policy = cls(lm, chunked_head)
            policy._prepare_packing()
        policy.checkpoint_activations(gradient_checkpointing)
        return policy

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        if enabled:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    @torch.no_grad()
    def _prepare_packing(self) -> None:
        """Switch to packed attention where a small pack gives what its sequences give alone, else say that packing
        is off: which models it covers is seen, not looked up."""
        before = self.model.config._attn_implementation
        reason = ""
        if before.startswith("flash_attention"):  # transformers cuts a row into sequences where its positions restart
            self.can_pack = True
        elif before != "sdpa":
            reason = f"its attention is {before}"
        elif any(kind != "full_attention" for kind in getattr(self.model.config, "layer_types", None) or ()):
            reason = "not all of its layers have full attention"
        else:
            contexts = Sequences.of([(1, 0, 2), (2,)])
            responses = Sequences.of([(0, 1, 2, 0, 1), (2, 2, 0), (1, 0)])
            made = [Family(contexts[0], (0, 1), (5, 3), shared=True), Family(contexts[1], (2,), (2,))]
            alone = [self(b)[0] for b in micro_batches(made, responses, 64, packed=False)]
            try:
                self.model.set_attn_implementation(attention.NAME)
                self.can_share = True
                (pack,) = micro_batches(made, responses, 64)
                assert pack.plan is not None
                watched = _WatchedPlan(pack.plan)
                together, _ = self(replace(pack, plan=watched))
                self._head_shapes = watched.shapes
                self.can_pack = torch.allclose(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
                reason = "packed sequences come out differently"
            except (TypeError, ValueError, NotImplementedError) as error:
                reason = str(error)
        if not self.can_pack:
            self.can_share = False
            self.model.set_attn_implementation(before)
            log.warning(
                "Responses are padded to the longest of a micro-batch instead of packed, which costs the passes over "
                "the padding, and one over the prompt for each response: %s: %s",
                *(type(self.model).__name__, reason),
            )

    def attention_kernel(self, device: torch.device) -> attention.Kernel:
        """What packs are to be planned for: on a GPU in 16 bits the variable-length kernel, if it works there."""
        if device.type != "cuda" or not torch.is_autocast_enabled("cuda") or not self._head_shapes:
            return "sdpa"
        dtype = torch.get_autocast_dtype("cuda")
        return "varlen" if all(attention.varlen_works(device, dtype, *s) for s in self._head_shapes) else "sdpa"

    def forward(
        self, batch: MicroBatch, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(T,) fp32 log-probs of ``batch.targets``, logits divided by ``temperature`` as in sampling; and, where asked
        for, the (T,) entropies of their distributions, without gradient.

        For ``backward()``, which finds the head's gradient already in place (`head_log_probs`, ``into_grad``).
        """
        body = cast(nn.Module, self.model.base_model)
        packed: dict[str, Any] = {} if batch.plan is None else {"position_ids": batch.positions}
        if self.can_share and batch.plan is not None:
            packed["plan"] = batch.plan
        hidden = body(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predictors)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        scale = self.logit_scale / temperature
        tied = head.weight is self.model.get_input_embeddings().weight
        return head_log_probs(
            hidden,
            head.weight,
            head.bias,
            batch.targets,
            scale,
            self.logit_softcap,
            self.chunked_head,
            entropy,
            into_grad="no" if not head.weight.is_leaf else "also" if tied else "only",
        )

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights by their Hugging Face names, one full tensor at a time, tied ones once.

        Under FSDP2 each is cast on its shard and then gathered, so that no second full copy of the model exists.
        The gathers are collective: every rank iterates to the end.
        """
        for name, parameter in self.model.named_parameters():
            tensor = parameter.detach()
            if dtype is not None:
                tensor = tensor.to(dtype)
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
