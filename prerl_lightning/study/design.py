"""A study's YAML: arms, seeds, tuning and claims, as frozen records. docs/guides/studies.md shows the form."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prerl_lightning import shipped
from prerl_lightning.errors import InputError
from prerl_lightning.refusals import Once
from prerl_lightning.report.files import is_number

Settings = Mapping[str, Any]  # dotted keys of `prerl fit` to values

# measure -> its options and whether they must be given
MEASURES: dict[str, dict[str, bool]] = {
    "steps_to_accuracy": {"share": False, "accuracy": False},
    "final_accuracy": {},
    "accuracy": {"at": True},
    "pass_at_k": {"k": False, "at": False},
    "thoughts": {"family": True, "at": False, "of": False},
    "negative_share": {"at": False},
    "cosine": {"of": False, "at": False},
}
TUNED_BY = ("final_accuracy", "accuracy", "pass_at_k")  # by themselves, and more is better
OF = {"thoughts": ("ratio", "count"), "cosine": ("responses", "policy_gradient")}
OWN = {"seed_everything": "seeds", "trainer.default_root_dir": "", "trainer.logger": "", "checkpoint.dirpath": ""}


@dataclass(frozen=True)
class Measure:
    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return self.name.replace("_", " ") + (f" ({said})" if said else "")


@dataclass(frozen=True)
class Arm:
    name: str
    configs: tuple[Path, ...]
    settings: Settings


@dataclass(frozen=True)
class Tuning:
    """``points``: by arm, the settings of each point of its grid."""

    seeds: tuple[int, ...]
    measure: Measure
    settings: Settings
    points: Mapping[str, tuple[Settings, ...]]


@dataclass(frozen=True)
class Claim:
    """``against`` None: the measure by itself. ``effect``: ratio (compared in logs), difference or value.
    ``more``: whether the effect is expected above ``margin``."""

    name: str
    says: str
    measure: Measure
    arm: str
    against: str | None
    effect: str
    more: bool
    margin: float
    registered: str
    """Canonical JSON of what the file says of it."""


@dataclass(frozen=True)
class Study:
    name: str
    file: Path
    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]
    jobs: int
    tuning: Tuning | None
    claims: tuple[Claim, ...]
    registered: str
    """Canonical JSON of what the runs are: arms with their files' contents, settings, seeds and tuning."""

    @property
    def level(self) -> float:
        """Of each claim's interval, such that all of them hold together at 95 % (Bonferroni)."""
        return 1 - 0.05 / max(1, len(self.claims))

    @property
    def digest(self) -> str:
        """Of all that its runs and verdicts come from."""
        return digest(canonical([self.registered, *(claim.registered for claim in self.claims)]))

    def points(self, arm: str) -> tuple[Settings, ...]:
        return self.tuning.points.get(arm, ()) if self.tuning else ()


def read_study(path: Path) -> Study:
    """Raises InputError, naming the key and the mend, for anything that is not as it should be."""
    value = _mapping(_yaml(path, "STUDY.yaml"), str(path))
    _keys(value, "", ("arms", "seeds", "claims"), ("name", "set", "jobs", "tuning"))
    shared = _settings(value.get("set"), "set")
    arms: dict[str, Arm] = {}
    for key, given in _mapping(value["arms"], "arms").items():
        name = _name(key, "arms")
        place = f"arms.{name}"
        _keys(_mapping(given, place), place, ("config",), ("set",))
        files = given["config"] if isinstance(given["config"], list) else [given["config"]]
        configs = tuple(_config(path.parent, str(file)) for file in files)
        for config in configs:
            if not config.is_file():
                raise InputError(
                    f"{place}.config: there is no file {config}. Paths start at the study's own folder."
                    f"{shipped.hint(config.name)}"
                )
        if not configs:
            raise InputError(f"{place}.config: no file. Name one or more configurations of prerl fit.")
        arms[name] = Arm(name, configs, {**shared, **_settings(given.get("set"), f"{place}.set")})
    seeds = _seeds(value["seeds"], "seeds")
    tuning = _tuning(value["tuning"], arms, seeds) if value.get("tuning") is not None else None
    jobs = value.get("jobs", 1)
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise InputError(f"jobs: {jobs!r}: how many runs go side by side, 1 or more.")
    claims = tuple(_claim(claim, f"claims[{i}]", arms) for i, claim in enumerate(_list(value["claims"], "claims")))
    names = [claim.name for claim in claims]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"claims[{i}].name: {name!r} is the name of claims[{names.index(name)}], too.")
    contents = {name: [_yaml(file, f"arms.{name}.config") for file in arm.configs] for name, arm in arms.items()}
    design = {key: value.get(key) for key in ("set", "seeds", "tuning")} | {"arms": value["arms"], "files": contents}
    name = _name(value.get("name", path.stem), "name")
    return Study(name, path, arms, seeds, jobs, tuning, claims, canonical(design))


