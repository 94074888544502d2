"""From problems to prompts: formatting, tokenisation, and the checks that come before any sampling."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.types import Message, Problem, Prompt

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

    def encode(self, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Raises InputError, with the mend, where a chat template is needed and the tokenizer has none."""
        text: str
        if isinstance(problem.prompt, str):
            text = self.template.replace("{prompt}", problem.prompt)
            messages: list[Message] = [{"role": "user", "content": text}] if self.chat else []
        else:
            messages = list(problem.prompt)
        if messages:
            if not tokenizer.chat_template:
                raise InputError(
                    f"Row {problem.row} is chat messages, and the model's tokenizer has no chat template. Use an "
                    "instruct model, or plain-text problems with data.format.template and data.format.chat: false."
                )
            if self.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            try:
                text = tokenizer.apply_chat_template(  # type: ignore[assignment]
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
                )
            except TemplateError as error:  # its own refusals, and what transformers' sandbox does not let it do
                raise InputError(
                    f"Row {problem.row}: the chat template of the model's tokenizer fails ({in_one_line(error)}). Look "
                    "at data.format.system and chat_template_kwargs, or leave chat messages out with data.format.chat: "
                    "false."
                ) from error
        elif self.system is not None:
            raise InputError("data.format.system: needs chat: a plain-text prompt has no system message.")
        ids = tokenizer(text, add_special_tokens=not messages)["input_ids"]
        return Prompt(problem.row, tuple(ids), text, problem.ground_truth, problem.extra)


def encode_all(
    problems: ProblemSet,
    what: str,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    vocab_size: int,
    on_bad: Literal["drop", "error"],
) -> list[Prompt]:
    """Tokenise every problem and find those that cannot be sampled from.

    Args:
        what: the set's key in the configuration, for messages.
        max_tokens: the longest prompt allowed.
        vocab_size: of the model; a token id of the tokenizer beyond it is an error of the model folder.
        on_bad: ``"error"`` stops at the first bad problem, ``"drop"`` leaves them out and says so once.

    Raises:
        InputError: a bad problem with ``"error"``, or no usable one at all.
    """
    prompts: list[Prompt] = []
    bad: list[str] = []
    for i in range(len(problems)):
        prompt = prompt_format.encode(problems[i], tokenizer)
        fault = _fault(prompt, problems[i], max_tokens, vocab_size)
        if fault is None:
            prompts.append(prompt)
            continue
        bad.append(f"row {prompt.row}: {fault}")
        if on_bad == "error":
            raise InputError(f"{what}: {bad[0]}. data.on_bad_prompt: drop leaves such rows out.")
    if bad:
        log.warning("%s: %d of %d prompts dropped; the first: %s", what, len(bad), len(problems), bad[0])
    if not prompts:
        raise InputError(f"{what}: no usable prompt among {len(problems)}" + (f"; {bad[0]}" if bad else "") + ".")
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
