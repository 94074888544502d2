"""What a run is resumed from: which file `last` and `best` are, and its configuration against the present one."""

import inspect
import logging
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from prerl_lightning import checkpoints
from prerl_lightning.callbacks.saving import kept_best
from prerl_lightning.callbacks.watcher import runs_folder
from prerl_lightning.checkpoints import damage
from prerl_lightning.compat import registry_name
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.objectives.objective import BaseObjective
from prerl_lightning.policy.lora import KEY, Lora
from prerl_lightning.policy.model import Policy, empty_model
from prerl_lightning.report.files import last_written
from prerl_lightning.report.folders import below
from prerl_lightning.report.reading import read_begun
from prerl_lightning.secrets import hide
from prerl_lightning.signals import first_rank

log = logging.getLogger(__name__)

# what neither orders the data nor gives a step another meaning: where, how fast, how well watched. Of model, data and
# lives all else does; of the Trainer what BOUND names.
FREE = (
    *(f"model.init_args.{name}" for name in ("max_tokens_per_microbatch", "micro_batch_size", "packing")),
    *(f"model.init_args.{name}" for name in ("share_prompts", "chunked_head", "gradient_checkpointing")),
    *(f"model.init_args.{name}" for name in ("mismatch_samples", "mismatch_bound", "entropy", "peak_flops")),
    *("model.init_args.attn_implementation", "model.init_args.name", "model.init_args.optimizer.init_args.lr"),
    *(f"data.engine.init_args.{name}" for name in ("kv_cache_mib", "gpu_memory_utilization", "max_num_seqs")),
    *(f"data.engine.init_args.{name}" for name in ("enforce_eager", "sleep_between_rollouts")),
    *("data.val", "data.val_samples", "data.val_greedy", "data.val_reward", "data.val_batch", "data.verification"),
    *("data.val_more", "data.val_sampling"),
)
BOUND = ("seed_everything", "model", "data", "lives", "trainer.limit_train_batches", "trainer.overfit_batches")
RESUMED_FROM = "PRERL_RESUMED_FROM"
UNLISTED = ("ckpt_path", "allow_changes", "weights_only", "name")


class KeepConfig(SaveConfigCallback):
    """config.yaml in the run's folder, and the same in each checkpoint, which may be moved. Both are without keys and
    passwords (secrets.py)."""

    def __init__(self, parser: Any, config: Any, **options: Any) -> None:
        super().__init__(parser, _written(config), **options)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["configuration"] = plain(self.parser, self.config)


def plain(parser: Any, config: Any) -> dict[str, Any]:
    """As config.yaml has it."""
    return _written(yaml.safe_load(parser.dump(config, skip_none=False)))


def _written(config: Any) -> Any:
    """A configuration as it may be kept: without secrets, and without the learning rates that optimizers have by
    default, which a reader would take for the objective's ``lr``."""

    def look(value: Any) -> None:
        held = vars(value) if isinstance(value, Namespace) else value
        if isinstance(held, dict):
            optimizer = held.get("optimizer")
            if isinstance(optimizer, (dict, Namespace)) and "init_args" in optimizer:
                optimizer["init_args"].pop("lr", None)  # type: ignore[index]
            held = list(held.values())
        for inner in held if isinstance(held, list) else ():
            look(inner)

    found = hide(config)
    look(found)
    return found


def folders_of(trainer: L.Trainer, dirpath: str | os.PathLike[str] | None) -> list[Path]:
    """That of all runs of its name, and ``checkpoint.dirpath``."""
    own = [Path(dirpath).expanduser()] if dirpath and "://" not in str(dirpath) else []
    return [runs_folder(trainer), *own]


def is_file(ckpt_path: str | None) -> bool:
    """Neither none, nor what Lightning alone knows how to find."""
    return ckpt_path not in (None, "", "hpc") and "://" not in str(ckpt_path)


