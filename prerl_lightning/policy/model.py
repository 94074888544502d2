"""The policy: a causal LM whose forward returns token log-probs.

Everything that touches parameters happens inside `Policy.forward`, because DDP and FSDP2 hook the forward of the
module they wrap: an output head called from outside would see a shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prerl_lightning.errors import InputError

EMBEDDED = Path(__file__).parents[1] / "assets" / "arithmetic"

# Logits alive at once in the head, in elements: more tokens than this allows go chunk by chunk, and a chunk's
# logits are made again in the backward pass instead of being kept. 2^24 fp32 elements are 64 MiB.
HEAD_CHUNK_ELEMENTS = 1 << 24


def model_path(model: str) -> str:
    """``"embedded"`` is the tiny model shipped with the package; all else goes to `from_pretrained` as it is."""
    return str(EMBEDDED) if model == "embedded" else model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_existing(model))


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
class MicroBatch:
    """Right-padded rows for one forward pass, and where in them the response tokens are predicted.

    A causal model never looks to the right, so right padding needs no attention mask.

    Args:
        input_ids: (B, L).
        predictors: (T,) positions in the flattened (B * L) rows whose hidden state predicts a response token.
        targets: (T,) the response tokens, response after response.
        sequence: (T,) the number of each token's response within the rollout.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequence: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


class Policy(nn.Module):
    """Wraps a Hugging Face causal LM. Parameter names are the model's behind ``model.``.

    Args:
        model: the LM; its dropout is switched off, since the log-probs of a sampled response must be those it was
            sampled with.
    """

    def __init__(self, model: PreTrainedModel) -> None:
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

    @classmethod
    def from_pretrained(
        cls, model: str, attn_implementation: str | None = None, gradient_checkpointing: bool = False
    ) -> "Policy":
        """fp32 master weights. Raises InputError, with the mend, where ``model`` is no model folder."""
        kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
        lm = AutoModelForCausalLM.from_pretrained(_existing(model), dtype=torch.float32, **kwargs)
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(lm)

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        """(T,) fp32 log-probs of ``batch.targets``, logits divided by ``temperature`` as in sampling."""
        body = cast(nn.Module, self.model.base_model)
        hidden = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predictors)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        rows = max(1, HEAD_CHUNK_ELEMENTS // head.weight.shape[0])
        if len(hidden) <= rows:
            return self._head_log_probs(hidden, batch.targets, temperature)
        chunks = [
            checkpoint(self._head_log_probs, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(rows), batch.targets.split(rows), strict=True)
        ]
        return torch.cat(cast(list[Tensor], chunks))

    def _head_log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """hidden (T, H) -> (T,); the T x V logits live only in here."""
        head = cast(nn.Linear, self.model.get_output_embeddings())
        logits = head(hidden).float() * self.logit_scale
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return -F.cross_entropy(logits / temperature, targets, reduction="none")

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
