"""``prerl help [TOPIC]``: objectives, configuration keys, problem sets, engines, rewards, callbacks and metrics, in the
words of their docstrings; the documentation's reference of every key is made of the same records.

    prerl help
    prerl help GRPO
    prerl help data.sampling
    prerl help lr                        # every place that has such an argument
    prerl help rloo                      # a configuration that is shipped; evaluate: a command's options
    prerl help rollout/entropy           # a column of metrics.csv
    prerl help my_module.MyObjective     # a class of your own, by its path
    prerl help ProblemSet                # what one of your own derives from, or is handed
"""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module

from prerl_lightning import shipped
from prerl_lightning.docstrings import Argument, Entry, Method, constant, read
from prerl_lightning.errors import ArgumentParser, InputError, nearest
from prerl_lightning.metrics.glossary import Column, column, glossary
from prerl_lightning.terminal import printable_lines

OURS = "prerl_lightning"
REWARDS = f"{OURS}.rewards"
OBJECTIVES = f"{OURS}.objectives"
POLICY_MODULE = f"{OURS}.PolicyModule"
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"

# what LightningCLI has at a configuration's top level, and what stands below `data`
KEYS = {
    "data": f"{OURS}.data.module.RolloutDataModule",
    "data.sampling": f"{OURS}.rollout.engine.Sampling",
    "data.val_sampling": f"{OURS}.rollout.engine.HeldOutSampling",
    "data.format": f"{OURS}.data.prompts.PromptFormat",
    "data.verification": f"{OURS}.rewards.pool.Verification",
    "trainer": TRAINER,
    "checkpoint": f"{OURS}.callbacks.saving.RunCheckpoint",
    "export": f"{OURS}.callbacks.saving.ExportModel",
    "thoughts": f"{OURS}.callbacks.thoughts.Thoughts",
    "alignment": f"{OURS}.callbacks.alignment.GradientAlignment",
    "weights": f"{OURS}.callbacks.weights.WeightChange",
    "samples": f"{OURS}.callbacks.samples.Samples",
    "health": f"{OURS}.callbacks.health.RunHealth",
    "watchdog": f"{OURS}.callbacks.watchdog.Watchdog",
}
# single values at the top level, which no class of ours takes
VALUES = {
    "config": ("path", None, "a YAML file; may be given several times: later ones win."),
    "seed_everything": ("int", "0", "of all generators, of the prompts' order and of sampling."),
    "ckpt_path": (
        "str",
        "None",
        "resume from this checkpoint; ``last``: from the newest whole one of this name's runs; ``auto``: from that, or "
        "a new run where there is none; ``best``: from the best by ``checkpoint.monitor``; "
        "``registry:NAME[:version:VERSION]``: from Lightning's model registry.",
    ),
    "weights_only": (
        "bool",
        "None",
        "False: a checkpoint may run the code that is in it; for files of your own alone.",
    ),
    "name": ("str", "None", "of the run: runs/NAME/version_N; default: that of the configuration file."),
    "allow_changes": (
        "bool",
        "False",
        "resume also where the order of the data or the meaning of a step is another than in the checkpoint's "
        "configuration; what differs is listed.",
    ),
}
TITLES = {
    "objectives": ("Objectives", "model: {{class_path: {}, init_args: {{...}}}}"),
    "keys": ("Configuration keys", "{}: {{...}}"),
    "values": ("Single values", "--{} VALUE"),
    "problems": ("Problem sets", "data.train: {{class_path: {}, init_args: {{...}}}}"),
    "terms": ("Terms", "model: {{class_path: Objective, init_args: {{terms: [{{space: ..., ...}}]}}}}"),
    "axes": ("Choices along the axes", "{{class_path: {}, init_args: {{...}}}}, or its name alone"),
    "bases": ("To derive from, for an axis of your own", "from {} import {}"),
    "adapters": ("Adapters", "model.init_args.lora: {{...}}"),
    "engines": ("Engines", "data.engine: {{class_path: {}, init_args: {{...}}}}"),
    "rewards": ("Rewards", "data.reward: {}"),
    "callbacks": ("Callbacks", "trainer.callbacks: [{{class_path: {}, init_args: {{...}}}}]"),
    "strategies": ("Strategies", "trainer.strategy: {}"),
    "own": ("For other code of your own: what it derives from or is handed", "from {} import {}"),
}