def _config(folder: Path, file: str) -> Path:
    """A copy of a shipped study still finds what stood above it."""
    return folder / file if (folder / file).is_file() else shipped.taken(file.removeprefix("../")) or folder / file


def arguments(arm: Arm, *more: Settings) -> list[str]:
    """Of `prerl fit`, but for the seed and the place; of settings with one key the later one counts."""
    settings = dict(arm.settings)
    for settings_of in more:
        settings |= settings_of
    return [*(f"--config={file}" for file in arm.configs), *(f"--{k}={text(v)}" for k, v in settings.items())]


def identity(arm: Arm, seed: int, *more: Settings) -> str:
    """Equal for runs that are the same: by the contents of the configurations, the settings and the seed."""
    settings = dict(arm.settings)
    for settings_of in more:
        settings |= settings_of
    files = [_yaml(file, f"arms.{arm.name}.config") for file in arm.configs]
    return digest(canonical([files, {key: text(value) for key, value in settings.items()}, seed]))[:12]


def text(value: Any) -> str:
    """As it stands on the command line; one number has one form, in whichever way YAML has it."""
    if isinstance(value, str):
        try:
            value = float(value) if "e" in value.lower() else value
        except ValueError:
            return str(value)
    return value if isinstance(value, str) else json.dumps(value)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def digest(said: str) -> str:
    return hashlib.sha256(said.encode(errors="replace")).hexdigest()


