"""What an object was made with, and whether it is of the kinds that its constructor asks for: YAML is parsed by these
annotations, and what is put together in Python would be found out when the engine has started, or never."""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin

from prerl_lightning.errors import InputError, nearest

# what Python's own kinds are called
WORDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text", "NoneType": "None"}
ABSTRACT: dict[Any, tuple[type, ...]] = {
    float: (Real,),
    int: (Integral,),
    bool: (bool, Integral),
    str: (str, PathLike),
    list: (Sequence,),
    dict: (Mapping,),
}


@dataclass(frozen=True)
class Argument:
    """One of a constructor's, and the value that was given.

    Args:
        owner: the class whose constructor it is, of the object's or of one of its bases.
    """

    name: str
    value: Any
    annotation: Any
    default: Any
    owner: type


def given(value: object) -> Iterator[Argument]:
    """Those arguments of its constructor, with those that it hands on, that it keeps under their names, itself or in a
    dataclass, which is the convention here and in scikit-learn."""
    own = vars(value) if hasattr(value, "__dict__") else {}
    own = own | own.get("_modules", {})  # where torch keeps what is a module
    groups = [vars(held) for held in own.values() if is_dataclass(held)]  # an objective's
    options = own.get("options")  # an engine's
    places = [own, {name.removeprefix("_"): held for name, held in own.items()}, *groups, options or {}]
    for name, (parameter, owner) in _parameters(type(value)).items():
        for held in (place[name] for place in places if name in place):
            yield Argument(name, held, parameter.annotation, parameter.default, owner)
            break


def _parameters(kind: type) -> dict[str, tuple[inspect.Parameter, type]]:
    found: dict[str, tuple[inspect.Parameter, type]] = {}
    for base in kind.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found |= {p.name: (p, base) for p in named if p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def check_kinds(value: object, key: str) -> None:
    """Look at the arguments of it, and of what it was made of, that constructors of this package take: what others ask
    for is theirs to say.

    Args:
        key: of it, for the message: ``data`` or a class's name.

    Raises:
        InputError: one is of another kind than its annotation asks for.
    """
    for argument in given(value):
        place = f"{key}.{argument.name}"
        if argument.value is argument.default or not _is_ours(argument.owner):
            continue
        check_kind(argument.value, argument.annotation, place)
        for item in _items(argument.value):
            if any(map(_is_ours, type(item).__mro__)):
                check_kinds(item, place)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __package__


def check_call(function: Callable[..., Any], values: Mapping[str, Any], key: str) -> None:
    """`check_kind` for the arguments of a function, ``locals()`` in its first line."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD and values[name] is not parameter.default:
            check_kind(values[name], parameter.annotation, f"{key}.{name}")


def check_kind(value: Any, annotation: Any, key: str) -> None:
    """Raises InputError."""
    inner = get_args(annotation)
    if get_origin(annotation) in (list, Sequence, Iterable) and isinstance(value, list | tuple):
        for i, each in enumerate(value):
            check_kind(each, inner[0], f"{key}[{i}]")
    if not fits(value, annotation):
        raise InputError(f"{key}: {_shown(value)}; it must be {_wanted(value, annotation)}")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def fits(value: Any, annotation: Any) -> bool:
    """Whether it is of that kind; what is not understood of an annotation passes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in _members(annotation))
    if origin is Literal:
        return value in inner
    if annotation in (None, types.NoneType):
        return value is None
    if Callable in (annotation, origin):
        return callable(value)
    kind = origin or annotation
    unknown = kind in (Any, inspect.Parameter.empty) or getattr(kind, "_is_protocol", False)
    if unknown or not isinstance(kind, type):
        return True
    if isinstance(value, bool) and kind in (int, float):
        return False
    if not isinstance(value, ABSTRACT.get(kind, (kind,))):
        return False
    if isinstance(value, str) and kind is not str:  # a sequence of letters
        return kind is object
    if isinstance(value, Mapping) and len(inner) == 2:
        return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, Sequence) and (len(inner) == 1 or inner[1:] == (...,)):
        return all(fits(each, inner[0]) for each in value)
    return True


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"it is the class {value.__name__}, not one that is made, {value.__name__}(...)"
    text = repr(value)
    what = f"{text} is" if len(text) <= 40 and "<" not in text else "it is"
    return f"{what} a {type(value).__name__}"


def _wanted(value: Any, annotation: Any) -> str:
    members = list(_members(annotation))
    choices = [choice for each in members if get_origin(each) is Literal for choice in get_args(each)]
    kinds = dict.fromkeys(_name(each) for each in members if get_origin(each) is not Literal)
    mends = [mend for each in _classes(annotation) if (mend := getattr(each, "given_as", ""))]
    near = nearest(value, [str(c) for c in choices]) if choices and isinstance(value, str) else ""
    wanted = [f"one of {', '.join(map(str, choices))}"] if choices else []
    return f"{' or '.join([*wanted, *kinds])}.{near}{' '.join(['', *mends])}"


def _members(annotation: Any) -> Iterator[Any]:
    """Of unions within unions; else itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _members(each)
    else:
        yield annotation


def _name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), [" or ".join(map(_name, _members(each))) for each in get_args(annotation)]
    if Callable in (annotation, origin):
        return "a function"
    if origin in (list, Sequence, Iterable):
        return f"a list of {inner[0]}"
    if origin in (dict, Mapping):
        return f"a dict of {inner[1]} by {inner[0]}"
    name = getattr(annotation, "__name__", str(annotation))
    return WORDS.get(name, name)


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for each in get_args(annotation):
        yield from _classes(each)
