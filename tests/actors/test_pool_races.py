"""What meets what in a pool: every order of a few events is tried, turn by turn of the event loop.

Ray is not started. A pool's actors are objects in this process, behind what `ray.kill` and a pool use of Ray's handles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from actors.errors import EngineDeadError, QuarantinedError, WorkerError
from actors.pool import SET_ASIDE_IN_A_ROW, ElasticPool
from actors.worker import Place
from sapo_ray.requests import PoolConfig
from sapo_ray.scaling import Growth, ScalingConfig

NODE_GONE = RayActorError(error_msg="The actor died: its node has died.")
NO_DISK = OSError("no disk")
TURNS = range(40)
"""More turns than a worker takes to start."""

TestPool = ElasticPool[Any, Any]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Worker:
    """Answers with its checkpoint. The first request of a call may have it raise; the others then wait for ever."""

    def __init__(self, checkpoint: str, fault: Exception | None = None, no_start: Exception | None = None) -> None:
        self.checkpoint, self.fault, self.no_start = checkpoint, fault, no_start
        self.awake = True

    async def enter(self, run: str, stage: str) -> None: ...

    async def where(self) -> Place:
        return Place("node", 1, ())

    async def ready(self) -> None:
        await turns(3)
        if self.no_start:
            raise self.no_start

    async def load(self, checkpoint: str) -> None:
        await turns(3)
        self.checkpoint = checkpoint

    async def beat(self) -> int:
        return await asyncio.Future()

    async def sleep(self) -> None:
        await turns(3)
        self.awake = False

    async def wake(self) -> None:
        self.awake = True

    async def answer(self, batch: list[SimpleNamespace]) -> list[str]:
        if self.fault:
            await turns(3)
            if batch[0].id == "0":
                raise self.fault
            await asyncio.Future()
        assert self.awake
        return [self.checkpoint for _ in batch]


class Handle:
    """Stands for the handle of an actor. Once it is killed, whatever was asked of the actor fails."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.killed = worker, asyncio.Event()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *args: asyncio.ensure_future(self._ask(getattr(self.worker, method)(*args)))
        )

    async def _ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        answer, end = asyncio.ensure_future(work), asyncio.ensure_future(self.killed.wait())
        await asyncio.wait([answer, end], return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            raise RayActorError(error_msg="killed")
        return answer.result()


@pytest.fixture(autouse=True)
def kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda handle: handle.killed.set())


def run(
    test: Callable[[TestPool, list[Handle]], Awaitable[None]],
    *faults: Exception,
    no_start: Mapping[int, Exception] = MappingProxyType({}),
    sleeps: bool = False,
    max_kills: int = 2,
    **sizes: int,
) -> None:
    """Run `test` with a started pool, whose first workers have these faults, and the handles of all its workers.

    `no_start`: why a worker, by its number, cannot start.
    """

    async def main() -> None:
        handles, left = list[Handle](), list(faults)

        def make(checkpoint: str) -> Handle:
            fault = left.pop(0) if left else None
            handles.append(Handle(Worker(checkpoint, fault, no_start.get(len(handles)))))
            return handles[-1]

        config, scaling = PoolConfig(cpus_per_worker=0, **sizes), ScalingConfig(max_kills=max_kills)
        pool = TestPool("test", make, "answer", config, scaling, sleeps=sleeps)
        await pool.load("first")
        await asyncio.wait_for(test(pool, handles), 10)
        await pool.close()

    asyncio.run(main())


def submit(pool: TestPool, *ids: str) -> asyncio.Future[list[Any]]:
    return asyncio.gather(*(pool.submit(SimpleNamespace(id=i)) for i in ids))


@pytest.mark.parametrize("before", TURNS)
def test_no_worker_that_starts_while_a_checkpoint_is_loaded_is_left_with_the_one_before(before: int) -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        lost = submit(pool, "0")  # the worker is lost over it, and another one starts
        await turns(before)
        await pool.load("second")
        assert await submit(pool, "1") == ["second"]
        await lost

    run(test, RayActorError())


@pytest.mark.parametrize(
    "loss",
    [
        ObjectLostError("00", None, ""),
        NodeDiedError("gone"),
        RayActorError(error_msg="The actor died because its node has died."),
        RayActorError(preempted=True),
    ],
    ids=["object lost", "node died", "died with its node", "preempted"],
)
def test_what_is_lost_with_its_node_is_asked_of_others_and_held_against_no_request(loss: Exception) -> None:
    """Nor against those whose calls end because the pool gives the worker up."""

    async def test(pool: TestPool, handles: list[Handle]) -> None:
        assert await submit(pool, "0", "1") == ["first", "first"]
        counts = pool.stats().counts
        assert (counts["dead"], counts["retries"], "quarantined" in counts) == (3, 6, False)
        assert [handle.killed.is_set() for handle in handles] == [True, True, True, False]
        assert not pool._suspects

    run(test, loss, loss, loss, batch_size=1, in_flight=2, max_kills=4)


