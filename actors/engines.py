"""The reasoner, the verifier and the sandbox as asynchronous functions, whatever pools of workers stand behind them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from actors import logs
from actors.errors import QuarantinedError
from actors.executor import executor_pool
from actors.null import null_reasoner_pool, null_verifier_pool
from actors.pool import ElasticPool
from actors.reasoner import reasoner_pool
from actors.telemetry import PUBLISH_SECONDS, Telemetry
from actors.verifier import verifier_pool
from sapo_ray.cache import local_checkpoint
from sapo_ray.concurrency import ordered
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.data import LabelledTrajectory, Question, Trajectory
from sapo_ray.encoding import encode
from sapo_ray.models import Calibration, load_tokenizer, parameter_count
from sapo_ray.requests import Completion, ExecuteRequest, GenerateRequest, ScoreRequest
from sapo_ray.sandbox import Verdict
from sapo_ray.tasks import Task

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_spent: ContextVar[tuple[Cost, ...]] = ContextVar("spent")
"""The sums that the stream's item at hand counts in. `ordered` gives each item a task, whose children share them."""


def spend(cost: Cost) -> None:
    """Count a cost of the item at hand."""
    for total in _spent.get():
        total += cost


@dataclass(frozen=True, slots=True)
class Quarantine:
    """An item of a stage that was left out, because workers died over one of its requests."""

    question_id: str
    request_id: str
    cause: str
    log_tail: str


