"""The bounded stream and its like: order, limit, and that nothing is left running when they end early."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.concurrency import ordered, together


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end, and check that then no task is left."""

    async def watched() -> None:
        before = asyncio.all_tasks()
        await main()
        assert asyncio.all_tasks() == before

    asyncio.run(watched())


class Work:
    """Squares; item `fails` fails, and what comes after it never ends by itself."""

    def __init__(self, seed: int = 0, fails: int = 10**9) -> None:
        self._rng, self._fails = random.Random(seed), fails
        self.begun = self.running = self.most = 0

    async def __call__(self, item: int) -> int:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self._rng.randrange(5)):
                await asyncio.sleep(0)
            if item > self._fails:
                return await asyncio.Future[int]()
            if item == self._fails:
                raise LookupError(f"item {item}")
            return item * item
        finally:
            await asyncio.sleep(0)
            self.running -= 1


@given(count=st.integers(0, 20), limit=st.integers(1, 6), seed=st.integers(0, 99))
def test_results_come_in_order_and_no_more_than_the_limit_is_begun(count: int, limit: int, seed: int) -> None:
    work, taken = Work(seed), 0

    def source() -> Iterator[int]:
        nonlocal taken
        while taken < count:
            taken += 1
            yield taken

    async def main() -> None:
        results: list[int] = []
        async for result in ordered(source(), work, lambda: limit):
            assert taken - len(results) <= limit
            results.append(result)
        assert results == [item * item for item in range(1, count + 1)]

    run(main)
    assert work.most <= limit


def test_a_failure_is_raised_in_its_turn_and_ends_the_rest() -> None:
    work = Work(fails=3)

    async def main() -> None:
        stream = ordered(range(100), work, lambda: 8)
        assert [await anext(stream) for _ in range(3)] == [0, 1, 4]
        with pytest.raises(LookupError, match="item 3"):
            await anext(stream)

    run(main)
    assert work.running == 0
    assert work.begun <= 3 + 8


def test_closing_the_stream_ends_what_runs() -> None:
    work = Work(fails=1)

    async def main() -> None:
        stream = ordered(range(100), work, lambda: 4)
        assert await anext(stream) == 0
        await asyncio.sleep(0)
        assert work.running > 0
        await stream.aclose()

    run(main)
    assert work.running == 0


def test_the_limit_may_change_and_is_never_below_one() -> None:
    work, limits = Work(), iter([0, 0, 3, 3, 3, *[1] * 100])

    async def main() -> None:
        assert [r async for r in ordered(range(10), work, lambda: next(limits))] == [i * i for i in range(10)]

    run(main)


def test_together_gives_all_results_or_the_first_error() -> None:
    failing = Work(seed=1, fails=2)

    async def main() -> None:
        assert await together(map(Work(seed=1), range(5))) == [0, 1, 4, 9, 16]
        assert await together([]) == []
        with pytest.raises(LookupError, match="item 2"):
            await together(map(failing, range(6)))

    run(main)
    assert failing.running == 0