def chosen(
    ckpt_path: str | None,
    folders: Sequence[Path],
    objective: BaseObjective,
    monitor: str | None,
    mode: str,
    weights_only: bool,
) -> str | None:
    """The checkpoint that ``last``, ``auto`` (``last`` if there is one, else none), ``best``, a path or
    ``registry:NAME[:version:VERSION]`` names, looked through on the first rank.

    Args:
        folders: of all runs of this name, and where else this one's checkpoints go.
        objective: whose policy it is to be.
        monitor: of the best; None: the one that the run had.

    Raises:
        InputError: there is none, or it is damaged, of another model, or holds more than ``weights_only`` lets in.
    """
    newest_of_all, runs = ckpt_path in ("last", "auto"), folders[0]
    # the ranks that this process starts take the same, without reading it through once more; of this fit, and no former
    of_runs, _, same = os.environ.get(RESUMED_FROM, "").partition("\n")
    told = None if first_rank() or of_runs != str(runs) else same
    if newest_of_all:
        if told is None:
            none = ckpt_path == "auto" and not lasts(folders)
            told = "" if none else str(newest(folders))
        os.environ[RESUMED_FROM], ckpt_path = f"{runs}\n{told}", told or None
        log.info("Resuming from %s" if told else "A new run: there is no last.ckpt below %s", told or runs)
    elif ckpt_path and (name := registry_name(ckpt_path)) is not None:
        if told is None and not first_rank():
            raise InputError(
                f"--ckpt_path: {ckpt_path}: ranks that prerl has not started cannot share a download. "
                "Download it first, and give the file."
            )
        ckpt_path = told or str(downloaded(name, runs / "registry"))
        os.environ[RESUMED_FROM] = f"{runs}\n{ckpt_path}"
    elif ckpt_path == "best":
        ckpt_path = best(folders, monitor, mode, weights_only)
    if not is_file(ckpt_path):
        return ckpt_path
    path = Path(str(ckpt_path))
    if not path.exists():
        raise InputError(
            f"--ckpt_path: there is no {path}. Give a checkpoint, last for the newest one, or best for the best."
        )
    if first_rank():
        if not newest_of_all:  # that has been read through: it is the newest that is whole
            check_whole(path)
        check_weights(path, objective.model_name, objective.lora, weights_only)
    return str(path)


def downloaded(name: str, folder: Path) -> Path:
    """The checkpoint of a model in Lightning's registry.

    Args:
        name: ORGANISATION/TEAMSPACE/MODEL[:VERSION].
        folder: where it comes to, in a folder of its own.
    """
    try:
        from litmodels import download_model
    except ModuleNotFoundError as error:
        raise InputError(f"--ckpt_path: registry: needs the package {error.name}: pip install litmodels") from error
    place = folder / re.sub(r"[/:]", "_", name)
    shutil.rmtree(place, ignore_errors=True)  # of another version, where none is named
    try:
        download_model(name, download_dir=str(place))
    except Exception as error:  # of HTTP, of lightning-sdk, of the system
        raise InputError(f"--ckpt_path: {name} could not be downloaded: {in_one_line(error)}") from error
    found = sorted(place.rglob("*.ckpt"))
    if len(found) != 1:
        raise InputError(f"--ckpt_path: {name} holds {len(found)} checkpoints (*.ckpt), not one, see {place}.")
    log.info("Resuming from %s, downloaded to %s", name, found[0])
    return found[0]


def check_whole(path: Path) -> None:
    """Raises InputError where the file is damaged."""
    if problem := damage(path):
        raise InputError(f"--ckpt_path: {path} is {problem}. Give another; last takes the newest that is whole.")


def check_weights(path: Path, model: str, lora: Lora | None = None, weights_only: bool = True) -> None:
    """Raises InputError where it is no training checkpoint, one of another model, or one of adapters where the run has
    none, or the other way round; and as `load` does."""
    found = load(str(path), weights_only)
    if not isinstance(found, dict) or not {"state_dict", "loops", "pytorch-lightning_version"} <= found.keys():
        raise InputError(
            f"--ckpt_path: {path} is no training checkpoint of this library. To start a new run from exported weights, "
            "give their folder as --model.init_args.model."
        )
    if lora is None and "lora" in found:
        raise InputError(f"--ckpt_path: {path} holds adapters alone (LoRA): give {KEY} as its run had it.")
    if lora is not None and "lora" not in found:
        raise InputError(
            f"--ckpt_path: {path} holds all weights, and this run trains adapters: leave {KEY} out, or start anew from "
            "its exported model."
        )
    ours = Policy(empty_model(model))
    if lora is not None:
        ours.adapt(lora)
    theirs = {name.removeprefix("policy."): tensor.shape for name, tensor in found["state_dict"].items()}
    expected = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    for name in [*theirs, *(name for name, _ in ours.trained())]:
        if theirs.get(name) != expected.get(name):
            there, here = (str(tuple(s[name])) if name in s else "absent" for s in (theirs, expected))
            other, name = "model" if lora is None else f"model or {KEY}", name.removeprefix("model.")
            raise InputError(
                f"--ckpt_path: {path} is of another {other}: {name} is {there} in it, and {here} in {model}."
            )


