"""The problem sets of a run by their keys, and what holds for each: its own settings, else the run's.

Keys: ``train``, or ``train/NAME`` of a mixture; ``val``, and ``val/NAME`` of ``val_more``.
"""

from collections.abc import Mapping
from inspect import signature

from prerl_lightning.data.mixture import Mixture, settings_of
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.errors import InputError, is_name
from prerl_lightning.rewards.score import Reward, name_of
from prerl_lightning.rollout.engine import HeldOutSampling, Sampling


class Sets:
    """The part of `RolloutDataModule`, which says what each attribute is, that knows them."""

    train: ProblemSet
    val: ProblemSet | None
    val_more: Mapping[str, ProblemSet]
    reward: Reward | None
    val_reward: Reward | None
    format: PromptFormat
    sampling: Sampling
    val_sampling: HeldOutSampling
    val_samples: int
    val_greedy: bool

    def check_sets(self) -> None:
        """Raises InputError for a name that is none, and for settings that a set does not take in its place."""
        for name in self.val_more:
            if self.val is None or not is_name(name):
                raise InputError(
                    f"data.val_more: {name!r}: a name is of letters, digits, dots and dashes, and data.val has to be "
                    "there, the set that all that watches a run looks at."
                )
        for key, problems in self.sets.items():
            if isinstance(problems, Mixture):
                raise InputError(f"{label(key)}: a Mixture is to train on. data.val_more takes further held-out sets.")
            source = settings_of(problems)
            refused = [name for name in ("samples", "greedy") if getattr(source, name) is not None]
            if key == "val" and refused:
                raise InputError(f"{label(key)}.init_args.{refused[0]}: give data.val_{refused[0]} instead.")
            refused += ["temperature"] if source.temperature is not None else []
            if key.startswith("train") and refused:
                raise InputError(
                    f"{label(key)}.init_args.{refused[0]}: of held-out problems alone. Training has one way to draw "
                    "(data.sampling), but for top_p, top_k and max_new_tokens."
                )

    @property
    def training_sets(self) -> dict[str, ProblemSet]:
        """``train``, or those of a mixture as train/NAME."""
        if not isinstance(self.train, Mixture):
            return {"train": self.train}
        return {f"train/{name}": problems for name, problems in self.train.sets.items()}

    @property
    def held_out(self) -> dict[str, ProblemSet]:
        """``val`` first, then those of ``val_more`` as val/NAME."""
        if self.val is None:
            return {}
        return {"val": self.val} | {f"val/{name}": problems for name, problems in self.val_more.items()}

    @property
    def sets(self) -> dict[str, ProblemSet]:
        """All by their keys."""
        return self.training_sets | self.held_out

    def sampling_of(self, key: str) -> Sampling:
        """Of a set by its key."""
        if key not in self.training_sets:
            return self.held_out_sampling(self.held_out[key])
        return settings_of(self.training_sets[key]).sampling.over(self.sampling)

    @property
    def training_samplings(self) -> list[Sampling]:
        """Of each set to train on."""
        return [self.sampling_of(key) for key in self.training_sets]

    def held_out_sampling(self, problems: ProblemSet) -> Sampling:
        return settings_of(problems).sampling.over(self.val_sampling.over(self.sampling))

    def samples_of(self, key: str) -> tuple[int, bool]:
        """k of a held-out set, and whether there is a greedy response more."""
        own = settings_of(self.held_out[key])
        return own.samples or self.val_samples, self.val_greedy if own.greedy is None else own.greedy

    def format_of(self, problems: ProblemSet) -> PromptFormat:
        return settings_of(problems).format or self.format

    def rewards(self) -> dict[str, Reward]:
        """Of all sets by their keys. Raises InputError where one has none."""
        rewards: dict[str, Reward] = {}
        for key, problems in self.sets.items():
            training = key in self.training_sets
            last = None if training else next(iter(rewards.values()))
            rewards[key] = self.reward_of(label(key), problems, self.reward if training else self.val_reward, last)
        return rewards

    @staticmethod
    def reward_of(what: str, problems: ProblemSet, general: Reward | None, last: Reward | None = None) -> Reward:
        """A set's: the one set for it, else the general one, else the problems' own, else the last."""
        return first_reward(what, settings_of(problems).own_reward, general, problems.reward, last)


def label(key: str) -> str:
    """Of a set of a run its place in the configuration; `prerl evaluate` has others by their names."""
    if key in ("train", "val"):
        return f"data.{key}"
    if key.startswith("train/"):
        return f"data.train.init_args.sets.{key.removeprefix('train/')}"
    return f"data.val_more.{key.removeprefix('val/')}" if key.startswith("val/") else key


def _check_call(reward: Reward) -> None:
    try:
        takes = signature(reward)
    except ValueError:  # of builtins it is not known
        return
    try:
        takes.bind("", "", "", {})
    except TypeError as error:
        raise InputError(
            f"data.reward: {name_of(reward)}{takes}: {error}. A reward is called with the prompt, the response, the "
            "ground truth and a dictionary of the rest: def reward(prompt, response, ground_truth, extra)."
        ) from None


def first_reward(key: str, *candidates: Reward | None) -> Reward:
    """The first that is there. Raises InputError where none is."""
    for reward in candidates:
        if reward is not None and not callable(reward):
            raise InputError(
                f"data.reward: {reward!r} is no function. Give the function itself; YAML alone takes its import path."
            )
        if reward is not None:
            _check_call(reward)
            return reward
    raise InputError(
        f"data.reward: missing, and {key} has no verifier of its own. Give one by import path, e.g. "
        "prerl_lightning.rewards.boxed_reward."
    )