# the module of each axis of a term, and its classes; and what follows the entropy
AXES = {
    "advantages": ("GroupStd", "GroupMean", "LeaveOneOut", "BatchStd", "SignedReward", "LENS", "ConstantBaseline"),
    "surrogates": ("PPOClip", "GSPO", "CISPO", "SAPO", "DPPO", "PolicyGradient"),
    "aggregations": ("TokenMean", "SeqMeanTokenMean", "ConstantLength"),
    "token_weights": ("BySign", "Confidence"),
    "coefficients": ("Linear", "Cosine", "Exponential"),
    "entropy": ("TargetEntropy",),
}
BASES = {
    "advantages": ("Advantage",),
    "surrogates": ("Surrogate", "Tokens"),
    "losses": ("TokenLosses",),
    "aggregations": ("Aggregation",),
    "token_weights": ("Weight",),
    "coefficients": ("Coefficient",),
}
CODE = ("bases", "own")  # kinds of what is no part of a configuration
# by the kind beside which the documentation has them
OWN = {
    "problems": {name: f"{OURS}.{name}" for name in ("ProblemSet", "Problem")},
    "engines": {"Engine": f"{OURS}.Engine"},
    "rewards": {"Score": f"{REWARDS}.Score"},
    "callbacks": {name: f"{OURS}.{name}" for name in ("Watcher", "Rollout", "Prompt", "Response")},
}


@cache
def topics() -> Mapping[str, Mapping[str, str]]:
    """By kind: topic -> import path."""
    objectives = [name for name in _all(OBJECTIVES) if name != "PolicyModule"]
    rewards = [name for name in _all(REWARDS) if name not in ("Reward", "Score")]
    readers, tasks = f"{OURS}.data.readers", f"{OURS}.data.tasks"
    return {
        "objectives": {name: f"{OBJECTIVES}.{name}" for name in objectives},
        "keys": KEYS,
        "problems": {
            "CountdownProblems": f"{tasks}.countdown.CountdownProblems",
            "ArithmeticProblems": f"{tasks}.sums.ArithmeticProblems",
            "TwoDigitSums": f"{tasks}.sums.TwoDigitSums",
            "Files": f"{readers}.Files",
            "HubDataset": f"{readers}.HubDataset",
            "NamedProblems": f"{OURS}.data.named.NamedProblems",
            "ReasoningGym": f"{OURS}.data.procedural.ReasoningGym",
            "Mixture": f"{OURS}.data.mixture.Mixture",
            "Source": f"{OURS}.data.mixture.Source",
        },
        "terms": {"Term": f"{OBJECTIVES}.term.Term"},
        "axes": {name: f"{OBJECTIVES}.{axis}.{name}" for axis, names in AXES.items() for name in names},
        "bases": {name: f"{OBJECTIVES}.{module}.{name}" for module, names in BASES.items() for name in names},
        "adapters": {"Lora": f"{OURS}.policy.lora.Lora"},
        "engines": {"VLLMEngine": f"{OURS}.rollout.vllm_engine.VLLMEngine"},
        "rewards": {name: f"{REWARDS}.{name}" for name in rewards}
        | {"math_verify_reward": f"{REWARDS}.symbolic.math_verify_reward"}
        | {"reasoning_gym_reward": f"{REWARDS}.gym.reasoning_gym_reward"},
        "callbacks": {
            "PolicyReincarnation": f"{OURS}.callbacks.reincarnation.PolicyReincarnation",
            "PolicyReincarnation.until": f"{OBJECTIVES}.until.Until",
        },
        "strategies": {"fsdp2": f"{OURS}.strategies.FSDP2Strategy"},
        "own": {"PolicyModule": POLICY_MODULE} | {name: path for of in OWN.values() for name, path in of.items()},
    }


def entry(path: str) -> Entry:
    """Raises InputError where there is no source of it."""
    found = read(path)
    if found is None:
        raise InputError(f"{path}: no class or function of this path is found from here. Give MODULE.NAME.")
    if path == TRAINER:
        ours = ast.literal_eval(constant(f"{OURS}.training", "TRAINER_DEFAULTS"))
        arguments = [replace(a, default=repr(ours[a.name])) if a.name in ours else a for a in found.arguments]
        text = "Lightning's Trainer, whose arguments these are; the defaults are those of `prerl fit`."
        return replace(found, text=text, arguments=tuple(arguments))
    return found


@cache
def options() -> Mapping[str, Argument]:
    """Every dotted key of `prerl fit`, but for what stands below a class."""
    found = {"model": Argument("model", "class", None, "the objective, with the model that it trains.", "")}
    found |= {name: Argument(name, *of, "") for name, of in VALUES.items()}
    for key, path in KEYS.items():
        found |= {f"{key}.{a.name}": a for a in entry(path).arguments if f"{key}.{a.name}" not in KEYS}
    return found


