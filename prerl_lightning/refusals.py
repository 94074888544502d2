"""What jsonargparse and Lightning refuse, said as this library says it: the key, what is wrong, the mend.

What torch has to be imported for is imported where a message needs it: most are said at once.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prerl_lightning import manual, shipped
from prerl_lightning.errors import InputError, in_one_line, nearest

if TYPE_CHECKING:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
# what TRL and verl call it, and we otherwise; docs/coming-from/ has all
OURS_OF = {
    **dict.fromkeys(("num_generations", "rollout_n"), "data.sampling.group_size"),
    **dict.fromkeys(("max_completion_length", "max_response_length"), "data.sampling.max_new_tokens"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size"), "data.prompts_per_step (prompts, not responses)"
    ),
    **dict.fromkeys(("beta", "kl_loss_coef"), "model.init_args.kl_coefficient"),
    **dict.fromkeys(("epsilon", "cliprange", "clip_ratio_low"), "model.init_args.clip_low and clip_high"),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high"), "model.init_args.clip_high"),
    **dict.fromkeys(("max_grad_norm", "grad_clip"), "model.init_args.gradient_clip"),
    "lr_scheduler_type": "model.init_args.lr_schedule",
    **{"peft_config": "model.init_args.lora", "target_modules": "model.init_args.lora.targets"},
    **{"lora_rank": "model.init_args.lora.rank", "lora_alpha": "model.init_args.lora.alpha"},
    "vllm_gpu_memory_utilization": "data.engine.init_args.gpu_memory_utilization",
    **dict.fromkeys(("eval_steps", "test_freq"), "trainer.val_check_interval"),
    **dict.fromkeys(("save_steps", "save_freq"), "checkpoint.every_n_train_steps"),
    "total_training_steps": "trainer.max_steps",
    **dict.fromkeys(("num_iterations", "ppo_epochs"), "model.init_args.epochs"),
    "max_prompt_length": "data.max_prompt_tokens",
    "learning_rate": "model.init_args.lr",
    "reward_funcs": "data.reward",
    "model_name_or_path": "model.init_args.model",
    "output_dir": "trainer.default_root_dir",
}
# and what there is not, with why
NOT_HERE = dict.fromkeys(
    ("tensor_parallel_size", "tensor_model_parallel_size", "vllm_tensor_parallel_size", "pipeline_parallel_size"),
    "An engine has one GPU here; trainer.devices is the number of ranks, which are data parallel.",
)
RUN_HERE = {"trainer.precision": ("32-true", "bf16-mixed")}  # of more that the key's type takes
VERL = ("actor_rollout_ref", "algorithm", "critic", "custom_reward_function", "reward_model")  # the tops of its tree
# of jsonargparse's messages: what stands around the reason
_AROUND = re.compile(r"$|Does not validate|Subtypes:|Errors:|Expected a path but|Given value")


# ---------------------------------------------------------------------- the command line of a run


def checked(args: Sequence[str], own: Iterable[str] = ()) -> list[str]:
    """It, with the path of each ``--config``.

    Args:
        own: options besides those of `prerl fit`.

    Raises:
        InputError: what need not be parsed for: a file is none, an option is no key.
    """
    args = shipped.in_arguments(args)
    trees = [check_file(file) for file in config_files(args)]
    known = {*manual.options(), *own, "help", "print_config"}
    for arg in args:
        key = arg[2:].partition("=")[0].rstrip("+") if arg.startswith("--") else ""
        if key and not _is_key(key, known):
            raise InputError(f"{key}: there is no such key.{_near_key(key, [*known])}")
    for tree in [*trees, *_trees(args)]:
        for key, value in _settings(tree):
            _check_setting(key, value)
    return args


def config_files(args: Sequence[str]) -> list[str]:
    given = []
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if arg.startswith("--config=") or (arg in ("--config", "-c") and following):
            given.append(arg.partition("=")[2] or following)
    return given


def _is_key(key: str, known: set[str]) -> bool:
    """It, or the class that takes it: of data.engine.init_args.dtype data.engine is."""
    parts = key.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    first = next((name for name in above if name not in manual.KEYS), None)
    return first is None or first in known or parts[-1] == "help"


# ---------------------------------------------------------------------- configuration files


class Once(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if isinstance(name, str) and name != "<<" and name in lines:
                raise InputError(f"line {line}: the key {name} is there twice, before in line {lines[name]}. Keep one.")
            if isinstance(name, str):
                lines[name] = line
        return super().construct_mapping(node, deep)


def check_file(file: str) -> Mapping[str, Any]:
    """What it holds; of a remote one nothing, which is the parser's to read. Raises InputError for what is no
    configuration."""
    if "://" in file:
        return {}
    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else f"no such file (looked for from {Path.cwd()})"
        raise InputError(f"--config: {file}: {what}. Give a YAML file.{shipped.hint(file)}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Once)
    except InputError as error:
        raise InputError(f"--config: {file}, {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config: {file}: not text in UTF-8. Give a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"--config: {file}{place}: not YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(found, Mapping):
        what = "it is empty" if found is None else "it holds no keys"
        raise InputError(f"--config: {file}: {what}. A configuration has keys such as model, data and trainer.")
    return found


# ---------------------------------------------------------------------- values that stand for something else here


def _trees(args: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """What each option of a command line gives, as YAML."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        key, is_one, text = arg.partition("=")
        if key.startswith("--") and (text := text if is_one else following):
            try:
                yield {key[2:].rstrip("+"): yaml.safe_load(text)}
            except (yaml.YAMLError, ValueError):  # a date of no day
                yield {key[2:].rstrip("+"): text}