def test_a_request_that_takes_node_after_node_along_is_set_aside() -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        lost = asyncio.gather(submit(pool, "0"), submit(pool, "1"), return_exceptions=True)
        killer, (neighbour,) = await lost
        assert isinstance(killer, QuarantinedError)
        assert neighbour == "first"
        assert len(handles) == 4  # one loss is nobody's fault, and two that count

    run(test, *[NODE_GONE] * 3)


@pytest.mark.parametrize(
    "losses",
    [
        [RayActorError(preempted=True)] * 9,
        [NODE_GONE, *[RayActorError(preempted=True)] * 9],
        [NodeDiedError("gone")] * 9,
        [ObjectLostError("0" * 56, "", "")] * 9,
    ],
    ids=["announced", "the last announced", "the answer lay there", "the answer is lost"],
)
def test_a_loss_that_no_request_can_have_caused_is_held_against_none(losses: list[Exception]) -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        assert await submit(pool, "0") == ["first"]

    run(test, *losses)


def test_workers_too_many_that_cannot_start_leave_a_needed_one_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        for _ in range(4):
            pool._grow(Growth(1, "test"))
            await turns(len(TURNS))
        pool._lose(pool._workers[0], RayActorError())
        await turns(4 * len(TURNS))
        assert await submit(pool, "1") == ["first"]
        assert len(handles) == 8

    run(test, no_start=dict.fromkeys(range(1, 7), NO_DISK), max_workers=8)


def test_a_suspect_whose_node_is_lost_stays_apart_from_others() -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        retry = pool._retry

        def check(*args: Any) -> None:
            retry(*args)
            assert not any(waiting.kills for waiting in pool._queue)

        pool._retry = check  # type: ignore[method-assign]
        suspect = submit(pool, "0")
        await turns(len(TURNS))
        assert await asyncio.gather(suspect, submit(pool, "1")) == [["first"], ["first"]]

    run(test, RayActorError(), NodeDiedError("gone"), max_kills=3)


@pytest.mark.parametrize("death", [OutOfMemoryError("no memory"), WorkerCrashedError()])
def test_a_worker_that_ray_kills_for_memory_is_replaced_like_any_dead_one(death: Exception) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        assert await submit(pool, "0", "1") == ["first", "first"]
        assert len(handles) == 2

    run(test, death)


def test_a_copy_of_a_request_that_fails_leaves_it_to_its_first_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(_: Any) -> list[str]:
        await turns(2 * len(TURNS))
        return ["late"]

    async def refuse(_: Any) -> None:
        raise ValueError("no")

    async def test(pool: TestPool, handles: list[Handle]) -> None:
        monkeypatch.setattr(handles[0].worker, "answer", late)
        monkeypatch.setattr(handles[1].worker, "answer", refuse)
        asked = submit(pool, "0")
        await turns(3)
        pool._send(pool._workers[1], list(pool._flying))
        await turns(len(TURNS))
        assert not pool._workers[1].calls
        assert await asked == ["late"]

    run(test, workers=2)


def test_an_error_of_the_pools_own_within_a_call_leaves_no_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        def no_ray(*_: Any) -> None:
            raise RuntimeError("Ray is gone")

        monkeypatch.setattr(pool, "_make_actor", no_ray)
        with pytest.raises(WorkerError, match="test pool: RuntimeError: Ray is gone"):
            await submit(pool, "0")

    run(test, RayActorError())


@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("before", TURNS)
def test_no_worker_that_starts_while_its_pool_pauses_stays_awake(before: int, sleeps: bool) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        def awake() -> list[Worker]:
            return [handle.worker for handle in handles if not handle.killed.is_set() and handle.worker.awake]

        lost = submit(pool, "0")
        await turns(before)
        await pool.pause()
        assert awake() == []
        waiting = submit(pool, "1")
        await turns(len(TURNS))
        assert awake() == []
        await pool.resume()
        assert pool.stats().ready == len(awake()) == 2
        assert await asyncio.gather(lost, waiting) == [["first"], ["first"]]

    run(test, RayActorError(), sleeps=sleeps, workers=2)


@pytest.mark.parametrize("before", range(10))
def test_a_worker_that_is_lost_as_its_pool_pauses_is_no_error(before: int) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        (worker,) = pool._workers
        pause = asyncio.ensure_future(pool.pause())
        await turns(before)
        pool._lose(worker, RayActorError())
        await pause
        assert all(handle.killed.is_set() for handle in handles)
        await pool.resume()
        assert await submit(pool, "0") == ["first"]

    run(test)


