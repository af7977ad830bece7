from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import ray

from actors.errors import EngineDeadError, QuarantinedError, WorkerError
from actors.pool import ElasticPool, PoolStats
from actors.worker import PoolWorker, actor_class
from sapo_ray.requests import PoolConfig
from sapo_ray.scaling import ScalingConfig

pytestmark = pytest.mark.engine

TestPool = ElasticPool[Any, Any]


@dataclass(frozen=True)
class Ask:
    """A number to double, or a word that a worker understands."""

    what: Any
    index: int = 0

    @property
    def id(self) -> str:
        return f"{self.what}-{self.index}"


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


class Doubler(PoolWorker):
    """Doubles numbers, behind a gate if there is one. Some words are understood as well."""

    def __init__(self, checkpoint: str, gate: Any = None) -> None:
        self.checkpoint, self.gate = checkpoint, gate
        self.awake = True
        if checkpoint == "stillborn":
            time.sleep(1000)

    async def ready(self) -> None:
        if self.checkpoint == "slow start":
            await self.gate.enter.remote(os.getpid(), [])
        if self.checkpoint == "no disk":
            raise OSError("no disk")
        if self.checkpoint == "endless":
            await asyncio.sleep(1000)
        if self.checkpoint == "deadly":
            os._exit(1)

    async def load(self, checkpoint: str) -> None:
        if checkpoint == "no disk":
            raise OSError("no disk")
        if checkpoint == "hang":
            await asyncio.sleep(1000)
        self.checkpoint = checkpoint

    async def sleep(self) -> None:
        self.awake = False

    async def wake(self) -> None:
        self.awake = True

    async def double(self, batch: list[Ask]) -> list[Any]:
        if self.gate is not None and self.checkpoint != "slow start":
            await self.gate.enter.remote(os.getpid(), [ask.what for ask in batch])
        return [await self._answer(ask.what, batch) for ask in batch]

    async def _answer(self, what: Any, batch: list[Ask]) -> Any:
        match what:
            case "die":
                print("the engine's last words", flush=True)
                os._exit(1)
            case "engine":
                raise EngineDeadError("the engine is gone")
            case "raise":
                raise ValueError("no such\nnumber")
            case "refuse":
                return ValueError("odd one out")
            case "checkpoint":
                return self.checkpoint
            case "awake":
                return self.awake
            case "pid":
                return os.getpid()
            case "hang" | "block" if self.checkpoint == "first":
                await asyncio.sleep(1000) if what == "hang" else time.sleep(1000)
            case "work":
                for _ in range(30):
                    await asyncio.sleep(0.1)
                    self.progress += 1
        self.progress += 1
        return 2 * what


def make_pool(gate: Any = None, scaling: ScalingConfig | None = None, sleeps: bool = False, **sizes: int) -> TestPool:
    config = PoolConfig(**{"cpus_per_worker": 0, "batch_size": 4, "in_flight": 2, **sizes})
    actor = actor_class(Doubler, config, {})
    make = partial(actor.remote, gate=gate)
    return ElasticPool("test", make, "double", config, scaling or PATIENT, sleeps=sleeps)


PATIENT = ScalingConfig(hang_after=600)


def run(
    test: Callable[[TestPool], Awaitable[None]],
    gate: Any = None,
    scaling: ScalingConfig | None = None,
    sleeps: bool = False,
    **sizes: int,
) -> None:
    """Run `test` with a started pool in a loop of its own."""

    async def main() -> None:
        pool = make_pool(gate, scaling, sleeps, **sizes)
        await pool.load("first")
        try:
            await asyncio.wait_for(test(pool), 90)
        finally:
            await pool.close()

    asyncio.run(main())


def submit(pool: TestPool, *what: Any) -> Awaitable[list[Any]]:
    return asyncio.gather(*(pool.submit(Ask(w, i)) for i, w in enumerate(what)), return_exceptions=True)


async def until(pool: TestPool, holds: Callable[[PoolStats], bool]) -> PoolStats:
    while not holds(pool.stats()):
        await asyncio.sleep(0.05)
    return pool.stats()


def test_every_request_gets_its_own_result() -> None:
    async def test(pool: TestPool) -> None:
        assert await submit(pool, *range(100)) == [2 * i for i in range(100)]
        stats = pool.stats()
        assert (stats.ready, stats.done, stats.queued, stats.in_flight) == (2, 100, 0, 0)
        assert stats.counts == {}

    run(test, workers=2)


