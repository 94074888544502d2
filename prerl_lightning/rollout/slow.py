"""Makes a step whose rollout waited explain itself, in one line."""

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from prerl_lightning.rewards.pool import RewardPool

log = logging.getLogger(__name__)

FACTOR, SECONDS = 10, 10.0  # slow: both times the median before it and longer than so many seconds
BEFORE, AT_LEAST = 50, 3  # steps of which the median is


@dataclass(frozen=True)
class Usage:
    """What this process and its reward workers had used at a time."""

    cpu: float
    """Seconds, of all threads."""
    faults: int
    """Pages read from disk, such as swapped ones."""
    preempted: int
    """Times that another process got the CPU."""
    replaced: int
    """Reward workers lost."""

    @classmethod
    def now(cls, *pools: RewardPool) -> "Usage":
        own = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.process_time(), own.ru_majflt, own.ru_nivcsw, sum(pool.replaced for pool in pools))


@dataclass
class SlowRollouts:
    """Remembers how long the parts of a rollout took."""

    before: dict[str, deque[float]] = field(default_factory=dict)

    def look(self, step: int, seconds: Mapping[str, float], start: Usage, end: Usage) -> None:
        """``seconds``: of sampling as ``rollout``, and from then to the last verdict as ``reward``."""
        slow = {}
        for part in ("rollout", "reward"):
            known = self.before.setdefault(part, deque(maxlen=BEFORE))
            if len(known) >= AT_LEAST and seconds[part] > max(FACTOR * median(known), SECONDS):
                slow[part] = median(known)
            known.append(seconds[part])
        if slow:
            usual = " and ".join(f"{value:.2g} s ({part})" for part, value in slow.items())
            log.warning(
                "The rollout after step %d took %.1f s to sample and %.1f s more until the last verdict; the median so "
                "far is %s. In that time this process had %.1f s of CPU, gave its core to another %d times, read %d "
                "pages from disk, and replaced %d reward workers; the load is %.1f on %d cores.",
                *(step, seconds["rollout"], seconds["reward"], usual),
                *(end.cpu - start.cpu, end.preempted - start.preempted, end.faults - start.faults),
                *(end.replaced - start.replaced, os.getloadavg()[0], os.cpu_count()),
            )
