"""Keys, tokens and passwords stay out of what a run writes: config.yaml, checkpoints, run.json, and what is made of
them. They are told by the names of their settings, and in addresses by their place."""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "<hidden>"
# not every key or token is one: answer_key, eos_token
_NAME = (
    r"(?:(?:api|access|auth|secret|private|hf|hub|wandb)_?(?:key|token)"
    r"|(?<![a-z0-9_])token|secret|passw(?:or)?d|passphrase|credentials?)"
)
_NAMED = re.compile(_NAME + r"\Z", re.IGNORECASE)
_INLINE = re.compile(_NAME + r"""(?P<between>["']?\s*[=:]\s*)(?:"[^"]*"|'[^']*'|[^\s,}"']+)""", re.IGNORECASE)
_ADDRESS = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+@")  # https://user:password@host


def is_secret(name: str) -> bool:
    """Of the setting with this dotted name."""
    return bool(_NAMED.search(name.rpartition(".")[2]))


def hide(value: Any, name: str = "") -> Any:
    """A copy of a configuration, parsed or plain, with `HIDDEN` in the place of what is secret."""
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else _ADDRESS.sub(rf"\1:{HIDDEN}@", value)
    if isinstance(value, Namespace):
        return type(value)(**{key: hide(held, key) for key, held in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: hide(held, str(key)) for key, held in value.items()}
    if isinstance(value, list):
        return [hide(held, name) for held in value]
    return value


def hide_in_text(text: str) -> str:
    """The same of a configuration's text, such as YAML, JSON or a line of it."""
    text = _INLINE.sub(lambda found: found[0][: found.end("between") - found.start()] + HIDDEN, text)
    return _ADDRESS.sub(rf"\1:{HIDDEN}@", text)


def hide_in_command(arguments: Sequence[str]) -> list[str]:
    """The same of a command line."""
    before = ["", *arguments]
    return [
        HIDDEN if name.startswith("--") and "=" not in name and is_secret(name) else hide_in_text(argument)
        for name, argument in zip(before, arguments, strict=False)
    ]


def hidden_keys(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the settings that `hide` has left without their values."""
    if isinstance(value, str) and HIDDEN in value:
        yield name
    elif isinstance(value, (Mapping, Namespace)):
        for key, held in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from hidden_keys(held, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for held in value:
            yield from hidden_keys(held, name)
