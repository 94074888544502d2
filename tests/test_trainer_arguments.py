"""What of Lightning works, means a key of ours or means nothing: the tables against Lightning's lists, what is refused,
and one run with what works."""

import inspect
import json
import logging
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from test_resume import CONFIG, column

from prerl_lightning import cli
from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.checks import check_callbacks, check_hooks, check_trainer
from prerl_lightning.objectives.stops import Stops
from prerl_lightning.objectives.trainer_arguments import ARGUMENTS, CALLBACKS, HOOKS, LOGGERS, table
from prerl_lightning.run import TRAINER_DEFAULTS

# of LightningModule's methods, those that a module calls, or that nothing of training does
CALLED = {
    *("print", "log", "log_dict", "all_gather", "optimizers", "lr_schedulers", "manual_backward", "clip_gradients"),
    *("toggle_optimizer", "untoggle_optimizer", "toggled_optimizer", "freeze", "unfreeze", "forward"),
    *("to_onnx", "to_torchscript", "to_tensorrt", "load_from_checkpoint"),
}
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(L.Trainer.__init__).parameters.items()
    if name != "self"
} | TRAINER_DEFAULTS


def test_all_that_lightning_has_has_a_row():
    methods = {
        name
        for kind in (ModelHooks, DataHooks, CheckpointHooks, L.LightningModule)
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.ismethoddescriptor(value))
    }
    assert list(ARGUMENTS) == [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    assert set(CALLBACKS) == set(callbacks.__all__)
    assert set(LOGGERS) == {*loggers.__all__} - {"Logger"}
    assert set(HOOKS) == methods - CALLED


def test_the_table_has_all_of_it_as_markdown():
    text = table()
    for prefix, rows in (("trainer.", ARGUMENTS), ("", CALLBACKS), ("", LOGGERS), ("", HOOKS)):
        for name in rows:
            assert text.count(f"`{prefix}{name}`") >= 1, name
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.count(" | ") == 2 for line in rows)


# ---------------------------------------------------------------------- arguments

