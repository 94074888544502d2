"""Several problem sets to train on at once, and sets with settings of their own.

train:
  class_path: Mixture
  init_args:
    sets:
      sums: {class_path: TwoDigitSums}
      maths: {class_path: Source, init_args: {problems: {class_path: Files, ...}, max_new_tokens: 512}}
    weights: {sums: 1, maths: 3}
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf

import torch
from torch import Tensor

from prerl_lightning.arguments import check_call
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.errors import InputError, check_bounds, is_name
from prerl_lightning.rewards.score import Reward
from prerl_lightning.rollout.engine import ABOVE, LEAST, MOST, HeldOutSampling
from prerl_lightning.rollout.sampler import mixed_seed
from prerl_lightning.types import Problem, Prompt


class Source(ProblemSet):
    """Problems with settings of their own; what is left out is as in the rest of the run.

    Args:
        problems: any other set.
        format: how they become prompts.
        reward: before ``data.reward`` and ``data.val_reward``.
        temperature: of held-out problems alone: what is trained on is drawn at one temperature.
        top_p: of the most probable tokens.
        top_k: likewise; 0 is off.
        max_new_tokens: a response is cut there. Training problems with another limit are sampled one set behind the
            other.
        samples: responses a problem, of a set of ``data.val_more``.
        greedy: one greedy response more, likewise.
    """

    def __init__(
        self,
        problems: ProblemSet,
        format: PromptFormat | None = None,
        reward: Reward | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
        samples: int | None = None,
        greedy: bool | None = None,
    ) -> None:
        if isinstance(problems, (Source, Mixture)):
            raise InputError(f"Source.problems: a {type(problems).__name__}. Give the problems themselves.")
        self.problems, self.format, self._reward = problems, format, reward
        self.temperature, self.top_p, self.top_k, self.max_new_tokens = temperature, top_p, top_k, max_new_tokens
        self.samples, self.greedy = samples, greedy
        check_bounds(self, "Source", {**LEAST, "samples": 1}, ABOVE, MOST)

    @property
    def sampling(self) -> HeldOutSampling:
        return HeldOutSampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)

    @property
    def own_reward(self) -> Reward | None:
        return self._reward

    @property
    def reward(self) -> Reward | None:
        return self.problems.reward

    def forms(self, truth: str) -> Sequence[str]:
        return self.problems.forms(truth)

    def load(self) -> None:
        self.problems.load()

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]


def settings_of(problems: ProblemSet) -> Source:
    """Its own, or none."""
    return problems if isinstance(problems, Source) else Source(problems)


class Mixture(ProblemSet):
    """Several sets to train on, each with metrics of its own (source/NAME/...). For ``data.train``.

    The prompts of a step are spread over the sets as evenly as can be. An epoch has as many prompts as the sets have
    problems; of a set that is drawn from more often, the problems come again, in another order, when all have come.

    Args:
        sets: by name; a `Source` has a format, reward or lengths of its own.
        weights: of each set's share of the prompts; None: by their sizes, so that an epoch has each problem once.
    """

    def __init__(self, sets: dict[str, ProblemSet], weights: dict[str, float] | None = None) -> None:
        check_call(Mixture.__init__, locals(), "Mixture")
        self.sets, self.weights = sets, weights
        for name, problems in sets.items():
            if not is_name(name) or isinstance(problems, Mixture):
                raise InputError(f"Mixture.sets: {name!r}: a name is of letters, digits, dots and dashes, of one set.")
        if not sets or (weights is not None and weights.keys() != sets.keys()):
            raise InputError(f"Mixture.weights: of {', '.join(weights or [])}; the sets are {', '.join(sets)}.")
        if wrong := [name for name, weight in (weights or {}).items() if not 0 < weight < inf]:
            raise InputError(
                f"Mixture.weights.{wrong[0]}: {(weights or {})[wrong[0]]} must be a finite number above 0."
            )

    def load(self) -> None:
        for problems in self.sets.values():
            problems.load()

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def __getitem__(self, index: int) -> Problem:
        name, place = _place(self.sets, index)
        return self.sets[name][place]


class MixedPrompts(Sequence[Prompt]):
    """Those of several sets, one set behind the other, each prompt with the name of its set.

    Args:
        sets: by name.
        weights: as in `Mixture`.
    """

    def __init__(self, sets: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float] | None) -> None:
        self.sets = sets
        self.weights = {name: len(prompts) for name, prompts in sets.items()} if weights is None else weights

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        name, place = _place(self.sets, range(len(self))[index])
        return replace(self.sets[name][place], source=name)

    def order(self, seed: int, epoch: int) -> Tensor:
        """(P,) the epoch's prompts by their place: a pure function, so that a resume and any number of ranks go on
        alike."""
        places, keys, before = [], [], 0
        shares = self._shares()
        for number, (name, prompts) in enumerate(self.sets.items()):
            n, share = len(prompts), shares[name]
            drawn = epoch * share + torch.arange(share)  # of this set, since the run began
            turns = [
                torch.randperm(n, generator=_generator(seed, number, turn))
                for turn in range(epoch * share // n, -(-(epoch + 1) * share // n))
            ]
            if share:
                places.append(before + torch.cat(turns)[drawn - epoch * share // n * n])
            # one draw in each of as many stretches of the epoch
            within = torch.rand(share, generator=_generator(seed, number, "within", epoch), dtype=torch.float64)
            keys.append((torch.arange(share) + within) / max(share, 1))
            before += n
        return torch.cat(places)[torch.cat(keys).argsort(stable=True)]

    def _shares(self) -> dict[str, int]:
        """Prompts of an epoch, whole numbers by the largest remainders."""
        total, weight = len(self), sum(self.weights.values())
        exact = {name: total * self.weights[name] / weight for name in self.sets}
        shares = {name: int(value) for name, value in exact.items()}
        last = sorted(exact, key=lambda name: shares[name] - exact[name])  # stable: ties in the sets' order
        for name in last[: total - sum(shares.values())]:
            shares[name] += 1
        return shares


def _place(sets: Mapping[str, Sequence[Prompt] | ProblemSet], index: int) -> tuple[str, int]:
    """The set that holds it, and where."""
    ends = list(accumulate(map(len, sets.values())))
    number = bisect_right(ends, index)
    return list(sets)[number], index - ([0, *ends][number])


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed("order", *parts))
