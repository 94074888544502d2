"""Problem sets from rows: which column is the prompt, which the answer, and which rows are of no use.

All of it is looked at in `load`, before the engine starts; a problem is made of its row when it is asked for.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.rows import Listed, Rows, as_text, open_files, open_hub
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.types import Problem

log = logging.getLogger(__name__)

Text = str | list[dict[str, str]]
AnswerIn = Literal["boxed", "after_hashes", "whole"]

VERL = "reward_model.ground_truth"


class Unusable(ValueError):
    """A row that makes no problem, and why."""


class RowProblems(ProblemSet):
    """A problem a row. Rows that make none are left out, counted, and the first of them is named.

    Args:
        limit: use the first so many problems.
        fold: of rows with the same prompt and the same answer (copies for avg@20, DAPO's hundred), use the first.
        max_unusable: the set is refused if a larger share of its rows makes no problem: their answer is missing, empty
            or of a kind that has no text, or there is nothing to ask. 0: every row has to.
    """

    def __init__(self, source: str, limit: int | None, fold: bool, max_unusable: float) -> None:
        self.source, self.limit, self.fold, self.max_unusable = source, limit, fold, max_unusable
        check_bounds(self, type(self).__name__, {"limit": 1})
        if not 0 <= max_unusable <= 1:
            raise InputError(f"{source}: max_unusable: {max_unusable!r} is no share.")
        self._rows: Rows = Listed([])
        self._kept = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Problem:
        number = int(self._kept[index])
        row = self._rows[number]
        found = self.read(row)
        assert found is not None
        rest = row.items() if isinstance(row, Mapping) else ()
        return Problem(number, without_answer(found[0]), found[1], {k: v for k, v in rest if k not in self.used})

    def forms(self, truth: str) -> Sequence[str]:
        return (f"\\boxed{{{truth}}}", f"#### {truth}", f"The answer is {truth}.", truth)

    # what a kind of set says

    columns: tuple[str, ...] = ()
    """Those that `read` looks at."""
    used: tuple[str, ...] = ()
    """Those that are no further columns for the reward."""

    def open(self) -> Rows:
        raise NotImplementedError

    def look(self, first: Any) -> None:
        """At the first row, before any is read."""

    def read(self, row: Any) -> tuple[Text, str] | None:
        """Prompt and truth; None: the row is not of this set. Raises Unusable."""
        raise NotImplementedError

    # ------------------------------------------------------------------

    def load(self) -> None:
        """
        Raises:
            InputError: no rows, or too many of no use.
        """
        self._rows = self.open()
        if not len(self._rows):
            raise InputError(f"{self.source}: it holds no rows.")
        self.look(self._rows[0])
        kept: list[int] = []
        seen: set[int] = set()
        bad: list[int] = []
        answered: list[int] = []
        number, first = -1, ""
        for number, row in enumerate(self._rows.of(self.columns)):
            if len(kept) == self.limit:
                number -= 1
                break
            try:
                found = self.read(row)
            except Unusable as error:
                first = first or f"{self._rows.where(number)}: {error}"
                bad.append(number)
                continue
            if found is None:
                continue
            prompt = without_answer(found[0])
            if len(prompt) < len(found[0]):
                answered.append(number)
            if self.fold:
                asked = prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt)
                key = hash((asked, found[1]))
                if key in seen:
                    continue
                seen.add(key)
            kept.append(number)
        looked = number + 1
        if len(bad) > self.max_unusable * looked:
            raise InputError(
                f"{self.source}: {len(bad)} of {looked} rows make no problem, which is more than max_unusable "
                f"({self.max_unusable:.0%}). The first: {first}"
            )
        if not kept:
            raise InputError(f"{self.source}: no row of {looked} makes a problem. {first}".rstrip())
        if bad:
            log.warning("%s: %d of %d rows make no problem; the first: %s", self.source, len(bad), looked, first)
        if answered:
            log.warning(
                "%s: the messages of %d rows end with the assistant's, which is left out of the prompt; the first: %s",
                *(self.source, len(answered), self._rows.where(answered[0])),
            )
        if self.fold and len(kept) < looked - len(bad):
            log.info("%s: %d rows, %d distinct problems: folded", self.source, looked, len(kept))
        self._kept = np.array(kept)


class Columns(RowProblems):
    """Rows whose columns are given by path: ``answer``, ``reward_model.ground_truth``, ``answer[0]``."""

    def __init__(self, source: str, prompt: str, answer: str | None, answer_in: AnswerIn | None, **rest: Any) -> None:
        super().__init__(source, **rest)
        self.prompt, self.answer, self.answer_in = prompt, answer, answer_in
        self._set(answer or "answer")

    def _set(self, answer: str) -> None:
        self.used = (self.prompt, answer)
        self._paths = (steps(self.prompt), steps(answer))
        self.columns = tuple(dict.fromkeys(str(path[0]) for path in self._paths))

    def look(self, first: Any) -> None:
        if self.answer is None:
            self._set(VERL if is_verl(first) else "answer")

    def read(self, row: Any) -> tuple[Text, str]:
        (prompt, answer), (to_prompt, to_answer) = self.used, self._paths
        return (
            text_of(at(row, prompt, to_prompt), prompt),
            truth_of(at(row, answer, to_answer), answer, self.answer_in),
        )


class Files(Columns):
    """Files of JSON lines, a JSON array, CSV, parquet or Arrow, compressed or not (.gz, .zst, .bz2), a folder of them,
    or one that ``save_to_disk`` has written; in verl's format or any other.

    Args:
        path: of a file or folder, a pattern such as ``data/*.jsonl``, or a list of these.
        prompt: the column with text or chat messages; of a nested one the path, such as ``messages[0].content``.
        answer: likewise with the ground truth; None: ``reward_model.ground_truth``, where there is such (verl's
            format), else ``answer``.
        answer_in: where in that column the answer is: ``boxed``, in its last box; ``after_hashes``, behind its last
            ####; ``whole``: all of it, a solution too. None: all of it, and a row in which it holds a box or #### is of
            no use.
        split: of a folder that holds several.
        limit: use the first so many problems.
        fold: of rows with the same prompt and the same answer, use the first.
        max_unusable: the set is refused if a larger share of its rows makes no problem.
    """

    def __init__(
        self,
        path: str | list[str],
        prompt: str = "prompt",
        answer: str | None = None,
        answer_in: AnswerIn | None = None,
        split: str | None = None,
        limit: int | None = None,
        fold: bool = True,
        max_unusable: float = 0.5,
    ) -> None:
        self.path, self.split = as_text(path), split
        source = self.path if isinstance(self.path, str) else ", ".join(self.path)
        super().__init__(source, prompt, answer, answer_in, limit=limit, fold=fold, max_unusable=max_unusable)

    def open(self) -> Rows:
        return open_files(self.path, self.split)


class HubDataset(Columns):
    """A data set of the Hugging Face hub.

    Args:
        name: its id, e.g. ``openai/gsm8k``.
        prompt: the column with text or chat messages; of a nested one the path, such as ``messages[0].content``.
        answer: likewise with the ground truth; None: ``reward_model.ground_truth``, where there is such, else
            ``answer``.
        answer_in: where in that column the answer is: ``boxed``, ``after_hashes`` or ``whole``, as in `Files`.
        split: of the data set.
        config: its configuration's name, e.g. ``main``.
        revision: of the repository.
        limit: use the first so many problems.
        fold: of rows with the same prompt and the same answer, use the first.
        max_unusable: the set is refused if a larger share of its rows makes no problem.
    """

    def __init__(
        self,
        name: str,
        prompt: str = "prompt",
        answer: str | None = None,
        answer_in: AnswerIn | None = None,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        fold: bool = True,
        max_unusable: float = 0.5,
    ) -> None:
        super().__init__(name, prompt, answer, answer_in, limit=limit, fold=fold, max_unusable=max_unusable)
        self.split, self.config, self.revision = split, config, revision

    def open(self) -> Rows:
        return open_hub(self.source, self.config, self.split, self.used, self.revision)


# ---------------------------------------------------------------------- of one row


def is_verl(row: Any) -> bool:
    return isinstance(row, Mapping) and "prompt" in row and "reward_model" in row


def steps(path: str) -> list[str | int]:
    """Of ``answers[0].value``: answers, 0, value."""
    found = re.findall(r"\[(-?\d+)\]|([^.\[\]]+)", path)
    if not found:
        raise InputError(f"{path!r} is no path of a column, such as answer, reward_model.ground_truth or answer[0].")
    return [int(index) if index else name for index, name in found]


def at(row: Any, name: str, path: Sequence[str | int]) -> Any:
    """What lies there; a column whose own name is ``name`` comes first. Raises Unusable."""
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for depth, step in enumerate(path):
        if isinstance(step, int):
            fine = isinstance(value, Sequence) and not isinstance(value, str) and -len(value) <= step < len(value)
        else:
            fine = isinstance(value, Mapping) and step in value
        if not fine and value is None and depth:
            raise Unusable(f"{name!r} is missing: {_path(path[:depth])!r} is null.")
        if not fine:
            raise Unusable(f"no column {name!r}; {described(row)}")
        value = value[step]
    return value


def _path(path: Sequence[str | int]) -> str:
    """What `steps` takes apart."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def described(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"its columns are {', '.join(sorted(map(str, _names(row))))}."
    return f"it is a list of {len(row)}, so begin with [0]." if isinstance(row, list) else "it is not a JSON object."


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) else (name,)


def text_of(value: Any, name: str) -> Text:
    """A prompt: text, or chat messages whose content is text. Raises Unusable."""
    if isinstance(value, str):
        if not value.strip():
            raise Unusable(f"{name!r} is empty.")
        return value
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise Unusable(
            f"{name!r} is neither text nor a list of chat messages (role and content), but {str(value)[:80]!r}."
        )
    messages = [{"role": str(m["role"]), "content": _content(m.get("content"), name)} for m in value]
    if all(m["role"] == "assistant" for m in messages):
        raise Unusable(f"{name!r} holds the assistant's messages alone.")
    return messages


def _content(content: Any, name: str) -> str:
    """Also of a list of parts, as chat services have it."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [p if isinstance(p, str) else p.get("text") if isinstance(p, Mapping) else None for p in parts]
    if not texts or not all(isinstance(t, str) for t in texts):
        raise Unusable(
            f"{name!r} is neither text nor a list of chat messages (role and content): it has a message with "
            f"{str(content)[:80]!r}."
        )
    return "\n".join(map(str, texts))


def without_answer(prompt: Text) -> Text:
    """Messages up to what is asked: in many public sets the solution stands behind it."""
    if isinstance(prompt, str):
        return prompt
    end = len(prompt)
    while prompt[end - 1]["role"] == "assistant":
        end -= 1
    return prompt[:end]


def truth_of(value: Any, name: str, answer_in: AnswerIn | None = None) -> str:
    """Of a column's value, as text. Raises Unusable where it is missing or empty, and for what has no text that is
    the same everywhere."""
    if type(value) is str and answer_in is None and "\\boxed{" not in value and "####" not in value and value.strip():
        return value  # nearly all of a million
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise Unusable(f"{name!r} is missing.")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        inner = (
            "[0]" if isinstance(value, list) else f".{next(iter(value), 'value')}" if isinstance(value, Mapping) else ""
        )
        mend = f"; give the path of one in it, such as {name}{inner}" if inner else ""
        raise Unusable(f"{name!r} is no text or number, but {value!r:.80}{mend}.")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables make 27.0 of 27 where another row has none
    text = str(value)
    if answer_in == "boxed":
        box = last_boxed(text)
        if box is None:
            raise Unusable(f"{name!r} has no box: {text[-80:]!r}.")
        text = box
    elif answer_in == "after_hashes":
        if "####" not in text:
            raise Unusable(f"{name!r} has no ####: {text[-80:]!r}.")
        text = text.rpartition("####")[2].strip()
    elif answer_in is None:
        for mark, where in (("\\boxed{", "boxed"), ("####", "after_hashes")):
            if mark in text:
                raise Unusable(f"{name!r} is a solution, not an answer: set answer_in: {where} ({text[-80:]!r}).")
    if not text.strip():
        raise Unusable(f"{name!r} is empty, which an empty answer would earn.")
    return text
