"""Ctrl-C and SIGTERM end a command alike: by KeyboardInterrupt, which puts away on its way out what was started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 25
"""Seconds from the first signal until the kernel ends a process that hangs on its way out."""

_LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_received: list[int] = []


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, even where a shell without job control has SIGINT ignored."""
    for number in _LINES:
        signal.signal(number, _interrupt)


def last_words() -> tuple[str, int]:
    """The line and the exit status of a command that KeyboardInterrupt has ended. Further signals go unheard."""
    if not _received:  # someone else's handler
        return _LINES[signal.SIGINT], 128 + signal.SIGINT
    for number in _LINES:
        signal.signal(number, signal.SIG_IGN)
    return _LINES[signal.Signals(_received[0])], 128 + _received[0]


@contextmanager
def postponed() -> Iterator[None]:
    """A signal waits until the block ends, then meets the handler that was there before the block."""
    waiting: list[int] = []

    def wait(number: int, _: FrameType | None) -> None:
        _limit_grace()
        waiting.append(number)

    before = {number: signal.signal(number, wait) for number in _LINES}
    try:
        yield
    except SystemExit:  # while Ray starts, it meets SIGTERM with a handler of its own
        waiting.append(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _limit_grace() -> None:
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.alarm(GRACE)


def _interrupt(number: int, _: FrameType | None) -> None:
    _limit_grace()
    _received.append(number)
    raise KeyboardInterrupt  # Ray's waits let no other exception of a handler through
