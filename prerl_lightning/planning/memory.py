"""What each rank of a run has to hold, by phase and by part, and which options to lower where that is too much.

On GPUs it is `budget.rank_budget`, which the run itself asks; on a CPU the same sums, with the program's own memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from prerl_lightning.budget import (
    RESERVED,
    ModelShape,
    PackChoice,
    RankBudget,
    Strategy,
    choose_pack,
    head_bytes,
    pass_bytes,
    rank_budget,
    training_bytes,
)
from prerl_lightning.errors import InputError
from prerl_lightning.objectives.passes import CPU_PACK_TOKENS
from prerl_lightning.rollout.engine import EngineSizes

PROGRAM = 800 << 20  # Python with torch, transformers, Lightning and vLLM on a CPU, measured: benchmarks/plan.py
SHARE = "data.engine.init_args.gpu_memory_utilization"

Parts = dict[str, int]  # bytes by part


@dataclass(frozen=True)
class Setup:
    """What memory follows from.

    Args:
        total: bytes of a rank's GPU that are free before anything of the run is loaded; None: a CPU.
        longest: tokens of the longest prompt and response.
        step_tokens: input tokens of a rank in one step: no pack on a CPU is larger; None: not known.
        copies: see `budget.training_bytes`.
        checkpointing: None: chosen, as is ``max_tokens``, of a pack.
        watching: see `objectives.memory.watching`, by the number of a rank's weights that are trained.
        sleeps: the engine hands its memory back between rollouts.
    """

    shape: ModelShape
    total: int | None
    strategy: Strategy
    world_size: int
    precision: str
    longest: int
    step_tokens: int | None
    copies: int
    checkpointing: int | None
    max_tokens: int | None
    engine: EngineSizes
    sleeps: bool
    watching: Callable[[int], int] = field(default=lambda parameters: 0)

    @property
    def awake(self) -> int:
        """Bytes of the engine."""
        return self.engine.weights + self.engine.kv_cache

    @property
    def asleep(self) -> int:
        return 0 if self.sleeps else self.awake

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp2"

    @property
    def own(self) -> int:
        """Of the weights that are trained, how many a rank holds."""
        return self.shape.trained // (self.world_size if self.sharded else 1)


class Memory:
    """Of one rank.

    Attributes:
        held: `TrainingBytes`.
        pack: the largest pack.
        problem: why it does not fit, of a GPU.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.problem = setup, ""
        if setup.total is None:
            self.budget = self._on_cpu()
        else:
            try:
                self.budget = self._on_gpu(setup.total, setup.checkpointing, setup.max_tokens)
            except InputError as error:
                self.problem = str(error)
                self.budget = self._least(setup.total)
        self.held, self.pack = self.budget.held, self.budget.pack

    def _on_gpu(self, total: int, checkpointing: int | None, max_tokens: int | None) -> RankBudget:
        s = self.setup
        s.engine.check(s.longest)
        return rank_budget(
            *(s.shape, total, (s.awake, s.asleep), s.longest, s.strategy, s.world_size, s.precision),
            *(s.copies, checkpointing, max_tokens, s.watching(s.own)),
        )

    def _least(self, total: int) -> RankBudget:
        """That which does not fit, with the smallest pack."""
        s = self.setup
        recompute: int = True if s.checkpointing is None else s.checkpointing
        tokens = s.max_tokens or s.longest
        pack = choose_pack(s.shape, 0, s.longest, s.precision, recompute, tokens, s.sharded)
        watching = s.watching(s.own)
        if watching:
            watching += pass_bytes(s.shape, s.longest, s.precision, recompute, sharded=s.sharded)
        held = training_bytes(s.shape, s.strategy, s.world_size, s.precision, s.copies)
        return RankBudget(total, s.awake, s.asleep, held, pack, watching)

    def _on_cpu(self) -> RankBudget:
        s = self.setup
        recompute = s.checkpointing or 0

        def room(tokens: int) -> int:
            return pass_bytes(s.shape, tokens, s.precision, recompute, sharded=s.sharded, on_cpu=True)

        most = s.max_tokens or CPU_PACK_TOKENS
        tokens = max(min(most, s.step_tokens or most), s.longest)
        watching = s.watching(s.own)
        held = training_bytes(s.shape, s.strategy, s.world_size, s.precision, s.copies)
        pack = PackChoice(tokens, recompute, room(tokens))
        return RankBudget(0, s.awake, s.awake, held, pack, watching + room(s.longest) if watching else 0)

    @cached_property
    def phases(self) -> dict[str, Parts]:
        """The parts of each phase; only what is there."""
        s, held, on_cpu = self.setup, self.held, self.setup.total is None
        steady = {
            "program" if on_cpu else "reserved": PROGRAM if on_cpu else RESERVED,
            "weights": held.weights,
            "moments": held.moments,
            "copies": held.copies,
            "buckets": held.buckets,
        }
        awake = {"engine_weights": s.engine.weights, "kv_cache": s.engine.kv_cache}
        asleep = {} if s.sleeps and not on_cpu else awake
        tokens = max(self.pack.tokens, s.longest)
        logits = min(head_bytes(s.shape, tokens, on_cpu), self.pack.bytes)
        pack = {"gathered": held.gathered, "activations": self.pack.bytes - logits, "logits": logits}
        found = {
            "rollout": steady | awake,
            "training": steady | {"gradients": held.gradients} | pack | asleep,
            "comparing": steady | {"gathered": held.gathered, "comparison": self.budget.watching} | asleep,
            # rank 0 alone; on GPUs it lies in the host's memory. Gradients are freed by then, but lie between what is
            # kept, and glibc does not give such memory back (benchmarks/sharded_memory.py)
            "checkpoint": steady | asleep | {"gradients": held.gradients, "checkpoint": 12 * s.shape.trained},
        }
        if not self.budget.watching:
            del found["comparing"]
        if not (on_cpu and s.sharded):
            del found["checkpoint"]
        return {phase: {part: size for part, size in parts.items() if size} for phase, parts in found.items()}

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    def fits(self, free: int) -> bool:
        """Into ``free`` bytes: a GPU's, or the host's, where all ranks are."""
        return not self.problem and self.peak * (1 if self.setup.total is not None else self.setup.world_size) <= free


