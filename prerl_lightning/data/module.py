"""RolloutDataModule: prompts, engine, reward and validation set of a run, shared by all its lives."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch

from prerl_lightning.data.loader import PromptLoader
from prerl_lightning.data.preview import check_truths, show_first
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import CHECKED, PromptFormat, Prompts, encode_all
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.policy.model import load_config, load_tokenizer, model_path
from prerl_lightning.rewards.pool import RewardPool, Verification
from prerl_lightning.rewards.score import Reward
from prerl_lightning.rollout.engine import Engine, HeldOutSampling, Place, Sampling
from prerl_lightning.rollout.sampler import Group, mixed_seed, sample, sample_for_evaluation
from prerl_lightning.rollout.slow import SlowRollouts, Usage
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.types import Prompt, Rollout

if TYPE_CHECKING:
    from prerl_lightning.policy.model import Policy


class RolloutDataModule(L.LightningDataModule):
    """Owns the prompts, the engine and the reward; `training_step` asks it for a `Rollout`.

    Args:
        train: the problems to train on.
        val: the held-out problems; None: no validation.
        val_more: further held-out sets by name, logged as val/NAME/avg@k and so on. All that watches a run looks at
            ``val``.
        reward: ``(prompt, response, ground_truth, extra) -> float`` by import path, e.g.
            ``prerl_lightning.rewards.boxed_reward``; None: the problem set's own.
        val_reward: likewise for the held-out sets; None: ``reward``, or each set's own.
        val_sampling: what is drawn otherwise for held-out problems than for training.
        verification: processes, time and memory for rewards.
        sampling: how responses are drawn; the group size G is in here.
        engine: the inference engine.
        format: how a problem becomes a prompt.
        prompts_per_step: P over all ranks; P * G responses are sampled a step.
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
        self.prompts_per_step = prompts_per_step
        self.val_samples, self.val_greedy, self.val_batch = val_samples, val_greedy, val_batch
        self.max_prompt_tokens, self.on_bad_prompt = max_prompt_tokens, on_bad_prompt
        self.seed = seed
        least = {"prompts_per_step": 1, "val_samples": 1, "val_batch": 1, "max_prompt_tokens": 1, "seed": 0}
        check_bounds(self, "data", least)
        for name in self.val_more:
            if val is None or not re.fullmatch(r"[\w.-]+", name):
                raise InputError(
                    f"data.val_more: {name!r}: a name is of letters, digits, dots and dashes, and data.val has to be "
                    "there, the set that all that watches a run looks at."
                )
        self._prompts: dict[str, Prompts] = {}
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
        if stage == "fit":
            module.check_run(self, trainer)
        elif self.val is None:
            raise InputError(
                f"data.val: missing, and prerl {stage} measures on nothing else. Give the held-out problems."
            )
        if not self._prompts:
            self._rewards()
            self._load(module, trainer)
        self._check_shares(trainer, stage)
        module.check_prefixes()
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
        if strategy.global_rank == 0:
            for key, problems in ({"train": self.train} | self.held_out).items():
                check_truths(label(key), problems, self._prompts[key], self._pools[key], self.sampling_of(key))
        if stage == "fit":
            longest = self._prompts["train"].longest + self.sampling.max_new_tokens
            module.plan_memory(self.engine, strategy.root_device, longest)
        module.configure_model()  # Lightning would do so when the engine has started, and damaged weights show here
        place = Place(strategy.global_rank, self.trainer.world_size, strategy.local_rank, strategy.root_device)
        self.engine.start(model_path(module.model_name), self.seed or 0, place)

    def teardown(self, stage: str) -> None:
        for pool in set(self._pools.values()):
            pool.close()
        self._pools = {}

    def _check_shares(self, trainer: L.Trainer, stage: str) -> None:
        """Of no whole batch: Lightning refuses them when the engine has started, or trains on nothing."""
        sizes = {"train": len(self._prompts["train"]) // self.prompts_per_step} if stage == "fit" else {}
        if "val" in self._prompts:
            sizes["test" if stage == "test" else "val"] = -(-len(self._prompts["val"]) // self.val_batch)
        for key, batches in sizes.items():
            share = getattr(trainer, f"limit_{key}_batches")
            if isinstance(share, float) and share > 0 and int(batches * share) < 1:
                raise InputError(
                    f"trainer.limit_{key}_batches: {share:g} of {batches} batches is none. Give a whole number of them."
                )

    def _rewards(self) -> dict[str, Reward]:
        rewards = {"train": first_reward("data.train", self.reward, self.train.reward)}
        for key, problems in self.held_out.items():
            rewards[key] = first_reward(label(key), self.val_reward, problems.reward, rewards["train"])
        return rewards

    def _start_pools(self) -> None:
        rewards = self._rewards()
        for key, reward in rewards.items():
            shared = next((self._pools[k] for k in self._pools if rewards[k] is reward), None)
            self._pools[key] = shared or RewardPool(reward, self.verification)

    def _load(self, module: Any, trainer: L.Trainer) -> None:
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        # trainer.world_size is not known yet where ranks are to be launched
        world_size = trainer.num_devices * trainer.num_nodes
        if self.prompts_per_step % world_size:
            raise InputError(
                f"data.prompts_per_step: {self.prompts_per_step} prompts do not divide over {world_size} ranks."
            )
        self._prompts = self.encode(module.model_name, {"train": self.train} | self.held_out)
        if len(self._prompts["train"]) < self.prompts_per_step:
            raise InputError(
                f"data.train: {len(self._prompts['train'])} usable prompts are fewer than data.prompts_per_step "
                f"({self.prompts_per_step})."
            )

    @property
    def held_out(self) -> dict[str, ProblemSet]:
        """``val`` first, then those of ``val_more`` as val/NAME."""
        if self.val is None:
            return {}
        return {"val": self.val} | {f"val/{name}": problems for name, problems in self.val_more.items()}

    def size_of(self, key: str) -> int:
        """Usable problems of ``train`` or of a held-out set, from `setup` on."""
        return len(self._prompts[key])

    def sampling_of(self, key: str) -> Sampling:
        """``train``, or the key of a held-out set."""
        return self.sampling if key == "train" else self.val_sampling.over(self.sampling)

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
        tokenizer = load_tokenizer(model)
        max_model_len = self.engine.max_model_len(config)
        made = {}
        for key, problems in sets.items():
            new = self.sampling_of(key).max_new_tokens
            longest = max_model_len - new
            if longest < 1:
                own = key != "train" and self.val_sampling.max_new_tokens is not None
                raise InputError(
                    f"data.{'val_sampling' if own else 'sampling'}.max_new_tokens: {new} leaves no room for a prompt "
                    f"in the engine's max_model_len of {max_model_len}."
                )
            if self.max_prompt_tokens is not None:
                longest = min(longest, self.max_prompt_tokens)
            made[key] = encode_all(
                *(problems, label(key), self.format, tokenizer, longest, config.vocab_size, self.on_bad_prompt),
                checked=CHECKED if key == "train" else None,
            )
            show_first(label(key), made[key], tokenizer)
        return made

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_step, self.seed)

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
        pool = self._pools["train"]
        before = Usage.now(pool)
        groups = sample(self.engine, pool, prompts, self.sampling, seeds, seconds=seconds)
        self._slow.look(policy_version, seconds, before, Usage.now(pool))
        verdicts = [v for group in groups for v in group.verdicts]
        failures = [v.failure for v in verdicts]
        return Rollout.of(
            prompts,
            [r for group in groups for r in group.responses],
            group_ids=torch.arange(len(prompts)).repeat_interleave(self.sampling.group_size),
            rewards=torch.tensor([v.score for v in verdicts], dtype=torch.float64),
            policy_version=policy_version,
            temperature=self.sampling.temperature,
            timeouts=failures.count("timeout"),
            errors=failures.count("error"),
            answered=sum(v.answer is not None for v in verdicts),
            seconds=seconds,
        )

    def evaluate(self, prompts: Sequence[Prompt], key: str = "val") -> tuple[list[Group], list[Group]]:
        """``val_samples`` samples of each prompt of a held-out set, and its greedy response if ``val_greedy``."""
        pool, k, sampling = self._pools[key], self.val_samples, self.sampling_of(key)
        return sample_for_evaluation(self.engine, pool, prompts, sampling, k, self.val_greedy, self.seed)

    def _seeds(self, n_prompts: int, step: int) -> list[int]:
        """By position in the global batch: one rank or several draw the same responses."""
        first = (self.trainer.global_rank if self.trainer else 0) * n_prompts
        return [mixed_seed(self.seed, "train", step, first + i) for i in range(n_prompts)]


def label(key: str) -> str:
    """Of a set of a run its place in the configuration; `prerl evaluate` has others by their names."""
    if key in ("train", "val"):
        return f"data.{key}"
    return f"data.val_more.{key.removeprefix('val/')}" if key.startswith("val/") else key


def first_reward(key: str, *candidates: Reward | None) -> Reward:
    """The first that is there. Raises InputError where none is."""
    for reward in candidates:
        if reward is not None:
            return reward
    raise InputError(
        f"data.reward: missing, and {key} has no verifier of its own. Give one by import path, e.g. "
        "prerl_lightning.rewards.boxed_reward."
    )
