from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray

from actors.pool import Pool, WorkerError

pytestmark = pytest.mark.engine

TestPool = Pool[Any, Any]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Gate:
    """Lets calls through one by one, and writes down who came with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[Any]]] = []
        self.open = asyncio.Event()

    async def enter(self, pid: int, batch: list[Any]) -> None:
        self.calls.append((pid, batch))
        await self.open.wait()

    async def arrived(self, count: int) -> list[tuple[int, list[Any]]]:
        while len(self.calls) < count:
            await asyncio.sleep(0.01)
        return self.calls

    async def release(self) -> None:
        self.open.set()


class Doubler:
    """Doubles numbers, behind a gate if there is one. Some words are understood as well."""

    def __init__(self, gate: Any = None) -> None:
        self.gate = gate

    async def ready(self) -> None:
        pass

    async def pid(self) -> int:
        return os.getpid()

    async def double(self, batch: list[Any]) -> list[Any]:
        if self.gate is not None:
            await self.gate.enter.remote(os.getpid(), batch)
        if "die" in batch:
            os._exit(1)
        if "raise" in batch:
            raise ValueError("no such\nnumber")
        if "lose" in batch:
            return []
        return [ValueError("odd one out") if request == "refuse" else 2 * request for request in batch]


class Stillborn(Doubler):
    async def ready(self) -> None:
        raise OSError("no disk")


def run(test: Callable[[TestPool], Awaitable[None]], worker: type = Doubler, gate: Any = None, **sizes: int) -> None:
    """Run `test` with a started pool in a loop of its own."""
    actor = ray.remote(num_cpus=0)(worker)

    async def main() -> None:
        made = {"workers": 1, "batch_size": 4, "in_flight": 2} | sizes
        pool: TestPool = Pool("test", lambda: actor.remote(gate), "double", **made)
        await pool.start()
        try:
            await asyncio.wait_for(test(pool), 60)
        finally:
            await pool.close()

    asyncio.run(main())


def test_every_request_gets_its_own_result() -> None:
    async def test(pool: TestPool) -> None:
        assert await asyncio.gather(*map(pool.submit, range(100))) == [2 * i for i in range(100)]
        assert (pool.stats().done, pool.stats().queued, pool.stats().in_flight) == (100, 0, 0)
        assert pool.stats().rate > 0

    run(test, workers=2)


def test_requests_are_spread_evenly_and_travel_together() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        results = asyncio.gather(*map(pool.submit, range(6)))
        calls = await gate.arrived.remote(2)
        assert sorted(len(batch) for _, batch in calls) == [3, 3]
        assert len({pid for pid, _ in calls}) == 2
        await gate.release.remote()
        await results

    run(test, gate=gate, workers=2)


def test_the_least_loaded_worker_comes_next() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = asyncio.gather(*map(pool.submit, range(7)))  # 4 to one worker, 3 to the other
        (_, _), (light, _) = sorted(await gate.arrived.remote(2), key=lambda call: -len(call[1]))
        last = asyncio.ensure_future(pool.submit(7))
        assert (await gate.arrived.remote(3))[2] == (light, [7])
        assert pool.stats().in_flight == 8
        await gate.release.remote()
        await asyncio.gather(first, last)

    run(test, gate=gate, workers=2)


def test_submit_waits_while_the_pool_is_full() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        results = asyncio.gather(*map(pool.submit, range(100)))
        assert [len(batch) for _, batch in await gate.arrived.remote(2)] == [4, 4]
        assert (pool.stats().in_flight, pool.stats().queued) == (8, 8)  # and 84 that `submit` has not let in
        await gate.release.remote()
        assert await results == [2 * i for i in range(100)]

    run(test, gate=gate)


def test_a_request_whose_caller_gave_up_is_not_sent() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = asyncio.ensure_future(pool.submit(0))
        await gate.arrived.remote(1)
        given_up, last = asyncio.ensure_future(pool.submit(1)), asyncio.ensure_future(pool.submit(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await gate.release.remote()
        assert await asyncio.gather(first, last) == [0, 4]
        assert [batch for _, batch in await gate.arrived.remote(2)] == [[0], [2]]

    run(test, gate=gate, batch_size=1, in_flight=1)


def test_a_refused_request_fails_alone() -> None:
    async def test(pool: TestPool) -> None:
        results = await asyncio.gather(*map(pool.submit, [1, "refuse", 3]), return_exceptions=True)
        assert (results[0], results[2]) == (2, 6)
        assert isinstance(results[1], ValueError)
        assert str(results[1]) == "odd one out"

    run(test)


@pytest.mark.parametrize(
    ("request_", "cause"),
    [
        ("raise", "test worker 0: double failed: ValueError: no such number"),
        ("lose", "test worker 0: double failed: ValueError: 0 results for 1 requests"),
    ],
)
def test_a_failed_call_fails_its_requests_and_the_worker_goes_on(request_: str, cause: str) -> None:
    async def test(pool: TestPool) -> None:
        with pytest.raises(WorkerError) as caught:
            await pool.submit(request_)
        assert str(caught.value) == cause
        assert await pool.submit(5) == 10

    run(test)


def test_a_request_that_cannot_be_sent_fails() -> None:
    async def test(pool: TestPool) -> None:
        with pytest.raises(WorkerError, match=r"test worker 0: double failed: TypeError: .*pickle"):
            await pool.submit(threading.Lock())

    run(test)


def test_a_dead_worker_fails_what_it_held_and_the_others_go_on() -> None:
    async def test(pool: TestPool) -> None:
        with pytest.raises(WorkerError, match=r"test worker \d: double failed: ActorDiedError: .*"):
            await pool.submit("die")
        assert pool.stats().workers == 1
        assert await asyncio.gather(*map(pool.submit, range(9))) == [2 * i for i in range(9)]

    run(test, workers=2)


def test_the_last_worker_s_death_fails_all_that_wait_and_all_that_come() -> None:
    async def test(pool: TestPool) -> None:
        results = await asyncio.gather(*map(pool.submit, ["die", 1, 2]), return_exceptions=True)
        assert [type(result) for result in results] == [WorkerError] * 3
        assert "ActorDiedError" in str(results[0])
        with pytest.raises(WorkerError, match="test pool: no worker is left"):
            await pool.submit(3)

    run(test, batch_size=1, in_flight=1)


def test_a_broadcast_reaches_every_worker_between_requests() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = asyncio.ensure_future(pool.submit(1))
        await gate.arrived.remote(1)
        pids = asyncio.ensure_future(pool.broadcast("pid"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(pool.submit(2))
        await asyncio.sleep(0.2)
        assert not pids.done()  # one request is still in flight
        assert pool.stats().queued == 1  # and no other is sent before the broadcast
        await gate.release.remote()
        assert len(set(await pids)) == 2
        assert await asyncio.gather(first, second) == [2, 4]

    run(test, gate=gate, workers=2)


def test_a_worker_that_cannot_start_says_why() -> None:
    async def test(pool: TestPool) -> None:
        pytest.fail("the pool has started")

    with pytest.raises(WorkerError, match="test worker 0: ready failed: OSError: no disk"):
        run(test, worker=Stillborn)