def host_bytes(setup: Setup, ranks_on_node: int) -> Mapping[str, int]:
    """Of a node with GPUs, besides what each process takes: while the model loads, which every rank does on the CPU in
    fp32 unless fsdp2 has each read its shards, and for a checkpoint of one file, which rank 0 of fsdp2 gathers."""
    loading = 0 if setup.sharded else 4 * setup.shape.parameters * ranks_on_node
    return {"loading": loading, "checkpoint": 12 * setup.shape.trained if setup.sharded else 0}


def lowered(setup: Setup, free: int, prompts: int) -> list[tuple[str, int, bool]]:
    """What to change where it does not fit, in the order of what it costs, each besides those before it: the option,
    the peak then in bytes, and whether that fits. What lowers nothing is left out; ends with what fits, if anything.
    ``prompts``: of a step, which ranks have to share evenly."""
    found: dict[str, tuple[str, int, bool]] = {}  # by option: of several values the last
    here = Memory(setup)
    total, one = setup.total, setup.longest * setup.engine.kv_token
    if total is not None and setup.engine.kv_cache < one:
        tenths = next((n for n in range(1, 10) if n * total // 10 - setup.engine.weights >= one), None)
        if tenths is None:
            return []
        setup = replace(setup, engine=replace(setup.engine, kv_cache=tenths * total // 10 - setup.engine.weights))
        here = Memory(setup)
        found[SHARE] = (f"{SHARE}: 0.{tenths}, for a KV cache", here.peak, here.fits(free))
    for words, changed in _changes(setup, prompts) if not here.fits(free) else ():
        there = Memory(changed(here.setup))
        before, peak = (m.peak * (1 if setup.total is not None else m.setup.world_size) for m in (here, there))
        if there.fits(free) or peak < 0.99 * before:
            here = there
            found[words.partition(":")[0]] = (words, there.peak, there.fits(free))
            if there.fits(free):
                break
    return list(found.values())


def _changes(setup: Setup, prompts: int) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """First what changes nothing but time."""
    shape = setup.shape
    on_cpu = setup.total is None
    if setup.max_tokens is None or setup.max_tokens > setup.longest:
        words = f"model.init_args.max_tokens_per_microbatch: {setup.longest}"
        yield words, lambda s: replace(s, max_tokens=s.longest)
    yield "model.init_args.gradient_checkpointing: true", lambda s: replace(s, checkpointing=True)
    if shape.whole_logits:
        yield "model.init_args.chunked_head: true", lambda s: replace(s, shape=replace(s.shape, whole_logits=False))
    if not on_cpu and not setup.sleeps:
        yield "data.engine.init_args.sleep_between_rollouts: true", lambda s: replace(s, sleeps=True)
    for tenths in range(9, 0, -1) if setup.total is not None else ():
        cache = tenths * (setup.total or 0) // 10 - setup.engine.weights
        if setup.longest * setup.engine.kv_token <= cache < setup.engine.kv_cache:
            smaller = replace(setup.engine, kv_cache=cache)
            words = f"{SHARE}: 0.{tenths}"
            yield words, lambda s, smaller=smaller: replace(s, engine=smaller)  # type: ignore[misc]
    yield "alignment.every_n_steps: 0", lambda s: replace(s, watching=lambda parameters: 0)
    if setup.world_size > 1 and not setup.sharded:
        yield "trainer.strategy: fsdp2", lambda s: replace(s, strategy="fsdp2")
    ranks = setup.world_size
    while not on_cpu and prompts % (ranks := 2 * ranks) == 0:
        words = f"trainer.devices: {ranks}, under fsdp2"
        yield words, lambda s, ranks=ranks: replace(s, strategy="fsdp2", world_size=ranks)  # type: ignore[misc]
    of_values = setup.copies // 4 * 4  # `objectives.memory.copies`
    if of_values:
        yield "value_body: policy in all lives", lambda s: replace(s, copies=s.copies - of_values)
    yield "kl_coefficient: 0 in all lives", lambda s: replace(s, copies=s.copies // 4 * 4)
