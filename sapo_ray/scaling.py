"""Decisions of a pool: how many workers it should have, by the rate they work at, and which suspects go together."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from sapo_ray.config_loader import changeable

RATE_WINDOW = 60.0
"""Seconds over which the rate of a pool is taken."""


@dataclass(kw_only=True)
class ScalingConfig:
    grow_after: float = changeable(60.0)
    """Seconds: workers are added while what waits would take those present longer, at the measured rate."""
    shrink_after: float = changeable(120.0)
    """Seconds without work after which a worker is ended, down to `workers`."""
    start_within: float = changeable(1800.0)
    """Seconds in which a worker that Ray has placed must answer at all, then be ready, and later have loaded another
    checkpoint: it may have to copy it and to compile. One that does not is taken for hung and replaced."""
    hang_after: float = changeable(600.0)
    """Seconds in which a worker with work does nothing, or does not answer at all, before it is taken for hung and
    replaced."""
    max_kills: int = changeable(3)
    """Workers that may die over a request before it is set aside; the run goes on without its question."""
    hedge_after: float = changeable(0.0)
    """Seconds after which a request in flight goes to a second worker, too, and the first answer counts; 0: never."""

    def __post_init__(self) -> None:
        for key in ("grow_after", "shrink_after", "start_within", "hang_after"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")
        if self.max_kills < 2:
            raise ValueError(
                f"max_kills is {self.max_kills}; it must be at least 2: one death is shared by all that were on it"
            )
        if not self.hedge_after >= 0:
            raise ValueError(f"hedge_after is {self.hedge_after}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool sees of itself. `rate` is requests finished per second and busy worker, None before one is known."""

    waiting: float
    ready: int
    starting: int
    rate: float | None


@dataclass(slots=True)
class Meter:
    """Requests done and seconds that workers were busy, in all and within the last `RATE_WINDOW` seconds."""

    done: int = 0
    busy: float = 0.0
    seen: float = field(default_factory=time.monotonic)
    recent: deque[tuple[float, int, float]] = field(default_factory=lambda: deque([(time.monotonic(), 0, 0.0)]))

    def tick(self, busy_workers: int) -> None:
        now = time.monotonic()
        self.busy += busy_workers * (now - self.seen)
        self.seen = now
        self.recent.append((now, self.done, self.busy))
        while self.recent[0][0] < now - RATE_WINDOW:
            self.recent.popleft()

    def rate(self) -> float | None:
        (_, first_done, first_busy), (_, done, busy) = self.recent[0], self.recent[-1]
        return (done - first_done) / (busy - first_busy) if busy > first_busy and done > first_done else None


@dataclass(frozen=True, slots=True)
class Growth:
    """A decision to add workers, and why."""

    workers: int
    reason: str


def growth(load: Load, least: int, most: int, grow_after: float) -> Growth | None:
    """Workers to add, or None.

    The least number always; one where something waits for none; else as many as would work off what waits within
    `grow_after` seconds, at most twice the present number at a time, because a rate measured on a few says little about
    many.
    """
    present = load.ready + load.starting
    if present < least:
        return Growth(least - present, f"{least} are always up")
    if present >= most or not load.waiting:
        return None
    if not present:
        return Growth(1, f"{load.waiting:.0f} requests wait and no worker is up")
    if not load.rate:
        return None
    seconds = load.waiting / (load.rate * present)
    if seconds <= grow_after:
        return None
    wanted = min(most, 2 * present, math.ceil(load.waiting / (load.rate * grow_after)))
    why = f"{load.waiting:.0f} requests would take {seconds:.0f} s at {load.rate:.3g} a second and worker"
    return Growth(wanted - present, why)


def tried_together(kills: Iterable[int], max_kills: int) -> int:
    """How many of the first suspects, over each of which so many workers died, go to one worker in one call.

    Whoever would be set aside after one more death goes alone: that death must be held against nobody else.
    """
    return max(1, len(list(takewhile(lambda count: count < max_kills - 1, kills))))
