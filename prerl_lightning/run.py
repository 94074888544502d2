"""What stands behind ``prerl fit``, ``validate`` and ``test``: LightningCLI with this library's defaults."""

import logging
import sys
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import prerl_lightning.data.named
import prerl_lightning.data.procedural
import prerl_lightning.data.readers
import prerl_lightning.data.tasks.countdown
import prerl_lightning.data.tasks.sums
import prerl_lightning.strategies  # noqa: F401  (registers fsdp2)
from prerl_lightning import refusals, resume, shipped
from prerl_lightning.callbacks.monitors import check_monitors
from prerl_lightning.callbacks.reincarnation import PolicyReincarnation
from prerl_lightning.callbacks.requeue import requeued
from prerl_lightning.callbacks.watcher import callbacks_of
from prerl_lightning.compat import (
    accept_lit_logger,
    accept_short_names,
    observe_ranks,
    share_version,
    whole_numbers_first,
)
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, is_name, said_by_us
from prerl_lightning.objectives import PolicyModule
from prerl_lightning.objectives.checks import check_trainer
from prerl_lightning.objectives.trainer_arguments import LOGGERS
from prerl_lightning.report.files import run_name
from prerl_lightning.resume import KeepConfig
from prerl_lightning.secrets import hidden_keys
from prerl_lightning.training import (
    TRAINER_DEFAULTS,
    WATCHERS,
    default_precision,
    no_folder_of_a_refusal,
    progress,
    run_logger,
    with_records,
)
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)

# of loggers: which argument names a run, and its default
UNNAMED = {
    "CSVLogger": ("name", "lightning_logs"),
    "TensorBoardLogger": ("name", "lightning_logs"),
    "WandbLogger": ("name", None),
    "LitLogger": ("name", None),
    "MLFlowLogger": ("run_name", None),
    "SwanLabLogger": ("experiment_name", None),
}


