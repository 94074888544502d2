"""Problem sets by name, each with its prompt, its answer, its verifier and its licence.

Hub ids, columns and licences are as published; no hub was in reach where this was written, so that only the local
files were read by us (README, "What is proven where").
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.readers import (
    VERL,
    AnswerIn,
    RowProblems,
    Text,
    Unusable,
    at,
    described,
    is_verl,
    steps,
    text_of,
    truth_of,
)
from prerl_lightning.data.rows import Rows, as_text, open_files, open_hub
from prerl_lightning.errors import InputError, nearest
from prerl_lightning.rewards.boxed import boxed_reward
from prerl_lightning.rewards.choice import choice_reward
from prerl_lightning.rewards.numeric import gsm8k_reward
from prerl_lightning.rewards.score import Reward

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
HASHED = "Reason step by step, and write the final number behind ####."
LETTER = 'Reason step by step, and end with "The answer is (X)", X being the letter of the right option.'


def _integer(truth: str) -> str:
    """AIME's 033 is 33."""
    if not re.fullmatch(r"\s*-?\d+(\.0*)?\s*", truth):
        raise Unusable(f"an integer is the answer of these problems, not {truth!r}.")
    return str(int(float(truth)))


def _without_dollars(truth: str) -> str:
    """``$1$, $2$`` is ``1, 2``."""
    return re.sub(r"(?<!\\)\$", "", truth).strip()


def _lines(options: Any) -> str:
    """One option a line: MathQA's are ``a ) 38 , b ) 27 , ...``."""
    return re.sub(r"\s*,?\s*\b([a-e]) \)\s*", lambda m: f"\n({m[1].upper()}) ", str(options))


SAME = {"problem": ("question",), "question": ("problem",)}


@dataclass(frozen=True)
class Source:
    """Where a set comes from, and what is made of a row.

    Args:
        hub: id of the data set.
        splits: its splits, the default first.
        question: its column. Names of columns are found whatever their case, and ``problem`` is ``question``.
        answer: likewise.
        instruction: system message, or last line of a plain prompt.
        reward: the verifier; None: `math_verify_reward`, whose library takes a second to import.
        licence: as the data set's page states it.
        answer_in: where in that column the answer is.
        finish: the answer, of what stands there.
        options: column of a choice's options, in MathQA's form.
        config: of the data set.
        revision: of the repository.
    """

    hub: str
    splits: tuple[str, ...]
    question: str
    answer: str
    instruction: str
    reward: Reward | None
    licence: str
    answer_in: AnswerIn | None = None
    finish: Callable[[str], str] = str
    options: str | None = None
    config: str | None = None
    revision: str | None = None


_CONTEST = "none stated; problems of the Mathematical Association of America"
# Hugging Face keeps a parquet copy of sets whose own loading scripts `datasets` no longer runs
_PARQUET = "refs/convert/parquet"

# fmt: off
SETS: dict[str, Source] = {
    "math_train": Source("DigitalLearningGmbH/MATH-lighteval", ("train", "test"), "problem", "solution", BOXED,
                         boxed_reward, "MIT", answer_in="boxed"),
    "math500": Source("HuggingFaceH4/MATH-500", ("test",), "problem", "answer", BOXED, boxed_reward, "MIT"),
    "aime24": Source("HuggingFaceH4/aime_2024", ("train",), "problem", "answer", BOXED, boxed_reward, _CONTEST,
                     finish=_integer),
    "aime25": Source("yentinglin/aime_2025", ("train",), "problem", "answer", BOXED, boxed_reward, _CONTEST,
                     finish=_integer),
    "amc23": Source("zwhe99/amc23", ("test",), "question", "answer", BOXED, boxed_reward, _CONTEST, finish=_integer),
    "minerva": Source("math-ai/minervamath", ("test",), "question", "answer", BOXED, None,
                      "none stated; problems of MIT OpenCourseWare (CC BY-NC-SA)"),
    "olympiadbench": Source("Hothan/OlympiadBench", ("train",), "question", "final_answer", BOXED, None, "Apache-2.0",
                            config="OE_TO_maths_en_COMP", finish=_without_dollars),
    "gsm8k": Source("openai/gsm8k", ("test", "train"), "question", "answer", HASHED, gsm8k_reward, "MIT",
                    answer_in="after_hashes", config="main"),
    "mathqa": Source("allenai/math_qa", ("test", "train", "validation"), "Problem", "correct", LETTER, choice_reward,
                     "Apache-2.0", options="options", revision=_PARQUET),
    **{
        f"logical_deduction_{n}": Source("lukaemon/bbh", ("test",), "input", "target", LETTER, choice_reward,
                                         "MIT (BIG-Bench Hard)", config=f"logical_deduction_{n}_objects",
                                         revision=_PARQUET)
        for n in ("three", "five", "seven")
    },
}
# fmt: on


