"""What reaches the terminal: text of models, files and libraries made harmless, our own lines, libraries' noise."""

import logging
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prerl_lightning.signals import first_rank

STEERING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories of what has no picture of its own
# what tokenizers' special tokens look like: <|im_end|>, <s>, <start_of_turn>, [INST]
SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def printable(text: str) -> str:
    """Characters that could steer the terminal, one for one, as a dot: offsets into the text stay right."""
    return "".join("↵" if c == "\n" else "·" if unicodedata.category(c) in STEERING else c for c in text)


def printable_lines(text: str) -> str:
    """The same of each line."""
    return "\n".join(map(printable, text.split("\n")))


def last_part(text: str, most: int) -> str:
    """Its last characters, ``most`` or a few less: it does not begin inside a special token."""
    begin = max(0, len(text) - most)
    inside = (token.end() for token in SPECIAL.finditer(text) if token.start() < begin < token.end())
    return text[next(inside, begin) :]


class _Printable(logging.Formatter):
    """What is logged may quote completions, data and other libraries' errors."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _Stdout(logging.StreamHandler):
    """To what sys.stdout is at the moment: a rich bar takes its place and keeps other lines off its own."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def log_to_stdout() -> None:
    """Our own log lines, of rank 0; of all ranks from warnings on. Once, however often it is called."""
    log = logging.getLogger("prerl_lightning")
    if not any(isinstance(handler, _Stdout) for handler in log.handlers):
        handler = _Stdout()
        handler.setFormatter(_Printable("%(message)s"))
        log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO if first_rank() else logging.WARNING)


def quiet() -> None:
    """Start-up noise of the libraries; a variable that the user has set wins."""
    settings: dict[str, Any] = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")  # a notebook without ipywidgets
    # `prerl evaluate` makes fit's arguments of its own
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # advice about checkpoints before the optimizer step (ours are after it), and about log calls that are right as
    # they are: the metrics are equal on all ranks
    warnings.filterwarnings("ignore", message=".*Using ModelCheckpoint with manual optimization.*")
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log.*")
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # a run without a held-out set


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers shows none meanwhile; `quiet` is too late where a script or notebook has imported it."""
    from transformers.utils import logging as its

    shown = its.is_progress_bar_enabled()
    its.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            its.enable_progress_bar()


def quiet_lightning() -> None:
    """Whose import sets its loggers to INFO."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks"):  # the report, the summary, a verbose callback: what was asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
