"""`math`: questions with a number or an expression for an answer, from any data set: GSM8K, MATH, SVAMP, your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sapo_ray.errors import SapoError
from sapo_ray.tasks.answers import Convention, read_answer, same_answer, same_text
from sapo_ray.tasks.dataset import DataConfig, DataTask, Record, field_of
from sapo_ray.tasks.sources import SourceConfig


@dataclass(kw_only=True)
class MathConfig(DataConfig):
    """Questions from data sets, whose answers are compared by math-verify."""

    kind: Literal["math"] = "math"
    """Questions from data sets, whose answers are compared as mathematics."""
    convention: Convention = "hashes"
    """How a solution states its answer: `hashes`, in a last line `#### 72` (GSM8K), or `boxed`, in `\\boxed{72}`
    (MATH). A solution without the one is read by the other."""
    compare: Literal["math", "text"] = "math"
    """`math`: plain numbers by their values, all else by math-verify. `text`: the same letters, whatever their case."""


class Math(DataTask):
    """The `math` task."""

    config: MathConfig
    slow_to_judge = True  # math-verify takes 5 ms an answer, and seconds over some

    def variables(self) -> dict[str, object]:
        return {"convention": self.config.convention}

    def gold(self, source: SourceConfig, record: Record) -> str:
        text = field_of(source, "answer", record).strip()
        return read_answer(text, self.config.convention) or text

    def learned(self, solution: str, gold: str) -> str:
        """With a last line that states the answer, where it does not state one itself."""
        stated = self.answer([solution])
        if stated is None:
            hashes = self.config.convention == "hashes"
            return f"{solution}\n#### {gold}" if hashes else f"{solution}\nThe answer is $\\boxed{{{gold}}}$."
        if not self.is_correct(stated, gold):
            raise SapoError(f"the solution comes to {stated!r} and not to the answer {gold!r}")
        return solution

    def answer(self, steps: Sequence[str]) -> str | None:
        return read_answer("".join(steps), self.config.convention)

    def is_correct(self, answer: str | None, gold: str) -> bool:
        if answer is None:
            return False
        return same_answer(answer, gold) if self.config.compare == "math" else same_text(answer, gold)
