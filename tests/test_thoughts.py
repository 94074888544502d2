"""Sentences labelled by hand with what the families of assets/thoughts.yaml count in them, traps included."""

# ruff: noqa: RUF001
import random
import re
import sys

import pytest
import torch

from prerl_lightning.errors import InputError
from prerl_lightning.metrics import thoughts
from prerl_lightning.metrics.thoughts import ThoughtCounts, ThoughtFinder, load_families

FINDER = ThoughtFinder(load_families())

LABELLED = [
    ("Wait, that gives 12.", {"transition": 1}),
    ("wait... WAIT; Wait-", {"transition": 3}),
    ("The waiter waited, awaiting a rewait at the waitlist.", {}),
    ("Alternatively, we could factor. However, 7 is prime.", {"transition": 2}),
    ("alternative routes, howevers and buttons rebut nothing", {}),
    ("But hold on\n  a minute: on the other\nhand it is even.", {"transition": 3}),
    ("Hmm, let me try another way.", {"transition": 3}),
    ("Let’s try x = 3, or let's try x = 4.", {"transition": 2}),
    ("At the checkout I paid by cheque; the checker and the paycheck are no hits, checklist neither.", {}),
    ("Let me check: I checked and double-checked it, then rechecked.", {"reflection": 4}),
    ("Let me re-read the problem and re-examine it.", {"reflection": 2}),
    ("let me read it; the unverified, verifiable verifier", {}),
    ("Make sure to verify the verification.", {"reflection": 3}),
    ("We recalculate, reconsider and rethink; reckless recalls do not count.", {"reflection": 3}),
    ("Is that right? Is this correct? Does that make sense?", {"reflection": 3}),
    ("We need to find x. Let's break it down step by step.", {"subgoal": 3}),
    ("To do this, the first step is to add.", {"subgoal": 2}),
    ("First, add. Second, divide. Finally, round to 3 seconds.", {"enumeration": 3}),
    ("Case 1: n even. Case 12 is none, case 2 is.", {"enumeration": 2}),
    ("The firstborn of the thirds, nextdoor.", {}),
    ("No, wait. I made a mistake; let me go back and start over.", {"backtracking": 4}),
    ("That's wrong. That’s not right. This doesn't work.", {"backtracking": 3}),
    ("Therefore the answer is 5; thus, hence, so the answer is 5.", {"conclusion": 5}),
    ("henceforth, thusly, thereforeness", {}),
    ("But wait, let me verify: first, 2+2=4. That is wrong, so try again.", {"transition": 2, "reflection": 1,
     "enumeration": 1, "backtracking": 2}),
    ("wait_for(check2) and re-checkout", {"reflection": 1}),  # re-check* takes any end; identifiers are words
    ("", {}),
    ("等一下 wait 123 \U0001d54e\U0001d4ea wait", {"transition": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), LABELLED, ids=range(len(LABELLED)))
def test_counts_are_those_labelled_by_hand(text, expected):
    found = dict(zip(FINDER.families, FINDER.counts(text), strict=True))
    assert {k: v for k, v in found.items() if v} == expected
    spans = FINDER.spans(text)
    assert [text[a:b].strip() for a, b, _ in spans] == [text[a:b] for a, b, _ in spans]
    assert sum(expected.values()) == len(spans)


def naive(text, families):
    """Position by position and phrase by phrase, ASCII letters and digits only."""
    word = lambda c: c.isalnum() or c == "_"  # noqa: E731
    low, found, i = text.lower(), [], 0
    while i < len(low):
        best = (0, "")
        for family, phrases in families.items():
            for phrase in phrases:
                body = phrase.rstrip("*").lower()
                end = i + len(body)
                if not low.startswith(body, i) or (i and word(low[i - 1]) and word(body[0])):
                    continue
                if phrase.endswith("*"):
                    while end < len(low) and word(low[end]):
                        end += 1
                elif end < len(low) and word(low[end]) and word(body[-1]):
                    continue
                best = max(best, (end, family))
        if best[0]:
            found.append((i, *best))
            i = best[0]
        else:
            i += 1
    return found


@pytest.mark.parametrize("long", [0, sys.maxsize])
def test_spans_equal_a_search_phrase_by_phrase(long, monkeypatch):
    monkeypatch.setattr(thoughts, "_LONG", long)
    families = load_families()
    generator = random.Random(0)
    pieces = [p.rstrip("*") for phrases in families.values() for p in phrases]
    pieces += ["er", "s", "-", ",", "2", "_", "re", "x", "a", ".", "out", "let me"]
    for _ in range(200):
        glue = generator.choice(["", " ", " "])
        text = glue.join(generator.choice(pieces) for _ in range(12))
        text = "".join(c.upper() if generator.random() < 0.2 else c for c in text)
        assert FINDER.spans(text) == naive(text, families), text


ODD = {
    "a": ["hmm...", "re*check", "i", "so what?", "it's", "a b c", "wait*", "waiting room", "kiss", "what if"],
    "b": ["is", "wait:", "2nd", "_x", "k", "s *", "in a  b c d", "ab*c*", "sk", "Kiss me", "I'm"],
}
GERMAN = {"a": ["aber", "prüf*", "Straße", "x等"], "b": ["wait", "ist"]}
CHINESE_AND_HINDI = {"a": ["等一下", "wait"], "b": ["但是", "पर"]}
SPACES = [" ", " ", "  ", "\n", " \n\t ", "\xa0", "\u3000", "\x1c", "\x85", "\u200b", "", "-"]
OTHERS = ["er", "s", ",", "2", "_", "re", "x", ".", "?", "let me", "the", "is", "to", "n't", "room", "\0", "\ud800"]
OTHERS += [
    "等一下",
    "但是",
    "पर",
    "रुको",
    "é",
    "e\u0301",
    "\u0301",
    "\u200b",
    "π",
    "≠",
    "’",
    "—",
    "ſ",
    "\u212a",
    "İ",
    "ı",
]
OTHERS += ["İst", "Straße", "prüfe", "ﬆ", "\U0001d54e", "$x^2$", r"\frac{1}{2}", r"\[", "waiting", "That’s"]


@pytest.mark.parametrize("families", [None, ODD, GERMAN, CHINESE_AND_HINDI])
def test_a_long_texts_spans_equal_those_of_one_regular_expression(families, monkeypatch):
    families = families or load_families()
    finder = ThoughtFinder(families)
    phrases = [phrase for family in families.values() for phrase in family]
    generator = random.Random(0)

    def changed(letter):
        likely = {"i": "ıİI", "s": "ſS", "k": "\u212aK", "'": "’", " ": SPACES}
        kind = generator.random()
        if kind < 0.04:
            return generator.choice(likely.get(letter, [letter]))
        return letter.upper() if kind < 0.2 else "" if kind < 0.21 else letter

    found = 0
    for _ in range(3000):
        endings = ["", "", "ing", "é", "_3", "\u0301"]
        pieces = [p.replace("*", generator.choice(endings)) for p in generator.choices(phrases, k=8)]
        pieces += generator.choices(OTHERS, k=8)
        text = "".join(generator.choice(pieces) + generator.choice(SPACES) for _ in range(generator.randrange(15)))
        text = "".join(map(changed, text))
        monkeypatch.setattr(thoughts, "_LONG", sys.maxsize)
        expected = finder.spans(text), finder.counts(text)
        monkeypatch.setattr(thoughts, "_LONG", 0)
        assert (finder.spans(text), finder.counts(text)) == expected, text
        found += len(expected[0])
    assert found > 3000


def test_all_letters_that_match_ascii_ones_are_known():
    others = "".join(map(chr, range(128, sys.maxunicode + 1)))
    parts = [FINDER._part(chr(c)) for c in range(33, 127) if chr(c) != "*" and not chr(c).isupper()]
    assert set(re.findall("|".join(parts), others, re.IGNORECASE)) == set(thoughts._ALIKE)


def test_other_languages_and_other_letters(tmp_path):
    path = tmp_path / "families.yaml"
    path.write_text("Wende: [aber, 'einen Moment', prüf*]\n转折: [等一下, 但是]\n", encoding="utf-8")
    finder = ThoughtFinder(load_families(path))
    assert finder.families == ("Wende", "转折")
    assert finder.counts("Aber Einen  Moment! Das prüfe ich. PRÜFEN, aberwitzig, Haber") == [4, 0]
    assert finder.counts("我想等一下,但是x等于等一下3") == [0, 3]
    hindi = ThoughtFinder({"a": ["पर", "रुको"], "b": ["जाँच*"]})  # vowel signs are letters of a word
    assert hindi.counts("पर रुको, परिणाम रुकोगे जाँचें") == [2, 1]
    longest = ThoughtFinder({"a": ["wait*"], "b": ["waiting room"]})
    assert longest.counts("waiting room, waiting, waits") == [2, 1]
    assert ThoughtFinder({"a": ["ist"]}).counts("İst ist") in ([1], [2])  # a dotted capital: no crash


@pytest.mark.parametrize(
    "text",
    ["", "- wait", "a: wait", "a: [1]", "a: ['*']", "a: []", "a b: [wait]", "a: [wait]\nb: [Wait]", "a: ["],
)
def test_a_wrong_file_is_refused(tmp_path, text):
    path = tmp_path / "families.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"thoughts\.families"):
        load_families(path)


def test_means_by_right_and_wrong():
    metric = ThoughtCounts(["a", "b"])
    metric.update(torch.tensor([[2, 0], [0, 1], [4, 3]]), torch.tensor([10, 20, 70]), torch.tensor([1.0, 0.0, 0.5]))
    metric.update(torch.tensor([[1, 1]]), torch.tensor([100]), torch.tensor([1.0]))
    found = metric.compute()
    assert found["a"] == 7 / 4
    assert found["a/right"] == 3 / 2
    assert found["a/wrong"] == 4 / 2
    assert found["b_per_1k"] == pytest.approx(5 * 1000 / 200)
    assert found["b_per_1k/right"] == pytest.approx(1000 / 110)
    assert found["b_per_1k/wrong"] == pytest.approx(4000 / 90)
    metric.reset()
    metric.update(torch.tensor([[2, 0]]), torch.tensor([0]), torch.tensor([1.0]))
    assert metric.compute() == {"a": 2.0, "b": 0.0, "a/right": 2.0, "b/right": 0.0}
