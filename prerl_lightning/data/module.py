"""RolloutDataModule: prompts, engine, reward and validation set of a run, shared by all its lives."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from transformers import AutoConfig

from prerl_lightning.data.loader import PromptLoader
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import PromptFormat, encode_all
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import load_tokenizer, model_path
from prerl_lightning.rollout.engine import Engine, Sampling
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.types import Prompt, Response, Rollout

if TYPE_CHECKING:
    from prerl_lightning.policy.model import Policy

log = logging.getLogger(__name__)

#: (prompt, response text, ground truth, extra) -> reward. ``extra`` holds the problem's further columns and
#: ``truncated``: the length limit ended the response.
Reward = Callable[[str, str, str, Mapping[str, Any]], float]


class RolloutDataModule(L.LightningDataModule):
    """Owns the prompts, the engine and the reward; `training_step` asks it for a `Rollout`.

    Args:
        train: the problems to train on.
        val: the held-out problems; None: no validation.
        reward: ``(prompt, response, ground_truth, extra) -> float`` by import path, e.g.
            ``prerl_lightning.rewards.boxed_reward``.
        val_reward: likewise for the held-out set; the training reward if None.
        sampling: how responses are drawn; the group size G is in here.
        engine: the inference engine.
        format: how a problem becomes a prompt.
        prompts_per_step: P over all ranks; P * G responses are sampled a step.
        val_samples: k, responses a held-out problem, for avg@k and pass@k.
        val_greedy: one greedy response more, for greedy accuracy.
        val_batch: held-out problems sampled at a time, over all ranks.
        max_prompt_tokens: longer prompts are bad; default: the engine's ``max_model_len`` less
            ``sampling.max_new_tokens``.
        on_bad_prompt: what to do with an empty or too long prompt: ``drop`` (counted and said once) or ``error``.
        seed: of the prompts' order and of sampling; default: ``seed_everything``'s.
    """

    def __init__(
        self,
        train: ProblemSet,
        reward: Reward,
        val: ProblemSet | None = None,
        val_reward: Reward | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        engine: Engine | None = None,
        format: PromptFormat = PromptFormat(),  # noqa: B008  (frozen)
        prompts_per_step: int = 16,
        val_samples: int = 8,
        val_greedy: bool = True,
        val_batch: int = 128,
        max_prompt_tokens: int | None = None,
        on_bad_prompt: Literal["drop", "error"] = "drop",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.reward, self.val_reward = reward, val_reward or reward
        self.sampling, self.engine, self.format = sampling, engine or VLLMEngine(), format
        self.prompts_per_step = prompts_per_step
        self.val_samples, self.val_greedy, self.val_batch = val_samples, val_greedy, val_batch
        self.max_prompt_tokens, self.on_bad_prompt = max_prompt_tokens, on_bad_prompt
        self.seed = seed
        self._prompts: dict[str, list[Prompt]] = {}

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Open the data and check every prompt, then start the engine: the cheap errors first."""
        assert self.trainer is not None
        if self._prompts:
            return
        model = str(self.trainer.lightning_module.model_name)
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        world_size = self.trainer.world_size
        if self.prompts_per_step % world_size:
            raise InputError(
                f"data.prompts_per_step: {self.prompts_per_step} prompts do not divide over {world_size} ranks."
            )
        sets = {"train": self.train, "val": self.val}
        for problems in sets.values():
            if problems is not None:
                problems.load()
        tokenizer = load_tokenizer(model)
        config = AutoConfig.from_pretrained(model_path(model)).get_text_config()
        max_model_len = self.engine.max_model_len(config)
        longest = max_model_len - self.sampling.max_new_tokens
        if longest < 1:
            raise InputError(
                f"data.sampling.max_new_tokens: {self.sampling.max_new_tokens} leaves no room for a prompt in the "
                f"engine's max_model_len of {max_model_len}."
            )
        if self.max_prompt_tokens is not None:
            longest = min(longest, self.max_prompt_tokens)
        for key, problems in sets.items():
            if problems is not None:
                self._prompts[key] = encode_all(
                    problems, f"data.{key}", self.format, tokenizer, longest, config.vocab_size, self.on_bad_prompt
                )
        if len(self._prompts["train"]) < self.prompts_per_step:
            raise InputError(
                f"data.train: {len(self._prompts['train'])} usable prompts are fewer than data.prompts_per_step "
                f"({self.prompts_per_step})."
            )
        self.engine.start(model_path(model), self.seed, world_size)

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_step, self.seed)

    def val_dataloader(self) -> PromptLoader | list[Any]:
        return [] if self.val is None else self._loader("val", self.val_batch, None)

    def test_dataloader(self) -> PromptLoader | list[Any]:
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
            self.engine.update_weights(policy.named_weights(), policy_version)
        return time.perf_counter() - start

    def rollout(self, prompts: Sequence[Prompt], policy_version: int) -> Rollout:
        """Sample G responses for each prompt and reward them.

        Raises:
            RuntimeError: the engine does not hold ``policy_version``.
            ValueError: the reward raised or gave no finite number; the message shows the row and the response.
        """
        if self.engine.policy_version != policy_version:
            raise RuntimeError(
                f"The engine holds policy version {self.engine.policy_version}, not {policy_version}: call sync first."
            )
        seconds: dict[str, float] = {}
        with _timed(seconds, "rollout"):
            groups = self._generate(prompts, self.sampling, self._seeds(len(prompts), policy_version))
        with _timed(seconds, "reward"):
            rewards = [self._rewards(self.reward, p, g) for p, g in zip(prompts, groups, strict=True)]
        return Rollout(
            prompts=tuple(prompts),
            group_ids=torch.arange(len(prompts)).repeat_interleave(self.sampling.group_size),
            responses=tuple(r for group in groups for r in group),
            rewards=torch.tensor([r for group in rewards for r in group], dtype=torch.float64),
            policy_version=policy_version,
            temperature=self.sampling.temperature,
            seconds=seconds,
        )

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rewards of k samples of each held-out prompt: (P, k), and of its greedy response: (P,).

        The seeds depend on the row alone, so evaluations of different steps draw with the same luck.
        """
        sampling = replace(self.sampling, group_size=self.val_samples)
        seeds = [_seed(self.seed, "val", p.row) for p in prompts]
        groups = self._generate(prompts, sampling, seeds)
        rewards = [self._rewards(self.val_reward, p, g) for p, g in zip(prompts, groups, strict=True)]
        greedy = None
        if self.val_greedy:
            answers = self._generate(prompts, sampling, seeds, greedy=True)
            greedy = torch.tensor(
                [self._rewards(self.val_reward, p, g)[0] for p, g in zip(prompts, answers, strict=True)]
            )
        return torch.tensor(rewards, dtype=torch.float64).view(len(prompts), self.val_samples), greedy

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], greedy: bool = False
    ) -> list[list[Response]]:
        return self.engine.generate([p.token_ids for p in prompts], sampling, seeds, greedy)

    def _seeds(self, n_prompts: int, step: int) -> list[int]:
        """By position in the global batch: one rank or several draw the same responses."""
        first = (self.trainer.global_rank if self.trainer else 0) * n_prompts
        return [_seed(self.seed, "train", step, first + i) for i in range(n_prompts)]

    @staticmethod
    def _rewards(reward: Reward, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        values = []
        for response in responses:
            extra = {**prompt.extra, "truncated": response.truncated}
            try:
                value = float(reward(prompt.text, response.text, prompt.ground_truth, extra))
            except Exception as error:
                raise InputError(
                    f"The reward raised {error!r} at row {prompt.row}, response {response.text[:500]!r}."
                ) from error
            if not math.isfinite(value):
                raise InputError(f"The reward gave {value} at row {prompt.row}, response {response.text[:500]!r}.")
            values.append(value)
        return values


def _seed(*parts: Any) -> int:
    """63 well-mixed bits: the engine gives response i of a group the seed + i, so seeds must lie far apart."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - start
