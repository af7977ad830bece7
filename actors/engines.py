"""The reasoner and the verifier as two asynchronous functions, whatever pools of workers stand behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeVar

from transformers import AutoTokenizer

from actors.pool import Pool
from actors.reasoner import reasoner_pool
from actors.verifier import verifier_pool
from sapo_ray.cache import local_checkpoint
from sapo_ray.concurrency import ordered
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.data import Trajectory
from sapo_ray.encoding import Encoded, encode
from sapo_ray.models import Calibration, parameter_count
from sapo_ray.requests import Completion, GenerateRequest
from sapo_ray.tasks import Task

Item = TypeVar("Item")
Result = TypeVar("Result")

_spent: ContextVar[Cost] = ContextVar("spent")
"""What the stream's item at hand has cost. `ordered` gives each item a task, whose children share its context."""


def spend(cost: Cost) -> None:
    """Count a cost of the item at hand."""
    total = _spent.get()
    total += cost


class Engines:
    """Both pools, what the stage in progress has cost so far, and how far it is."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self._config, self._task = config, task
        self._reasoners: Pool[GenerateRequest, Completion] | None = None
        self._verifiers: Pool[Encoded, list[float]] | None = None
        self.calibration: Calibration | None = None
        self.cost = Cost()
        self._done, self._total = 0, 0

    async def load_reasoner(self, checkpoint: str) -> None:
        """Load a reasoner into every engine, in place; the first call starts the engines.

        Raises with the engine's own cause where they cannot start.
        """
        if self._reasoners is None:
            self._reasoners = reasoner_pool(self._config.engine, checkpoint)
            await self._reasoners.start()
        else:
            await self._reasoners.broadcast("load", checkpoint)
        self._reasoner_parameters = parameter_count(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(local_checkpoint(checkpoint, weights=False))

    async def load_verifier(self, checkpoint: str) -> None:
        """Load a verifier, and its calibration if it has one; the first call starts the scoring workers."""
        if self._verifiers is None:
            self._verifiers = verifier_pool(self._config.verifier, checkpoint)
            await self._verifiers.start()
        else:
            await self._verifiers.broadcast("load", checkpoint)
        self._verifier_parameters = parameter_count(checkpoint)
        self.calibration = Calibration.load(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(local_checkpoint(checkpoint, weights=False))

    async def reset_prefix_cache(self) -> None:
        """Forget every prompt the engines have seen."""
        await self._pool().broadcast("reset_prefix_cache")

    async def close(self) -> None:
        for pool in (self._reasoners, self._verifiers):
            if pool is not None:
                await pool.close()

    @property
    def has_verifier(self) -> bool:
        return self._verifiers is not None

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion by the reasoner."""
        completion = await self._pool().submit(request)
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

    async def score(self, trajectory: Trajectory) -> tuple[float, ...]:
        """ĉ_j for every step of a trajectory, from one forward pass of the verifier. Raises where none is loaded."""
        if self._verifiers is None:
            raise RuntimeError(f"trajectory {trajectory.id} cannot be scored: no verifier is loaded")
        encoded = encode(self.tokenizer, self._task.prompt(trajectory.question), trajectory.steps)
        scores = await self._verifiers.submit(encoded)
        spend(Cost(scored_tokens=len(encoded.ids), flops=2.0 * self._verifier_parameters * len(encoded.ids)))
        return tuple(scores)

    def _pool(self) -> Pool[GenerateRequest, Completion]:
        if self._reasoners is None:
            raise RuntimeError("no reasoner is loaded")
        return self._reasoners

    def begin(self, total: int) -> None:
        """A stage of `total` items begins: its cost and progress start at nothing."""
        self.cost, self._done, self._total = Cost(), 0, total

    async def stream(self, items: Sequence[Item], work: Callable[[Item], Awaitable[Result]]) -> AsyncIterator[Result]:
        """`ordered` over the items, `questions_in_flight` at a time, counted as progress.

        `cost` grows by what an item cost when it is yielded: so it is at any time that of the items done so far, and
        what a restart does again is not counted twice.
        """

        async def metered(item: Item) -> tuple[Result, Cost]:
            cost = Cost()
            _spent.set(cost)
            return await work(item), cost

        async with aclosing(ordered(items, metered, self._config.ray.questions_in_flight)) as results:
            async for result, cost in results:
                self._done += 1
                self.cost += cost
                yield result

    def progress(self) -> dict[str, Any]:
        return {"done": self._done, "total": self._total, "tokens": self.cost.generated_tokens}
