"""The bounded stream: order, limit, and that nothing is left behind when it ends early."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.concurrency import ordered, together


class Work:
    """Items that take a pseudo-random number of turns, counted; item `fails` fails."""

    def __init__(self, seed: int = 0, fails: int | None = None) -> None:
        self.rng, self.fails = random.Random(seed), fails
        self.begun = self.running = self.most = 0

    async def __call__(self, item: int) -> int:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.rng.randrange(5)):
                await asyncio.sleep(0)
            if item == self.fails:
                raise LookupError(f"item {item}")
            return item * item
        finally:
            self.running -= 1


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> list[str]:
    """Run to the end, after which no task may be left; what the event loop complained of."""
    complaints: list[str] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        before = asyncio.all_tasks()
        try:
            await main()
        finally:
            assert asyncio.all_tasks() == before

    asyncio.run(watched())
    return complaints


def complaints_after(main: Callable[[], Coroutine[Any, Any, None]]) -> list[str]:
    """As `run`, with complaints about failures that nobody looked at: those come when the garbage is collected."""
    complaints = run(main)
    gc.collect()
    return complaints


@given(count=st.integers(0, 20), limit=st.integers(1, 6), seed=st.integers(0, 99))
def test_results_come_in_order_and_no_more_than_the_limit_run(count: int, limit: int, seed: int) -> None:
    work = Work(seed)
    pending: list[int] = []

    def source() -> Any:
        for item in range(count):
            pending.append(item)
            yield item

    async def main() -> None:
        results = []
        async for result in ordered(source(), work, limit):
            assert len(pending) - len(results) <= limit
            results.append(result)
        assert results == [item * item for item in range(count)]

    assert run(main) == []
    assert work.most <= limit


def test_a_failure_is_raised_in_its_turn_and_ends_the_rest() -> None:
    work = Work(fails=3)

    async def main() -> None:
        results = []
        with pytest.raises(LookupError, match="item 3"):
            async for result in ordered(range(100), work, 8):
                results.append(result)
        assert results == [0, 1, 4]
        assert work.running == 0
        assert work.begun <= 3 + 8

    assert complaints_after(main) == []


def test_two_failures_in_the_window_leave_no_complaint() -> None:
    async def fail(item: int) -> int:
        raise LookupError(f"item {item}")

    async def main() -> None:
        with pytest.raises(LookupError, match="item 0"):
            async for _ in ordered(range(9), fail, 4):
                pass

    assert complaints_after(main) == []


def test_closing_the_stream_cancels_what_runs() -> None:
    work = Work(seed=5)

    async def main() -> None:
        stream: AsyncIterator[int] = ordered(range(100), work, 4)
        async with aclosing(stream) as results:  # type: ignore[type-var]
            async for _ in results:
                break
        assert work.running == 0

    assert complaints_after(main) == []
    assert work.begun == 4


def test_a_limit_of_nothing_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="limit is 0"):
            await anext(ordered([1], Work(), 0))

    run(main)


def test_together_gives_all_results_or_the_first_error() -> None:
    async def main() -> None:
        assert await together(map(Work(seed=1), range(5))) == [0, 1, 4, 9, 16]
        assert await together([]) == []
        with pytest.raises(LookupError, match="item 2"):
            await together([Work(fails=2)(2), forever(), forever()])
        assert ended == 2

    ended = 0

    async def forever() -> int:
        nonlocal ended
        try:
            return await asyncio.Future[int]()
        finally:
            ended += 1

    assert complaints_after(main) == []
