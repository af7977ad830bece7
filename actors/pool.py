"""An elastic pool of Ray actors behind one asynchronous function: single requests in, single results out.

Requests that wait together travel together: a worker with room takes an even share of what is waiting, up to
`batch_size`, and no timer holds anything back. A request that arrives while the workers are full waits its turn; while
too many wait, `submit` itself does.

A dead or hung worker is replaced and what it held is asked of others. Requests that were on a worker when it died are
under suspicion: they go to a worker of their own, fewer at a time each time, until the one that kills is alone with it
and is set aside.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

from actors.errors import DEATHS, KILLED, AnswerLostError, EngineDeadError, HungError, QuarantinedError, WorkerError
from actors.logs import about
from actors.worker import Place, is_placed, log_tail
from sapo_ray.errors import one_line, told
from sapo_ray.requests import PoolConfig
from sapo_ray.scaling import Growth, Load, Meter, ScalingConfig, growth, tried_together

FAILED_STARTS = 3
"""Workers that may fail one after the other while they start, before the pool gives up."""
SET_ASIDE_IN_A_ROW = 8
"""Requests that may be set aside one after the other, with none answered in between, before the pool gives up: then it
is not they that kill."""
_TICK = 1.0
_REST = 60.0  # seconds without growth after a worker could not start that the pool can do without
_SCHEDULING = 5.0  # a worker that Ray has not placed after so many seconds waits for a node

logger = logging.getLogger(__name__)


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Request = TypeVar("Request", bound=HasId)
Result = TypeVar("Result")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts of workers and requests; `rate` is requests finished per second and busy worker, lately.

    `unplaced` of the `starting` workers wait for a node. `counts`: dead (hung ones among them), hung,
    retries, quarantined, hedged, growths (decisions to grow), grown and shrunk (workers).
    """

    ready: int
    starting: int
    unplaced: int
    queued: int
    in_flight: int
    done: int
    rate: float | None
    counts: dict[str, int]


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    actor: Any
    version: int
    created: float = field(default_factory=time.monotonic)
    ready: bool = False
    place: Place | None = None
    calls: int = 0
    requests: int = 0
    idle_since: float = 0.0
    lost: Exception | None = None


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Request, Result]):
    request: Request
    result: asyncio.Future[Result]
    kills: int = 0
    lost_nodes: int = 0
    sent: float = 0.0
    holders: list[_Worker] = field(default_factory=list)


