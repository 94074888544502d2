"""What the rest of the library asks of an inference engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prerl_lightning.budget import GIB, ModelShape
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.types import Response

OnGroup = Callable[[int, list[Response]], None]
# bounds of both ways to draw responses
LEAST = {"top_k": 0, "max_new_tokens": 1}
ABOVE = {"temperature": 0, "top_p": 0}
MOST = {"top_p": 1}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        group_size: G, responses a prompt.
        temperature: > 0; the trainer divides its logits by the same number.
        top_p: below 1 the engine's log-probs are those of the cut distribution, and differ from the trainer's.
        top_k: likewise; 0 is off.
        max_new_tokens: a response is cut there, and known as truncated.
        stop: strings that end a response; they are cut from its text, their tokens are trained on.
        stop_token_ids: token ids that end a response, besides the model's own end of text.
    """

    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bounds(self, "data.sampling", {**LEAST, "group_size": 1}, ABOVE, MOST)


@dataclass(frozen=True)
class HeldOutSampling:
    """How responses to held-out problems are drawn, where that is another way than in training; None: the same.

    Args:
        temperature: > 0.
        top_p: of the most probable tokens.
        top_k: likewise; 0 is off.
        max_new_tokens: a response is cut there.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "data.val_sampling", LEAST, ABOVE, MOST)

    def over(self, training: Sampling) -> Sampling:
        return replace(training, **{key: value for key, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Place:
    """Which of the ranks an engine belongs to, and the device that it shares with the rank's trainer.

    Args:
        rank: of world_size.
        local_rank: on this node.
        device: with its index, where there are several of its kind.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    )


@dataclass(frozen=True)
class EngineSizes:
    """Bytes of an engine's weights, of its KV cache and of a token in it, and how many sequences are decoded at a time,
    where that is known. All 0: an engine that does not say."""

    weights: int = 0
    kv_cache: int = 0
    kv_token: int = 0
    sequences: int | None = None

    @property
    def kv_tokens(self) -> int:
        return self.kv_cache // self.kv_token if self.kv_token else 0

    def check(self, longest: int) -> None:
        """Raises InputError where the KV cache has no room for a sequence of so many tokens."""
        if self.kv_token and self.kv_tokens < longest:
            raise InputError(
                f"data.engine: beside its weights ({self.weights / GIB:.1f} GiB; no engine goes over several GPUs) its "
                f"share has room for {self.kv_tokens:,} tokens, and the longest prompt and response have {longest:,}. "
                "What helps: a larger data.engine.init_args.gpu_memory_utilization or kv_cache_mib; a smaller model."
            )


class Engine(ABC):
    """Samples from the policy's current weights. One engine a rank, in the training process.

    An engine is an inert bag of options until `start`.
    """

    #: optimizer steps behind the weights it holds; None: whatever the model folder held
    policy_version: int | None = None
    #: of its weights, known from `start` on
    weights_dtype: torch.dtype | None = None
    #: what the first update changed although it was given the weights of the engine's own folder (version 0)
    suspects: Sequence[str] = ()

    @abstractmethod
    def max_model_len(self, config: PretrainedConfig) -> int:
        """Tokens of prompt and response together, for a model of this (text) configuration; before `start` too."""

    def check(self, model: str, config: PretrainedConfig) -> None:  # noqa: B027  (optional)
        """Before `start`: raises InputError for options that cannot work with ``model``, a folder or hub id of this
        (text) configuration."""

    @abstractmethod
    def start(self, model: str, seed: int, place: Place) -> None:
        """Load the model on ``place.device``. After torch.distributed has been initialised, if it is going to be.

        Raises:
            InputError: it cannot run there, or has no room for one sequence of `max_model_len`.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        greedy: bool = False,
        on_group: OnGroup | None = None,
    ) -> list[list[Response]]:
        """G responses for each prompt, in order; G = 1 and temperature 0 if ``greedy``.

        Args:
            prompts: P token-id lists, each at least one token shorter than `max_model_len`.
            seeds: (P,); the same seed gives the same responses, whatever else is in the batch.
            on_group: called with a prompt's position and its responses as soon as they are there.
        """

    @abstractmethod
    def update_weights(self, named_weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Take over the weights, one tensor at a time under its name on disk, and forget cached prefixes.

        Raises:
            InputError: it cannot take over all of them.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop cached prefixes."""

    def stop(self) -> None:  # noqa: B027  (optional)
        """Free what it holds; `start` may follow."""

    def device_bytes(self, shape: ModelShape, total: int) -> tuple[int, int]:
        """Of ``total`` bytes of a GPU, what it takes when awake and when asleep; before `start` too."""
        return 0, 0

    def sizes(self, shape: ModelShape, config: PretrainedConfig, total: int | None) -> "EngineSizes":
        """On a GPU of ``total`` bytes; None: on a CPU. Before `start`."""
        return EngineSizes()

    def sleep(self) -> None:  # noqa: B027  (optional: an engine on the CPU has nothing to hand back)
        """Hand the accelerator's memory to the training step, until the next `update_weights`."""
