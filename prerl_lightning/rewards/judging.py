"""Asking a reward, in each of its forms (score.py), and what its word is worth. No limit of time but an async
reward's own: that of the whole is the worker's."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prerl_lightning.rewards.score import is_async
from prerl_lightning.rewards.shaping import WeightedSum

# of a reward's size: sums of squares over a batch stay finite in fp32, in which metrics are logged and advantages used
LARGEST = 1e9

Arguments = tuple[str, str, str, Mapping[str, Any]]
Failure = Literal["timeout", "error"]
Judged = tuple[float, str | None, Failure | None, str, Mapping[str, float]]  # the fields of pool.Verdict


class OutOfTime(BaseException):
    pass


def failed(failure: Failure, message: str) -> Judged:
    return 0.0, None, failure, message, {}


def judge(reward: Any, arguments: Arguments) -> Judged:
    """By a reward of one answer at a time."""
    try:
        return _worth(reward(*arguments))
    except Exception as error:
        return failed("error", repr(error)[:500])


def judge_all(reward: Any, many: Sequence[Arguments], timeout: float) -> list[Judged]:
    """By a reward of any form. What it raises of a batch is each answer's error.

    Args:
        timeout: seconds that one answer of an async reward may take.
    """
    return [_judged(value) for value in asyncio.run(_values(reward, many, timeout))]


async def _values(reward: Any, many: Sequence[Arguments], timeout: float) -> list[Any]:
    """What it returned for each answer, or raised."""
    if isinstance(reward, WeightedSum):
        columns = [await _values(part, many, timeout) for part in reward.parts.values()]
        return [_combined(reward, values) for values in zip(*columns, strict=True)]
    if getattr(reward, "batched", False):
        try:
            found = reward(*([*column] for column in zip(*many, strict=True)))
            values = [*(await found if is_async(reward) else found)]
        except Exception as error:
            return [error] * len(many)
        if len(values) != len(many):
            return [ValueError(f"the reward gave {len(values)} numbers for {len(many)} answers")] * len(many)
        return values
    if is_async(reward):
        return await asyncio.gather(*(_awaited(reward, arguments, timeout) for arguments in many))
    return [_called(reward, arguments) for arguments in many]


async def _awaited(reward: Any, arguments: Arguments, timeout: float) -> Any:
    try:
        async with asyncio.timeout(timeout) as limit:
            return await reward(*arguments)
    except (Exception, OutOfTime) as error:  # the latter by the worker's timer: it has held up the others
        late = limit.expired() or isinstance(error, OutOfTime)
        return OutOfTime(f"longer than {timeout:g} s") if late else error


def _called(reward: Any, arguments: Arguments) -> Any:
    try:
        return reward(*arguments)
    except Exception as error:
        return error


def _combined(reward: WeightedSum, values: Sequence[Any]) -> Any:
    wrong = next((value for value in values if isinstance(value, BaseException)), None)
    try:
        return wrong if wrong is not None else reward.combined(values)
    except Exception as error:
        return error


def _judged(value: Any) -> Judged:
    if isinstance(value, OutOfTime):
        return failed("timeout", str(value))
    try:
        return failed("error", repr(value)[:500]) if isinstance(value, Exception) else _worth(value)
    except Exception as error:  # it is no number
        return failed("error", repr(error)[:500])


def _worth(value: Any) -> Judged:
    score, answer = float(value), getattr(value, "answer", None)
    if not abs(score) <= LARGEST:  # so is nan
        return failed("error", f"the reward is {score}; it must lie between {-LARGEST:g} and {LARGEST:g}")
    parts = getattr(value, "parts", {})
    return score, None if answer is None else str(answer)[:1000], None, "", dict(parts)