def load(path: str, weights_only: bool = True) -> dict[str, Any]:
    """A checkpoint whose tensors stay on disk.

    Args:
        weights_only: nothing but tensors and plain values; False: also what runs code of the file's choice.

    Raises:
        InputError: it is none, or holds more than ``weights_only`` lets in.
    """
    try:
        return checkpoints.load(path, weights_only)
    except Exception as error:  # pickle, zip and torch each raise their own
        if weights_only and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise InputError(
                f"--ckpt_path: {path} holds more than tensors and plain values ({found[1]}), and to load that may run "
                "code that it brings along. If you trust where it comes from, write --weights_only false."
            ) from error
        raise InputError(f"--ckpt_path: {path} is no training checkpoint: {in_one_line(error)}") from error


def lasts(folders: Iterable[Path]) -> list[Path]:
    """Each run's last.ckpt below, the newest first; last.ckpt.old where a kill has left that alone."""
    found = _by_age(folders, "last.ckpt", "last.ckpt.old")
    return [path for path in found if path.suffix != ".old" or not path.with_suffix("").exists()]


def _by_age(folders: Iterable[Path], *names: str) -> list[Path]:
    """The newest first. Files come and go under a run that is alive, and links may lead nowhere."""
    ages: dict[Path, float] = {}
    for path in (path for folder in folders for name in names for path in folder.glob(f"**/{name}")):
        with suppress(OSError):
            ages[path] = path.stat().st_mtime
    return sorted(ages, key=ages.__getitem__, reverse=True)


def newest(folders: Sequence[Path]) -> Path:
    """The last.ckpt of all runs below: a resumed run gets a folder of its own, so that no log is overwritten. If it is
    not whole, the newest checkpoint that is."""
    runs = folders[0]
    if not (found := lasts(folders)):
        if not runs.is_dir():
            beside = [p.name for p in runs.parent.iterdir() if p.is_dir()] if runs.parent.is_dir() else []
            names = f": there are {', '.join(sorted(beside))}" if beside else ""
            mend = "Give the run's --name, or leave --ckpt_path out to start anew."
            raise InputError(f"--ckpt_path: there is no folder {runs}{names}. {mend}")
        raise InputError(
            f"--ckpt_path: there is no last.ckpt below {runs}: no run there has come to its first checkpoint "
            "(checkpoint.every_n_train_steps: 20 unless given). Leave --ckpt_path out to start anew."
        )
    files: dict[int, Path] = {}  # of several names of one, the first
    for path in [found[0], *_by_age(folders, "*.ckpt")]:
        with suppress(OSError):
            files.setdefault(path.stat().st_ino, path)
    for path in files.values():
        problem = damage(path)
        if problem is None:
            for run in _newer_without(runs, path):
                log.warning("%s is newer, and has no checkpoint: %s.", run, read_begun(run).status()[1])
            return path
        log.warning("%s is %s. The newest before it that is whole is taken.", path, problem)
    raise InputError(f"--ckpt_path: none of the checkpoints below {runs} is whole. Leave it out to start anew.")


def _newer_without(folder: Path, path: Path) -> list[Path]:
    """Runs below that have trained behind the checkpoint at ``path``, and have none of their own."""
    began = (run for run in below(folder) if (run / "run.json").is_file() and run not in path.parents)
    return [run for run in began if last_written(run, True) > path.stat().st_mtime and not any(run.rglob("*.ckpt"))]


