"""Rewards of each form, in a module that a worker imports in no time."""

import asyncio
import os
import time

from prerl_lightning.rewards import Score


def length(prompt, response, ground_truth, extra):
    return float(len(response)) if response != "not this" else float("nan")


async def judge(prompt, response, ground_truth, extra):
    """As a server would answer, some calls at a time."""
    if response == "raise":
        raise KeyError("nothing here")
    if response == "hold":  # up the others, too
        time.sleep(60)
    await asyncio.sleep({"late": 60.0, "own timeout": 0.0}.get(response, 0.2))
    if response == "own timeout":
        raise TimeoutError("of the server")
    return Score(float(len(response)), response)


class Model:
    """Scores many at once: their number, so that a test sees how many came."""

    batched = True

    def __call__(self, prompts, responses, ground_truths, extras):
        assert len(prompts) == len(responses) == len(ground_truths) == len(extras)
        word = next((w for w in ("raise", "few", "exit", "hang") if w in responses), None)
        if word == "raise":
            raise KeyError("nothing here")
        if word == "exit":
            os._exit(3)
        if word == "hang":
            time.sleep(60)
        return [1.0] if word else [float(len(responses))] * len(responses)
