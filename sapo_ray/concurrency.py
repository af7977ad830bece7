"""Asynchronous work that leaves nothing behind: what is begun has ended, and is accounted for, when it is left."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def ordered(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], limit: Callable[[], int]
) -> AsyncGenerator[Result, None]:
    """The results of `work` over `items`, in the items' order, with at most `limit()` items begun and not yet yielded.

    The order makes whatever is written from a stream the same in every run; the limit, asked for each item and at least
    1, bounds memory and holds back the source. When an item fails or the caller closes the stream, the work in progress
    is cancelled.
    """
    window: deque[asyncio.Future[Result]] = deque()
    try:
        for item in items:
            window.append(asyncio.ensure_future(work(item)))
            while len(window) >= max(1, limit()):
                yield await window.popleft()
        while window:
            yield await window.popleft()
    finally:
        await abandon(window)


async def together(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all of `work`, run at once. When one fails the others are cancelled, and its error is raised."""
    futures = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*futures)
    finally:
        await abandon(futures)


async def abandon(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel what still runs and wait until it has ended. Failures are dropped: the caller has its own to report."""
    futures = list(futures)
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
