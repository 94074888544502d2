"""Problem sets by name, each with its prompt, its answer, its verifier and its licence.

Hub ids, columns and licences are as published; no hub was in reach where this was written, so that only the local
files were read by us (README, "What has run where").
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prerl_lightning.data.readers import RowProblems, check_columns, file_rows, hub_rows, is_verl, verl_rows
from prerl_lightning.errors import InputError
from prerl_lightning.rewards.boxed import boxed_reward, last_boxed
from prerl_lightning.rewards.choice import choice_reward
from prerl_lightning.rewards.numeric import gsm8k_reward
from prerl_lightning.rewards.score import Reward

Row = Mapping[str, Any]

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
HASHED = "Reason step by step, and write the final number behind ####."
LETTER = 'Reason step by step, and end with "The answer is (X)", X being the letter of the right option.'


def _from_solution(row: Row) -> str:
    answer = last_boxed(row["solution"])
    if answer is None:
        raise InputError(f"a solution without a box: {row['solution'][:100]!r}")
    return answer


def _first(row: Row) -> str:
    answer = row["final_answer"]
    return str(answer[0] if isinstance(answer, list) else answer).strip().strip("$")


def _whole(row: Row) -> str:
    """Files write integers as 27.0."""
    return re.sub(r"\.0+$", "", str(row["answer"]))


def _mathqa(row: Row) -> str:
    """One option a line: theirs are ``a ) 38 , b ) 27 , ...``."""
    options = re.sub(r"\s*,?\s*\b([a-e]) \)\s*", lambda m: f"\n({m[1].upper()}) ", row["options"])
    return f"{row['Problem']}{options}"


@dataclass(frozen=True)
class Source:
    """Where a set comes from, and what is made of a row.

    Args:
        hub: id of the data set.
        splits: its splits, the default first.
        columns: that a row must have.
        question: of a row.
        answer: of a row.
        instruction: system message, or last line of a plain prompt.
        reward: the verifier; None: `math_verify_reward`, whose library takes a second to import.
        licence: as the data set's page states it.
        config: of the data set.
        revision: of the repository.
        keep: rows to use.
    """

    hub: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    instruction: str
    reward: Reward | None
    licence: str
    config: str | None = None
    revision: str | None = None
    keep: Callable[[Row], bool] = lambda row: True


def _column(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


_PROBLEM, _QUESTION = _column("problem"), _column("question")
_CONTEST = "none stated; problems of the Mathematical Association of America"
# Hugging Face keeps a parquet copy of sets whose own loading scripts `datasets` no longer runs
_PARQUET = "refs/convert/parquet"

# fmt: off
SETS: dict[str, Source] = {
    "math_train": Source("DigitalLearningGmbH/MATH-lighteval", ("train", "test"), ("problem", "solution"), _PROBLEM,
                         _from_solution, BOXED, boxed_reward, "MIT"),
    "math500": Source("HuggingFaceH4/MATH-500", ("test",), ("problem", "answer"), _PROBLEM, _column("answer"), BOXED,
                      boxed_reward, "MIT"),
    "aime24": Source("HuggingFaceH4/aime_2024", ("train",), ("problem", "answer"), _PROBLEM,
                     lambda row: str(int(row["answer"])), BOXED, boxed_reward, _CONTEST),
    "aime25": Source("yentinglin/aime_2025", ("train",), ("problem", "answer"), _PROBLEM,
                     lambda row: str(int(row["answer"])), BOXED, boxed_reward, _CONTEST),
    "amc23": Source("zwhe99/amc23", ("test",), ("question", "answer"), _QUESTION, _whole, BOXED, boxed_reward,
                    _CONTEST),
    "minerva": Source("math-ai/minervamath", ("test",), ("question", "answer"), _QUESTION, _column("answer"), BOXED,
                      None, "none stated; problems of MIT OpenCourseWare (CC BY-NC-SA)"),
    "olympiadbench": Source("Hothan/OlympiadBench", ("train",), ("question", "final_answer"), _QUESTION, _first, BOXED,
                            None, "Apache-2.0", config="OE_TO_maths_en_COMP",
                            keep=lambda row: bool(row["final_answer"])),
    "gsm8k": Source("openai/gsm8k", ("test", "train"), ("question", "answer"), _QUESTION,
                    lambda row: row["answer"].rpartition("####")[2].strip(), HASHED, gsm8k_reward, "MIT",
                    config="main"),
    "mathqa": Source("allenai/math_qa", ("test", "train", "validation"), ("Problem", "options", "correct"), _mathqa,
                     _column("correct"), LETTER, choice_reward, "Apache-2.0", revision=_PARQUET),
    **{
        f"logical_deduction_{n}": Source("lukaemon/bbh", ("test",), ("input", "target"), _column("input"),
                                         _column("target"), LETTER, choice_reward, "MIT (BIG-Bench Hard)",
                                         config=f"logical_deduction_{n}_objects", revision=_PARQUET)
        for n in ("three", "five", "seven")
    },
}
# fmt: on


class NamedProblems(RowProblems):
    """A set of `SETS`, from the hub or from a file.

    Args:
        name: math_train, math500, aime24, aime25, amc23, minerva, olympiadbench, gsm8k, mathqa,
            logical_deduction_three (or five, seven).
        path: a parquet or JSON lines file, with the hub's columns or in verl's format, whose prompts are then taken as
            they are.
        split: of the hub's; None: the one that the set is named for.
        limit: use the first so many problems.
        style: ``chat``: question as the user's message, instruction as the system's; ``plain``: for base models,
            ``Question: ... Answer:`` with the instruction in front.
        instruction: instead of the set's own; an empty one leaves it out.
    """

    def __init__(
        self,
        name: str,
        path: str | None = None,
        split: str | None = None,
        limit: int | None = None,
        style: Literal["chat", "plain"] = "chat",
        instruction: str | None = None,
    ) -> None:
        super().__init__(path or name, limit)
        if name not in SETS:
            raise InputError(f"NamedProblems: {name!r} is none of {', '.join(SETS)}.")
        self.name, self.path, self.style = name, path, style
        self.set = SETS[name]
        self.split = split or self.set.splits[0]
        if self.split not in self.set.splits:
            raise InputError(f"NamedProblems: {name} has the splits {', '.join(self.set.splits)}, not {split!r}.")
        self.instruction = self.set.instruction if instruction is None else instruction

    @property
    def reward(self) -> Reward:
        if self.set.reward is not None:
            return self.set.reward
        from prerl_lightning.rewards.symbolic import math_verify_reward

        return math_verify_reward

    def load(self) -> None:
        if self.path is None:
            s = self.set
            rows = hub_rows(s.hub, s.config, self.split, s.columns, s.revision)
        else:
            rows = file_rows(self.path)
            if is_verl(rows):
                return self._fill(verl_rows(self.path, rows), "prompt", "ground_truth")
            for row in rows:
                check_columns(self.path, list(row), *self.set.columns)
        made = []
        for number, row in enumerate(rows):
            try:
                if self.set.keep(row):
                    made.append({**row, "_prompt": self._prompt(row), "_answer": self.set.answer(row)})
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self.source}, row {number}: no answer could be read: {error}") from None
        return self._fill(made, "_prompt", "_answer")

    def _prompt(self, row: Row) -> str | list[dict[str, str]]:
        question = self.set.question(row)
        if self.style == "plain":
            head = f"{self.instruction}\n\n" if self.instruction else ""
            return f"{head}Question: {question}\nAnswer:"
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": question}]
