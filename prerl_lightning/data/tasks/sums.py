"""Three-term chains of two-digit numbers, and the corpus of the tiny model ``embedded-sums``.

    43-36+17=?
    43-36=7;7+17=24#24

Most writers are careless, and wrong wherever a carry or borrow occurs: RL is left something to do.
"""

import random

from prerl_lightning.data.tasks.corpus import Corpus, DrawnProblems, Split, is_held_out
from prerl_lightning.rewards.arithmetic import arithmetic_reward
from prerl_lightning.rewards.score import Reward
from prerl_lightning.types import Message, Problem

CARELESS = 0.75  # share of writers who forget carries and borrows
SLIP = 0.25  # chance that a careful writer slips at a step, and notices
CHECK = 0.1  # chance that a careful writer checks a step
WITHOUT_QUESTION = 0.2  # share of documents that are a solution alone, so that log p(y) means something


def _draw_chain(rng: random.Random) -> tuple[int, str, int, str, int]:
    """a, op, b, op, c: two-digit numbers, no intermediate result below 0."""
    while True:
        a, b, c = (rng.randint(10, 99) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        middle = _right(a, first, b)
        if middle >= 0 and _right(middle, second, c) >= 0:
            return a, first, b, second, c


def _right(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def _careless(a: int, op: str, b: int) -> int:
    """Digit by digit, the carry or borrow forgotten: 28+17=35, 43-36=17."""
    if op == "+":
        return (a % 10 + b % 10) % 10 + 10 * (a // 10 + b // 10)
    return sum((a // p - b // p) % 10 * p for p in (1, 10, 100))


def draw_problem(rng: random.Random, split: Split) -> tuple[tuple[int, str, int, str, int], str]:
    """A chain of the split and its question, by rejection."""
    while True:
        chain = _draw_chain(rng)
        question = "".join(map(str, chain)) + "=?"
        if is_held_out(question) == (split == "held_out"):
            return chain, question


def solution(chain: tuple[int, str, int, str, int], rng: random.Random) -> str:
    """A worked solution by a writer drawn at random: careless, or careful with slips, corrections and checks."""
    careless = rng.random() < CARELESS
    a, first, b, second, c = chain
    steps = []
    value = a
    for op, term in ((first, b), (second, c)):
        left, right, wrong = f"{value}{op}{term}=", _right(value, op, term), _careless(value, op, term)
        if careless:
            steps.append(f"{left}{wrong}")
            value = wrong
            continue
        text = f"{left}{right}"
        if wrong != right and rng.random() < SLIP:
            text = f"{left}{wrong} wait {text}"
        elif rng.random() < CHECK:
            text += f" check {right}{'-' if op == '+' else '+'}{term}={value}"
        steps.append(text)
        value = right
    return f"{steps[0]};{steps[1]}#{value}"


class ArithmeticProblems(DrawnProblems):
    """Chains such as ``43-36+17=?``."""

    @property
    def reward(self) -> Reward:
        return arithmetic_reward

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"chain {self.seed} {self.split} {index}")
        (a, first, b, second, c), question = draw_problem(rng, self.split)
        return Problem(index, question + "\n", str(_right(_right(a, first, b), second, c)))


class SumsCorpus(Corpus):
    """Worked solutions of chains."""

    tokens = tuple("0123456789+-=?#;\n waitchek")

    def document(self, rng: random.Random) -> str:
        chain, question = draw_problem(rng, "train")
        answer = solution(chain, rng)
        return answer if rng.random() < WITHOUT_QUESTION else f"{question}\n{answer}"

    def held_out(self, size: int) -> ArithmeticProblems:
        return ArithmeticProblems("held_out", size)


class TwoDigitSums(DrawnProblems):
    """Sums such as ``What is 37 + 18?`` after worked ones in a chat, for an instruct model that was not trained here.

    Args:
        split: ``train`` or ``held_out``; by a hash of the sum.
        size: number of problems.
        shots: worked sums in front, the same for all problems.
        seed: of the problems.
    """

    def __init__(self, split: Split = "train", size: int = 1024, shots: int = 4, seed: int = 0) -> None:
        super().__init__(split, size, seed)
        rng = random.Random(f"shots {seed}")
        self.examples: list[Message] = []
        for a, b in ((rng.randint(10, 99), rng.randint(10, 99)) for _ in range(shots)):
            self.examples.append({"role": "user", "content": f"What is {a} + {b}?"})
            self.examples.append({"role": "assistant", "content": f"{a} + {b} = {a + b}"})

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"sum {self.seed} {self.split} {index}")
        while True:
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            if is_held_out(f"{a}+{b}") == (self.split == "held_out"):
                question = {"role": "user", "content": f"What is {a} + {b}?"}
                return Problem(index, [*self.examples, question], str(a + b))
