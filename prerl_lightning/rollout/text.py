"""Token ids back to text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

TAGS = ("<think>", "</think>")


def decode(
    tokenizer: Any, prompt: Sequence[int], responses: Sequence[Sequence[int] | np.ndarray], special: bool = False
) -> list[str]:
    """Texts as they stand behind the prompt: what precedes a token decides about its space.

    Args:
        special: with all special tokens; else with none but the tags of a thought, which rewards read.
    """
    tail, own = list(prompt[-8:]), [list(ids) for ids in responses]
    tags, unseen = _special(tokenizer)
    if tags and not special:
        tail, *own = ([i for i in ids if i not in unseen] for ids in (tail, *own))
    options = {"skip_special_tokens": not special and not tags, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(tail, **options)
    texts = tokenizer.batch_decode([tail + ids for ids in own], **options)
    return [
        text[len(before) :] if text.startswith(before) else tokenizer.decode(ids, **options)
        for text, ids in zip(texts, own, strict=True)
    ]


def think_tags(tokenizer: Any) -> frozenset[int]:
    """Ids of the tags that are special tokens; mostly they are none."""
    return _special(tokenizer)[0]


@lru_cache(maxsize=8)
def _special(tokenizer: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of those tags, and of the other special tokens. Asked for each group, of what a tokenizer makes anew each
    time, of all its added tokens."""
    special = {i: token.content in TAGS for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(i for i in special if special[i]), frozenset(i for i in special if not special[i])
