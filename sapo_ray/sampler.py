"""From questions to trajectories: S_i = Sample(M, questions) (SAPO.md's algorithm 1; paper section 3.1)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from sapo_ray.concurrency import together
from sapo_ray.data import Question, Trajectory, seed_of
from sapo_ray.encoding import Encoded, encode
from sapo_ray.requests import Completion, ExecuteRequest, GenerateRequest, Sampling
from sapo_ray.sandbox.program import Verdict
from sapo_ray.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Generate = Callable[[GenerateRequest], Awaitable[Completion]]
Execute = Callable[[ExecuteRequest], Awaitable[Verdict]]


@dataclass(kw_only=True)
class SamplingConfig:
    samples: int = 4
    """Trajectories sampled per question (K)."""
    temperature: float = 1.0
    """Sampling temperature, of trajectories and of rollouts; at most 2."""
    top_p: float = 1.0
    """Nucleus of the distribution that is sampled from; 1 takes all of it."""
    max_tokens: int = 96
    """Most tokens a solution may have, one that goes on from a prefix included; a longer one is truncated."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a solution; the end-of-sequence token always does."""
    min_unique: int = 1
    """Go on sampling a question until it has this many different trajectories …"""
    max_samples: int = 4
    """… or this many samples in all. Repeats of a trajectory are dropped."""
    questions: int = 0
    """Questions a round samples from, a new part of the pool each round as far as it reaches; 0 takes all of them."""

    def __post_init__(self) -> None:
        for key in ("samples", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("min_unique", "questions"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}; it must lie between 0 and 2, which vLLM allows")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        if "" in self.stop:
            raise ValueError(f"stop is {self.stop}; an empty string cannot end a solution")
        if self.max_samples < self.samples:
            raise ValueError(f"max_samples is {self.max_samples}; it must be at least samples = {self.samples}")
        if self.min_unique > self.max_samples:
            raise ValueError(f"min_unique is {self.min_unique}; it must be at most max_samples = {self.max_samples}")

    def decoding(self, *, greedy: bool = False) -> Sampling:
        """How one request is decoded."""
        return Sampling(
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop),
        )


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first steps of a question's solution, encoded once for all completions that go on from them."""

    question: Question
    steps: tuple[str, ...]
    encoded: Encoded

    def until(self, step: int) -> Prefix:
        """The part of this prefix that ends with `step`; -1 is the bare question."""
        return Prefix(self.question, self.steps[: step + 1], self.encoded.until(step))


@dataclass(frozen=True, slots=True)
class Solution:
    """A completion, read: the steps it adds to its prefix, and the answer of the whole."""

    steps: tuple[str, ...]
    answer: str | None
    correct: bool
    truncated: bool


class Solver:
    """Asks the reasoner to go on from prefixes of a question's solution, and reads what comes back."""

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        generate: Generate,
        seed: int,
        execute: Execute | None = None,
    ) -> None:
        """`execute` runs the programs of a task whose answers are programs."""
        self.task, self._tokenizer, self._generate, self._seed = task, tokenizer, generate, seed
        self._execute = execute

    def prefix(self, question: Question, steps: tuple[str, ...] = ()) -> Prefix:
        """A prefix of a solution of `question`; the bare question without `steps`."""
        return Prefix(question, steps, encode(self._tokenizer, self.task.prompt(question.text), steps))

    async def solve(self, prefix: Prefix, request_id: str, sampling: Sampling) -> Solution:
        """One completion of a prefix, sampled with the seed that belongs to the request's id.

        The prefix counts towards `max_tokens`; where it leaves nothing, one token is sampled. What the limit cuts off
        loses its last step, which is unfinished.
        """
        ids, prompt_length = prefix.encoded.ids, prefix.encoded.prompt_length
        left = sampling.max_tokens - (len(ids) - prompt_length)
        completion = await self._generate(
            GenerateRequest(
                id=request_id,
                prompt_ids=ids,
                seed=seed_of(self._seed, request_id),
                sampling=replace(sampling, max_tokens=max(1, left)),
            )
        )
        steps = self.task.split(completion.text)
        if not completion.finished:
            steps = steps[:-1]
        answer = self.task.answer([*prefix.steps, *steps]) if completion.finished else None
        correct = await self._is_correct(request_id, answer, prefix.question.answer)
        return Solution(steps, answer, correct, not completion.finished)

    async def _is_correct(self, request_id: str, answer: str | None, gold: str) -> bool:
        program = self.task.program(answer, gold)
        if program is None:
            judge = self.task.is_correct
            return await asyncio.to_thread(judge, answer, gold) if self.task.slow_to_judge else judge(answer, gold)
        if self._execute is None:
            raise RuntimeError(
                f"request {request_id}: nothing runs its program; task.programs must say that there are some"
            )
        return (await self._execute(ExecuteRequest(request_id, program))).passed


class Samples(NamedTuple):
    """A question's different trajectories, and how many samples repeated one or had no finished step."""

    trajectories: list[Trajectory]
    repeats: int
    empty: int


class Sampler:
    """Samples whole solutions of questions."""

    def __init__(self, solver: Solver, config: SamplingConfig) -> None:
        self._solver, self._config = solver, config

    async def sample(
        self, question: Question, stage: str, numbers: Sequence[int], *, greedy: bool = False
    ) -> list[Trajectory]:
        """The samples with these numbers, repeats and empty ones included."""
        prefix, decoding = self._solver.prefix(question), self._config.decoding(greedy=greedy)
        return await together(self._one(prefix, f"{stage}/{question.id}/{k}", decoding) for k in numbers)

    async def unique(self, question: Question, stage: str) -> Samples:
        """At least `samples` samples, and on until `min_unique` different ones are found or `max_samples` drawn.

        Solutions without a finished step and repeats of an earlier sample are dropped, and counted.
        """
        drawn, repeats, empty, found = 0, 0, 0, dict[tuple[str, ...], Trajectory]()
        while drawn < self._config.samples or (
            len(found) < self._config.min_unique and drawn < self._config.max_samples
        ):
            more = min(self._config.samples, self._config.max_samples - drawn)
            for trajectory in await self.sample(question, stage, range(drawn, drawn + more)):
                empty += not trajectory.steps
                if trajectory.steps:
                    repeats += trajectory.steps in found
                    found.setdefault(trajectory.steps, trajectory)
            drawn += more
        return Samples(list(found.values()), repeats, empty)

    async def _one(self, prefix: Prefix, request_id: str, decoding: Sampling) -> Trajectory:
        solution = await self._solver.solve(prefix, request_id, decoding)
        return Trajectory(
            id=request_id,
            question_id=prefix.question.id,
            question=prefix.question.text,
            steps=solution.steps,
            answer=solution.answer,
            correct=solution.correct,
            truncated=solution.truncated,
        )


def round_questions(pool: Sequence[Question], round_number: int, count: int) -> Sequence[Question]:
    """The questions that a round samples from: the next `count` of the pool, round after round; 0 takes all of it."""
    if not 0 < count < len(pool):
        return pool
    return [pool[(round_number * count + i) % len(pool)] for i in range(count)]


def original_trajectory(question: Question) -> Trajectory:
    """A question's worked solution as a trajectory. Raises ValueError where it has none."""
    if question.solution is None:
        raise ValueError(f"question {question.id} has no worked solution")
    return Trajectory(
        id=f"original/{question.id}",
        question_id=question.id,
        question=question.text,
        steps=question.solution,
        answer=question.solution_answer or question.answer,
        correct=question.solution_answer is None,
        source="original",
    )