def _tuning(value: Any, arms: Mapping[str, Arm], seeds: Sequence[int]) -> Tuning:
    _keys(_mapping(value, "tuning"), "tuning", ("seeds", "measure", "grid"), ("set",))
    own = _seeds(value["seeds"], "tuning.seeds")
    if both := sorted(set(own) & set(seeds)):
        raise InputError(
            f"tuning.seeds: {', '.join(map(str, both))} in seeds, too. What is chosen on a seed looks too good on it."
        )
    measure = _measure(value["measure"], "tuning.measure")
    if measure.name not in TUNED_BY:
        raise InputError(f"tuning.measure: {measure.name} cannot choose. Take one of {', '.join(TUNED_BY)}.")
    points = {}
    for arm, grid in _mapping(value["grid"], "tuning.grid").items():
        place = f"tuning.grid.{arm}"
        if arm not in arms:
            raise InputError(f"{place}: no arm of this name. There are {', '.join(arms)}.")
        for key, values in _settings(grid, place).items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{place}.{key}: {values!r}: give a list of values to try.")
        points[arm] = tuple(dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return Tuning(own, measure, _settings(value.get("set"), "tuning.set"), points)


def _claim(value: Any, place: str, arms: Mapping[str, Arm]) -> Claim:
    required = ("name", "says", "measure", "arm", "expected", "margin")
    _keys(_mapping(value, place), place, required, ("against", "effect"))
    for key in ("arm", "against"):
        if value.get(key) is not None and value[key] not in arms:
            raise InputError(f"{place}.{key}: no arm {value[key]!r}. There are {', '.join(arms)}.")
    against = value.get("against")
    if against == value["arm"]:
        raise InputError(f"{place}.against: an arm cannot be compared with itself.")
    measure = _measure(value["measure"], f"{place}.measure")
    if against is None and "share" in measure.options:
        raise InputError(
            f"{place}.measure: a share is of another arm's gain: name it in {place}.against, or give "
            "steps_to_accuracy: {accuracy: A}."
        )
    effects = ("ratio", "difference") if against else ("value", "ratio")
    effect = value.get("effect", None if against else "value")
    if effect not in effects:
        raise InputError(f"{place}.effect: {effect!r}: write {effects[0]} or {effects[1]}.")
    if value["expected"] not in ("more", "less"):
        raise InputError(f"{place}.expected: {value['expected']!r}: write more or less, than the margin.")
    margin = value["margin"]
    if not is_number(margin) or (effect == "ratio" and margin <= 0):
        raise InputError(f"{place}.margin: {margin!r}: give a number{' above 0' if effect == 'ratio' else ''}.")
    more, says = value["expected"] == "more", str(value["says"])
    name = _name(value["name"], f"{place}.name")
    return Claim(name, says, measure, value["arm"], against, effect, more, float(margin), canonical(value))


def _measure(value: Any, place: str) -> Measure:
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in MEASURES:
        raise InputError(
            f"{place}: {_brief(value)}: give one measure with its options, as in {{final_accuracy: {{}}}}. "
            f"There are {', '.join(MEASURES)}."
        )
    name, options = next(iter(value.items()))
    options = _mapping(options or {}, f"{place}.{name}")
    known = MEASURES[name]
    _keys(options, f"{place}.{name}", [k for k, needed in known.items() if needed], list(known))
    if name == "steps_to_accuracy" and len(options) != 1:
        raise InputError(f"{place}.{name}: give either share, of the baseline's gain, or accuracy.")
    for key in ("share", "accuracy"):
        if key in options and not (is_number(options[key]) and 0 < options[key] <= 1):
            raise InputError(f"{place}.{name}.{key}: {options[key]!r}: give a number above 0, of at most 1.")
    for key, least in (("at", 0), ("k", 1)):
        if key in options and (type(options[key]) is not int or options[key] < least):
            raise InputError(f"{place}.{name}.{key}: {options[key]!r}: give a whole number, {least} or more.")
    if "of" in options and options["of"] not in OF[name]:
        raise InputError(f"{place}.{name}.of: {options['of']!r}: write {' or '.join(OF[name])}.")
    return Measure(name, dict(options))


def _settings(value: Any, place: str) -> dict[str, Any]:
    found = {str(k): v for k, v in _mapping(value or {}, place).items()}
    for key in found:
        for own, instead in OWN.items():
            if key == own or key.startswith(f"{own}."):
                mend = f"Use {instead}." if instead else "The study says where its runs lie: leave it out."
                raise InputError(f"{place}.{key}: {mend}")
        if key in ("config", "ckpt_path"):
            raise InputError(f"{place}.{key}: is no setting of a study. Files belong to arms.NAME.config.")
    return found


def _seeds(value: Any, place: str) -> tuple[int, ...]:
    seeds = _list(value, place)
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{place}: {_brief(value)}: give different whole numbers, as in [0, 1, 2].")
    return tuple(seeds)


def _keys(value: Mapping[str, Any], place: str, required: Sequence[str], optional: Sequence[str]) -> None:
    at = f"{place}." if place else ""
    known = [*required, *(key for key in optional if key not in required)]
    for key in value:
        if key not in known:
            raise InputError(f"{at}{key}: no such key. Here may stand {', '.join(known) or 'none'}.")
    for key in required:
        if value.get(key) is None:
            raise InputError(f"{at}{key} is missing.")


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: {_brief(value)}: must be a mapping of keys to values.")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{place}: {_brief(value)}: must be a list.")
    return value


def _name(value: Any, place: str) -> str:
    name = str(value)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise InputError(f"{place}: {name!r}: names are of letters, digits, _, - and dots, since files are named so.")
    return name


def _brief(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:59]}…"


def _yaml(path: Path, place: str) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Once)
    except FileNotFoundError:
        raise InputError(f"{place}: there is no file {path}.") from None
    except InputError as error:
        raise InputError(f"{place}: {path}, {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{place}: {path} cannot be read: {error}") from None
