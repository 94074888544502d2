"""``prerl runs``: the runs in a folder, a line each, the newest last.

prerl runs               # those below runs/
prerl runs runs/dsrl
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.report.files import inside
from prerl_lightning.report.folders import below
from prerl_lightning.report.reading import read_begun
from prerl_lightning.report.runs import Run
from prerl_lightning.terminal import printable

HEAD = ("run", "objective", "model", "steps", "held out", "state", "started (UTC)")
MODEL = 24  # characters; of a longer name, such as a folder's, the end


def runs(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: there is no run.
    """
    parser = ArgumentParser("prerl runs", description="The runs in a folder, the newest last.")
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    own = parser.parse_args(args)
    folder = Path(own.folder)
    found = sorted(((started(run), run) for run in map(read_begun, below(folder))), key=lambda one: one[0])
    if not found:
        raise InputError(f"prerl runs: no run in {folder}: no folder with metrics.csv, run.json or config.yaml.")
    rows = [HEAD, *(row(run, folder, when) for when, run in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(f"{printable(cell):{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())


def row(run: Run, folder: Path, when: float) -> tuple[str, ...]:
    """The cells of HEAD."""
    lives = " -> ".join(name if not first else f"{name} at {first}" for name, first in run.planned)
    model = str(run.info.get("model") or inside(run.config, "model", "init_args").get("model") or "?")
    accuracy = run.column(run.accuracy) if run.accuracy else {}
    ends = [f"{accuracy[step]:.2f}" for step in dict.fromkeys([min(accuracy), max(accuracy)])] if accuracy else []
    return (
        str(run.folder.relative_to(folder)) if run.folder != folder else str(folder),
        lives or "?",
        model if len(model) <= MODEL else f"...{model[3 - MODEL :]}",
        f"{run.steps}/{run.max_steps or '?'}",
        " -> ".join(ends) or "-",
        run.status()[0],
        datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M"),
    )


def started(run: Run) -> float:
    """Seconds since 1970; where run.json does not say, when the run last wrote."""
    try:
        return datetime.fromisoformat(run.info["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return run.touched
