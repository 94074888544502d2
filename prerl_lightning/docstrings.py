"""What a class or function says of itself, as records read from its source. Nothing is imported: `prerl help` answers
at once, and the documentation is built without torch."""

import ast
import builtins
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign
FOREIGN = ("abc", "collections", "torch", "typing")  # packages whose bases bring no arguments of ours
_FACTORIES = {"list": "[]", "dict": "{}"}


@dataclass(frozen=True)
class Argument:
    """``type`` and ``default`` as Python writes them; default None: required. ``owner``: the class that declares it."""

    name: str
    type: str
    default: str | None
    text: str
    owner: str


@dataclass(frozen=True)
class Method:
    """Of a base, one that has or is free to be written, or what a record has beside its fields. ``called``: its
    signature; ``text``: the first paragraph."""

    called: str
    how: Literal["to write", "may be written", "method", "property"]
    text: str


@dataclass(frozen=True)
class Entry:
    """``home``: where it is defined. ``text``: the docstring; of a class without its arguments. ``unread``: bases whose
    source is not to be found."""

    name: str
    path: str
    home: str
    is_class: bool
    text: str
    arguments: tuple[Argument, ...] = ()
    methods: tuple[Method, ...] = ()
    unread: tuple[str, ...] = ()


def read(path: str) -> Entry | None:
    """Of a class or function by import path, re-exported ones too; None: there is no source of such."""
    module, node = _definition(path) or ("", None)
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
        return None
    name, home, text = path.rpartition(".")[2], f"{module}.{node.name}", ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return Entry(name, path, home, False, text)
    unread: list[str] = []
    arguments = tuple(_arguments(module, node, unread).values())
    methods = sorted(_methods(node), key=lambda method: method.how != "to write")
    return Entry(name, path, home, True, _sections(text)[0], arguments, tuple(methods), tuple(unread))


def constant(module: str, name: str) -> ast.expr:
    """The value that a module gives a name, as a tree."""
    found = _definition(f"{module}.{name}")
    if found is None or not isinstance(found[1], ast.Assign | ast.AnnAssign) or found[1].value is None:
        raise KeyError(f"{module} has no {name}")
    return found[1].value


# ---------------------------------------------------------------------- where things are