OTHER = {
    **{"limit_predict_batches": 2, "overfit_batches": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    **{"gradient_clip_algorithm": "value", "benchmark": True, "use_distributed_sampler": False, "barebones": True},
    **{"sync_batchnorm": True, "reload_dataloaders_every_n_epochs": 1, "model_registry": "me/model"},
}
WRONG = [
    *((name, OTHER[name], re.escape(row.says)) for name, row in ARGUMENTS.items() if row.refused),
    ("accelerator", "mps", "has no engine here"),
    ("strategy", "ddp_notebook", "Write auto, ddp or fsdp2"),
    ("strategy", SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy"), "Write auto, ddp or fsdp2"),
    ("min_steps", 11, "are more than trainer.max_steps, 10"),
    ("min_epochs", -1, "of at least 0"),
    ("val_check_interval", {"minutes": 10}, "must be a whole number of rollouts"),
    ("max_time", "tomorrow", "is no time"),
    ("max_time", {"ours": 3}, "is no time"),
    ("max_time", "00:00:00:00", "trains nothing"),
]


@pytest.mark.parametrize(("name", "value", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_an_argument_without_meaning_is_refused(name, value, says):
    with pytest.raises(InputError, match=rf"^trainer\.{name}: .*{says}"):
        check_trainer(SimpleNamespace(**DEFAULTS | {"max_steps": 10, name: value}), trains=True)


def test_defaults_and_neutral_values_pass():
    neutral = {name: row.neutral for name, row in ARGUMENTS.items() if row.refused}
    works = {"max_time": {"hours": 1}, "min_steps": 10, "accelerator": "gpu", "strategy": "fsdp2", "callbacks": []}
    for given in ({}, neutral, works, {"strategy": SimpleNamespace(class_path="mine.Strategy")}):
        check_trainer(SimpleNamespace(**DEFAULTS | {"max_steps": 10} | given), trains=True)


# ---------------------------------------------------------------------- callbacks

UNFIT = {
    "BackboneFinetuning": callbacks.BackboneFinetuning,
    "BaseFinetuning": type("Own", (BaseFinetuning,), dict.fromkeys(("freeze_before_training", "finetune_function"))),
    "BasePredictionWriter": type("Own", (BasePredictionWriter,), {}),
    "BatchSizeFinder": callbacks.BatchSizeFinder,
    "EMAWeightAveraging": callbacks.EMAWeightAveraging,
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2}),
    "LearningRateFinder": callbacks.LearningRateFinder,
    "LearningRateMonitor": callbacks.LearningRateMonitor,
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured"),
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("."),
    "SpikeDetection": callbacks.SpikeDetection,
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(1e-3),
    "WeightAveraging": type("Own", (callbacks.WeightAveraging,), {}),
}


def test_callbacks_without_meaning_are_refused_and_others_are_not():
    for name, row in CALLBACKS.items():
        if row.refused:
            with pytest.raises(InputError, match=rf"^trainer\.callbacks: \w+: {re.escape(row.says)}$"):
                check_callbacks([UNFIT[name]()])
    with pytest.raises(InputError, match=r"^trainer\.callbacks: ModelCheckpoint\.monitor: .* Give checkpoint\.monitor"):
        check_callbacks([RunCheckpoint(), ModelCheckpoint(monitor="val/avg@8")])
    own = type("Timer", (L.Callback,), {})
    check_callbacks(
        [RunCheckpoint(monitor="val/avg@8"), ModelCheckpoint(every_n_train_steps=1), Timer("00:00:01:00"), own()]
    )


# ---------------------------------------------------------------------- hooks


def test_hooks_that_would_never_be_called_are_refused():
    def with_hook(name, base=GRPO):
        return type("Mine", (base,), {name: lambda self, *_: None})

    for name, row in HOOKS.items():
        mine = type("Later", (with_hook(name),), {})
        if row.refused:
            with pytest.raises(InputError, match=rf"^model: Mine\.{name}: {re.escape(row.says)}$"):
                check_hooks(mine, successor=False)
        else:
            check_hooks(mine, successor=False)
        if name != "training_step":
            with pytest.raises(InputError, match=rf"^PolicyReincarnation\.successor: Mine\.{name}\b"):
                check_hooks(mine, successor=True)
    for name in ("training_step", "update", "make_optimizer", "lr_at", "helper"):
        for successor in (False, True):
            check_hooks(with_hook(name), successor)
    check_hooks(NSRPreRL, successor=True)


# ---------------------------------------------------------------------- stops


def test_what_ended_a_run_is_told():
    trainer = SimpleNamespace(max_steps=10, global_step=4, max_epochs=-1, current_epoch=1)
    stops = Stops()
    assert stops.reason(trainer) is None
    assert stops.reason(SimpleNamespace(**vars(trainer) | {"max_epochs": 1})) == "trainer.max_epochs (1) is reached"
    assert stops.reason(SimpleNamespace(**vars(trainer) | {"max_epochs": 1, "max_steps": -1})) is None
    stops._note(None, "stop_at_noon")
    assert stops.reason(trainer) == "trainer.should_stop was set in stop_at_noon"
    stops._note(Timer({"minutes": 90}), "Timer.on_train_batch_end")
    assert stops.reason(trainer) == "trainer.max_time: 1:30:00 is over"
    stopping = EarlyStopping("val/avg@8", mode="max", stopping_threshold=0.5)
    _, stopping.stopping_reason_message = stopping._evaluate_stopping_criteria(torch.tensor(0.75))
    stops._note(stopping, "EarlyStopping._run_early_stopping_check")
    assert stops.reason(trainer) == "EarlyStopping: Stopping threshold reached: val/avg@8 = 0.75 > 0.5"
    trainer.global_step = 10
    assert stops.reason(trainer) is None


# ---------------------------------------------------------------------- a run with what works

called: set[str] = set()


class Hooked(GRPO):
    """Notes each hook of its own that is called."""


def _noting(name):
    def hook(self, *args, **kwargs):
        called.add(name)
        return getattr(super(Hooked, self), name)(*args, **kwargs)

    hook.__name__ = name  # not by functools.wraps, behind which Lightning looks for what is overridden
    hook.__signature__ = inspect.signature(getattr(GRPO, name))
    return hook


for _name, _row in HOOKS.items():
    if not _row.refused:
        setattr(Hooked, _name, _noting(_name))


def note(trainer, *_):
    called.add("LambdaCallback")


RUN = {
    "model": {"class_path": "test_trainer_arguments.Hooked"},
    "trainer": {
        **{"max_steps": 10, "min_steps": 1, "profiler": "simple", "deterministic": True, "detect_anomaly": True},
        **{"inference_mode": False, "limit_train_batches": 8, "limit_val_batches": 1},
        "callbacks": [
            {
                "class_path": "EarlyStopping",
                "init_args": {"monitor": "val/avg@2", "mode": "max", "min_delta": 2, "patience": 1},
            },
            {"class_path": "DeviceStatsMonitor"},
            {"class_path": "ModelSummary"},
            {"class_path": "ThroughputMonitor", "init_args": {"batch_size_fn": "builtins.len"}},
            {"class_path": "LambdaCallback", "init_args": {"on_train_start": "test_trainer_arguments.note"}},
        ],
    },
}


def test_what_works_works(tmp_path, model_folder, monkeypatch, caplog):
    """The profiler's report and the summary are shown, callbacks and hooks are called, and EarlyStopping, at once after
    min_steps, tells why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["prerl"])
    (tmp_path / "small.yaml").write_text(CONFIG.format(model=model_folder("llama-tied")))
    (tmp_path / "works.yaml").write_text(json.dumps(RUN))
    caplog.set_level("INFO", "prerl_lightning")
    lightning = logging.getLogger("lightning.pytorch")
    lightning.addHandler(caplog.handler)
    called.clear()
    try:
        cli._command(["fit", "--config=small.yaml", "--config=works.yaml"], debug=False)
    finally:
        lightning.removeHandler(caplog.handler)
        torch.use_deterministic_algorithms(False)
    assert "FIT Profiler Report" in caplog.text
    assert "Trainable params" in caplog.text
    assert {name for name, row in HOOKS.items() if not row.refused} - called <= {
        *(name for name in HOOKS if "test" in name),
        "on_load_checkpoint",
    }
    assert "LambdaCallback" in called
    run = tmp_path / "runs" / "works" / "version_0"
    names = (run / "metrics.csv").read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_start" in names
    assert "train/batches" in names
    assert list(column(run, "reward/mean")) == [1, 2]
    why = json.loads((run / "run.json").read_text())["stopped"]
    assert re.fullmatch(
        r"EarlyStopping: Monitored metric val/avg@2 did not improve in the last 1 records\. Best score: [\d.]+", why
    )
    assert f"Stopped at step 2, before trainer.max_steps (10): {why}." in caplog.text
