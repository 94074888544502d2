"""metrics.csv of a run: its training and its validation rows, by optimizer steps, read on from where it was left."""

import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

Row = dict[str, float]  # the columns that have a value


@dataclass
class Rows:
    """What metrics.csv has held so far. Of two rows of one step the later one counts."""

    training: dict[int, Row] = field(default_factory=dict)
    """By the optimizer steps done after the row, from 1."""
    validation: dict[int, Row] = field(default_factory=dict)
    """By the optimizer steps behind the weights; 0 is before training."""
    numbered: bool = True
    """False: the file is of an older version, without optim/step; steps are told from Lightning's column."""
    cut_off: bool = False
    """The last line has no end: the writer was killed, or is writing."""
    unreadable: int = 0
    """Lines that do not fit the header, or whose step is no number."""


class MetricsFile:
    """Reads a CSVLogger's file again and again, each time only what is new.

    The header grows when a column first appears; the logger then rewrites the file, and it is read afresh.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = Rows()
        self._header: list[str] = []
        self._first_line = b""
        self._offset = 0

    def read(self) -> bool:
        """Takes in what is new; False: nothing was. A missing file is an empty one."""
        try:
            with self.path.open("rb") as file:
                first_line = file.readline()
                if not first_line.endswith(b"\n"):
                    return False
                if first_line != self._first_line or os.fstat(file.fileno()).st_size < self._offset:
                    self._first_line, self._offset = first_line, len(first_line)
                    self._header = next(csv.reader([_text(first_line)]))
                    self.rows = Rows(numbered="optim/step" in self._header or "val/step" in self._header)
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return False
        whole = new.rfind(b"\n") + 1
        self._offset += whole
        self.rows.cut_off = whole < len(new)
        for cells in csv.reader(_text(new[:whole]).splitlines()):
            self._take(cells)
        return whole > 0

    def _take(self, cells: list[str]) -> None:
        if not cells:
            return
        if len(cells) != len(self._header):
            self.rows.unreadable += 1
            return
        row: Row = {}
        for name, cell in zip(self._header, cells, strict=True):
            if cell:
                try:
                    row[name] = float(cell)
                except ValueError:
                    continue
        lightning_step = row.pop("step", None)
        row.pop("epoch", None)
        validation = {name: value for name, value in row.items() if name.startswith("val/")}
        training = {name: value for name, value in row.items() if name not in validation}
        rows = self.rows
        if rows.numbered:
            at, behind = training.get("optim/step"), validation.get("val/step")
        else:  # Lightning counts from 0, and a validation has the step of the row before it
            at = None if lightning_step is None or "reward/mean" not in training else lightning_step + 1
            behind = float(max(rows.training, default=0)) if validation else None
        rows.unreadable += not all(math.isfinite(step) for step in (at, behind) if step is not None)
        if at is not None and math.isfinite(at):
            rows.training.setdefault(int(at), {}).update(training)
        if behind is not None and math.isfinite(behind):
            rows.validation.setdefault(int(behind), {}).update(validation)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