def options_of_a_run(command: str) -> str:
    """What `prerl fit --help` shows: without torch, which the parser has to be made with."""
    lines = [f"usage: prerl {command} [--config FILE ...] [--KEY VALUE ...]", ""]
    lines += _wrapped("All keys, in a file or on the command line. What an objective, a problem set, an engine or a "
                      "reward takes says prerl help NAME; prerl help lists them.", "")  # fmt: skip
    lines += ["", "  --help", "      these lines.", "  --print_config", "      the whole configuration as YAML."]
    for name, option in options().items():
        lines += _argument(replace(option, name=f"--{name}"), "  ")
    return "\n".join(lines)


def help(args: Sequence[str]) -> None:
    """The command. Raises InputError for what is no topic."""
    parser = ArgumentParser("prerl help", description="What there is to configure, in the words of its docstrings.")
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help="default: a list of them")
    topic = parser.parse_args(args).topic
    fits, commands = _commands()
    if topic in commands:
        getattr(import_module(commands[topic]), topic)(["--help"])
    lines = _contents() if topic is None else [options_of_a_run(topic)] if topic in fits else _about(topic)
    print(printable_lines("\n".join(lines)))


# ---------------------------------------------------------------------- in the terminal


def _contents() -> Iterator[str]:
    yield "prerl help TOPIC: one of these, a class of your own by its path, any argument or column of metrics.csv."
    for kind, of_kind in topics().items():
        yield f"\n{TITLES[kind][0]}"
        yield from _wrapped(", ".join(of_kind), "  ")
    yield f"\n{TITLES['values'][0]}"
    yield from _wrapped(", ".join(VALUES), "  ")
    yield "\nCommands"
    yield from _wrapped(", ".join(name for of in _commands() for name in of), "  ")
    yield "\nConfigurations, by the last part of their names too"
    yield from _wrapped(", ".join(shipped.names()), "  ")
    yield "\nmetrics"
    yield from _wrapped("every column of metrics.csv, with its unit", "  ")


def _about(topic: str) -> Iterator[str]:
    for kind, of_kind in topics().items():
        for name, path in of_kind.items():
            if topic in (name, path):
                return _entry(entry(path), name, kind)
    if topic in VALUES:
        type_, default, text = VALUES[topic]
        return _argument(Argument(topic, type_, default, text, ""), "")
    if topic == "metrics":
        return (line for of_group in glossary().items() for line in _group(*of_group))
    if (of_metrics := column(topic)) is not None:
        return _column(of_metrics)
    for called, (name, path, kind) in _classes().items():
        if _folded(called) == _folded(topic) and not (kind == "own" and any(_arguments_named(topic))):  # engine
            return _entry(entry(path), name, kind)
    if files := [name for name in shipped.names() if _folded(topic) in (_folded(name), _folded(_last(name, "/")))]:
        return (line for name in files for line in _configuration(name))
    if matches := list(_arguments_named(topic)):
        return _in_places(matches)
    if (found := read(topic if "." in topic else f"{OURS}.{topic}")) is not None:
        for name, path, kind in _classes().values():
            if _last(path) == _last(found.home) and entry(path).home == found.home:
                return _entry(entry(path), name, kind)
        return _entry(found, topic, "objectives" if _is_objective(found) else "")
    if matches := list(_arguments_given(topic)):
        return _in_places(matches)
    names = [*(_last(name, "/") for name in shipped.names()), *(name for of in _commands() for name in of)]
    near = nearest(topic, [*names, *options(), *KEYS, *VALUES, "metrics", *_classes()])  # GRPO rather than grpo.yaml
    if "." in topic:
        raise InputError(f"{topic}: no class or function of this path is found from here.{near} Give MODULE.NAME.")
    raise InputError(f"{topic}: no such topic.{near} prerl help lists them.")


def _classes() -> Mapping[str, tuple[str, str, str]]:
    """Topic, import path and kind by topic; of a key also by its class: Verification is data.verification."""
    keys = {_last(path): (name, path, "keys") for name, path in KEYS.items()}
    return keys | {name: (name, path, kind) for kind, of_kind in topics().items() for name, path in of_kind.items()}


def _commands() -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Those that take a run's configuration, and the modules of the others."""
    fits, others = (ast.literal_eval(constant(f"{OURS}.cli", name)) for name in ("FITS", "COMMANDS"))
    return fits, others