class Engines:
    """The pools, what the stage in progress has cost so far, how far it is, and what it had to leave out."""

    def __init__(self, config: RunConfig, task: Task, run: str) -> None:
        """`run` is the run's name in logs and metrics."""
        self._config, self._task, self._run = config, task, run
        self._telemetry = Telemetry(run)
        self._publishing: asyncio.Task[None] | None = None
        engine, verifier, scaling = config.engine, config.verifier, config.scaling
        self._reasoners = reasoner_pool(engine, scaling) if engine.kind else null_reasoner_pool(config)
        attention = config.model.attention
        self._verifiers = verifier_pool(verifier, attention, scaling) if verifier.kind else null_verifier_pool(config)
        self._executors = executor_pool(config.executor, config.sandbox, scaling)
        self.has_verifier = False
        self.calibration: Calibration | None = None
        self._spent, self._published = Cost(), Cost()
        self.begin(0)

    def enter(self, stage: str) -> None:
        """What is logged from now on is logged for this stage. Publishing metrics starts with the first."""
        logs.enter(self._run, stage)
        for pool in self._pools:
            pool.enter(self._run, stage)
        self._publishing = self._publishing or asyncio.create_task(self._keep_publishing())

    async def load_reasoner(self, checkpoint: str) -> None:
        """Load a reasoner into every engine, in place; the first call starts the engines, and what its programs run in.

        Raises with the engine's own cause where they cannot start.
        """
        if self._config.runs_programs:
            await self._executors.start()
        await self._reasoners.load(checkpoint)
        self._reasoner_parameters = parameter_count(checkpoint)
        self.tokenizer = load_tokenizer(local_checkpoint(checkpoint, weights=False))

    async def load_verifier(self, checkpoint: str) -> None:
        """Load a verifier, and its calibration if it has one; the first call starts the scoring workers."""
        await self._verifiers.load(checkpoint)
        self.has_verifier = True
        self._verifier_parameters = parameter_count(checkpoint)
        self.calibration = Calibration.load(checkpoint)
        self.tokenizer = load_tokenizer(local_checkpoint(checkpoint, weights=False))

    async def reset_prefix_cache(self) -> None:
        """Forget every prompt the engines have seen."""
        await self._reasoners.broadcast("reset_prefix_cache")

    async def pause(self) -> None:
        """Give the workers' place to others."""
        for pool in self._pools:
            await pool.pause()

    async def resume(self) -> None:
        """Have the workers back."""
        for pool in self._pools:
            await pool.resume()

    async def close(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
        for pool in self._pools:
            await pool.close()

    @property
    def _pools(self) -> tuple[ElasticPool[Any, Any], ...]:
        executors = [self._executors] if self._config.runs_programs else []
        return self._reasoners, self._verifiers, *executors

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion by the reasoner."""
        self._asked[self._reasoners] += 1
        completion = await self._reasoners.submit(request)
        computed = completion.prompt_tokens - completion.cached_tokens + completion.generated_tokens
        spend(
            Cost(
                prompt_tokens=completion.prompt_tokens,
                cached_tokens=completion.cached_tokens,
                generated_tokens=completion.generated_tokens,
                flops=2.0 * self._reasoner_parameters * computed,
            )
        )
        return completion

    async def execute(self, request: ExecuteRequest) -> Verdict:
        """The verdict on one program."""
        self._asked[self._executors] += 1
        verdict = await self._executors.submit(request)
        timeouts = int(verdict.verdict == "timeout")
        spend(Cost(programs=1, program_timeouts=timeouts, program_seconds=verdict.seconds))
        return verdict

    async def score(self, trajectory: Trajectory) -> tuple[float, ...]:
        """ĉ_j for every step of a trajectory, from one forward pass of the verifier.

        Raises RuntimeError where none is loaded, ValueError for a score that is no number.
        """
        if not self.has_verifier:
            raise RuntimeError(f"trajectory {trajectory.id} cannot be scored: no verifier is loaded")
        self._asked[self._verifiers] += 1
        encoded = encode(self.tokenizer, self._task.prompt(trajectory.question), trajectory.steps)
        scores = await self._verifiers.submit(ScoreRequest(trajectory.id, encoded))
        spend(Cost(scored_tokens=len(encoded.ids), flops=2.0 * self._verifier_parameters * len(encoded.ids)))
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"trajectory {trajectory.id} has scores that are no numbers, {scores}: V has diverged")
        return tuple(scores)

    def begin(self, total: int, cost: Cost | None = None, quarantined: Sequence[Quarantine] = ()) -> None:
        """A stage of `total` items begins; or is gone on with, after items of this cost and some that were left out."""
        logger.info("%d items to do", total)
        self.cost, self.quarantined = cost or Cost(), list(quarantined)
        self._asked: Counter[ElasticPool[Any, Any]] = Counter()
        self._done, self._begun, self._total = 0, 0, total

    async def stream(
        self, items: Sequence[Item], work: Callable[[Item], Awaitable[Result]]
    ) -> AsyncIterator[tuple[Item, Result]]:
        """Every item that is not left out with its result, as `attempts` has them."""
        async with aclosing(self.attempts(items, work)) as attempts:
            async for item, result in attempts:
                if result is not None:
                    yield item, result

    async def attempts(
        self, items: Sequence[Item], work: Callable[[Item], Awaitable[Result]]
    ) -> AsyncGenerator[tuple[Item, Result | None], None]:
        """Every item with its result, in their order, `questions_in_flight` for each rollout worker at a time.

        An item over whose requests workers died again and again is left out: it has None for a result and is noted in
        `quarantined`. That and `cost` grow when an item is yielded: so they are at any time those of the items done so
        far, and what a restart does again is not counted twice.
        """

        async def attempt(item: Item) -> tuple[Item, Result | Quarantine, Cost]:
            self._begun += 1
            self._look_ahead()
            cost = Cost()
            _spent.set((cost, self._spent))
            try:
                return item, await work(item), cost
            except QuarantinedError as error:
                return item, Quarantine(_question_id(item), error.request_id, error.cause, error.log_tail), cost

        try:
            async with aclosing(ordered(items, attempt, self._window)) as results:
                async for item, result, cost in results:
                    self._done += 1
                    self.cost += cost
                    if isinstance(result, Quarantine):
                        self.quarantined.append(result)
                        yield item, None
                    else:
                        yield item, result
        finally:
            for pool in self._pools:  # what comes next, nobody knows: no worker is held or started for it
                pool.upcoming = 0

    def progress(self) -> dict[str, Any]:
        """Counts of the stage in progress, and what has happened to workers since the last call, a line each."""
        stats = {pool.name: pool.stats() for pool in self._pools}
        return {
            "done": self._done,
            "total": self._total,
            "tokens": self.cost.generated_tokens,
            "unplaced": {name: s.unplaced for name, s in stats.items() if s.unplaced},
            "events": [event for pool in self._pools for event in pool.events()],
        }

    async def _keep_publishing(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(PUBLISH_SECONDS)

    def _publish(self) -> None:
        """Tell Ray's metrics what has happened since the last call, on items under way, too."""
        self._telemetry.spent(self._spent, self._published)
        self._telemetry.pools(self._pools)
        self._published = replace(self._spent)

    def _window(self) -> int:
        return self._config.ray.questions_in_flight * max(1, self._reasoners.stats().ready)

    def _look_ahead(self) -> None:
        """Tell the pools what the items that have not begun will ask of them, if they are like those that have."""
        for pool in self._pools:
            pool.upcoming = max(0, self._total - self._begun) * self._asked[pool] / self._begun


def _question_id(item: object) -> str:
    """The question of a stage's item: a question, a trajectory with or without labels, or a tuple that begins so."""
    match item:
        case (first, *_):
            return _question_id(first)
        case Question(id=name) | Trajectory(question_id=name):
            return name
        case LabelledTrajectory(trajectory=trajectory):
            return trajectory.question_id
    raise TypeError(f"{type(item).__name__} has no question")
