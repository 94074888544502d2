"""Coverage, false positives and power by simulation: of one answer a problem and of eight, with difficulties that are
alike (``spread`` 0) or as different as can be (1: each problem is always right or always wrong)."""

from math import comb

import pytest
import torch

from prerl_lightning.metrics.intervals import bounds, difference, interval, moved_bounds, sign_flips

DRAWS = 2000


def difficulties(mean, spread, problems, generator, draws=DRAWS):
    """(draws, problems), Beta distributed."""
    if spread == 0:
        return torch.full((draws, problems), mean, dtype=torch.float64)
    if spread == 1:
        return (torch.rand(draws, problems, generator=generator, dtype=torch.float64) < mean).double()
    strength = 1 / spread - 1
    ab = torch.tensor([mean * strength, (1 - mean) * strength], dtype=torch.float64).expand(draws, problems, 2)
    return torch._sample_dirichlet(ab, generator)[..., 0]


def answers(difficulty, k, generator):
    """Mean of k answers to each problem."""
    return torch.stack(
        [(torch.rand(difficulty.shape, generator=generator) < difficulty).double() for _ in range(k)]
    ).mean(0)


@pytest.mark.parametrize("problems", [10, 30, 128])
@pytest.mark.parametrize("k", [1, 8])
def test_coverage(problems, k):
    generator = torch.Generator().manual_seed(problems + k)
    found = {}
    for mean in (0.02, 0.05, 0.2, 0.5, 0.9, 0.98):
        for spread in (0, 0.3, 0.7) if k > 1 else (0,):  # one answer a problem is as spread as it can be
            low, high = bounds(answers(difficulties(mean, spread, problems, generator), k, generator))
            found[mean, spread] = float(((low <= mean) & (mean <= high)).double().mean())
    assert min(found.values()) >= 0.93, found


def test_intervals_at_the_edges():
    nothing = torch.zeros(30, dtype=torch.float64)
    low, high = interval(nothing)
    assert low == 0
    assert 0.1 < high < 0.13
    assert interval(1 - nothing) == pytest.approx((1 - high, 1))
    few = nothing.clone()
    few[3] = 0.125  # one right answer of 240
    assert 0 < interval(few)[0] < 0.004 < interval(few)[1] < high + 0.01
    assert interval(torch.tensor([0.5], dtype=torch.float64)) == (0, 1)
    half = torch.tensor([1.0] * 500 + [0.0] * 500, dtype=torch.float64)
    assert interval(half) == pytest.approx((0.5 - 0.031, 0.5 + 0.031), abs=1e-3)  # a large set's, as ever
    signed = torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64)
    assert interval(signed) == pytest.approx((-0.2, 0.2), abs=0.01)


@pytest.mark.parametrize("problems", [8, 15, 30])
@pytest.mark.parametrize("k", [1, 8])
def test_two_models_that_are_alike(problems, k):
    """False positives at p < 0.05, and how often the interval of the difference holds 0."""
    generator = torch.Generator().manual_seed(problems + k)
    for mean, spread in ((0.1, 0.3), (0.5, 0.3), (0.5, 0.7)):
        difficulty = difficulties(mean, spread, problems, generator, draws=250)
        moved = answers(difficulty, k, generator) - answers(difficulty, k, generator)
        low, high = moved_bounds(moved)
        assert float(((low <= 0) & (high >= 0)).double().mean()) >= 0.93
        positives = sum(sign_flips(one) < 0.05 for one in moved) / 250
        assert positives <= 0.05 + 2.6 * (0.05 * 0.95 / 250) ** 0.5


def test_the_sign_test_is_exact():
    def p(*moved):
        return sign_flips(torch.tensor(moved, dtype=torch.float64))

    assert p(1, 1, 1) == 0.25
    assert p(1, 1, 1, 0, 0) == 0.25  # of no difference there are not two ways
    assert p() == p(0, 0) == p(1, -1) == 1
    ups, downs = 9, 2
    assert p(*[1] * ups, *[-1] * downs) == pytest.approx(2 * sum(comb(11, i) for i in range(downs + 1)) / 2**11)
    drawn = p(*[1] * 16, *[-1] * 5)
    assert drawn == pytest.approx(2 * sum(comb(21, i) for i in range(6)) / 2**21, rel=0.2)


def test_no_difference_among_few_is_not_none():
    zeros = torch.zeros(30, dtype=torch.float64)
    found = difference(zeros, zeros)
    assert found["p"] == 1
    assert found["low"] == -found["high"]
    assert 0.1 < found["high"] < 0.2
    three = torch.zeros(3, dtype=torch.float64)
    assert difference(three, three + 1)["p"] == 0.25
    assert difference(three, three + 1)["smallest"] == float("inf")


def test_the_smallest_difference_is_found_in_four_of_five_comparisons():
    generator = torch.Generator().manual_seed(0)
    difficulty = difficulties(0.4, 0.3, 128, generator, draws=60)
    a, alike = (answers(difficulty, 8, generator) for _ in range(2))
    smallest = sum(difference(x, y)["smallest"] for x, y in zip(a, alike, strict=True)) / 60
    assert 0.04 < smallest < 0.09  # 128 problems, k = 8
    b = answers(difficulty + smallest * (1 - difficulty) / 0.6, 8, generator)
    found = sum(sign_flips(y - x) < 0.05 for x, y in zip(a, b, strict=True)) / 60
    assert 0.65 < found < 0.97