def _folded(name: str) -> str:
    """REINFORCE++ is reinforce_pp, NSR-PreRL is NSRPreRL."""
    return re.sub(r"[\W_]", "", name.lower().replace("+", "p"))


def _last(name: str, mark: str = ".") -> str:
    return name.rpartition(mark)[2]


def _configuration(name: str) -> Iterator[str]:
    """What its first lines say."""
    command = {"study": "prerl study", "pretrain": "prerl pretrain --config"}.get(name.partition("/")[0], "--config")
    yield f"{name}    {command} configs/{name}.yaml"
    yield from _wrapped(shipped.about(name), "  ")
    yield f"  prerl configs {name} prints it."


def _entry(found: Entry, name: str, kind: str) -> Iterator[str]:
    yield f"{name}    {usage(found, name, kind)}".rstrip()
    yield ""
    yield from _prose(found.text)
    yield from (f"\n{base}, which it is derived from, could not be read: its arguments are missing here."
                for base in found.unread)  # fmt: skip
    for argument in found.arguments:
        yield ""
        yield from _argument(argument, "  ")
    for method in found.methods if kind in ("", *CODE) else ():
        yield ""
        yield from _method(method, "  ")
    below = [topic for of_kind in topics().values() for topic in of_kind if topic.startswith(f"{name}.")]
    if below:
        yield ""
        yield from _wrapped(f"See also: prerl help {', '.join(below)}.", "")


def _in_places(found: Sequence[tuple[str, Argument]]) -> Iterator[str]:
    for where, argument in found:
        yield from ("", f"{where}:", *_argument(argument, "  "))


def _argument(argument: Argument, indent: str) -> Iterator[str]:
    default = "required" if argument.default is None else f"default {argument.default}"
    yield from _wrapped(f"{argument.name}    {argument.type or 'any'}, {default}", indent, indent + "    ")
    yield from _prose(argument.text, indent + "    ")


def _method(method: Method, indent: str) -> Iterator[str]:
    yield from _wrapped(f"{method.how}    {method.called}", indent, indent + "    ")
    yield from _prose(method.text, indent + "    ")


def _group(group: str, of_group: tuple[str, tuple[Column, ...]]) -> Iterator[str]:
    yield from ("", group, *_wrapped(_plain(of_group[0]), ""))
    for each in of_group[1]:
        yield from ("", *_column(each, "  "))


def _column(found: Column, indent: str = "") -> Iterator[str]:
    yield from _wrapped(f"{found.name}    {found.unit}", indent, indent + "    ")
    yield from _wrapped(_plain(found.text + (f" With {found.when}." if found.when else "")), indent + "    ")


def _prose(text: str, indent: str = "") -> Iterator[str]:
    """Paragraphs and lists, wrapped anew."""
    for i, block in enumerate(_blocks(text)):
        if block.startswith("- "):
            yield from _wrapped(_plain(block), indent, indent + "  ")
        else:
            yield from [""] * (i > 0)
            yield from _wrapped(_plain(block), indent)


def _wrapped(text: str, indent: str, then: str | None = None) -> list[str]:
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent if then is None else then,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _plain(text: str) -> str:
    return text.replace("``", "").replace("`", "")


# ---------------------------------------------------------------------- in the documentation


def page(kind: str) -> str:
    """Markdown on all topics of a kind, on the ``trainer``'s arguments or on ``metrics``: what docs/conf.py puts in the
    place of a marker. What Lightning says of its arguments is left to Lightning."""
    if kind == "metrics":
        return "\n".join(_glossary())
    if kind == "values":
        return "\n".join(line for name, of in VALUES.items() for line in _item(Argument(name, *of, "")))
    if kind == "trainer":
        bare = [replace(argument, text="") for argument in entry(TRAINER).arguments]
        return "\n".join(line for argument in bare for line in _item(argument))
    lines = []
    if kind == "objectives":
        base = entry(POLICY_MODULE)
        lines = [*_section(base, "What all objectives take", "", base.arguments), ""]
    shown = [(name, path, kind) for name, path in topics()[kind].items() if path != TRAINER]
    for name, path, of in [*shown, *((name, path, "own") for name, path in OWN.get(kind, {}).items())]:
        found = entry(path)
        own = [a for a in found.arguments if a.owner not in _bases()]
        lines += [*_section(found, name, usage(found, name, of), own, found.methods if of in CODE else ()), ""]
    return "\n".join(lines)


