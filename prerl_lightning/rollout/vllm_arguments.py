"""The names of ``vllm.LLM``'s arguments, read in its source: importing it takes 10 s and more."""

import ast
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from prerl_lightning.errors import InputError, nearest


def check_arguments(given: Collection[str], key: str) -> None:
    """Raises InputError for the first of ``given``, found under ``key``, that vllm.LLM does not take. Where there is no
    vLLM, it is not this that is wrong."""
    if given and (found := find_spec("vllm")) is not None:
        known = llm_arguments(Path(*found.submodule_search_locations or ()))
        for name in given:
            if name not in known:
                mend = nearest(name, known) or " Leave it out."
                raise InputError(f"{key}.{name}: vllm.LLM has no such argument.{mend}")


def llm_arguments(vllm: Path) -> set[str]:
    """Its own, and those that it hands on to EngineArgs."""
    names = set()
    for node in _class("EngineArgs", vllm / "engine" / "arg_utils.py"):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    for node in _class("LLM", vllm / "entrypoints" / "llm.py"):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names |= {argument.arg for argument in node.args.kwonlyargs}
    return names


def _class(name: str, file: Path) -> list[ast.stmt]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