class ElasticPool(Generic[Request, Result]):
    """`workers` to `max_workers` actors, PoolWorkers with `ready()`, `load(checkpoint)` and a batch method: requests ->
    results.

    An exception in the list fails its request alone; what a call raises fails all requests of that call, with a
    WorkerError that names the cause. Where the least number of workers cannot start, or workers die over whatever they
    are asked, the pool breaks: everything that waits fails with the reason. Lives in one asyncio loop. `upcoming` is
    what its users expect to submit yet.
    """

    def __init__(
        self,
        name: str,
        make_actor: Callable[[str], Any],
        method: str,
        config: PoolConfig,
        scaling: ScalingConfig,
        *,
        sleeps: bool = False,
    ) -> None:
        self._sleeps = sleeps
        self.name, self._make_actor, self._method = name, make_actor, method
        self._least, self._most, self._scaling = config.workers, config.most_workers, scaling
        self._batch_size, self._in_flight = config.batch_size, config.in_flight
        self.upcoming = 0.0
        self._checkpoint: str | None = None
        self._version = 0
        self._workers: list[_Worker] = []
        self._made = 0
        self._queue: deque[_Waiting[Request, Result]] = deque()
        self._suspects: deque[_Waiting[Request, Result]] = deque()
        self._isolated: _Worker | None = None
        self._flying: set[_Waiting[Request, Result]] = set()
        self._room = asyncio.Semaphore(2 * self._most * self._batch_size * self._in_flight)
        self._exclusive = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._broken: WorkerError | None = None
        self._failed_starts = self._set_aside_in_a_row = 0
        self._was_up, self._rest_until = False, 0.0  # up: with the least number of workers, and one at least
        self._meter, self._counts = Meter(), Counter[str]()
        self._events: list[str] = []
        self._run = self._stage = "-"
        self._woken = self._paused = False

    def enter(self, run: str, stage: str) -> None:
        """What is submitted from now on is for this stage of this run: for the workers' logs."""
        self._run, self._stage = run, stage
        for worker in self._workers:
            worker.actor.enter.remote(run, stage)

    async def load(self, checkpoint: str) -> None:
        """Have every worker hold `checkpoint`, between requests; the first call starts the least number of workers.

        Returns when those are ready. Raises WorkerError with the cause where a worker cannot start or load, which
        breaks the pool.
        """
        if self._paused and self._sleeps:
            await self.resume()  # an engine that sleeps takes no weights
        first, self._checkpoint = self._checkpoint is None, checkpoint
        self._version += 1
        if first:
            self._spawn(self._monitor())
        try:
            await self._exclusively(self._reload)
        except WorkerError as error:  # some workers hold it by now, and others do not
            self._break(error)
            raise
        await self.resume()

    async def start(self) -> None:
        """As `load`, of workers that hold no checkpoint; a second call does nothing."""
        if self._checkpoint is None:
            await self.load("")

    async def submit(self, request: Request) -> Result:
        """The result of one request. Waits for room while the pool holds twice what its workers can have in flight."""
        async with self._room:
            if self._broken:
                raise self._broken
            # Not _Waiting[…](…), which is slow: it sets an attribute that has no slot, and catches the error.
            waiting: _Waiting[Request, Result] = _Waiting(request, asyncio.get_running_loop().create_future())
            self._queue.append(waiting)
            self._wake()
            return await waiting.result

    async def broadcast(self, method: str) -> None:
        """Call a method of every ready worker, between requests: those in flight end first, those queued wait.

        A worker that dies is replaced. Raises WorkerError for what a worker raises.
        """
        await self._exclusively(lambda worker: self._ask(worker, method))

    async def pause(self) -> None:
        """Give the workers' place to others once what they have in flight is done: end them, or put them to sleep.

        What is submitted from now on waits for `resume`.
        """
        self._paused = True
        await (self.broadcast("sleep") if self._sleeps else self._exclusively(self._end))
        for worker in [worker for worker in self._workers if not worker.ready]:  # those that are still starting
            self._remove(worker)

    async def resume(self) -> None:
        """Have the least number of workers up again, and wait until they are ready. Raises what broke the pool.

        A pool that was never given a checkpoint stays empty.
        """
        if self._checkpoint is None:
            self._paused = False
            return
        if self._paused and self._sleeps:
            await self.broadcast("wake")
        self._paused = False
        self._wake()
        self._scale()
        while not self._broken and sum(worker.ready for worker in self._workers) < self._least:
            self._changed.clear()
            await self._changed.wait()
        if self._broken:
            raise self._broken

    async def close(self) -> None:
        """End the workers. Requests that are still waiting fail."""
        self._break(WorkerError(f"{self.name} pool: closed"))
        for task in (*self._tasks, *self._calls):
            task.cancel()

    def stats(self) -> PoolStats:
        ready = sum(worker.ready for worker in self._workers)
        late = time.monotonic() - _SCHEDULING
        return PoolStats(
            ready=ready,
            starting=len(self._workers) - ready,
            unplaced=sum(worker.place is None and worker.created < late for worker in self._workers),
            queued=len(self._queue) + len(self._suspects),
            in_flight=len(self._flying),
            done=self._meter.done,
            rate=self._meter.rate(),
            counts=dict(self._counts),
        )

    def events(self) -> list[str]:
        """What has happened to workers since the last call, a line each."""
        events, self._events = self._events, []
        return events

    # Workers: started, watched, lost, ended.

    async def _monitor(self) -> None:
        while not self._broken:
            self._meter.tick(sum(worker.requests > 0 for worker in self._workers))
            self._scale()
            self._hedge()
            await asyncio.sleep(_TICK)

    def _scale(self) -> None:
        if self._paused or self._broken or self._checkpoint is None:
            return
        ready = [worker for worker in self._workers if worker.ready]
        queued = len(self._queue) + len(self._suspects)
        # What is to come waits elsewhere, and needs no first worker before it is here.
        starved = not queued and (not ready or any(not worker.requests for worker in ready))
        waiting = queued + (0 if starved else self.upcoming)
        load = Load(waiting, len(ready), len(self._workers) - len(ready), self._meter.rate())
        rests = len(self._workers) >= self._least and time.monotonic() < self._rest_until
        if not rests and (decision := growth(load, self._least, self._most, self._scaling.grow_after)):
            self._grow(decision)
        long_ago = time.monotonic() - self._scaling.shrink_after
        idle = [worker for worker in ready if not worker.requests and worker.idle_since < long_ago]
        if not queued:  # nor do workers that wait for a node keep it from other pools
            idle = [w for w in self._workers if w.place is None and w.created < long_ago] + idle
        for worker in idle[: max(0, len(self._workers) - self._least)]:
            self._counts["shrunk"] += 1
            self._say(f"worker {worker.number} ends after {self._scaling.shrink_after:g} s without work")
            self._remove(worker)

    def _grow(self, decision: Growth) -> None:
        if len(self._workers) >= self._least:  # not the first ones, nor those that replace them
            self._counts.update(growths=1, grown=decision.workers)
            self._say(f"{len(self._workers)} -> {len(self._workers) + decision.workers} workers: {decision.reason}")
        assert self._checkpoint is not None
        for _ in range(decision.workers):
            worker = _Worker(self._made, self._make_actor(self._checkpoint), self._version)
            self._made += 1
            self._workers.append(worker)
            worker.actor.enter.remote(self._run, self._stage)
            self._spawn(self._start(worker))

    async def _start(self, worker: _Worker) -> None:
        try:
            worker.place = await self._place(worker)
            await self._in_time(self._make_ready(worker))
            while worker.version != self._version:  # loaded meanwhile; from here to `ready` nothing is waited for
                await self._in_time(self._reload(worker))
        except Exception as error:
            if worker in self._workers:  # not ended by the pool itself
                self._fail_start(worker, error)
        else:
            self._failed_starts = 0
            if self._paused and worker in self._workers:  # it came too late to be ended or put to sleep with the others
                return self._remove(worker)
            worker.ready, worker.idle_since = True, time.monotonic()
            self._was_up = self._was_up or self._has_enough()
            self._spawn(self._watch(worker))
            self._changed.set()
            self._wake()

    async def _place(self, worker: _Worker) -> Place:
        """Where a worker runs. It may wait for a node for as long as it takes, but once it has one, not for a word."""
        where = asyncio.ensure_future(worker.actor.where.remote())
        while not (await asyncio.wait([where], timeout=_SCHEDULING))[0] and not is_placed(worker.actor):
            pass
        return await self._in_time(where)

    def _fail_start(self, worker: _Worker, error: Exception) -> None:
        """Try again, or break the pool: over workers that it cannot do without, where that happens again and again; at
        once over what the very first ones say, such as that there is no such model. One more than those, on a bad node,
        say, ends nothing: for a while no other is asked for."""
        if self._has_enough():
            self._rest_until = time.monotonic() + _REST
            return self._lose(worker, error)
        self._failed_starts += not _node_is_lost(error)
        if self._failed_starts >= FAILED_STARTS or not (isinstance(error, DEATHS) or self._was_up):
            self._break(error if isinstance(error, WorkerError) else self._error(worker, "start", error))
        self._lose(worker, error)

    def _has_enough(self) -> bool:
        """Whether the workers that are ready could do without others."""
        return sum(worker.ready for worker in self._workers) >= max(1, self._least)

    async def _make_ready(self, worker: _Worker) -> None:
        await worker.actor.ready.remote()
        await self._reload(worker)

    async def _in_time(self, work: Awaitable[Answer]) -> Answer:
        """A worker's start, or a command to it. Raises HungError where that takes `start_within` seconds."""
        try:
            return await asyncio.wait_for(work, self._scaling.start_within)
        except TimeoutError:
            raise HungError(f"hung: no answer for {self._scaling.start_within:g} s") from None

    async def _reload(self, worker: _Worker) -> None:
        while worker.version != self._version:
            version = self._version
            await self._ask(worker, "load", self._checkpoint)
            worker.version = version

    async def _watch(self, worker: _Worker) -> None:
        """Replace a worker that has work and does nothing, or that does not answer at all."""
        limit, seen, since = self._scaling.hang_after, -1, time.monotonic()
        hung = HungError(f"hung: no progress for {limit:g} s")
        while worker in self._workers:
            await asyncio.sleep(limit / 8)
            try:
                beat = await asyncio.wait_for(worker.actor.beat.remote(), limit)
            except TimeoutError:
                return self._lose(worker, hung)
            except DEATHS as error:
                return self._lose(worker, error)
            if beat != seen or not worker.requests:
                seen, since = beat, time.monotonic()
            elif time.monotonic() - since > limit:
                return self._lose(worker, hung)

    def _lose(self, worker: _Worker, cause: Exception) -> None:
        """Take a dead worker off the list; its calls fail by themselves and are retried."""
        if worker in self._workers:
            worker.lost = cause
            self._counts.update(dead=1, hung=int(isinstance(cause, HungError)))
            self._say(f"worker {worker.number} is lost ({one_line(cause)}) and will be replaced")
            self._remove(worker)
            self._scale()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        if self._isolated is worker:
            self._isolated = None
        ray.kill(worker.actor)

    async def _end(self, worker: _Worker) -> None:
        if worker in self._workers:  # it may have been lost meanwhile
            self._remove(worker)

    def _break(self, error: WorkerError) -> None:
        self._broken = self._broken or error
        self._fail([*self._queue, *self._suspects, *self._flying], self._broken)
        self._queue.clear()
        self._suspects.clear()
        self._changed.set()
        for worker in list(self._workers):
            self._remove(worker)

    # Requests: sent, answered, retried, set aside.

    def _wake(self) -> None:
        """Dispatch after everything that is ready to run now has run: what is submitted together then goes together."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._woken = False
        if self._paused or self._exclusive.locked():
            return
        self._dispatch_suspects()
        if free := self._free():
            share = min(self._batch_size, math.ceil(len(self._queue) / len(free)))
            while self._queue and (free := self._free()):
                batch = [self._queue.popleft() for _ in range(min(share, len(self._queue)))]
                self._send(min(free, key=lambda worker: worker.requests), batch)

    def _dispatch_suspects(self) -> None:
        """Give suspects to one worker that has nothing else."""
        ready = [worker for worker in self._workers if worker.ready]
        if self._suspects and self._isolated is None and ready:
            self._isolated = min(ready, key=lambda worker: worker.requests)
        if self._isolated is None or self._isolated.calls:
            return
        if not self._suspects:
            self._isolated = None
            return
        kills = (suspect.kills for suspect in islice(self._suspects, self._batch_size))
        size = tried_together(kills, self._scaling.max_kills)
        self._send(self._isolated, [self._suspects.popleft() for _ in range(size)])

    def _free(self) -> list[_Worker]:
        return [w for w in self._workers if w.ready and w.calls < self._in_flight and w is not self._isolated]

    def _hedge(self) -> None:
        if not self._scaling.hedge_after or self._exclusive.locked():
            return
        late = time.monotonic() - self._scaling.hedge_after
        for waiting in [w for w in self._flying if w.sent < late and len(w.holders) == 1 and not w.kills]:
            if others := [worker for worker in self._free() if worker not in waiting.holders]:
                self._counts["hedged"] += 1
                self._send(min(others, key=lambda worker: worker.requests), [waiting])

    def _send(self, worker: _Worker, batch: list[_Waiting[Request, Result]]) -> None:
        batch = [waiting for waiting in batch if not waiting.result.done()]  # not those whose caller has given up
        if not batch:
            return self._wake()
        worker.calls += 1
        worker.requests += len(batch)
        for waiting in batch:
            waiting.sent = time.monotonic()
            waiting.holders.append(worker)
        self._flying.update(batch)
        call = asyncio.create_task(self._call(worker, batch))
        self._calls.add(call)
        call.add_done_callback(self._ended)

    async def _call(self, worker: _Worker, batch: list[_Waiting[Request, Result]]) -> None:
        lost: Exception | None = None
        try:
            results = await self._ask(worker, self._method, [waiting.request for waiting in batch])
        except DEATHS as error:
            # Once the pool has ended a worker, its calls tell of that; unless they know that its node is gone.
            lost = error if _node_is_lost(error) else worker.lost or error
        except WorkerError as error:
            logger.error("%s", error, extra=_about(batch))
            self._fail((waiting for waiting in batch if waiting.holders == [worker]), error)
        else:
            self._deliver(worker, batch, results)
        worker.calls -= 1
        worker.requests -= len(batch)
        worker.idle_since = time.monotonic()
        for waiting in batch:
            waiting.holders.remove(worker)
        self._flying.difference_update(waiting for waiting in batch if not waiting.holders)
        if lost:
            self._retry(worker, batch, lost)
            self._lose(worker, lost)
        self._wake()

    async def _ask(self, worker: _Worker, method: str, *args: Any) -> Any:
        """Call a worker. Raises one of DEATHS where it is beyond use, else WorkerError."""
        try:
            return await getattr(worker.actor, method).remote(*args)
        except KILLED:
            raise
        except (NodeDiedError, ObjectLostError) as error:
            raise AnswerLostError(f"its answer is lost: {told(error)}") from error
        except Exception as error:  # what the method raised, or Ray could not send
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, EngineDeadError):
                raise cause from error
            raise self._error(worker, method, cause) from error

    async def _exclusively(self, work: Callable[[_Worker], Any]) -> None:
        """Do something with every ready worker while no request is in flight."""
        async with self._exclusive:
            while self._calls:
                await asyncio.wait(self._calls)
            ready = [worker for worker in self._workers if worker.ready]
            outcomes = await asyncio.gather(*(self._in_time(work(w)) for w in ready), return_exceptions=True)
        errors = []
        for worker, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, DEATHS):
                self._lose(worker, outcome)
            elif isinstance(outcome, BaseException):
                errors.append(outcome)
        self._wake()
        if errors:
            raise errors[0]

    def _retry(self, worker: _Worker, batch: Iterable[_Waiting[Request, Result]], cause: Exception) -> None:
        """Ask others, and hold the death against what was on the worker."""
        open_ = [waiting for waiting in batch if not waiting.result.done() and not waiting.holders]
        if open_:
            logger.warning("%s worker %d died with these requests", self.name, worker.number, extra=_about(open_))
        for waiting in open_:
            self._suspect(waiting, cause)
            if waiting.kills >= self._scaling.max_kills:
                self._spawn(self._set_aside(waiting, worker, one_line(cause)))
            elif waiting.kills:
                self._suspects.append(waiting)
        self._queue.extendleft(waiting for waiting in reversed(open_) if not waiting.kills)
        self._counts["retries"] += sum(waiting.kills < self._scaling.max_kills for waiting in open_)

    def _suspect(self, waiting: _Waiting[Request, Result], cause: Exception) -> None:
        """Count a death against a request. A node that goes away is not its fault; but one that takes all memory may
        take its node along, so that the last of several losses count: of nodes that fell while the request was at work,
        with no notice, as a spot node gives."""
        if not _node_is_lost(cause):
            waiting.kills += 1
        elif isinstance(cause, RayActorError) and not cause.preempted:
            waiting.lost_nodes += 1
            waiting.kills += waiting.lost_nodes >= self._scaling.max_kills

    async def _set_aside(self, waiting: _Waiting[Request, Result], worker: _Worker, cause: str) -> None:
        self._counts["quarantined"] += 1
        self._set_aside_in_a_row += 1
        tail = await log_tail(worker.place)
        error = QuarantinedError(waiting.request.id, waiting.kills, cause, tail)
        self._say(str(error), waiting)
        self._fail([waiting], error)
        if (count := self._set_aside_in_a_row) >= SET_ASIDE_IN_A_ROW:
            self._break(WorkerError(f"{self.name} pool: {count} requests in a row killed their workers: {error}"))

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
                self._meter.done += 1
                self._set_aside_in_a_row = 0

    def _error(self, worker: _Worker, method: str, error: Exception) -> WorkerError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        return WorkerError(f"{self.name} worker {worker.number}: {method} failed: {told(cause)}")

    @staticmethod
    def _fail(requests: Iterable[_Waiting[Request, Result]], error: Exception) -> None:
        for waiting in requests:
            if not waiting.result.done():
                waiting.result.set_exception(error)

    def _say(self, what: str, *requests: _Waiting[Request, Result]) -> None:
        self._events.append(f"{self.name} pool: {what}")
        logger.info("%s", self._events[-1], extra=_about(requests))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error in a task of the pool's own breaks the pool: nobody awaits it, and requests would wait for ever."""
        self._tasks.discard(task)
        self._calls.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a task of the %s pool failed", self.name, exc_info=error)
            self._break(WorkerError(f"{self.name} pool: {type(error).__name__}: {one_line(error)}"))


def _about(requests: Iterable[_Waiting[Any, Any]]) -> dict[str, str]:
    return about(waiting.request.id for waiting in requests)


def _node_is_lost(error: Exception) -> bool:
    """Whether a worker went with its node: by no fault of its requests.

    One that is out of reach (ActorUnavailableError) may as well have died of a request, which must not be asked again
    for ever.
    """
    if isinstance(error, RayActorError):
        return error.preempted or "node has died" in str(error)
    return isinstance(error, AnswerLostError)
