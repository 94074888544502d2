"""What of Lightning's Trainer works here, means a key of ours, or means nothing: its arguments, a module's hooks, the
callbacks and the loggers that come with it. The checks read these tables, the documentation shows them, and
tests/test_trainer_arguments.py holds them against Lightning's own lists, so that what a release adds needs a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """What is not ``works`` is refused, with exit status 2.

    Args:
        kind: ``works``; ``key``: another key does this here; ``none``: it has no meaning here.
        says: what it does; of what is refused, why, and what to write.
        neutral: of an argument that is refused: the value, besides None, that leaves it alone.
    """

    kind: Literal["works", "key", "none"]
    says: str
    neutral: Any = None

    @property
    def refused(self) -> bool:
        return self.kind != "works"


ARGUMENTS: dict[str, Row] = {
    "accelerator": Row("works", "`auto`, `cpu` or `gpu`; engines are for no other"),
    "strategy": Row("works", "`auto`, `ddp` or `fsdp2`; others are refused"),
    "devices": Row("works", "one rank each; `data.prompts_per_step` has to divide by their number"),
    "num_nodes": Row("works", "as `devices`"),
    "precision": Row("works", "`32-true` or `bf16-mixed`; without it the faster of the two; others are refused"),
    "logger": Row("works", "one, several or false; default: a CSVLogger in runs/NAME, whose files reports read"),
    "callbacks": Row("works", "`callbacks+:` appends to those of the file before; see the table of callbacks"),
    "fast_dev_run": Row("works", "so many rollouts and validations, and no file is written"),
    "max_epochs": Row("works", "an epoch is all prompts once; default -1: no limit"),
    "min_epochs": Row("works", "before that only `max_steps` ends a run"),
    "max_steps": Row("works", "optimizer steps, all lives together"),
    "min_steps": Row("works", "optimizer steps before which only an error, a signal or `max_epochs` ends a run"),
    "max_time": Row("works", "DD:HH:MM:SS; a resumed run has it anew. The last weights are then validated"),
    "limit_train_batches": Row("works", "rollouts of an epoch"),
    "limit_val_batches": Row("works", "of `data.val_batch` problems; 0: no validation"),
    "limit_test_batches": Row("works", "the same for `prerl test`"),
    "limit_predict_batches": Row("none", "there is no prerl predict: leave it out.", 1.0),
    "overfit_batches": Row(
        "key", "prompts are drawn anew in each epoch. Give data.train fewer problems, by its limit or size.", 0
    ),
    "val_check_interval": Row("works", "rollouts; with `check_val_every_n_epoch` also a share of an epoch. Not a time"),
    "check_val_every_n_epoch": Row("works", "default: none, `val_check_interval` counts on over epochs"),
    "num_sanity_val_steps": Row("works", "default 0: before the first step there is a whole validation instead"),
    "log_every_n_steps": Row("works", "optimizer steps; the first and last of each life are logged too. 0: none are"),
    "enable_checkpointing": Row("works", "false: none are written; which are, says the key `checkpoint`"),
    "enable_progress_bar": Row("works", "false: neither a bar nor lines"),
    "enable_model_summary": Row("works", "a table of the modules at the start; default: false"),
    "accumulate_grad_batches": Row(
        "key",
        "a step adds up the gradients of its whole rollout, in as many passes as memory asks for: leave it out, and "
        "give data.prompts_per_step more for a larger one.",
        1,
    ),
    "gradient_clip_val": Row(
        "key", "gradients are clipped by model.init_args.gradient_clip, by global norm: leave it out."
    ),
    "gradient_clip_algorithm": Row("key", "model.init_args.gradient_clip clips by global norm: leave it out."),
    "deterministic": Row("works", "of torch's operations; untried on a GPU"),
    "benchmark": Row("none", "it times convolutions, of which a language model has none: leave it out.", False),
    "inference_mode": Row("works", "validations run in it; false: under `torch.no_grad`"),
    "use_distributed_sampler": Row(
        "none", "prompts are dealt to the ranks by data.prompts_per_step, without a sampler: leave it out.", True
    ),
    "profiler": Row("works", "`simple`, `advanced`, `pytorch`; its report is printed at the end, or in its `filename`"),
    "detect_anomaly": Row("works", "of the backward passes; slow"),
    "barebones": Row("none", "it logs nothing and keeps no checkpoint: leave it out.", False),
    "plugins": Row("works", "cluster environments and checkpoint IO; a precision's are refused, by `precision`"),
    "sync_batchnorm": Row("none", "a language model normalises no batches: leave it out.", False),
    "reload_dataloaders_every_n_epochs": Row("none", "it would begin the order of prompts anew: leave it out.", 0),
    "default_root_dir": Row("works", "the folder of all runs, default runs"),
    "enable_autolog_hparams": Row("works", "of an objective that calls save_hyperparameters; config.yaml has them all"),
    "model_registry": Row(
        "key", "checkpoints are those of the key checkpoint, and the trained model is exported as a folder, see export."
    ),
}  # fmt: skip

_BARS = Row("works", "in place of our bar and lines")
_FREEZES = Row("none", "it freezes and thaws parts of a module that has no weights yet when it looks. Leave it out.")
_AVERAGES = Row(
    "none",
    "the engine samples from the policy's own weights, and validations would be of others than are averaged, or none "
    "be: the policy is loaded after it has looked. Leave it out.",
)
CALLBACKS: dict[str, Row] = {
    "BackboneFinetuning": _FREEZES,
    "BaseFinetuning": _FREEZES,
    "BasePredictionWriter": Row("none", "there is no prerl predict: samples.jsonl holds what the policy writes."),
    "BatchSizeFinder": Row(
        "key",
        "packs are made as large as memory allows, and the batch is data.prompts_per_step x data.sampling.group_size.",
    ),
    "Callback": Row("works", "the base of your own; its hooks are called as everywhere"),
    "Checkpoint": Row("works", "the base of your own"),
    "DeviceStatsMonitor": Row("works", "rows of its own in metrics.csv; on a CPU it needs psutil"),
    "EarlyStopping": Row(
        "works", "by a held-out metric at validations, the one of step 0 among them; its reason is in run.json"
    ),
    "EMAWeightAveraging": _AVERAGES,
    "GradientAccumulationScheduler": Row(
        "key", "a step adds up the gradients of its whole rollout. Give data.prompts_per_step for a larger one."
    ),
    "LambdaCallback": Row("works", "its functions by import path"),
    "LearningRateFinder": Row(
        "none", "it goes by a training loss, which here says nothing of how well the policy does. Compare short runs."
    ),
    "LearningRateMonitor": Row(
        "key", "optim/lr is in each row; this would log the rate of the step before. Leave it out."
    ),
    "ModelCheckpoint": Row(
        "works",
        "without a monitor, beside the key `checkpoint`, whose files `--ckpt_path last` and `best` take. With one it "
        "may judge a step by the validation before, and is refused: `checkpoint.monitor` judges by the step's own",
    ),
    "ModelPruning": Row(
        "none", "it gives the weights other names, by which neither the engine nor an export knows them. Leave it out."
    ),
    "ModelSummary": Row("works", "printed at the start"),
    "OnExceptionCheckpoint": Row(
        "key",
        "in the midst of a step the data are ahead of the weights, and a ruined policy would be kept. "
        "checkpoint.every_n_train_steps: 1 loses one step at most, and a signal has its own checkpoint.",
    ),
    "ProgressBar": _BARS,
    "RichModelSummary": Row("works", "printed at the start"),
    "RichProgressBar": _BARS,
    "SpikeDetection": Row(
        "key", "a step returns no loss for it to look at. The key health watches a run: accuracy, entropy, skipped ..."
    ),
    "StochasticWeightAveraging": _AVERAGES,
    "ThroughputMonitor": Row(
        "works", "rows of its own, prompts a second with `batch_size_fn: len`; tokens a second and MFU are in ours"
    ),
    "Timer": Row("works", "as `trainer.max_time`, which is left out then"),
    "TQDMProgressBar": _BARS,
    "WeightAveraging": _AVERAGES,
}  # fmt: skip

LOGGERS: dict[str, str] = {  # and the package that each needs; none: Lightning's own
    "CSVLogger": "",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "LitLogger": "litlogger",
}

_NO_PREDICTION = Row("none", "there is no prerl predict.")
_MANUAL = "optimisation is manual, so that Lightning never calls it. "
_LOADERS = Row("none", "the RolloutDataModule has the loaders. Give data.train, data.val or data.val_more.")
HOOKS: dict[str, Row] = {
    **dict.fromkeys(
        (
            *("setup", "prepare_data", "configure_model", "configure_callbacks", "teardown"),
            *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
            *("on_before_batch_transfer", "on_after_batch_transfer", "training_step"),
            *("on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step"),
            *("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"),
            *("on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_start"),
            *("on_validation_epoch_start", "on_validation_batch_start", "validation_step", "on_validation_batch_end"),
            *("on_validation_epoch_end", "on_validation_end", "on_validation_model_train"),
            *("on_test_model_eval", "on_test_start", "on_test_epoch_start", "on_test_batch_start", "test_step"),
            *("on_test_batch_end", "on_test_epoch_end", "on_test_end", "on_test_model_train"),
            *("on_save_checkpoint", "on_load_checkpoint"),
        ),
        Row("works", "of the first life's objective; what PolicyModule defines itself is to be called by super()"),
    ),
    **dict.fromkeys(
        (
            *("on_predict_start", "on_predict_end", "on_predict_model_eval", "on_predict_epoch_start"),
            *("on_predict_epoch_end", "on_predict_batch_start", "on_predict_batch_end", "predict_step"),
            "predict_dataloader",
        ),
        _NO_PREDICTION,
    ),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "transfer_batch_to_device"), _LOADERS),
    "configure_gradient_clipping": Row("key", f"{_MANUAL}Give model.init_args.gradient_clip."),
    "lr_scheduler_step": Row("key", f"{_MANUAL}Give model.init_args.lr_schedule, or override lr_at."),
    "optimizer_step": Row("none", f"{_MANUAL}on_before_optimizer_step is called."),
    "optimizer_zero_grad": Row("none", f"{_MANUAL}Gradients are freed after each step."),
    "on_before_zero_grad": Row("none", f"{_MANUAL}on_before_optimizer_step is called."),
    "configure_optimizers": Row(
        "key", "each life makes its optimizer by make_optimizer, of model.init_args.optimizer: override that."
    ),
    "configure_sharded_model": Row("none", "Lightning has replaced it by configure_model, which is called."),
}


def table() -> str:
    """All of it as Markdown, for the documentation."""
    parts = [
        _section("Arguments of the Trainer", "trainer.", ARGUMENTS),
        _section("Callbacks of Lightning", "", CALLBACKS),
        _section("Loggers of Lightning", "", {name: _logger(package) for name, package in LOGGERS.items()}),
        _section("Hooks of an objective's class", "", HOOKS),
        "Of a successor in a `PolicyReincarnation` no hook but `training_step` is called, and one that defines another "
        "is refused: put it into a callback.",
    ]
    return "\n\n".join(parts) + "\n"


def _logger(package: str) -> Row:
    return Row("works", f"needs `pip install {package.replace('_', '-')}`" if package else "the default")


def _section(title: str, prefix: str, rows: Mapping[str, Row]) -> str:
    """Names with one row share a line."""
    shared: dict[Row, list[str]] = {}
    for name, row in rows.items():
        shared.setdefault(row, []).append(f"`{prefix}{name}`")
    kinds = {"works": "works", "key": "refused: a key of ours", "none": "refused: no meaning here"}
    lines = [f"| {', '.join(names)} | {kinds[row.kind]} | {row.says} |" for row, names in shared.items()]
    return "\n".join([f"## {title}", "", "| | | |", "| --- | --- | --- |", *lines])
