"""RolloutDataModule: prompts, engine, reward and validation set of a run, shared by all its lives."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch

from prerl_lightning import ranks
from prerl_lightning.arguments import check_kinds
from prerl_lightning.data.loader import PromptLoader, shuffled
from prerl_lightning.data.mixture import MixedPrompts, Mixture, settings_of
from prerl_lightning.data.preview import check_truths, show_first
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import CHECKED, PromptFormat, Prompts, encode_all
from prerl_lightning.data.rollouts import as_rollout, refill, signals
from prerl_lightning.data.sets import Sets, label
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.policy.model import load_config, load_tokenizer, model_path
from prerl_lightning.rewards.pool import RewardPool, Verification
from prerl_lightning.rewards.score import Reward
from prerl_lightning.rollout.engine import Engine, HeldOutSampling, Place, Sampling
from prerl_lightning.rollout.sampler import Group, Way, mixed_seed, sample, sample_for_evaluation
from prerl_lightning.rollout.slow import SlowRollouts, Usage
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.types import Prompt, Refill, Rollout

if TYPE_CHECKING:
    from prerl_lightning.policy.model import Policy


class RolloutDataModule(Sets, L.LightningDataModule):
    """Owns the prompts, the engine and the reward; `training_step` asks it for a `Rollout`.

    Args:
        train: the problems to train on. Several sets are a `Mixture`.
        val: the held-out problems; None: no validation.
        val_more: further held-out sets by name, logged as val/NAME/avg@k and so on; a `Source` is sampled in a way of
            its own. All that watches a run looks at ``val``.
        reward: ``(prompt, response, ground_truth, extra) -> float`` by import path, e.g.
            ``prerl_lightning.rewards.boxed_reward``; None: the problem set's own.
        val_reward: likewise for the held-out sets; None: ``reward``, or each set's own.
        val_sampling: what is drawn otherwise for held-out problems than for training.
        verification: processes, time and memory for rewards.
        sampling: how responses are drawn; the group size G is in here.
        engine: the inference engine.
        format: how a problem becomes a prompt.
        prompts_per_step: P over all ranks; P * G responses are sampled a step.
        refill: rounds, in each of which prompts whose responses all have the same reward, so that there is nothing to
            learn from them, give way to further ones (DAPO's dynamic sampling); 0: none.
        val_samples: k, responses a held-out problem, for avg@k and pass@k.
        val_greedy: one greedy response more, for greedy accuracy.
        val_batch: held-out problems sampled at a time, over all ranks.
        max_prompt_tokens: longer prompts are bad; default: the engine's ``max_model_len`` less ``max_new_tokens``.
        on_bad_prompt: what to do with an empty or too long prompt: ``drop`` (counted and said once) or ``error``. Of
            more than 10,000 training prompts ``drop`` looks at the others when they are drawn.
        seed: of the prompts' order and of sampling; default: ``seed_everything``'s.
    """

    def __init__(
        self,
        train: ProblemSet,
        reward: Reward | None = None,
        val: ProblemSet | None = None,
        val_more: dict[str, ProblemSet] | None = None,
        val_reward: Reward | None = None,
        verification: Verification = Verification(),  # noqa: B008  (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        engine: Engine | None = None,
        format: PromptFormat = PromptFormat(),  # noqa: B008  (frozen)
        prompts_per_step: int = 16,
        refill: int = 0,
        val_sampling: HeldOutSampling = HeldOutSampling(),  # noqa: B008  (frozen)
        val_samples: int = 8,
        val_greedy: bool = True,
        val_batch: int = 128,
        max_prompt_tokens: int | None = None,
        on_bad_prompt: Literal["drop", "error"] = "drop",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_more = train, val, val_more or {}
        self.val_sampling = val_sampling
        self.reward, self.val_reward = reward, val_reward or reward
        self.verification = verification
        self.sampling, self.engine, self.format = sampling, engine or VLLMEngine(), format
        self.prompts_per_step, self.refill = prompts_per_step, refill
        self.val_samples, self.val_greedy, self.val_batch = val_samples, val_greedy, val_batch
        self.max_prompt_tokens, self.on_bad_prompt = max_prompt_tokens, on_bad_prompt
        self.seed = seed
        ones = ("prompts_per_step", "val_samples", "val_batch", "max_prompt_tokens")
        check_bounds(self, "data", {**dict.fromkeys(ones, 1), "refill": 0, "seed": 0})
        self.check_sets()
        self.tokenizer: Any = None
        self._prompts: dict[str, Prompts | MixedPrompts] = {}
        self._prompts_of: str | None = None  # the model: by its tokenizer, and its engine's length
        self._pools: dict[str, RewardPool] = {}
        self._slow = SlowRollouts()
        self._checked: tuple[Any, ...] = ()  # the module, the Trainer and the stage, from `check` until `setup`

    # ------------------------------------------------------------------ set-up

    def check(self, module: Any, trainer: L.Trainer, stage: str) -> None:
        """Refuse what can be before anything is started or written: the run, then the files, then every prompt.

        Args:
            module: the `PolicyModule`, which need not be the Trainer's yet.

        Raises:
            InputError: with the key and the mend.
        """
        check_kinds(self, "data")
        if stage == "fit":
            module.check_run(self, trainer)
        elif self.val is None:
            raise InputError(
                f"data.val: missing, and prerl {stage} measures on nothing else. Give the held-out problems."
            )
        if self._prompts_of != module.model_name:
            self.rewards()
            self._load(module, trainer)
            self._prompts_of = module.model_name
        self._check_shares(trainer, stage)
        module.check_prefixes(self.tokenizer, trainer if stage == "fit" else None)
        self._checked = (module, trainer, stage)

    def setup(self, stage: str) -> None:
        """The cheap errors first: `check`, the reward's workers, the policy's weights, and then the engine."""
        assert self.trainer is not None
        module, strategy = cast(Any, self.trainer.lightning_module), cast(Any, self.trainer.strategy)
        if self._checked != (module, self.trainer, stage):
            self.check(module, self.trainer, stage)
        self._checked = ()
        if not self._pools:
            self._start_pools()
        if strategy.global_rank == 0 and self.verification.try_truths:
            for key, problems in self.sets.items():
                check_truths(label(key), problems, self._prompts[key], self._pools[key], self.sampling_of(key))
        if stage == "fit":
            longest = [self._longest(key) + self.sampling_of(key).max_new_tokens for key in self.training_sets]
            module.plan_memory(self.engine, strategy.root_device, max(longest))
        module.configure_model()  # Lightning would do so when the engine has started, and damaged weights show here
        place = Place(strategy.global_rank, self.trainer.world_size, strategy.local_rank, strategy.root_device)
        self.engine.start(model_path(module.model_name), self.run_seed, place)

    @property
    def run_seed(self) -> int:
        """``seed``, or the run's: the same data may serve runs of several."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def teardown(self, stage: str) -> None:
        for pool in set(self._pools.values()):
            pool.close()
        self._pools = {}

    def _check_shares(self, trainer: L.Trainer, stage: str) -> None:
        """Of no whole batch: Lightning refuses them when the engine has started, or trains on nothing."""
        sizes = [("train", len(self._prompts["train"]) // self.prompts_per_step)] if stage == "fit" else []
        held_out = "test" if stage == "test" else "val"
        sizes += [(held_out, -(-len(self._prompts[key]) // self.val_batch)) for key in self.held_out]
        for key, batches in sizes:
            share = getattr(trainer, f"limit_{key}_batches")
            if isinstance(share, float) and share > 0 and int(batches * share) < 1:
                raise InputError(
                    f"trainer.limit_{key}_batches: {share:g} of {batches} batches is none. Give a whole number of them."
                )

    def _longest(self, key: str) -> int:
        prompts = self._prompts[key]
        assert isinstance(prompts, Prompts)
        return prompts.longest

    def _start_pools(self) -> None:
        rewards = self.rewards()
        for key, reward in rewards.items():
            shared = next((self._pools[k] for k in self._pools if rewards[k] is reward), None)
            self._pools[key] = shared or RewardPool(reward, self.verification)

    def _load(self, module: Any, trainer: L.Trainer) -> None:
        # trainer.world_size is not known yet where ranks are to be launched
        world_size = trainer.num_devices * trainer.num_nodes
        if self.prompts_per_step % world_size:
            raise InputError(
                f"data.prompts_per_step: {self.prompts_per_step} prompts do not divide over {world_size} ranks."
            )
        prompts = self.encode(module.model_name, self.sets)
        self._prompts = {**prompts}
        if isinstance(self.train, Mixture):
            of_sets = {key.removeprefix("train/"): prompts[key] for key in self.training_sets}
            self._prompts["train"] = MixedPrompts(of_sets, self.train.weights)
        if len(self._prompts["train"]) < self.prompts_per_step:
            raise InputError(
                f"data.train: {len(self._prompts['train'])} usable prompts are fewer than data.prompts_per_step "
                f"({self.prompts_per_step})."
            )

    def size_of(self, key: str) -> int:
        """Usable problems of ``train`` or of a held-out set, from `setup` on."""
        return len(self._prompts[key])

    def encode(self, model: str, sets: Mapping[str, ProblemSet]) -> dict[str, Prompts]:
        """Open the problem sets and make prompts for ``model`` that its engine has room for; see `encode_all`."""
        config = load_config(model)
        self.engine.check(model_path(model), config)
        if wrong := [i for i in self.sampling.stop_token_ids if not 0 <= i < config.vocab_size]:
            raise InputError(
                f"data.sampling.stop_token_ids: {wrong[0]} is no token of this model, whose ids end at "
                f"{config.vocab_size - 1}."
            )
        for problems in sets.values():
            problems.load()
        self.tokenizer = tokenizer = load_tokenizer(model)
        max_model_len = self.engine.max_model_len(config)
        made = {}
        for key, problems in sets.items():
            training = key in self.training_sets
            sampling = self.sampling_of(key) if training else self.held_out_sampling(problems)
            new = sampling.max_new_tokens
            longest = max_model_len - new
            if longest < 1:
                place = "data.sampling" if training or self.val_sampling.max_new_tokens is None else "data.val_sampling"
                place = place if settings_of(problems).max_new_tokens is None else f"{label(key)}.init_args"
                raise InputError(
                    f"{place}.max_new_tokens: {new} leaves no room for a prompt in the engine's max_model_len of "
                    f"{max_model_len}. Write less, or a larger data.engine.init_args.max_model_len if the model has it."
                )
            if self.max_prompt_tokens is not None:
                longest = min(longest, self.max_prompt_tokens)
            made[key] = encode_all(
                *(problems, label(key), self.format_of(problems), tokenizer, longest),
                *(config.vocab_size, self.on_bad_prompt),
                checked=CHECKED if training else None,
            )
            show_first(label(key), made[key], tokenizer)
        return made

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_step, self.run_seed)

    def val_dataloader(self) -> PromptLoader | list[PromptLoader]:
        loaders = [self._loader(key, self.val_batch, None) for key in self.held_out]
        return loaders[0] if len(loaders) == 1 else loaders

    def test_dataloader(self) -> PromptLoader | list[PromptLoader]:
        return self.val_dataloader()

    def _loader(self, key: str, batch_size: int, shuffle_seed: int | None) -> PromptLoader:
        assert self.trainer is not None
        trainer = self.trainer
        return PromptLoader(self._prompts[key], batch_size, trainer.global_rank, trainer.world_size, shuffle_seed)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # prompts hold no tensors

    # ------------------------------------------------------------------ rollouts

    def sync(self, policy: "Policy", policy_version: int) -> float:
        """Give the engine the policy's weights unless it holds this version already; collective under FSDP2.

        Returns:
            seconds it took.
        """
        start = time.perf_counter()
        if self.engine.policy_version != policy_version:
            self.engine.update_weights(policy.named_weights(self.engine.weights_dtype), policy_version)
        return time.perf_counter() - start

    def some_prompts(self, number: int) -> list[Prompt]:
        """Of training, to look at the engine with."""
        prompts = self._prompts["train"]
        return [prompts[i] for i in range(min(number, len(prompts)))]

    def rollout(self, prompts: Sequence[Prompt], policy_version: int) -> Rollout:
        """Sample G responses for each prompt and reward them.

        Raises:
            RuntimeError: the engine does not hold ``policy_version``.
            InputError: too many of the responses could not be verified.
        """
        if self.engine.policy_version != policy_version:
            raise RuntimeError(
                f"The engine holds policy version {self.engine.policy_version}, not {policy_version}: call sync first."
            )
        seconds: dict[str, float] = {}
        seeds = self._seeds(len(prompts), policy_version)
        pools = {self._pools[key] for key in self.training_sets}
        before = Usage.now(*pools)
        groups = sample(self.engine, self._ways(prompts), prompts, seeds, seconds=seconds)
        self._slow.look(policy_version, seconds, before, Usage.now(*pools))
        given_up = self._refill(groups, policy_version) if self.refill else None
        if given_up is not None:
            seconds["rollout"] += given_up.seconds
        ways = self._ways([group.prompt for group in groups])
        return as_rollout(
            *(groups, [way.pool for way in ways], self.sampling.group_size, given_up),
            policy_version=policy_version,
            temperature=self.sampling.temperature,
            seconds=seconds,
        )

    def _refill(self, groups: list[Group], step: int) -> Refill:
        used = set(ranks.gather([(group.prompt.source, group.prompt.row) for group in groups]))

        def further(key: str) -> Iterator[Prompt]:
            """Of one set, in an order of the step's own, so that nothing has to be remembered; none that the step has
            seen."""
            prompts, source = self._prompts[key], key.partition("/")[2]
            for i in shuffled(prompts, mixed_seed(self.run_seed, "refill", key, step) >> 24, 0).tolist():
                prompt = replace(prompts[i], source=source)
                if (source, prompt.row) not in used:
                    used.add((source, prompt.row))
                    yield prompt

        def silent(group: Group) -> bool:
            (way,) = self._ways([group.prompt])
            return len(set(signals(group.verdicts, way.pool))) == 1

        def again(turn: int, places: Sequence[int], prompts: Sequence[Prompt]) -> list[Group]:
            seeds = self._seeds(len(groups), step, turn)
            return sample(self.engine, self._ways(prompts), prompts, [seeds[i] for i in places])

        more = {key.partition("/")[2]: further(key) for key in self.training_sets}
        return refill(groups, silent, more, self.refill, again)

    def _ways(self, prompts: Sequence[Prompt]) -> list[Way]:
        """(P,) of training prompts."""
        ways = {key: Way(self.sampling_of(key), self._pools[key], self.tokenizer) for key in self.training_sets}
        return [ways[f"train/{p.source}" if p.source else "train"] for p in prompts]

    def evaluate(self, prompts: Sequence[Prompt], key: str = "val") -> tuple[list[Group], list[Group]]:
        """k samples of each prompt of a held-out set, and its greedy response where it has one (`samples_of`)."""
        way = Way(self.sampling_of(key), self._pools[key], self.tokenizer)
        return sample_for_evaluation(self.engine, way, prompts, *self.samples_of(key), self.run_seed)

    def _seeds(self, n_prompts: int, step: int, *turn: int) -> list[int]:
        """By position in the global batch: one rank or several draw the same responses."""
        seed, first = self.run_seed, (self.trainer.global_rank if self.trainer else 0) * n_prompts
        return [mixed_seed(seed, "train", step, first + i, *turn) for i in range(n_prompts)]
