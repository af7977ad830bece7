"""A pool of Ray actors behind one asynchronous function: single requests in, single results out.

Requests that wait together travel together: a worker with room takes an even share of what is waiting, up to
`batch_size`, and no timer holds anything back. A request that arrives while the workers are full waits its turn; while
too many wait, `submit` itself does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from sapo_ray.errors import SapoError

Request = TypeVar("Request")
Result = TypeVar("Result")

RATE_WINDOW = 30.0
"""Seconds over which `PoolStats.rate` is taken."""


class WorkerError(SapoError):
    """A worker died or could not do what it was asked. One line: the pool, the worker, what it did, and the cause."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts of workers and of requests; `rate` is requests finished per second, lately."""

    workers: int
    queued: int
    in_flight: int
    done: int
    rate: float


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    actor: Any
    calls: int = 0
    requests: int = 0


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Request, Result]):
    request: Request
    result: asyncio.Future[Result]


@dataclass(slots=True)
class _Meter:
    """Requests done, in all and within the last `RATE_WINDOW` seconds."""

    done: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque([(time.monotonic(), 0)]))

    def count(self, requests: int) -> None:
        self.done += requests
        self.recent.append((time.monotonic(), self.done))
        while self.recent[0][0] < self.recent[-1][0] - RATE_WINDOW:
            self.recent.popleft()

    def rate(self) -> float:
        (start, before), now = self.recent[0], time.monotonic()
        return (self.done - before) / (now - start) if now > start else 0.0


class Pool(Generic[Request, Result]):
    """Workers of one class, each a Ray actor with `ready()` and one batch method: list of requests -> list of results.

    An exception in the list fails its request alone. What a call raises fails all requests of that call, and a worker's
    death those it held, with a WorkerError that names the cause. Lives in one asyncio loop.
    """

    def __init__(
        self,
        name: str,
        make_actor: Callable[[], Any],
        method: str,
        *,
        workers: int,
        batch_size: int,
        in_flight: int,
    ) -> None:
        self._name, self._make_actor, self._method = name, make_actor, method
        self._size, self._batch_size, self._in_flight = workers, batch_size, in_flight
        self._workers: list[_Worker] = []
        self._queue: deque[_Waiting[Request, Result]] = deque()
        self._room = asyncio.Semaphore(2 * workers * batch_size * in_flight)
        self._exclusive = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()
        self._meter = _Meter()
        self._woken = False

    async def start(self) -> None:
        """Start the workers and wait until all are ready. Raises WorkerError with the cause; then none is left."""
        self._workers = [_Worker(number, self._make_actor()) for number in range(self._size)]
        try:
            await self.broadcast("ready")
        except WorkerError:
            await self.close()
            raise

    async def submit(self, request: Request) -> Result:
        """The result of one request. Waits for room while the pool holds twice what its workers can have in flight."""
        async with self._room:
            waiting = _Waiting[Request, Result](request, asyncio.get_running_loop().create_future())
            self._queue.append(waiting)
            self._wake()
            return await waiting.result

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker, between requests: those in flight end first, those queued wait.

        Raises WorkerError where a worker fails.
        """
        async with self._exclusive:
            while self._calls:
                await asyncio.wait(self._calls)
            asked = [self._ask(worker, method, *args) for worker in self._workers]
            answers = await asyncio.gather(*asked, return_exceptions=True)
        self._wake()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def close(self) -> None:
        """End the workers. Requests that are still waiting fail."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []
        self._fail_queue(f"{self._name} pool: closed")

    def stats(self) -> PoolStats:
        in_flight = sum(worker.requests for worker in self._workers)
        return PoolStats(len(self._workers), len(self._queue), in_flight, self._meter.done, self._meter.rate())

    def _wake(self) -> None:
        """Dispatch after everything that is ready to run now has run: what is submitted together then goes together."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._woken = False
        if not self._workers:
            self._fail_queue(f"{self._name} pool: no worker is left")
        if self._exclusive.locked() or not (free := self._free()):
            return
        share = min(self._batch_size, math.ceil(len(self._queue) / len(free)))
        while self._queue and (free := self._free()):
            self._send(min(free, key=lambda worker: worker.requests), share)

    def _free(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.calls < self._in_flight]

    def _send(self, worker: _Worker, count: int) -> None:
        batch = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        batch = [waiting for waiting in batch if not waiting.result.done()]  # those whose caller has given up
        if batch:
            worker.calls += 1
            worker.requests += len(batch)
            call = asyncio.create_task(self._call(worker, batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, worker: _Worker, batch: list[_Waiting[Request, Result]]) -> None:
        try:
            results = await self._ask(worker, self._method, [waiting.request for waiting in batch])
        except WorkerError as error:
            self._fail(batch, error)
        else:
            self._deliver(worker, batch, results)
        worker.calls -= 1
        worker.requests -= len(batch)
        self._meter.count(len(batch))
        self._wake()

    async def _ask(self, worker: _Worker, method: str, *args: Any) -> Any:
        """Call a worker; one that died is taken off the list."""
        try:
            return await getattr(worker.actor, method).remote(*args)
        except RayActorError as error:
            if worker in self._workers:
                self._workers.remove(worker)
            raise self._error(worker, method, error) from error
        except Exception as error:  # what the method raised, or Ray could not send
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise self._error(worker, method, cause) from error

    def _error(self, worker: _Worker, method: str, cause: Exception) -> WorkerError:
        kind = "" if isinstance(cause, SapoError) else f"{type(cause).__name__}: "
        what = " ".join(str(cause).split())
        return WorkerError(f"{self._name} worker {worker.number}: {method} failed: {kind}{what}")

    def _deliver(
        self, worker: _Worker, batch: list[_Waiting[Request, Result]], results: Sequence[Result | Exception]
    ) -> None:
        if len(results) != len(batch):
            error = ValueError(f"{len(results)} results for {len(batch)} requests")
            return self._fail(batch, self._error(worker, self._method, error))
        for waiting, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                self._fail([waiting], result)
            elif not waiting.result.done():
                waiting.result.set_result(result)

    def _fail_queue(self, why: str) -> None:
        self._fail(self._queue, WorkerError(why))
        self._queue.clear()

    @staticmethod
    def _fail(requests: Iterable[_Waiting[Request, Result]], error: Exception) -> None:
        for waiting in requests:
            if not waiting.result.done():
                waiting.result.set_exception(error)
