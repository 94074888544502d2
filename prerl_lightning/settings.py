"""What was put together in Python, as a configuration file would have it: for a run's config.yaml and checkpoints."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import zeros
from torch.nn import Parameter
from torch.optim import Optimizer

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

    Of an object those arguments are known that it keeps under their names, which is the convention here and in
    scikit-learn; of others a resume cannot tell whether they have changed.
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
    own = vars(value) if hasattr(value, "__dict__") else {}
    groups = [vars(held) for held in own.values() if is_dataclass(held)]  # an objective's
    options = own.get("options")  # an engine's
    places = [own, {name.removeprefix("_"): held for name, held in own.items()}, *groups, options or {}]
    for name in _names(type(value)):
        for held in (place[name] for place in places if name in place):
            # it is made of parameters, and says more than the name of what makes it
            yield name, held([Parameter(zeros(1))]) if name == "optimizer" and callable(held) else held
            break


def _names(kind: type) -> list[str]:
    """Of the arguments of its constructor, with those that it hands on."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names |= dict.fromkeys(named)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)
