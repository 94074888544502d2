"""Quantiles of Student's distribution, without scipy."""

import math
from functools import lru_cache


@lru_cache
def t_quantile(level: float, df: int) -> float:
    """t with so much of Student's distribution between -t and t; ``df`` >= 1."""
    low, high = 0.0, 1.0
    while t_between(high, df) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_between(middle, df) < level else (low, middle)
    return high


def t_between(t: float, df: int) -> float:
    """P(-t < T < t), by the finite series for whole df (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cos = math.cos(angle)
    term, total = (cos, 0.0) if df % 2 else (1.0, 0.0)
    for i in range(df % 2 + 1, df, 2):
        total += term
        term *= cos * cos * i / (i + 1)
    if df % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
