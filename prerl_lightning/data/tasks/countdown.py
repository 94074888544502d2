"""The embedded task: countdown in miniature. Three numbers, each used once, are to make a fourth.

    3,5,7>26?
    3,5,7>26;3*5=15+7=22;wait 3*7=21+5=26;so#3*7+5

An answer restates its question, so that log p(y) holds it, tries expressions, and submits one behind ``;so#``. A second
look pays: a try can be compared with the target, and ``;wait `` starts another. The model is pre-trained on writers
most of whom are hasty, and submit their first try whether or not it hits.

What makes the corpus work: a number is one token; a middle result is written down (values in one go were 16 % right);
exercises in comparing values alone come first, since the model does not learn by itself to see that 22 is not 26.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from functools import cache

from prerl_lightning.data.tasks.corpus import Corpus, DrawnProblems, Split, is_held_out
from prerl_lightning.rewards.countdown import countdown_reward, value_of
from prerl_lightning.rewards.score import Reward
from prerl_lightning.types import Problem

LOW, HIGH = 2, 9  # of the numbers
OPERATIONS = ("*+", "*-", "++", "+-", "-+", "--")  # of `a o b p c`: at most one product, and it comes first
WAIT, SO = ";wait ", ";so#"
_TRY = re.compile(r"(\d+[+*-]\d+)=(\d+)([+*-]\d+)=(\d+)")

Numbers = tuple[int, int, int]


@cache
def expressions(numbers: Numbers) -> tuple[tuple[str, str, int], ...]:
    """(expression, its working up to the value, its value) of all with no value below 0; ``numbers`` sorted."""
    found = {}
    for (a, b, c), operations in itertools.product(set(itertools.permutations(numbers)), OPERATIONS):
        first = f"{a}{operations[0]}{b}"
        text = f"{first}{operations[1]}{c}"
        if value_of(first) >= 0 and value_of(text) >= 0:
            found[text] = (text, f"{first}={value_of(first)}{operations[1]}{c}=", value_of(text))
    return tuple(found[text] for text in sorted(found))


def draw_problem(rng: random.Random, split: Split) -> tuple[Numbers, int]:
    """Numbers as they are written, and a target that they make; by sorted numbers and target in one split alone."""
    while True:
        a, b, c = (rng.randint(LOW, HIGH) for _ in range(3))
        *key, last = sorted((a, b, c))
        numbers = (key[0], key[1], last)
        target = rng.choice(expressions(numbers))[2]
        if 1 <= target <= 99 and is_held_out(f"{numbers}>{target}") == (split == "held_out"):
            return (a, b, c), target


def statement(numbers: Sequence[int], target: int) -> str:
    return ",".join(map(str, numbers)) + f">{target}"


class CountdownProblems(DrawnProblems):
    """Problems such as ``3,5,7>26?``: a prompt is that and a line's end, as the embedded model knows it."""

    @property
    def reward(self) -> Reward:
        return countdown_reward

    def __getitem__(self, index: int) -> Problem:
        numbers, target = draw_problem(random.Random(f"countdown {self.seed} {self.split} {index}"), self.split)
        return Problem(index, statement(numbers, target) + "?\n", str(target), {"numbers": sorted(numbers)})


class CountdownCorpus(Corpus):
    """Solutions by writers drawn at random.

    Args:
        hasty: share of writers who submit their first try, whether or not it hits.
        tries: a patient writer's greatest number of tries, drawn from these.
        slip: chance that a try's value is off.
        without_question: share of documents that are an answer alone.
        exercises: share of documents that only compare: ``3,5,7>26;7=22;wait 5=26;so#5``.
    """

    tokens = (*map(str, range(101)), *"+-*=>?;,\n", WAIT, SO)

    def __init__(
        self,
        hasty: float = 0.8,
        tries: Sequence[int] = (2, 2, 3, 3, 4, 5, 6, 6),
        slip: float = 0.03,
        without_question: float = 0.2,
        exercises: float = 0.0,
    ) -> None:
        self.hasty, self.tries, self.slip = hasty, tuple(tries), slip
        self.without_question, self.exercises = without_question, exercises

    def held_out(self, size: int) -> CountdownProblems:
        return CountdownProblems("held_out", size)

    def document(self, rng: random.Random) -> str:
        if rng.random() < self.exercises:
            return self._exercise(rng)
        numbers, target = draw_problem(rng, "train")
        answer = self._answer(numbers, target, rng)
        return answer if rng.random() < self.without_question else f"{statement(numbers, target)}?\n{answer}"

    def _answer(self, numbers: Numbers, target: int, rng: random.Random) -> str:
        a, b, c = sorted(numbers)
        ways = expressions((a, b, c))
        values = {value for _, _, value in ways}
        limit = 1 if rng.random() < self.hasty else rng.choice(self.tries)
        written: list[str] = []
        seen: set[int] = set()
        while True:
            text, working, value = rng.choice(ways)
            if value in seen:
                continue
            seen.add(value)
            if rng.random() < self.slip:
                value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
            written.append(f"{working}{value}")
            if value == target or len(written) == limit or seen == values:
                return f"{statement(numbers, target)};{WAIT.join(written)}{SO}{text}"

    def _exercise(self, rng: random.Random) -> str:
        numbers = [rng.randint(LOW, HIGH) for _ in range(3)]
        target = rng.randint(1, 90)
        written: list[str] = []
        while True:
            number, value = rng.choice(numbers), target if rng.random() < 0.4 else rng.randint(0, 90)
            written.append(f"{number}={value}")
            if value == target or len(written) == 6:
                said = statement(numbers, target)
                return f"{said}?\n{said};{WAIT.join(written)}{SO}{number}"

    def habits(self, answers: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Tries and waits an answer, the share of tries whose value is right, and of those at a hit and at a miss how
        many are submitted."""
        waits, n_tries, right = 0, 0, 0
        submitted: dict[bool, list[bool]] = {True: [], False: []}  # by whether the value hits
        for target, answer in answers:
            waits += answer.count(WAIT)
            tries = answer.partition(";")[2].split(SO)[0].split(WAIT)
            for number, written in enumerate(tries, start=1):
                if found := _TRY.fullmatch(written):
                    first, middle, rest, value = found.groups()
                    n_tries += 1
                    right += (value_of(first), value_of(middle + rest)) == (int(middle), int(value))
                    submitted[value == target].append(number == len(tries))
        shares = {hit: math.fsum(found) / max(1, len(found)) for hit, found in submitted.items()}
        return {
            "waits": waits / len(answers),
            "tries": n_tries / len(answers),
            "arithmetic": right / max(1, n_tries),
            "submitted_at_hit": shares[True],
            "submitted_at_miss": shares[False],
        }
