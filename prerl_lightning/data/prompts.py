"""From problems to prompts: formatting, tokenisation, and the checks that come before any sampling."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.types import Problem, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptFormat:
    """How a problem becomes the model's input.

    Args:
        template: around a plain-text problem; ``{prompt}`` stands for it. Few-shot examples go here.
        chat: send plain-text problems through the chat template, as a user message. Problems that are chat messages
            always go through it.
        system: a system message in front, where the problem's messages have none.
        chat_template_kwargs: for the template, e.g. ``{enable_thinking: false}`` for Qwen3.
    """

    template: str = "{prompt}"
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InputError("data.format.template: has no {prompt} in it, so every prompt would be the same.")

    def encode(self, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """Raises InputError, with the mend, where a chat template is needed and the tokenizer has none."""
        texts: dict[bool, list[str]] = {True: [], False: []}  # of chats, of plain text: the one brings its own specials
        chats = []
        for problem in problems:
            asked = self.messages(problem)
            chats.append(not isinstance(asked, str))
            if not isinstance(asked, str):
                if not tokenizer.chat_template:
                    raise InputError(
                        f"Row {problem.row} is chat messages, and the model's tokenizer has no chat template. Use an "
                        "instruct model, or plain-text problems with data.format.template and data.format.chat: false."
                    )
                try:
                    asked = tokenizer.apply_chat_template(  # type: ignore[assignment]
                        asked, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
                    )
                except TemplateError as error:  # its own refusals, and what transformers' sandbox does not let it do
                    raise InputError(
                        f"Row {problem.row}: the chat template of the model's tokenizer fails ({in_one_line(error)}). "
                        "Look at data.format.system and chat_template_kwargs, or leave chat messages out with "
                        "data.format.chat: false."
                    ) from error
            texts[chats[-1]].append(str(asked))
        ids = {
            chat: iter(zip(them, tokenizer(them, add_special_tokens=not chat)["input_ids"], strict=True))
            for chat, them in texts.items()
            if them
        }
        made = []
        for problem, chat in zip(problems, chats, strict=True):
            text, found = next(ids[chat])
            made.append(Prompt(problem.row, tuple(found), text, problem.ground_truth, problem.extra))
        return made

    def untokenised(self, problem: Problem) -> Prompt:
        """For an engine that has the tokenizer itself (rollout/endpoint.py)."""
        asked = self.messages(problem)
        text = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
        mark = b"" if isinstance(asked, str) else b"\0"
        return Prompt(problem.row, tuple(mark + text.encode()), text, problem.ground_truth, problem.extra)

    def messages(self, problem: Problem) -> str | list[dict[str, str]]:
        """The problem as plain text or as a chat, before any template of a model."""
        if not isinstance(problem, Problem):
            raise InputError(
                f"data: a set of problems gave a {type(problem).__name__}; it must give Problem(row, prompt, "
                "ground_truth, extra), of prerl_lightning."
            )
        if isinstance(problem.prompt, str):
            text = self.template.replace("{prompt}", problem.prompt)
            messages = [{"role": "user", "content": text}] if self.chat else []
        else:
            text, messages = "", [dict(m) for m in problem.prompt]
        if not messages:
            if self.system is not None:
                raise InputError("data.format.system: needs chat: a plain-text prompt has no system message.")
            return text
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages


CHECKED = 10_000  # training prompts that are tokenised before the run starts: some seconds
BATCH = 1000


class Prompts(Sequence[Prompt]):
    """Prompts that are made when they are asked for: a million of them take the memory of their numbers.

    Those that were not checked at the start are checked then; in the place of one that cannot be sampled from stands
    the next that can.

    Attributes:
        longest: tokens of the longest prompt, or of the longest one allowed where not all were checked.
    """

    def __init__(
        self,
        problems: ProblemSet,
        what: str,
        encode: Callable[[Sequence[Problem]], list[Prompt]],
        fault: Callable[[Prompt, Problem], str | None],
    ) -> None:
        self.problems, self.what, self._encode, self._fault = problems, what, encode, fault
        self._places = np.arange(len(problems))
        self._checked = 0  # so many places at the beginning
        self._said = False
        self.longest = 0

    def check(self, number: int, on_bad: Literal["drop", "error"], longest: int) -> None:
        """Of the first ``number`` problems leaves out those that cannot be sampled from.

        Raises:
            InputError: a bad one with ``"error"``, or no usable one at all.
        """
        good: list[int] = []
        bad: list[str] = []
        number = min(number, len(self.problems))
        for start in range(0, number, BATCH):
            places = range(start, min(start + BATCH, number))
            problems = [self.problems[i] for i in places]
            for place, problem, prompt in zip(places, problems, self._encode(problems), strict=True):
                fault = self._fault(prompt, problem)
                if fault is None:
                    good.append(place)
                    self.longest = max(self.longest, len(prompt.token_ids))
                    continue
                bad.append(f"row {prompt.row}: {fault}")
                if on_bad == "error":
                    raise InputError(f"{self.what}: {bad[0]}. data.on_bad_prompt: drop leaves such rows out.")
        if bad:
            log.warning("%s: %d of %d prompts dropped; the first: %s", self.what, len(bad), number, bad[0])
        if not good:
            first = f"; {bad[0]}" if bad else ""
            raise InputError(f"{self.what}: no usable prompt among {number}{first}.")
        self._checked = len(good)
        if number < len(self.problems):
            log.info("%s: %d of %d prompts checked, others as they are drawn", self.what, number, len(self.problems))
            self.longest = longest
        self._places = np.concatenate([np.array(good), np.arange(number, len(self.problems))])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        index = range(len(self))[index]  # IndexError beyond the end, which ends an iteration
        for i in range(index, index + len(self)):
            problem = self.problems[int(self._places[i % len(self)])]
            prompt = self._encode([problem])[0]
            fault = None if i % len(self) < self._checked else self._fault(prompt, problem)
            if fault is None:
                return prompt
            if not self._said:
                self._said = True
                log.warning(
                    "%s: row %d: %s; the next one is taken instead, and so for others that follow.",
                    *(self.what, prompt.row, fault),
                )
        raise AssertionError("one of the checked was good")


def encode_all(
    problems: ProblemSet,
    what: str,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    vocab_size: int,
    on_bad: Literal["drop", "error"],
    checked: int | None = None,
) -> Prompts:
    """Find the problems that cannot be sampled from.

    Args:
        what: the set's key in the configuration, for messages.
        max_tokens: the longest prompt allowed.
        vocab_size: of the model; a token id of the tokenizer beyond it is an error of the model folder.
        on_bad: ``"error"`` stops at the first bad problem, ``"drop"`` leaves them out and says so once.
        checked: look at so many now, at the others when they are drawn; None: at all. With ``"error"`` at all.

    Raises:
        InputError: a bad problem with ``"error"``, or no usable one at all.
    """
    prompts = Prompts(
        problems,
        what,
        lambda some: prompt_format.encode(some, tokenizer),
        lambda prompt, problem: _fault(prompt, problem, max_tokens, vocab_size),
    )
    prompts.check(len(problems) if checked is None or on_bad == "error" else checked, on_bad, max_tokens)
    return prompts


def _fault(prompt: Prompt, problem: Problem, max_tokens: int, vocab_size: int) -> str | None:
    parts: Sequence[str] = (
        [problem.prompt] if isinstance(problem.prompt, str) else [m["content"] for m in problem.prompt]
    )
    if not prompt.token_ids or not any(part.strip() for part in parts):
        return "the prompt is empty"
    if len(prompt.token_ids) > max_tokens:
        return (
            f"the prompt has {len(prompt.token_ids)} tokens, {max_tokens} are allowed "
            "(the engine's max_model_len less sampling.max_new_tokens, or data.max_prompt_tokens)"
        )
    if max(prompt.token_ids) >= vocab_size:
        return (
            f"token id {max(prompt.token_ids)} is outside the model's vocabulary of {vocab_size}: "
            "tokenizer and model do not belong together"
        )
    return None
