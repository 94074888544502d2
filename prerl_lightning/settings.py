"""What was put together in Python, as a configuration file would have it: for a run's config.yaml and checkpoints."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from torch import zeros
from torch.nn import Parameter
from torch.optim import Optimizer

from prerl_lightning.arguments import given
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.objectives.entropy import TargetEntropy
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.until import Until
from prerl_lightning.policy.lora import Lora
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import HeldOutSampling, Sampling

# they have no class_path in a configuration
PLAIN = (PromptFormat, Verification, Sampling, HeldOutSampling, Term, TargetEntropy, Until, Lora)


def described(value: Any) -> Any:
    """Text, numbers, lists and dictionaries; an object by ``class_path`` and ``init_args``, a function by its path.

    Of an object the arguments of `given` are known; of others a resume cannot tell whether they have changed.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(held) for key, held in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(held) for held in value]
    if isinstance(value, PLAIN):
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, partial):
        return {"class_path": path_of(value.func), "init_args": described(value.keywords)}
    if isinstance(value, Optimizer):
        # what it keeps as `defaults` may be more than what it takes: AdamW is an Adam
        takes = inspect.signature(type(value)).parameters
        known = {k: held for k, held in value.defaults.items() if k in takes and k != "lr" and held is not None}
        return {"class_path": path_of(type(value)), "init_args": described(known)}
    if hasattr(value, "__qualname__"):
        return path_of(value)
    arguments = {name: described(held) for name, held in _arguments(value)}
    return {"class_path": path_of(type(value)), "init_args": arguments}


def path_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _arguments(value: Any) -> Iterator[tuple[str, Any]]:
    for argument in given(value):
        # an optimizer is made of parameters, and says more than the name of what makes it
        made = argument.name == "optimizer" and callable(argument.value)
        yield argument.name, argument.value([Parameter(zeros(1))]) if made else argument.value