def test_requests_are_spread_evenly_and_travel_together() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        results = submit(pool, *range(6))
        calls = await gate.arrived.remote(2)
        assert sorted(len(batch) for _, batch in calls) == [3, 3]
        assert len({pid for pid, _ in calls}) == 2
        await gate.release.remote()
        await results

    run(test, gate=gate, workers=2)


def test_the_least_loaded_worker_comes_next() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = submit(pool, *range(7))  # 4 to one worker, 3 to the other
        (_, _), (light, _) = sorted(await gate.arrived.remote(2), key=lambda call: -len(call[1]))
        last = submit(pool, 7)
        assert (await gate.arrived.remote(3))[2] == (light, [7])
        assert pool.stats().in_flight == 8
        await gate.release.remote()
        await asyncio.gather(first, last)

    run(test, gate=gate, workers=2)


def test_submit_waits_while_the_pool_is_full() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        results = submit(pool, *range(100))
        assert [len(batch) for _, batch in await gate.arrived.remote(2)] == [4, 4]
        assert (pool.stats().in_flight, pool.stats().queued) == (8, 8)  # and 84 that `submit` has not let in
        await gate.release.remote()
        assert await results == [2 * i for i in range(100)]

    run(test, gate=gate)


def test_a_request_whose_caller_gave_up_is_not_sent() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = submit(pool, 0)
        await gate.arrived.remote(1)
        given_up, last = submit(pool, 1), submit(pool, 2)
        await asyncio.sleep(0)
        given_up.cancel()
        await gate.release.remote()
        assert await asyncio.gather(first, last) == [[0], [4]]
        assert [batch for _, batch in await gate.arrived.remote(2)] == [[0], [2]]

    run(test, gate=gate, batch_size=1, in_flight=1)


def test_a_refused_request_fails_alone() -> None:
    async def test(pool: TestPool) -> None:
        results = await submit(pool, 1, "refuse", 3)
        assert (results[0], results[2]) == (2, 6)
        assert isinstance(results[1], ValueError)
        assert str(results[1]) == "odd one out"

    run(test)


def test_a_failed_call_fails_its_requests_and_the_worker_goes_on() -> None:
    async def test(pool: TestPool) -> None:
        (error,) = await submit(pool, "raise")
        assert isinstance(error, WorkerError)
        assert str(error) == "test worker 0: double failed: ValueError: no such number"
        assert await submit(pool, 5) == [10]
        assert pool.stats().counts == {}

    run(test)


def test_a_request_that_cannot_be_sent_fails() -> None:
    async def test(pool: TestPool) -> None:
        with pytest.raises(WorkerError, match=r"test worker 0: double failed: TypeError: .*pickle"):
            await pool.submit(Ask(threading.Lock()))

    run(test)


