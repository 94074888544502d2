"""``prerl watch``: a run's figures in the terminal, from its files alone.

    prerl watch                        # the newest run below runs/
    prerl watch runs/dsrl              # its newest version
    prerl watch runs/dsrl/version_0 --once

Draws again when the files have changed, and ends by itself when run.json says that the run has, or its process is gone.
Only what is new in metrics.csv is read, and the end of samples.jsonl.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.report.files import is_sample, last_written, parsed, read_config, read_info, run_name
from prerl_lightning.report.folders import find
from prerl_lightning.report.frame import frame
from prerl_lightning.report.metrics import MetricsFile
from prerl_lightning.report.runs import Run, run_seconds

WIDTH = 100  # of a picture that goes to no terminal
TAIL = 65_536  # bytes of samples.jsonl that are read
OVER = ("finished", "interrupted", "failed")


def _arguments() -> ArgumentParser:
    parser = ArgumentParser("prerl watch", description="A run in the terminal, live.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, or runs/NAME for its newest version")
    parser.add_argument("--once", action="store_true", help="one picture; the default where the output is no terminal")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between looks at the files (default 1)")
    return parser


def watch(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: there is no such run.
    """
    own = _arguments().parse_args(args)
    if not own.every > 0:
        raise InputError(f"--every: {own.every} is not above 0.")
    files = RunFiles(find(own.run))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters shows question marks
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH)
    if own.once or not console.is_terminal:
        files.read()
        with console.capture() as drawn:
            console.print(frame(files.run, console.width, console.height if console.is_terminal else 60))
        try:
            print("\n".join(line.rstrip() for line in drawn.get().splitlines()), flush=True)
        except BrokenPipeError:  # the reader, such as head, has enough; Python's own flush at exit would complain again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        follow(files, console, own.every)
    except KeyboardInterrupt:
        return


def follow(files: "RunFiles", console: Console, every: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until the run has ended; the last picture stays."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown: tuple[int, int, str] | None = None
        while True:
            changed = files.read()
            status = files.run.status()[0]
            if changed or shown != (console.width, console.height, status):
                live.update(frame(files.run, console.width, console.height), refresh=True)
                shown = (console.width, console.height, status)
            if files.run.info.get("status") in OVER or status == "killed":
                break
            sleep(every)
    console.print(frame(files.run, console.width, max(48, console.height)))


class RunFiles:
    """A run that is being written, as a `Run` that is brought up to date by `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = MetricsFile(folder / "metrics.csv")
        self.run = Run(folder, *run_name(folder, {}), {}, {}, "", {}, {}, {0: 0.0}, (), (), time.time(), ())
        self._seen: dict[str, tuple[int, float]] = {}

    def read(self) -> bool:
        """True: something has changed."""
        fresh = {name for name in ("metrics.csv", "run.json", "config.yaml", "samples.jsonl") if self._changed(name)}
        if not fresh:
            return False
        parts: dict[str, Any] = dict(vars(self.run))
        if "metrics.csv" in fresh:
            self.metrics.read()
            rows = self.metrics.rows
            parts["training"], parts["validation"] = (
                dict(sorted(found.items())) for found in (rows.training, rows.validation)
            )
            parts["seconds"] = run_seconds(parts["training"])
        if "run.json" in fresh:
            # a half-written file counts as the one before
            parts["info"] = read_info(self.folder)[0] or parts["info"]
            parts["name"], parts["version"] = run_name(self.folder, parts["info"])
        if "config.yaml" in fresh:
            parts["config"], parts["config_text"], _ = read_config(self.folder)
        if "samples.jsonl" in fresh:
            parts["samples"] = tuple(last_lines(self.folder / "samples.jsonl"))
        parts["touched"] = last_written(self.folder, bool(parts["training"]))
        self.run = Run(**parts)
        return True

    def _changed(self, name: str) -> bool:
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return False
        state = (stat.st_size, stat.st_mtime)
        if self._seen.get(name) == state:
            return False
        self._seen[name] = state
        return True


def last_lines(path: Path) -> list[dict[str, Any]]:
    """Samples that are whole lines among the last `TAIL` bytes."""
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]
    read = (parsed(line.decode("utf-8", "replace")) for line in lines)
    return [value for value in read if value is not None and is_sample(value)]