@cache
def _file(module: str) -> Path | None:
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)  # which imports nothing where there is no dot
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest)
        for file in (base.parent / f"{base.name}.py", base / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def _source(module: str) -> tuple[str, ast.Module] | None:
    file = _file(module)
    if file is None:
        return None
    text = file.read_text(encoding="utf-8")
    return text, ast.parse(text)


@cache
def _lines(module: str) -> list[bytes]:
    """In bytes, as the places of a tree are counted."""
    source = _source(module)
    return source[0].encode().splitlines() if source else []


@cache
def _imports(module: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Those of its source, then those of the stub beside it, which has the names of a lazy package."""
    file, source = _file(module), _source(module)
    trees = [source[1]] if source else []
    if file is not None and (stub := file.with_suffix(".pyi")).is_file():
        trees.append(ast.parse(stub.read_text(encoding="utf-8")))
    return tuple(n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))


@cache
def _definition(path: str) -> tuple[str, Definition] | None:
    """The module and the statement that a name comes from, through whatever imports it or gives it another name."""
    seen = set()
    while path not in seen:
        seen.add(path)
        module, _, name = path.rpartition(".")
        node = _statement(module, name)
        other = getattr(node, "value", None)
        if node is not None and not isinstance(other, ast.Name | ast.Attribute):
            return module, node
        path = _path(module, ast.unparse(other)) if other else _imported(module, name)
    return None


def _statement(module: str, name: str) -> Definition | None:
    source = _source(module)
    for node in source[1].body if source else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(getattr(t, "id", "") == name for t in targets):
            return node
    return None


def _path(module: str, name: str) -> str:
    """Of what a name, dotted or not, stands for in a module."""
    return f"{module}.{name}" if _statement(module, name) else _imported(module, name)


def _imported(module: str, name: str) -> str:
    """Likewise, by imports alone; what is not imported is the module's own."""
    first, dot, rest = name.partition(".")
    for node in _imports(module):
        for alias in node.names:
            if (alias.asname or alias.name.partition(".")[0]) == first:
                package = f"{_origin(module, node)}." if isinstance(node, ast.ImportFrom) else ""
                known = alias.name if package or alias.asname else first  # `import a.b` names a
                return f"{package}{known}{dot}{rest}"
    return f"{module}.{name}"


def _origin(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of what is imported from."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    parts = module.split(".") + ([""] if file and file.name == "__init__.py" else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def _bases(module: str, node: ast.ClassDef, unread: list[str]) -> Iterator[tuple[str, ast.ClassDef]]:
    """The class, then its bases, in the order of depth."""
    yield module, node
    for base in node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        path = _path(module, name)
        if path.partition(".")[0] in FOREIGN or hasattr(builtins, name):
            continue
        found = _definition(path)
        if found is None:
            unread.append(name)
        elif isinstance(found[1], ast.ClassDef) and found[0].partition(".")[0] not in FOREIGN:
            yield from _bases(found[0], found[1], unread)


# ---------------------------------------------------------------------- arguments


def _arguments(module: str, node: ast.ClassDef, unread: list[str]) -> dict[str, Argument]:
    """Its own, then those that it hands on to its bases."""
    chain = list(_bases(module, node, unread))
    texts: dict[str, str] = {}
    for _, each in reversed(chain):
        for documented in (each, _init(each)):
            texts |= _sections(ast.get_docstring(documented) or "")[1] if documented else {}
    found: dict[str, Argument] = {}
    for home, each in chain:
        if (init := _init(each)) is not None:
            for name, argument in _of_signature(home, each.name, init, texts).items():
                found.setdefault(name, argument)
            if init.args.kwarg is None:
                break
        elif _is_record(each):
            found |= _of_fields(home, each, texts)
    return found


def _init(node: ast.ClassDef) -> ast.FunctionDef | None:
    named = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    return named.get("__init__", named.get("__new__"))


def _is_record(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _of_signature(module: str, owner: str, init: ast.FunctionDef, texts: dict[str, str]) -> dict[str, Argument]:
    a = init.args
    plain = [*a.posonlyargs, *a.args][1:]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(a.defaults)), *a.defaults[-len(plain) or None :]]
    pairs = [*zip(plain, defaults, strict=True), *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return {
        arg.arg: Argument(arg.arg, _type(module, arg.annotation), _text(module, default), texts.get(arg.arg, ""), owner)
        for arg, default in pairs
    }


def _of_fields(module: str, node: ast.ClassDef, texts: dict[str, str]) -> dict[str, Argument]:
    found = {}
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name, default = field.target.id, _text(module, field.value)
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func).rpartition(".")[2] == "field":
            options = {k.arg: ast.unparse(k.value) for k in field.value.keywords}
            if options.get("init") == "False":
                continue
            made = options.get("default_factory")
            default = options.get("default", _FACTORIES.get(made or "", "made anew" if made else None))
        found[name] = Argument(name, _type(module, field.annotation), default, texts.get(name, ""), node.name)
    return found


def _text(module: str, node: ast.expr | None) -> str | None:
    """As its author wrote it: 1e-6, not 1e-06."""
    if node is None:
        return None
    assert node.end_lineno is not None
    # ast.get_source_segment cuts the whole file into lines for each: 2 s for all keys
    lines = _lines(module)[node.lineno - 1 : node.end_lineno]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return " ".join(b" ".join(lines).decode().split())


def _type(module: str, node: ast.expr | None) -> str:
    """With the choices that an alias stands for: 'k1' | 'k3'."""
    if node is None:
        return ""

    def spelled(match: re.Match[str]) -> str:
        found = _definition(f"{module}.{match[0]}")
        value = found[1].value if found and isinstance(found[1], ast.Assign) else None
        text = ast.unparse(value) if value is not None else ""
        return text if text.startswith("Literal[") else match[0]

    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)
    text = re.sub(r"(?<![\w.'])[A-Z]\w*\b(?!')", spelled, text)
    return re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | "), text)


# ---------------------------------------------------------------------- methods


def _methods(node: ast.ClassDef) -> Iterator[Method]:
    """In its own body. Of a base what does nothing by itself may be written, too: it is empty, or gives something in
    which none of its arguments occurs."""
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    is_base = any(map(_is_missing, methods))
    for each in methods:
        text = (ast.get_docstring(each) or "").partition("\n\n")[0]
        marks = {ast.unparse(d).rpartition(".")[2] for d in each.decorator_list}
        is_property = bool(marks & {"property", "cached_property"})
        public = text and not each.name.startswith("_")
        if _is_missing(each):
            yield Method(_called(each, is_property), "to write", text)
        elif public and is_base and _does_nothing(each):
            yield Method(_called(each, is_property), "may be written", text)
        elif public and _is_record(node):
            yield Method(_called(each, is_property), "property" if is_property else "method", text)


def _is_missing(node: ast.FunctionDef) -> bool:
    abstract = any(ast.unparse(d).rpartition(".")[2] == "abstractmethod" for d in node.decorator_list)
    return abstract or [ast.unparse(each) for each in _body(node)] == ["raise NotImplementedError"]


def _does_nothing(node: ast.FunctionDef) -> bool:
    names = {n.id for each in _body(node) for n in ast.walk(each) if isinstance(n, ast.Name)}
    given = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
    return all(isinstance(each, ast.Return | ast.Pass) for each in _body(node)) and not names & given


def _body(node: ast.FunctionDef) -> list[ast.stmt]:
    """Without docstring and ``...``."""
    return [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]


def _called(node: ast.FunctionDef, is_property: bool) -> str:
    gives = ast.unparse(node.returns).strip("'") if node.returns is not None else ""
    if is_property:
        return f"{node.name}: {gives}"
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    return f"{node.name}({arguments})" + (f" -> {gives}" if gives else "")


# ---------------------------------------------------------------------- docstrings


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    """What is not of arguments, and each argument's text, as one line a paragraph."""
    lines = inspect.cleandoc(docstring).splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), None)
    if start is None:
        return "\n".join(lines), {}
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    inner = inspect.cleandoc("\n" + "\n".join(lines[start + 1 : end])).splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in inner:
        if match := re.match(r"((?:\*{0,2}\w+(?:, )?)+)(?: \([^)]*\))?:(?: (.*)|$)", line):
            name = match[1].lstrip("*")
            found[name] = match[2] or ""
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip() if line.strip() else f"{found[name]}\n\n"
    texts = {key: re.sub(r"\n+ *", "\n\n", text).strip() for key, text in found.items()}
    rest = "\n".join([*lines[:start], *lines[end:]]).strip()
    return rest, {one: text for names, text in texts.items() for one in names.split(", ")}