def _settings(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All that a configuration gives, by dotted keys: mappings and lists, then what they hold. Of a class its name, by
    the key at which it stands."""
    yield key.removesuffix(".class_path"), tree
    for name, held in tree.items() if isinstance(tree, Mapping) else ():
        yield from _settings(held, f"{key}.{name}" if key else str(name))
    for held in tree if isinstance(tree, list) else ():
        yield from _settings(held, key)


def _check_setting(key: str, value: Any) -> None:
    """Raises InputError for null where there is no such, and by `MEANT`. The parser says less of these: of a file it
    has read what is in it, and of null nothing."""
    if value is None and (key in manual.KEYS or key.endswith(".init_args") or ("." in key and not _takes_none(key))):
        raise InputError(f"{key}: null: leave it out.")
    for pattern, kind, look in MEANT:
        if isinstance(value, kind) and re.fullmatch(pattern, key) and (mend := look(value)):
            raise InputError(f"{key}: {value}: {mend}")


def _takes_none(key: str) -> bool:
    """Or it is required, which the parser says, or stands below a class, whose own affair it is."""
    option = manual.options().get(key)
    return option is None or option.default in (None, "None") or bool(re.search(r"\b(None|Optional)\b", option.type))


def _set_of(value: str) -> str:
    """The mend, where a file, or the name of a set or of one on the hub, stands where a class belongs; else nothing."""
    if value in manual.topics()["problems"]:
        return ""
    from prerl_lightning.data.named import SETS
    from prerl_lightning.data.rows import COMPRESSED, KINDS

    path = Path(value)
    if value in SETS:
        kind, argument = "NamedProblems", "name"
    elif (path.suffix in (*KINDS, *COMPRESSED) and not _is_configuration(path)) or (value and path.is_dir()):
        kind, argument = "Files", "path"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", value) and path.suffix not in (".yaml", ".yml", ".json"):
        kind, argument = "HubDataset", "name"
    else:
        return ""
    return f"a set of problems is a class. Write {{class_path: {kind}, init_args: {{{argument}: {value}}}}}."


def _is_configuration(path: Path) -> bool:
    """A class may be given by a file, which may be JSON."""
    return path.suffix == ".json" and path.is_file() and "class_path" in path.read_text(errors="replace")


def _function_of(value: str) -> str:
    """The mend, where a reward is given as verl's are, by its file, or as entry points are, with a colon."""
    file, colon, function = value.partition(":")
    if not colon and not file.endswith(".py"):
        return ""
    place = Path(os.path.relpath(Path(file).expanduser() if file.endswith(".py") else file.replace(".", "/")))
    outside = place.parts[0] == ".."
    module = place.stem if outside else ".".join(place.with_suffix("").parts)
    mend = f", and put {place.parent.resolve()} into PYTHONPATH" if outside else ""
    return f"a reward goes by its import path. Write {module}.{function or 'FUNCTION'}{mend}."


def _overlay(folder: str, value: str) -> str:
    """The mend, where the name of what a shipped configuration sets up stands where a class belongs."""
    name = shipped.overlay(folder, value)
    return f"a configuration that comes along sets it up. Write --config {name}.yaml." if name else ""


def _off(value: int) -> str:
    return "that is off in vLLM and verl; here 0 is. Write 0, or leave it out." if value == -1 else ""


# by keys: the type of a value that is looked at, and what says the mend
MEANT: tuple[tuple[str, type, Callable[[Any], str]], ...] = (
    (r"data\.(train|val|val_more\.[^.]+)((\.init_args)?\.(sets\.[^.]+|problems))*", str, _set_of),
    (r"data\.(.+\.)?(reward|val_reward|rewards(\.[^.]+)?)", str, _function_of),
    (r"data\.(.+\.)?top_k", int, _off),
    (r"trainer\.logger", str, partial(_overlay, "logger")),
    (r"model", str, partial(_overlay, "objectives")),
)


# ---------------------------------------------------------------------- jsonargparse


def of_parser(message: str, dests: Iterable[str]) -> InputError:
    """Of a message of several lines, whose reason is in the middle.

    Args:
        dests: the parser's keys.
    """
    keys: list[str] = []
    owner, reasons = "", list[str]()
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := re.match(r'Parser key "([^"]*)":\s*', line):
            keys.append(found[1])
            owner, line = "", line[found.end() :]
        if found := re.match(r"Type .* expects a function or a callable class: ", line):
            line, _, value = line[found.end() :].partition(". Got value: ")
            owner = kind[1] if (kind := re.match(r"Namespace\(class_path='([^']+)'", value)) else owner
        if found := re.match(r"Problem with given class_path '([^']*)':\s*", line):
            owner = found[1]
            line = line[found.end() :]
        if not _AROUND.match(line):
            reasons.append(line)
    # of a list of loggers the first one says that it is no single logger
    reason = next((r for r in reasons if r.startswith("Option '")), reasons[0] if reasons else message)
    given = re.search(r"(?:Given value|Got value|import path string): (.+)$", message, re.M)
    said = _said(".init_args.".join(keys), owner, reason, reasons, given[1] if given else "", [*dests])
    return InputError(re.sub(r"\b(terms|lora)\.init_args\.", r"\1.", said))  # they stand there without a class_path


def _said(key: str, owner: str, reason: str, reasons: list[str], given: str, dests: list[str]) -> str:
    if found := re.match(
        r"Option '(.+)' is not accepted|unrecognized arguments: (\S+)|.* not accept option '(.+)'", reason
    ):
        name = next(filter(None, found.groups()))
        if owner:
            mend = here(name) or nearest(name, [other for other in _arguments(owner) if other != name])
            return f"{key}.init_args.{name}: {_name(owner)} has no such argument.{mend}"
        if not name.startswith("-") and found[2]:
            return f"{name}: an argument without a key. Write --KEY VALUE, or --KEY=VALUE."
        name = name.lstrip("-").partition("=")[0]
        return f"{name}: there is no such key.{_near_key(name, dests)}"
    if found := re.match(r"the following arguments are required: (.+)", reason):
        missing = [re.sub(r"^(fit|validate|test)\.", "", name) for name in found[1].split(", ")]
        return f"{f'{key}.init_args.' if key else ''}{', '.join(missing)}: missing."
    if found := re.match(r"argument (?:--)?(\S+): (.+)", reason):
        return f"{found[1]}: {found[2]}."
    if names := RUN_HERE.get(key) or _choices(reason):
        return f"{key}: {given} must be one of {', '.join(names)}.{nearest(given, names)}"
    if "codec can't decode" in reason:
        mend = "Write {class_path: Files, init_args: {path: FILE}}."
        return f"{key}: it names a file that is no configuration, not even text. {mend}"
    if re.search(r"import path|No module named|has no attribute|import object|Import path", reason):
        why = "" if "import path string" in reason else f": {reason}"
        path = owner or given
        return f"{key}: {path} is not what can be imported here{why}.{_near_name(path)}"
    if found := re.match(r"Not a valid subclass of (\w+)", reason):
        return f"{key}: {given or owner or 'it'} is no {found[1]}. Give one by its class_path, or leave it out."
    if reason.startswith("Expected a"):
        words = [word for r in reasons for word in (_choices(r) or _type(r))]
        return f"{key}: {given} must be {' or '.join(dict.fromkeys(words))}."
    return f"{key}: {reason[:300]}" if key else reason[:300]


def _choices(reason: str) -> list[str]:
    found = re.match(r"Expected a typing\.Literal\[(.+?)\]", reason)
    return [name.strip().strip("'") for name in found[1].split(",")] if found else []


def _type(reason: str) -> list[str]:
    found = re.match(r"Expected an? (?:<class ')?([\w.]+)", reason)
    return [TYPES.get(found[1], found[1])] if found and found[1] != "NoneType" else []


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _arguments(path: str) -> list[str]:
    """Of a class, with those that it hands on to its bases."""
    kind = getattr(import_module(path.rpartition(".")[0]), _name(path))
    return [name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters]


def here(name: str) -> str:
    """The end of a sentence, where a key is TRL's or verl's."""
    last = name.rpartition(".")[2]
    if found := OURS_OF.get(last):
        return f" Here that is {found}."
    if why := NOT_HERE.get(last):
        return f" {why}"
    return " That is verl's: docs/coming-from/verl.md has ours." if name.partition(".")[0] in VERL else ""


def _near_key(key: str, dests: list[str]) -> str:
    """By the first part of a dotted key that is none of those at its place."""
    if ours := here(key):
        return ours
    parts = key.split(".")
    for i, part in enumerate(parts):
        beside = {d.split(".")[i] for d in dests if d.split(".")[:i] == parts[:i] and d.count(".") >= i}
        if part not in beside:
            near = nearest(".".join(parts[: i + 1]), [".".join([*parts[:i], name]) for name in beside])
            return near or (_elsewhere(key, dests) if len(parts) == 1 else "")
    return ""


def _elsewhere(name: str, dests: Iterable[str]) -> str:
    """The end of a sentence, where it is the last part of a key."""
    if any(argument.name == name for argument in manual.entry(manual.POLICY_MODULE).arguments):
        return f" Did you mean model.init_args.{name}?"
    return next((f" Did you mean {d}?" for d in dests if d.endswith(f".{name}")), "")


def _near_name(path: str) -> str:
    """Among what a configuration may name without its package, and our rewards."""
    import lightning as L
    from lightning.pytorch.loggers import Logger

    from prerl_lightning.data.problems import ProblemSet
    from prerl_lightning.objectives import PolicyModule
    from prerl_lightning.objectives.advantages import Advantage
    from prerl_lightning.objectives.aggregations import Aggregation
    from prerl_lightning.objectives.coefficients import Coefficient
    from prerl_lightning.objectives.surrogates import Surrogate
    from prerl_lightning.objectives.token_weights import Weight
    from prerl_lightning.rollout.engine import Engine

    bases = (PolicyModule, ProblemSet, Engine, Advantage, Surrogate, Aggregation, Weight, Coefficient)
    found = {kind.__name__: kind.__name__ for base in bases for kind in _below(base)}
    found |= {kind.__name__: kind.__name__ for base in (L.Callback, Logger) for kind in _below(base)}
    found |= {name: name for name in manual.topics()["rewards"]}
    found["LitLogger"] = "lightning.pytorch.loggers.LitLogger"  # no subclass: see compat.accept_lit_logger
    hint = nearest(_name(path), found)
    name = hint.removeprefix(" Did you mean ").removesuffix("?")
    return hint.replace(name, found[name]) if hint else ""


def _below(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


# ---------------------------------------------------------------------- Lightning


def from_lightning(error: BaseException | None) -> "MisconfigurationException | None":
    """The refusal that ``error`` is, or was raised from."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    while error is not None and not isinstance(error, MisconfigurationException):
        error = error.__cause__
    return error


def of_lightning(error: Exception, trainer: Mapping[str, Any]) -> InputError:
    """What the Trainer or a part of it refuses, by the argument that it names, or whose value it does.

    Args:
        trainer: its configuration.
    """
    said = str(error)
    if twice := re.search(r"more than one stateful callback of type `(\w+)`", said):
        return InputError(f"trainer.callbacks: {twice[1]} is there twice. Give one.")
    named = [key for key in trainer if re.search(rf"\b{key}\b", said)]
    words = {key: value for key, value in trainer.items() if isinstance(value, str) and value != "auto"}
    valued = [key for key, value in words.items() if re.search(rf"\b{re.escape(value)}\b", said)]
    for key in sorted(named, key=said.index) or valued:
        return InputError(f"trainer.{key}: {trainer[key]}: {in_one_line(error)}")
    return InputError(f"trainer: {in_one_line(error)}")