class NamedProblems(RowProblems):
    """A set of `SETS`, from the hub or from a file.

    Args:
        name: math_train, math500, aime24, aime25, amc23, minerva, olympiadbench, gsm8k, mathqa,
            logical_deduction_three (or five, seven).
        path: what `Files` takes instead of the hub, with the hub's columns or in verl's format, whose prompts are then
            taken as they are.
        split: of the hub's; None: the one that the set is named for.
        limit: use the first so many problems.
        style: ``chat``: question as the user's message, instruction as the system's; ``plain``: for base models,
            ``Question: ... Answer:`` with the instruction in front.
        instruction: instead of the set's own; an empty one leaves it out.
        fold: of rows with the same prompt and the same answer, use the first.
        max_unusable: the set is refused if a larger share of its rows makes no problem.
    """

    def __init__(
        self,
        name: str,
        path: str | list[str] | None = None,
        split: str | None = None,
        limit: int | None = None,
        style: Literal["chat", "plain"] = "chat",
        instruction: str | None = None,
        fold: bool = True,
        max_unusable: float = 0.5,
    ) -> None:
        path = None if path is None else as_text(path)
        source = name if path is None else path if isinstance(path, str) else ", ".join(path)
        super().__init__(source, limit, fold, max_unusable)
        if name not in SETS:
            raise InputError(
                f"NamedProblems: {name!r} is none of {', '.join(SETS)}.{nearest(name, SETS)} A file of your own is "
                "read by Files; prerl evaluate takes it as data.val of a configuration: --config RUN/config.yaml "
                "--model RUN/model"
            )
        self.name, self.path, self.style = name, path, style
        self.set = SETS[name]
        self._given_split = split  # a file is what it is
        self.split = split or self.set.splits[0]
        if self.split not in self.set.splits:
            raise InputError(f"NamedProblems: {name} has the splits {', '.join(self.set.splits)}, not {split!r}.")
        self.instruction = self.set.instruction if instruction is None else instruction
        self._names: dict[str, str] = {}

    @property
    def reward(self) -> Reward:
        if self.set.reward is not None:
            return self.set.reward
        from prerl_lightning.rewards.symbolic import math_verify_reward

        return math_verify_reward

    def open(self) -> Rows:
        if self.path is None:
            s = self.set
            return open_hub(s.hub, s.config, self.split, self._wanted, s.revision)
        return open_files(self.path, self._given_split)

    @property
    def _wanted(self) -> tuple[str, ...]:
        s = self.set
        return (s.question, s.answer, *([s.options] if s.options else []))

    def look(self, first: Any) -> None:
        if is_verl(first):
            self._names, self.used, self.columns = {}, ("prompt",), ("prompt", "reward_model")
            return
        there = {str(name).lower(): name for name in first} if isinstance(first, Mapping) else {}
        for name in self._wanted:
            found = next((there[n] for n in (name.lower(), *SAME.get(name, ())) if n in there), None)
            if found is None:
                raise InputError(f"{self.source}: no column {name!r}; {described(first)}")
            self._names[name] = found
        self.columns = tuple(self._names.values())

    def read(self, row: Any) -> tuple[Text, str]:
        s = self.set
        if not self._names:
            return text_of(at(row, "prompt", ["prompt"]), "prompt"), s.finish(
                truth_of(at(row, VERL, steps(VERL)), VERL)
            )
        named = {name: at(row, there, [there]) for name, there in self._names.items()}
        question, answer = text_of(named[s.question], s.question), truth_of(named[s.answer], s.answer, s.answer_in)
        asked = f"{question}{_lines(named[s.options])}" if s.options else str(question)
        return self._prompt(asked), s.finish(answer)

    def _prompt(self, question: str) -> Text:
        if self.style == "plain":
            head = f"{self.instruction}\n\n" if self.instruction else ""
            return f"{head}Question: {question}\nAnswer:"
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": question}]


def named_sets(
    names: str | Sequence[str], limit: int | None = None, style: Literal["chat", "plain"] = "chat"
) -> dict[str, ProblemSet]:
    """Those of `SETS` by name, each from the hub or, as NAME=FILE, from a file; the first ``limit`` problems
    of each. One text may hold several, with commas between them."""
    found: dict[str, ProblemSet] = {}
    for item in names.split(",") if isinstance(names, str) else names:
        name, _, path = item.partition("=")
        if name in found:
            raise InputError(f"--data: {name}: a set is given twice. Give each once.")
        found[name] = NamedProblems(name, path or None, limit=limit, style=style)
    return found
