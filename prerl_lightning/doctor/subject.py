"""What the checks share: the form of a result, and what they look at. Nothing heavy is imported with this module."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from prerl_lightning.budget import ModelShape
    from prerl_lightning.policy.model import Policy
    from prerl_lightning.run import PrerlCLI

Status = Literal["PASS", "FAIL", "SKIP"]

GIB = 1 << 30


@dataclass(frozen=True)
class Result:
    """Of one check.

    Args:
        seen: one line, with units.
        mend: the configuration key or the command that helps; empty unless it failed.
        figures: the numbers in ``seen``, for ``--json``.
        details: further lines.
    """

    status: Status
    seen: str
    mend: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    details: tuple[str, ...] = ()


def result(seen: str, mends: Sequence[str] = (), details: Sequence[str] = (), **figures: Any) -> Result:
    """PASS, or FAIL where there is something to mend. ``seen`` is a format string over ``figures``."""
    return Result(
        "FAIL" if any(mends) else "PASS",
        seen.format(**figures),
        " ".join(m for m in dict.fromkeys(mends) if m),
        figures,
        tuple(details),
    )


def skipped(why: str) -> Result:
    return Result("SKIP", why)


@dataclass
class Subject:
    """What is examined.

    Args:
        model: folder or hub id; None: the configuration's, else a tiny random one.
        configs: files as for ``prerl fit``.
        folder: for what checks write; removed in the end.
        engine: the one that `rollouts.engine` has started, for the check behind it.
        environment: for child processes: as the user has it. vLLM, once imported, sets variables.
    """

    model: str | None
    configs: Sequence[str]
    folder: Path
    engine: Any = None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    @cached_property
    def configured(self) -> "PrerlCLI | None":
        """The configuration parsed, its parts made and nothing started; None: there is none.

        Raises:
            InputError, SystemExit: as `prerl fit` does.
        """
        if not self.configs:
            return None
        from prerl_lightning.run import RunParts

        model = [f"--model.init_args.model={self.model}"] if self.model else []
        files = [f"--config={file}" for file in self.configs]
        return RunParts.run(["fit", *files, *model, "--trainer.logger=false"])

    @cached_property
    def model_name(self) -> str:
        """Of the model that sizes are taken from."""
        return self.model or (str(self.configured.model.model_name) if self.configured else self.tiny)

    @cached_property
    def shape(self) -> "ModelShape":
        from prerl_lightning.budget import ModelShape
        from prerl_lightning.policy.model import load_config

        lora = self.configured.model.lora if self.configured else None
        return ModelShape.of_config(load_config(self.model_name), lora)

    @cached_property
    def device(self) -> "torch.device":
        """The first GPU, else the CPU."""
        import torch

        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def tiny(self) -> str:
        """Folder of a random Qwen3 of two layers with real head sizes, and the embedded model's tokenizer."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from prerl_lightning.policy.model import load_tokenizer

        tokenizer = load_tokenizer("embedded")
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=256,
            initializer_range=0.2,  # sharp distributions: a stale weight shows
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        folder = self.folder / "tiny"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def policy(self, model: str) -> "Policy":
        """On the device, in fp32."""
        from prerl_lightning.policy.model import Policy

        return Policy.from_pretrained(model).to(self.device)


def first_line(error: BaseException) -> str:
    """Of an error, all of it for an InputError; where it says nothing, the place instead."""
    from prerl_lightning.errors import InputError

    text = str(error).strip()
    if isinstance(error, InputError):
        return text
    if not text or isinstance(error, SystemExit):
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = traceback.tb_frame.f_code.co_filename if traceback is not None else "?"
        text = f"{text} at {Path(place).name}:{traceback.tb_lineno if traceback is not None else 0}".strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