@pytest.mark.parametrize("word", ["die", "engine"])
def test_a_request_that_kills_workers_is_set_aside_and_all_others_are_answered(
    word: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(pool: TestPool) -> None:
        *others, error = await submit(pool, *range(20), word)
        assert others == [2 * i for i in range(20)]
        assert isinstance(error, QuarantinedError)
        assert error.request_id == f"{word}-20"
        assert "3 workers died over it" in str(error)
        assert ("the engine's last words" in error.log_tail) == (word == "die")
        stats = await until(pool, lambda stats: stats.ready == 2)
        assert (stats.counts["dead"], stats.counts["quarantined"]) == (3, 1)
        events = pool.events()
        assert any("set aside" in event for event in events)
        assert events == [record.message for record in caplog.records if record.levelname == "INFO"]
        (aside,) = [record for record in caplog.records if "set aside" in record.message]
        assert aside.request == f"{word}-20"  # type: ignore[attr-defined]

    with caplog.at_level("INFO", "actors"):
        run(test, workers=2)


def test_two_that_kill_are_both_found() -> None:
    async def test(pool: TestPool) -> None:
        results = await submit(pool, 0, "die", 2, 3, 4, "die", 6)
        assert [type(r) for r in results].count(QuarantinedError) == 2
        assert [r for r in results if not isinstance(r, Exception)] == [0, 4, 6, 8, 12]

    run(test, scaling=ScalingConfig(max_kills=2))


def test_a_killed_worker_is_replaced_and_what_it_held_is_asked_of_others() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        results = submit(pool, *range(12))
        ((victim, _), *_) = await gate.arrived.remote(2)
        os.kill(victim, signal.SIGKILL)
        await until(pool, lambda stats: stats.counts.get("dead") == 1)
        await gate.release.remote()
        assert await results == [2 * i for i in range(12)]
        assert pool.stats().counts["retries"] >= 3
        assert (await until(pool, lambda stats: stats.ready == 2)).counts["dead"] == 1

    run(test, gate=gate, workers=2)


@pytest.mark.parametrize("word", ["hang", "block"])
def test_a_hung_worker_is_replaced(word: str) -> None:
    """It hangs with the first checkpoint only; a request that makes progress longer than the limit is left alone."""

    async def test(pool: TestPool) -> None:
        results = submit(pool, word, "work")
        await until(pool, lambda stats: stats.in_flight == 2)
        while pool.stats().counts.get("hung", 0) < 1:
            await asyncio.sleep(0.05)
        loading = asyncio.ensure_future(pool.load("second"))
        assert await results == [2 * word, "workwork"]
        assert pool.stats().counts["hung"] == 1
        await loading

    run(test, workers=2, batch_size=1, in_flight=1, scaling=ScalingConfig(hang_after=1))


def test_every_worker_holds_what_was_loaded_last_whenever_it_started() -> None:
    async def test(pool: TestPool) -> None:
        assert await submit(pool, "checkpoint") == ["first"]
        await pool.load("second")
        assert set(await submit(pool, *["checkpoint"] * 8)) == {"second"}
        (pid,) = await submit(pool, "pid")
        os.kill(pid, signal.SIGKILL)
        await until(pool, lambda stats: stats.counts.get("dead") == 1)
        await until(pool, lambda stats: stats.ready == 2)
        assert set(await submit(pool, *["checkpoint"] * 8)) == {"second"}
        for attempt in (pool.load("no disk"), pool.submit(Ask("checkpoint"))):  # no worker goes on with another model
            with pytest.raises(WorkerError, match=r"test worker \d: load failed: OSError: no disk"):
                await attempt

    run(test, workers=2, scaling=ScalingConfig(hang_after=20))  # an idle worker is looked after every eighth of that


def test_loading_waits_for_requests_in_flight() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        first = submit(pool, "checkpoint")
        await gate.arrived.remote(1)
        loading = asyncio.ensure_future(pool.load("second"))
        await asyncio.sleep(0)
        second = submit(pool, "checkpoint")
        await asyncio.sleep(0.2)
        assert not loading.done()  # one request is still in flight
        assert pool.stats().queued == 1  # and no other is sent before the load
        await gate.release.remote()
        await loading
        assert await asyncio.gather(first, second) == [["first"], ["second"]]

    run(test, gate=gate, workers=2)


@pytest.mark.parametrize(
    ("checkpoint", "cause"),
    [
        ("no disk", "test worker 0: start failed: OSError: no disk"),
        ("deadly", r"test worker \d: start failed: ActorDied"),
    ],
)
def test_a_pool_that_cannot_start_says_why(checkpoint: str, cause: str) -> None:
    async def main() -> None:
        pool = make_pool()
        with pytest.raises(WorkerError, match=cause):
            await pool.load(checkpoint)
        with pytest.raises(WorkerError, match=cause):
            await pool.submit(Ask(1))
        assert pool.stats().ready == pool.stats().starting == 0

    asyncio.run(main())


def test_a_pool_grows_with_its_backlog_and_shrinks_when_idle_but_never_ends_a_worker_with_work() -> None:
    async def test(pool: TestPool) -> None:
        assert pool.stats().ready == 0  # none is needed yet
        results = submit(pool, *["work"] * 12)
        stats = await until(pool, lambda stats: stats.ready == 3)
        assert stats.counts["grown"] >= 3
        assert await results == ["workwork"] * 12
        stats = await until(pool, lambda stats: stats.ready == 0)
        assert (stats.counts["shrunk"], stats.counts.get("dead", 0)) == (3, 0)
        assert any("requests wait and no worker is up" in event for event in pool.events())
        assert await submit(pool, 1) == [2]

    scaling = ScalingConfig(grow_after=0.5, shrink_after=2)
    run(test, workers=0, max_workers=3, batch_size=1, in_flight=1, scaling=scaling)


def test_a_slow_request_is_hedged_and_answered_once() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        result = submit(pool, 1)
        (slow, _), (other, batch) = await gate.arrived.remote(2)
        assert slow != other
        assert batch == [1]
        await gate.release.remote()
        assert await result == [2]
        stats = await until(pool, lambda stats: stats.in_flight == 0)
        assert (stats.counts["hedged"], stats.done) == (1, 1)

    run(test, gate=gate, workers=2, scaling=ScalingConfig(hedge_after=0.5))


def test_a_paused_pool_has_no_worker_and_goes_on_when_resumed() -> None:
    async def test(pool: TestPool) -> None:
        (before,) = await submit(pool, "pid")
        await pool.pause()
        assert pool.stats().ready == 0
        waiting = submit(pool, "checkpoint", "pid")
        await asyncio.sleep(1.5)
        assert pool.stats().ready == pool.stats().starting == 0
        await pool.resume()
        checkpoint, after = await waiting
        assert checkpoint == "first"
        assert after != before

    run(test)


def test_a_worker_that_still_starts_when_the_others_are_put_to_sleep_is_ended() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        await pool.load("slow start")
        (pid,) = await submit(pool, "pid")
        os.kill(pid, signal.SIGKILL)
        await gate.arrived.remote(1)  # the one that replaces it
        await pool.pause()
        assert (pool.stats().ready, pool.stats().starting) == (1, 0)
        waiting = submit(pool, *["awake"] * 8)
        await gate.release.remote()
        assert pool.stats().queued == 8
        await pool.resume()
        assert pool.stats().ready == 2
        assert await waiting == [True] * 8

    run(test, gate=gate, workers=2, sleeps=True, scaling=ScalingConfig(hang_after=20))


def test_a_worker_that_no_node_has_room_for_is_withdrawn_when_nothing_waits() -> None:
    async def test(pool: TestPool) -> None:
        results = submit(pool, *["work"] * 3)  # the first gives a rate, and the third ends the backlog
        await until(pool, lambda stats: stats.starting == 1)
        stats = await until(pool, lambda stats: stats.starting == 0)
        assert (stats.ready, stats.in_flight, stats.counts) == (1, 1, {"growths": 1, "grown": 1, "shrunk": 1})
        assert await results == ["workwork"] * 3

    scaling = ScalingConfig(grow_after=0.5, shrink_after=1)
    run(test, max_workers=2, cpus_per_worker=2, batch_size=1, in_flight=1, scaling=scaling)


def test_a_closed_pool_fails_what_waits_and_all_that_comes() -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        waiting = submit(pool, *range(20))
        await gate.arrived.remote(1)
        await pool.close()
        assert {str(error) for error in await waiting} == {"test pool: closed"}
        with pytest.raises(WorkerError, match="test pool: closed"):
            await pool.submit(Ask(3))

    run(test, gate=gate)


def test_an_error_of_the_pools_own_fails_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate.remote()

    async def test(pool: TestPool) -> None:
        waiting = submit(pool, 1)
        await gate.arrived.remote(1)
        monkeypatch.setattr(pool, "_hedge", lambda: 1 / 0)  # what the pool looks after every second
        (error,) = await waiting
        assert str(error) == "test pool: ZeroDivisionError: division by zero"

    run(test, gate=gate)


def test_a_worker_that_hangs_over_a_checkpoint_is_replaced_by_one_that_starts_with_it() -> None:
    async def test(pool: TestPool) -> None:
        await pool.load("hang")
        assert await submit(pool, 1, "checkpoint") == [2, "hang"]
        assert (pool.stats().counts["dead"], pool.stats().counts["hung"]) == (1, 1)
        assert any("hung: no answer for 2 s" in event for event in pool.events())

    run(test, scaling=ScalingConfig(start_within=2))


@pytest.mark.parametrize("checkpoint", ["endless", "stillborn"])
def test_workers_that_never_start_end_the_pool_with_that_cause(
    monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    """Be they in their process and never ready, or never so far as to say where they are."""
    monkeypatch.setattr("actors.pool._SCHEDULING", 0.5)

    async def main() -> None:
        pool = make_pool(scaling=ScalingConfig(start_within=2))
        with pytest.raises(WorkerError, match="start failed: hung: no answer for 2 s"):
            await asyncio.wait_for(pool.load(checkpoint), 90)

    asyncio.run(main())