def test_a_command_that_fails_on_one_worker_holds_back_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(worker: Worker) -> None:
        await turns(10)
        raise ValueError("no")

    async def test(pool: TestPool, handles: list[Handle]) -> None:
        monkeypatch.setattr(handles[0].worker, "wake", lambda: refuse(handles[0].worker))
        command = asyncio.ensure_future(pool.broadcast("wake"))
        await turns(3)
        waiting = submit(pool, "0", "1")
        await turns(3)
        assert pool.stats().queued == 2
        with pytest.raises(WorkerError, match="test worker 0: wake failed: ValueError: no"):
            await command
        assert await waiting == ["first", "first"]

    run(test, workers=2)


def test_a_node_that_falls_silent_before_it_is_known_to_be_gone_is_held_against_no_request() -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        asked = submit(pool, "0")
        await turns(2)
        pool._lose(pool._workers[0], ActorUnavailableError("no route", None))
        assert await asked == ["first"]
        assert pool.stats().counts["retries"] == 1
        assert not pool._suspects

    run(test, NodeDiedError("gone"))


def test_what_is_to_come_holds_no_worker_while_others_idle() -> None:
    """It waits for another pool, which may need the room: none is added, and one without a node is withdrawn."""

    async def test(pool: TestPool, handles: list[Handle]) -> None:
        pool.upcoming = 1000.0
        assert await submit(pool, "0") == ["first"]  # a rate is known
        pool._meter.tick(1)
        await asyncio.sleep(0.1)
        pool._meter.tick(1)
        pool._scale()
        assert len(handles) == 1
        pool._grow(Growth(1, "test"))
        await turns(len(TURNS))
        pool._workers[1].place, pool._workers[1].created = None, 0.0
        pool._scale()
        assert [handle.killed.is_set() for handle in handles] == [False, True]

    run(test, max_workers=8)


def test_a_worker_too_many_that_cannot_start_ends_nothing_and_is_not_asked_for_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        monkeypatch.setattr("actors.pool.growth", lambda *_: Growth(1, "test"))
        pool._scale()
        await turns(len(TURNS))
        pool._scale()
        await turns(len(TURNS))
        assert [handle.killed.is_set() for handle in handles] == [False, True]
        assert await submit(pool, "0") == ["first"]

    run(test, no_start={1: NO_DISK}, max_workers=8)


@pytest.mark.parametrize("bad", [2, 3])
def test_a_worker_that_is_needed_may_fail_to_start_twice(bad: int) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        pool._lose(pool._workers[0], RayActorError())
        await turns(4 * len(TURNS))
        assert len(handles) == 2 + bad + (bad < 3)
        if bad < 3:
            assert (await submit(pool, "0", "1"), pool.stats().ready) == (["first", "first"], 2)
        else:
            with pytest.raises(WorkerError, match=r"^test worker 4: start failed: OSError: no disk$"):
                await submit(pool, "0")

    run(test, no_start=dict.fromkeys(range(2, 2 + bad), NO_DISK), workers=2)


@pytest.mark.parametrize(("cause", "starts"), [(NO_DISK, 1), (RayActorError(error_msg="killed"), 3)])
def test_a_pool_that_is_empty_at_first_tells_why_its_worker_cannot_start(cause: Exception, starts: int) -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        asked = submit(pool, "0")
        for _ in range(starts):
            pool._scale()
            await turns(len(TURNS))
        with pytest.raises(WorkerError, match=str(cause)):
            await asked
        assert len(handles) == starts

    run(test, no_start=dict.fromkeys(range(9), cause), workers=0, max_workers=8)


def test_an_empty_pool_starts_no_worker_for_what_has_yet_to_come() -> None:
    async def test(pool: TestPool, handles: list[Handle]) -> None:
        pool.upcoming = 1000.0
        pool._scale()
        assert not handles
        asked = submit(pool, "0")
        await turns(1)
        pool._scale()
        assert await asked == ["first"]

    run(test, workers=0, max_workers=8)


def test_a_pool_whose_workers_die_over_whatever_they_are_asked_gives_up() -> None:
    async def test(pool: TestPool, _: list[Handle]) -> None:
        asked = [pool.submit(SimpleNamespace(id="0")) for _ in range(20)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(error) for error in found].count(QuarantinedError) == SET_ASIDE_IN_A_ROW
        broken = {str(error) for error in found if not isinstance(error, QuarantinedError)}
        assert len(broken) == 1
        assert broken.pop().startswith("test pool: 8 requests in a row killed their workers: request 0 is set aside: ")

    run(test, *[EngineDeadError("the device failed")] * 60, batch_size=1, in_flight=1)
