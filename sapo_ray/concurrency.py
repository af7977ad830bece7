"""A bounded stream over asynchronous work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def ordered(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], limit: int
) -> AsyncIterator[Result]:
    """The results of `work` over `items`, in the items' order, with at most `limit` items begun and not yet yielded.

    The order makes whatever is written from a stream the same in every run; the limit bounds memory and holds back the
    source. When an item fails or the caller stops, the work in progress is cancelled.
    """
    window: deque[asyncio.Future[Result]] = deque()
    try:
        for item in items:
            window.append(asyncio.ensure_future(work(item)))
            if len(window) == limit:
                yield await window.popleft()
        while window:
            yield await window.popleft()
    finally:
        for future in window:
            future.cancel()