def _section(
    found: Entry, name: str, how: str, arguments: Sequence[Argument], methods: Sequence[Method] = ()
) -> Iterator[str]:
    yield from (f"## {name}", "")
    if how:
        yield from (f"`{how}`", "")
    for block in _blocks(found.text):
        yield from (_marked(block), "")
    for argument in arguments:
        yield from _item(argument)
    for method in methods:
        yield from _defined(f"`{method.called}` ({method.how})", method.text)


def _item(argument: Argument) -> Iterator[str]:
    default = "required" if argument.default is None else f"`{argument.default}`"
    return _defined(f"`{argument.name}` ({f'`{argument.type}`' if argument.type else 'any'}, {default})", argument.text)


def _defined(what: str, text: str) -> Iterator[str]:
    """In a list of definitions; one of nothing is a paragraph."""
    first, *more = _blocks(text) or [""]
    yield from (what, f": {_marked(first)}") if first else (what,)
    yield from (line for block in more for line in ("", f"  {_marked(block)}"))
    yield ""


def _glossary() -> Iterator[str]:
    for group, (about, columns) in glossary().items():
        yield from (f"## {group}", "", about, "", "| column | unit | |", "| --- | --- | --- |")
        for each in columns:
            when = f" With `{each.when}`." if each.when else ""
            name, text = (t.replace("|", "\\|") for t in (each.name, each.text + when))
            yield f"| `{name}` | {each.unit} | {text} |"
        yield ""


def _marked(text: str) -> str:
    """The docstring's ``x`` as Markdown's `x`."""
    text = text.replace("``", "`")
    return re.sub(r"(?<=[\w)])\|(?=\w)", r"\\|", text) if "`" not in text else text


# ---------------------------------------------------------------------- shared


def usage(found: Entry, name: str, kind: str) -> str:
    """How it stands in a configuration, in one line of YAML; nothing for a kind that is not known."""
    if not kind:
        return ""
    if kind in CODE:
        module, _, last = found.path.rpartition(".")
        return TITLES[kind][1].format(module, last)
    if kind == "rewards":
        return (
            f"data.reward: {{class_path: {found.path}, init_args: {{...}}}}"
            if found.is_class
            else (f"data.reward: {found.path}")
        )
    of_a_callback = kind == "callbacks" and "." in name
    in_python = f", in Python {_last(found.path)}(...)" if kind == "keys" and found.path != TRAINER else ""
    return TITLES["keys" if of_a_callback else kind][1].format(name) + in_python


def _blocks(text: str) -> list[str]:
    """Paragraphs and items of a docstring, each in one line."""
    found: list[str] = []
    new = True
    for line in text.splitlines():
        words = line.strip()
        if not words:
            new = True
            continue
        indented, after_head = line.startswith("    "), bool(found) and found[-1].endswith(":")
        if indented and (after_head or found[-1].startswith("- ")) and re.match(r"    \S", line):
            found.append(f"- {words}")  # what is raised
        elif new or words.startswith("- "):
            found.append(words)
        else:
            found[-1] += f" {words}"
        new = False
    return found


def _all(module: str) -> list[str]:
    return [str(name) for name in ast.literal_eval(constant(module, "__all__"))]


def _is_objective(found: Entry) -> bool:
    return any(argument.owner in _bases() for argument in found.arguments)


@cache
def _bases() -> set[str]:
    """The classes that say what all objectives take."""
    return {argument.owner for argument in entry(POLICY_MODULE).arguments}


def _arguments_named(name: str) -> Iterator[tuple[str, Argument]]:
    """Every topic's argument of this name; ``data.sampling.top_p`` has one place."""
    owner, _, last = name.rpartition(".")
    return ((where, argument) for where, argument in _arguments(owner) if argument.name == last)


def _arguments_given(value: str) -> Iterator[tuple[str, Argument]]:
    """Every argument that is said to take this value: ``embedded``, ``k3``, ``last``."""
    said = (f"``{value}``", f"'{value}'")
    at_the_top = ((TITLES["values"][0], Argument(name, *of, "")) for name, of in VALUES.items())
    return ((where, a) for where, a in (*_arguments(), *at_the_top) if any(v in f"{a.type} {a.text}" for v in said))


def _arguments(owner: str = "") -> Iterator[tuple[str, Argument]]:
    """Every topic's, or that of one, each once."""
    seen = set()
    for of_kind in topics().values():
        for topic, path in of_kind.items():
            for argument in entry(path).arguments if owner in ("", topic) else ():
                where = "all objectives" if argument.owner in _bases() else topic
                if (where, argument.name) not in seen:
                    seen.add((where, argument.name))
                    yield where, argument
