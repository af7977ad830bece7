"""What a task is: questions, a prompt, a way to split a solution into steps, and a way to judge its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from sapo_ray.data import Question
from sapo_ray.encoding import Prompt
from sapo_ray.sandbox.program import Program

Split = Literal["worked", "pool", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class OracleLabels:
    """True labels of every step of a solution, 1 or 0 each.

    `strict`: the step itself is right, given what is written before it. `reachable`: a perfect reasoner that goes on
    from here, taking what is written as true, still reaches the gold answer. A right step after an error is `strict`
    and not `reachable`; an error that a later step makes good, or that does not touch the answer, the other way round.
    Prefix labels c_j estimate `reachable`.
    """

    strict: tuple[int, ...]
    reachable: tuple[int, ...]


class Task(Protocol):
    """One task. All methods are pure, so any process can build the task from the config and use it.

    A class that derives from this one has no alphabet, no programs, no oracle and no remarks unless it says otherwise,
    and its answers are judged in no time.
    """

    alphabet: str | None = None
    """Every character that a question or a solution can hold: the tokenizer of a model that starts at random. None: the
    task needs a model that there is already."""
    slow_to_judge: bool = False
    """Whether `is_correct` may take milliseconds. It is called in threads then, several at a time."""

    def questions(self, split: Split) -> Sequence[Question]:
        """The questions of a split, in a fixed order. Only `worked` ones carry solutions."""

    def prompt(self, question: str) -> Prompt:
        """What the reasoner goes on from."""

    def split(self, text: str) -> tuple[str, ...]:
        """The steps of a completion; joined with nothing between them they give `text` back."""

    def answer(self, steps: Sequence[str]) -> str | None:
        """The final answer a solution states, or None."""

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """Whether an answer agrees with the gold answer, or with another. None never does. Not asked of programs."""

    def program(self, answer: str | None, gold: str) -> Program | None:
        """Where answers are programs: the one whose verdict says whether the answer is right. None: `is_correct` says
        it, as it does of no answer."""
        return None

    def oracle(self, question: Question, steps: Sequence[str]) -> OracleLabels | None:
        """True step labels, or None where the task has no oracle."""
        return None

    def remarks(self) -> Sequence[str]:
        """What a person should know of the questions, such as how many were left out, a line each."""
        return ()
