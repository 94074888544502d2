"""How samples are shown: a line for a terminal, a table for W&B and TensorBoard."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any, cast

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.text import Text

from prerl_lightning.terminal import last_part, printable, printable_lines

COLUMNS = ("step", "life", "kind", "row", "reward", "prompt", "response", "ground_truth", "change")


def terminal_line(row: dict[str, Any], max_characters: int) -> Text:
    """One sample for a terminal: thoughts bold, what is new in the answer underlined; ``.plain`` for a file."""
    kind = {"held_out": "held out", "best": "best of batch", "worst": "worst of batch"}[row["kind"]]
    cut = " (cut off)" if row["truncated"] else ""
    truth = printable(str(row["ground_truth"]))
    line = Text(f"  sample, {kind}: reward {row['reward']:.2f}{cut}, truth {truth}: ")
    line.append(repr(last_part(row["prompt"], max_characters)) + " -> ")
    # rich leaves escape sequences in; line ends are written out below
    answer = Text(printable_lines(row["response"][:max_characters]))
    for start, end, _ in row["thoughts"]:
        answer.stylize("bold yellow", start, end)
    if previous := row["previous"]:
        for start, end in new_words(previous["response"], row["response"]):
            answer.stylize("underline", start, end)
    for part in answer.split("\n", include_separator=True):
        line.append_text(part[:-1] + Text("\\n") if part.plain.endswith("\n") else part)
    if previous:
        same = previous["response"] == row["response"]
        line.append(f" ({'as at' if same else 'changed since'} step {previous['step']})", style="dim")
    return line


def new_words(before: str, after: str) -> list[tuple[int, int]]:
    """(start, end) in ``after`` of what a comparison word by word does not find in ``before``."""
    old, new = before.split(), after.split()
    positions, at = [], 0
    for word in new:
        at = after.index(word, at)
        positions.append((at, at + len(word)))
        at += len(word)
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(positions[j1][0], positions[j2 - 1][1]) for tag, _, _, j1, j2 in changes if tag != "equal" and j2 > j1]


def to_loggers(loggers: Iterable[Logger], rows: Sequence[dict[str, Any]]) -> None:
    """A table where the logger has such: W&B by ``log_table``, TensorBoard as text."""
    data = []
    for row in rows:
        previous = row["previous"]
        change = "" if previous is None else f"at step {previous['step']}: {previous['response']}"
        data.append([*(row[c] for c in COLUMNS[:-1]), change])
    step = rows[0]["step"]
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key="samples", columns=list(COLUMNS), data=data, step=step)
        elif isinstance(logger, TensorBoardLogger):
            cells = [[escape(str(c)).replace("|", "&#124;").replace("\n", "<br>") for c in line] for line in data]
            lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
            text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            cast(Any, logger.experiment).add_text("samples", text, global_step=step)