def best(folders: Sequence[Path], monitor: str | None, mode: str, weights_only: bool = True) -> str:
    """The best of the newest run below, and of those that it was resumed from."""
    last = newest(folders)
    checkpoint = load(str(last), weights_only)
    if monitor is None:  # that of the run
        judged = [state for state in checkpoint.get("callbacks", {}).values() if state.get("best_k_models")]
        monitor, mode = next(((state["monitor"], state.get("mode", mode)) for state in judged), (None, mode))
    found = kept_best(checkpoint, monitor, mode, str(last)) if monitor else {}
    if not found:
        raise InputError(
            f"--ckpt_path best: {last} knows none{f' by {monitor}' if monitor else ''}. Runs keep the best with "
            "--checkpoint.monitor, e.g. val/avg@8."
        )
    path, score = next(iter(found.items()))
    log.info("The best by %s: %.4g, in %s", monitor, score, path)
    return path


def compare(path: str, present: Mapping[str, Any], allow_changes: bool, weights_only: bool = True) -> None:
    """Say what is not as in the configuration that the checkpoint at ``path`` was written with.

    Raises:
        InputError: one of it orders the data otherwise or gives a step another meaning, and ``allow_changes`` is False.
    """
    checkpoint = load(path, weights_only)
    if "optimizer_states" not in checkpoint:
        raise InputError(
            f"--ckpt_path: {path} has no optimizer state (checkpoint.save_weights_only), and cannot be resumed from. "
            "Start a new run from its weights: `prerl export` makes a folder of them, for model.init_args.model."
        )
    found = checkpoint.get("configuration")
    if found is None:
        log.warning("%s holds no configuration that the present one could be compared with.", path)
        return
    before, now = dict(_flat(_with_lives(found))), dict(_flat(_with_lives(present)))
    before = {k: _default(k) for k in now} | before
    keys = [k for k in (before | now) if before.get(k) != now.get(k) and k not in UNLISTED]
    lines = {k: f"  {k}: {_short(before.get(k))} in the checkpoint, {_short(now.get(k))} now" for k in keys}
    # a decay ends where the run does
    decays = any(key.endswith("init_args.lr_schedule") and value != "constant" for key, value in now.items())
    bound = [line for key, line in lines.items() if _is_bound(key) or (decays and key == "trainer.max_steps")]
    free = [line for line in lines.values() if line not in bound]
    if bound and not allow_changes:
        also = ["These differ too, and may:", *free] if free else []
        raise InputError(
            "\n".join(
                [
                    f"--ckpt_path: {path} was written by a run in which a step or the order of the data was another:",
                    *bound,
                    *also,
                    "--ckpt_path: resume with the configuration it was made with (config.yaml beside its checkpoints' "
                    "folder), or write --allow_changes true (in Python allow_changes=True) to go on from its weights "
                    "and optimizer with this one.",
                ]
            )
        )
    if lines:
        log.info("Not as in the checkpoint:\n%s", "\n".join(bound + free))


def _default(key: str) -> Any:
    """What a release that had not this argument yet did; None: that is not known."""
    place, _, name = key.rpartition(".")
    objective = place.endswith(("model.init_args", ".successor.init_args"))
    owner: Any = BaseObjective if objective else RolloutDataModule if place == "data" else object
    found = inspect.signature(owner).parameters.get(name)
    return None if found is None or found.default is inspect.Parameter.empty else found.default


def _is_bound(key: str) -> bool:
    of_successor = key.partition(".successor.")[2]  # lives.2.successor.init_args.packing is free as the model's is
    free = any(_below(f"model.{of_successor}" if of_successor else key, name) for name in FREE)
    return not free and any(_below(key, name) for name in BOUND)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _with_lives(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its lives, from the second on, by number, and other callbacks by name."""
    trainer = dict(config["trainer"])
    callbacks = trainer.pop("callbacks", None) or []
    lives: list[Mapping[str, Any]] = []
    others = {}
    for i, callback in enumerate(callbacks if isinstance(callbacks, list) else [callbacks]):
        name, arguments = callback["class_path"].rpartition(".")[2], callback.get("init_args") or {}
        if name == "PolicyReincarnation":
            lives.append(arguments)
        else:
            others[name if name not in others else f"{name} {i}"] = arguments
    lives.sort(key=lambda life: life["at_step"])
    by_number = {str(i): life for i, life in enumerate(lives, start=2)}
    return {**config, "trainer": {**trainer, "callbacks": others}, "lives": by_number}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted keys."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