class PrerlCLI(LightningCLI):
    """LightningCLI over `PolicyModule` subclasses and `RolloutDataModule`."""

    name = "prerl"  # of the run: runs/NAME/version_N

    @classmethod
    def run(cls, args: list[str]) -> "PrerlCLI":
        observe_ranks(watchdog.observe)
        whole_numbers_first()
        accept_lit_logger()
        accept_short_names()
        args = refusals.checked(args)
        cls.name = _run_name(refusals.config_files(args))
        return cls(
            PolicyModule,
            RolloutDataModule,
            subclass_mode_model=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "prerl", "exit_on_error": False, "allow_abbrev": False},
            args=args if args != sys.argv[1:] else None,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {k: v for k, v in LightningCLI.subcommands().items() if k != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="of the run: runs/NAME/version_N; default: that of the configuration file",
        )
        parser.add_argument(
            "--allow_changes",
            type=bool,
            default=False,
            help="resume with --ckpt_path also where the order of the data or the meaning of a step is another than in "
            "the checkpoint's configuration (seed, prompts_per_step, reward, lr ...); what differs is listed",
        )
        for key, watcher in WATCHERS.items():
            parser.add_lightning_class_args(watcher, key)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = args if isinstance(args, list) else sys.argv[1:]
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if said := said_by_us(error):
                raise said from error
            own = self._subcommand_parsers.get(given[0], parser)
            raise refusals.of_parser(error.message, [action.dest for action in own._actions]) from error
        seed = self.config[given[0]].seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 1 << 32:
            raise InputError(f"seed_everything: {seed} must be a whole number from 0 to {(1 << 32) - 1}.")

    def _parse_ckpt_path(self) -> None:
        """Lightning reads a checkpoint for hyperparameters, of which this library's hold none."""

    def before_instantiate_classes(self) -> None:
        subconfig = self.config[self.subcommand]
        # said once: in config.yaml it would hold for all resumes to come
        self.allow_changes, subconfig["allow_changes"] = subconfig["allow_changes"], False
        # likewise; Lightning's own default lets checkpoints from the net run code
        self.weights_only, subconfig["weights_only"] = subconfig["weights_only"] is not False, None
        if (name := subconfig["name"]) is not None:
            if not is_name(name):
                raise InputError(f"name: {name!r} is no folder's: letters, digits, dots and dashes alone.")
            self.name = name
        if key := next(hidden_keys(subconfig), None):
            raise InputError(
                f"{key}: its value, a secret, was left out of this file when it was written. Give it again, or better "
                "take the key out and set the variable that its library reads, such as WANDB_API_KEY."
            )
        trainer = self._get(self.config, "trainer")
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            kind = str(getattr(logger, "class_path", "")).rpartition(".")[2]
            package = LOGGERS.get(kind)
            if package and not find_spec(package):
                pip = package.replace("_", "-")
                raise InputError(f"trainer.logger: {kind} needs the package {package}: pip install {pip}")
            if kind == "LitLogger" and logger.init_args.save_logs:
                raise InputError(
                    "trainer.logger: LitLogger.save_logs: it would start the whole command once more within itself, to "
                    "read what that prints. Write save_logs: false."
                )
            # one that is given no name has the run's, whichever file it stands in
            argument, default = UNNAMED.get(kind, ("", None))
            if argument and logger.init_args.get(argument, kind) == default:
                logger.init_args[argument] = self.name
        check_trainer(trainer, trains=self.subcommand == "fit")
        if trainer.precision is None:
            model = getattr(self._get(self.config, "model"), "init_args", {}).get("model")
            engine = getattr(self._get(self.config, "data").engine, "init_args", {})
            trainer.precision = default_precision(trainer.accelerator, model, engine.get("dtype"))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            if said := refusals.from_lightning(error):  # a callback or a logger
                raise refusals.of_lightning(said, vars(self._get(self.config, "trainer"))) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = run_logger(config.get("default_root_dir"), self.name)
        keys = self._parser(self.subcommand).callback_keys
        lines, kwargs["enable_progress_bar"] = progress(config.get("enable_progress_bar"), config.get("callbacks"))
        watchers = (self._get(self.config_init, k) for k in keys)
        extra = with_records(watchers, lines, config.get("enable_checkpointing") is not False)
        try:
            trainer = self._instantiate_trainer({**config, **kwargs}, extra)
        except Exception as error:  # Lightning raises many kinds
            raise refusals.of_lightning(error, vars(self._get(self.config, "trainer"))) from error
        return trainer

    def after_instantiate_classes(self) -> None:
        if self.trainer is None:  # `RunParts`
            return
        subconfig = self.config_init[self.subcommand]
        subconfig["weights_only"] = self.weights_only
        if self.subcommand == "fit":
            lives = [c.successor for c in callbacks_of(self.trainer, PolicyReincarnation)]
            check_monitors(self.trainer, [self.model, *lives], self.datamodule)
        self.datamodule.check(self.model, self.trainer, self.subcommand)  # before a logger makes its folder
        checkpoint = subconfig["checkpoint"]
        folders, told = resume.folders_of(self.trainer, checkpoint.dirpath), subconfig.get("ckpt_path")
        if self.subcommand == "fit":
            told = told or requeued(folders[0])
        subconfig["ckpt_path"] = resume.chosen(
            *(told, folders, self.model),
            *(checkpoint.monitor, checkpoint.mode, self.weights_only),
        )
        if self.subcommand == "fit" and resume.is_file(subconfig["ckpt_path"]):
            present = resume.plain(self._parser("fit"), self.config["fit"])
            resume.compare(subconfig["ckpt_path"], present, self.allow_changes, self.weights_only)

    def _run_subcommand(self, subcommand: str) -> None:
        share_version(self.trainer.loggers)  # as late as can be: another run may start beside this one
        with no_folder_of_a_refusal(self.trainer):
            super()._run_subcommand(subcommand)


class RunParts(PrerlCLI):
    """The configuration of a run, its parts made and nothing started: for `prerl evaluate` and `prerl doctor`."""

    def instantiate_trainer(self, **_: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _run_name(given: list[str]) -> str:
    """Runs lie in runs/NAME/version_N: the name of the last configuration file that says which objective the model has,
    so that neither a shared file in front nor an overlay behind names a run; if none does, of the first file. A run's
    own config.yaml has the name of its run."""
    file = Path(next((file for file in reversed(given) if _says_objective(file)), [*given, "prerl"][0]))
    if file.name == "config.yaml" and (of_run := run_name(file.parent, {}))[1]:
        return of_run[0]
    return shipped.run_name(file) or file.stem


def _says_objective(file: str) -> bool:
    """What cannot be read is the parser's to report."""
    try:
        model = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    return isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)
