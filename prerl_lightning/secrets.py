"""Keys, tokens and passwords stay out of what a run writes: config.yaml, checkpoints, run.json, and what is made of
them. They are told by the names of their settings, in headers too, and in addresses by their place."""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "<hidden>"
# not every key or token is one: answer_key, eos_token
_OF = (
    "api|access|auth|bearer|session|security|refresh|secret|private|client|service|account"
    "|hf|hub|wandb|github|gitlab|openai"
)
_NAME = (
    rf"(?:(?:{_OF})[_-]?(?:key|token)s?|(?<![a-z0-9_])(?<![a-z0-9]-)tokens?"
    "|secrets?|passw(?:or)?ds?|passphrases?|credentials?|authorization)"
)
_NAMED = re.compile(_NAME + r"\Z", re.IGNORECASE)
# what makes a text of any kind secret: https://user:password@host, https://token@host, ?api_key=key, a header's value
_PLACES = (
    (re.compile(r"(?<=://)([^/@\s:?#]*):[^/\s?#]+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"\b(https?://)[^/@\s:?#]+@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&](?:[\w.-]*{_NAME}|key|sig|[\w-]*signature)=)[^&#\s\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Authorization\W{1,4}(?:Bearer|Basic|Token) +)[^\s\"',}]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer +)(?=\S*\d)[\w.~+/=-]+"), rf"\1{HIDDEN}"),  # not of a sentence
    (re.compile(rf"\A([\w-]*{_NAME}\s*[:=]\s*)[^\s{{}}]+\Z", re.IGNORECASE), rf"\1{HIDDEN}"),
)
# the same in a configuration's text: a value in its line, and one that the lines below hold
_VALUE = r"""(?:"[^"]*"|'[^']*'|\[[^]]*\]|\{[^}]*\}|[^\s,}"']+)"""
_BETWEEN = r"""(?P<between>(?:\.[\w.-]+)?["']?[ \t]*[=:][ \t]*)"""
_INLINE = re.compile(rf"(?P<name>{_NAME}){_BETWEEN}(?P<value>(?!{HIDDEN}){_VALUE})", re.IGNORECASE)
_BELOW = re.compile(
    rf"^(?P<kept>(?P<indent> *)(?:- )?[\w.\"'-]*{_NAME}[\"']?:)[ ]*[|>]?[-+]?[ ]*\n"
    r"(?:(?P=indent)(?: +|- ?).*(?:\n|\Z))+",
    re.IGNORECASE | re.MULTILINE,
)


def is_secret(name: str) -> bool:
    """Of the setting with this dotted name, or of one above it."""
    return any(_NAMED.search(part) for part in name.split("."))


def hide(value: Any, name: str = "") -> Any:
    """A copy of a configuration, parsed or plain, with `HIDDEN` in the place of what is secret."""
    if isinstance(value, Namespace):
        return type(value)(**{key: hide(held, f"{name}.{key}") for key, held in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: hide(held, f"{name}.{key}") for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        found = [hide(held, name) for held in value]
        return found if isinstance(value, list) else tuple(found)
    if _holds_secret(name, value):
        return HIDDEN
    return _hide_by_place(value) if isinstance(value, str) else value


def _holds_secret(name: str, value: Any) -> bool:
    """A number of tokens is none, nor are their ids; nor is whether one is given."""
    if value in (None, "") or isinstance(value, bool) or not is_secret(name):
        return False
    return not (name.lower().endswith("tokens") and re.fullmatch(r"[\d\W]+", str(value)))


def _hide_by_place(text: str) -> str:
    for pattern, hidden in _PLACES:
        text = pattern.sub(hidden, text)
    return text


def hide_in_text(text: str) -> str:
    """The same of a configuration's text, such as YAML, JSON or a line of it."""

    def inline(found: re.Match[str]) -> str:
        value = found["value"] if not _holds_secret(found["name"], found["value"].strip("\"'")) else HIDDEN
        return found["name"] + found["between"] + value

    text = _BELOW.sub(rf"\g<kept> {HIDDEN}\n", _hide_by_place(text))
    return _INLINE.sub(inline, text)


def hide_in_command(arguments: Sequence[str]) -> list[str]:
    """The same of a command line."""
    before = ["", *arguments]
    return [
        HIDDEN
        if name.startswith("--") and "=" not in name and _holds_secret(name[2:].rstrip("+"), argument)
        else hide_in_text(argument)
        for name, argument in zip(before, arguments, strict=False)
    ]


def hidden_keys(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the settings that `hide` has left without their values."""
    if isinstance(value, str) and HIDDEN in value:
        yield name
    elif isinstance(value, (Mapping, Namespace)):
        for key, held in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from hidden_keys(held, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for held in value:
            yield from hidden_keys(held, name)
