"""`chain`: multi-step arithmetic modulo m, made on the spot, whose true step labels are known.

`accumulator`: one number, to which each step applies the next operation:

    7+3*7-5         7+3=0 / 0*7=0 / 0-5=5

`variables`: a straight-line program over shuffled names. Each step computes the next variable from the last one and
from a constant or a *leaf* (a name whose value the question gives), which the solver must look up:

    c=4;a=7;f=a+c;b=f*3;?b         f=a+c=7+4=1 / b=f*3=1*3=3

Both are the same thing underneath: a list of statements over named values. The answer is the last value written.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sapo_ray.data import Question
from sapo_ray.tasks.base import OracleLabels, Split

VOCABULARY = string.digits + string.ascii_lowercase + "+-*=;?\n"
"""Every character that a question or a solution can hold; the tokenizer's alphabet."""

_ACCUMULATOR = "acc"
_LEAVES = 4
_Operand = str | int


@dataclass(kw_only=True)
class ChainConfig:
    level: Literal["accumulator", "variables"] = "accumulator"
    """`accumulator`: apply the next operation to the last result. `variables`: a little program with look-ups."""
    modulus: int = 10
    """Every result is taken modulo this."""
    max_operand: int = 9
    """Constants in statements are drawn from 1 … this (below the modulus)."""
    min_steps: int = 6
    """Fewest steps of a problem."""
    max_steps: int = 8
    """Most steps of a problem, in every split but `ood`."""
    ood_min_steps: int = 9
    """Fewest steps of an `ood` problem."""
    ood_max_steps: int = 10
    """Most steps of an `ood` problem."""
    unused: int = 0
    """Assignments a `variables` question makes that its answer does not need; the solution skips them."""
    repair: bool = False
    """Let a later statement set the value anew, so that an error before it does not matter."""
    masking: bool = False
    """Let a step lose information (× 0, × a divisor of the modulus), so that two values may collide."""
    worked: int = 1500
    """Problems whose worked solutions supervised fine-tuning sees."""
    pool: int = 6000
    """Problems of which only the answer is known; the rounds sample from these."""
    validation: int = 300
    """Problems used to choose thresholds and to measure self-verification."""
    test: int = 500
    """Test problems, as long as the training ones."""
    ood: int = 200
    """Test problems with longer chains."""
    seed: int = 0
    """Seed of the problems, apart from the run's seed, so that runs can share them."""

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"modulus is {self.modulus}; it must be at least 2")
        if not 1 <= self.max_operand < self.modulus:
            raise ValueError(f"max_operand is {self.max_operand}; it must lie between 1 and {self.modulus - 1}")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"min_steps is {self.min_steps}; it must lie between 1 and max_steps = {self.max_steps}")
        if not self.max_steps < self.ood_min_steps <= self.ood_max_steps:
            raise ValueError(
                f"ood_min_steps is {self.ood_min_steps}; it must lie above max_steps = {self.max_steps} and at most "
                f"at ood_max_steps = {self.ood_max_steps}"
            )
        names = _LEAVES + self.ood_max_steps + self.unused
        if self.level == "variables" and names > len(string.ascii_lowercase):
            raise ValueError(f"ood_max_steps + unused + {_LEAVES} leaves is {names}; `variables` has only 26 names")


@dataclass(frozen=True, slots=True)
class Statement:
    """`target = left op right`; op `=` sets the target to `right`."""

    target: str
    left: _Operand
    op: str
    right: _Operand


@dataclass(frozen=True, slots=True)
class Program:
    """The values a question gives and the statements its solution works through, in order."""

    values: dict[str, int]
    statements: tuple[Statement, ...]

    def run(self, modulus: int, values: dict[str, int], start: int = 0) -> int:
        """The last value that the statements from `start` on compute, beginning with `values`."""
        values = dict(values)
        result = values[self.statements[start - 1].target] if start else 0
        for s in self.statements[start:]:
            result = values[s.target] = apply(s.op, _value(s.left, values), _value(s.right, values), modulus)
        return result


def apply(op: str, left: int, right: int, modulus: int) -> int:
    """One operation modulo `modulus`."""
    result = {"+": left + right, "-": left - right, "*": left * right, "=": right}[op]
    return result % modulus


def _value(operand: _Operand, values: dict[str, int]) -> int:
    return operand if isinstance(operand, int) else values[operand]


class Chain:
    """The `chain` task (see the module's text)."""

    def __init__(self, config: ChainConfig) -> None:
        self.config = config

    def questions(self, split: Split) -> Sequence[Question]:
        return self._splits[split]

    def prompt(self, question: str) -> str:
        return question + "\n"

    def split(self, text: str) -> tuple[str, ...]:
        return tuple(text.splitlines(keepends=True))

    def answer(self, steps: Sequence[str]) -> str | None:
        found = re.search(r"=(\d+)\n?$", steps[-1]) if steps else None
        return str(int(found[1])) if found else None

    def is_correct(self, answer: str | None, gold: str) -> bool:
        return answer == gold

    def oracle(self, question: Question, steps: Sequence[str]) -> OracleLabels:
        """True labels of every step.

        A line that is no step at all, or one too many, is wrong by both labels and leaves all values as they were. A
        line that states a value is taken at its word by `reachable`, whatever it computes it from.
        """
        program = self.parse(question.text)
        values, done = dict(program.values), 0
        strict, reachable = [], []
        for step in steps:
            stated = re.search(r"=(\d+)\n?$", step)
            if stated is None or done == len(program.statements):
                strict.append(0)
                reachable.append(0)
                continue
            statement = program.statements[done]
            strict.append(int(step.rstrip("\n") == self._line(statement, values)))
            values[statement.target] = int(stated[1]) % self.config.modulus
            done += 1
            reachable.append(int(str(program.run(self.config.modulus, values, done)) == question.answer))
        return OracleLabels(tuple(strict), tuple(reachable))

    def parse(self, text: str) -> Program:
        """The program a question's text stands for."""
        return _parse_variables(text) if self.config.level == "variables" else _parse_accumulator(text)

    def solve(self, program: Program) -> tuple[str, ...]:
        """The worked solution: one line a statement, each ended by a newline."""
        values, lines = dict(program.values), []
        for s in program.statements:
            lines.append(self._line(s, values) + "\n")
            values[s.target] = apply(s.op, _value(s.left, values), _value(s.right, values), self.config.modulus)
        return tuple(lines)

    def _line(self, s: Statement, values: dict[str, int]) -> str:
        left, right = _value(s.left, values), _value(s.right, values)
        result = apply(s.op, left, right, self.config.modulus)
        computed = f"={right}" if s.op == "=" else f"{left}{s.op}{right}={result}"
        if self.config.level == "accumulator":
            return computed
        return f"{s.target}={right}" if s.op == "=" else f"{s.target}={s.left}{s.op}{s.right}={computed}"

    @cached_property
    def _splits(self) -> dict[Split, list[Question]]:
        c = self.config
        short, long = (c.min_steps, c.max_steps), (c.ood_min_steps, c.ood_max_steps)
        sizes: dict[Split, tuple[int, tuple[int, int]]] = {
            "test": (c.test, short),
            "validation": (c.validation, short),
            "worked": (c.worked, short),
            "pool": (c.pool, short),
            "ood": (c.ood, long),
        }
        rng, seen = random.Random(c.seed), set[str]()
        return {split: self._unseen(split, n, steps, rng, seen) for split, (n, steps) in sizes.items()}

    def _unseen(
        self, split: Split, count: int, steps: tuple[int, int], rng: random.Random, seen: set[str]
    ) -> list[Question]:
        """`count` new questions. Raises ValueError where the config does not hold so many different ones."""
        made: list[Question] = []
        misses = 0
        while len(made) < count:
            text = self._draw(rng, rng.randint(*steps))
            if text in seen:
                misses += 1
                if misses > 100 * count:
                    raise ValueError(
                        f"task.{split} is {count}, but only {len(made)} more different problems are found; "
                        "ask for fewer, or raise task.max_steps or task.modulus"
                    )
                continue
            seen.add(text)
            solution = self.solve(self.parse(text))
            answer = self.answer(solution)
            assert answer is not None
            made.append(Question(f"{split}-{len(made)}", text, answer, solution if split == "worked" else None))
        return made

    def _draw(self, rng: random.Random, steps: int) -> str:
        draw = self._draw_variables if self.config.level == "variables" else self._draw_accumulator
        return draw(rng, steps)

    def _draw_accumulator(self, rng: random.Random, steps: int) -> str:
        start = rng.randrange(self.config.modulus)
        return str(start) + "".join(self._operation(rng, first=i == 0) for i in range(steps))

    def _operation(self, rng: random.Random, *, first: bool) -> str:
        """An operator and a constant. Without `masking`, multipliers are units of the ring: no two values collide."""
        op = rng.choice("+-*=" if self.config.repair and not first else "+-*")
        constants = list(range(1, self.config.max_operand + 1))
        if op == "*" and self.config.masking:
            constants = [0, *constants]
        elif op == "*":
            constants = [k for k in constants if math.gcd(k, self.config.modulus) == 1]
        return f"{op}{rng.choice(constants)}"

    def _draw_variables(self, rng: random.Random, steps: int) -> str:
        c = self.config
        names = rng.sample(string.ascii_lowercase, k=_LEAVES + steps + c.unused)
        leaves, targets, spare = names[:_LEAVES], names[_LEAVES : _LEAVES + steps], names[_LEAVES + steps :]
        given = [f"{name}={rng.randrange(c.modulus)}" for name in leaves]
        last, statements = leaves[0], []
        for i, target in enumerate(targets):
            operation = self._operation(rng, first=i == 0)
            if operation[0] == "=":
                statements.append(f"{last}{operation}")
                continue
            if operation[0] in "+-" and rng.random() < 0.5:
                statements.append(f"{target}={last}{operation[0]}{rng.choice(leaves[1:])}")
            else:
                statements.append(f"{target}={last}{operation}")
            last = target
        for name in spare:
            at = rng.randint(0, len(statements))
            statements.insert(at, f"{name}={rng.choice(leaves)}+{rng.randint(1, c.max_operand)}")
        return ";".join([*given, *statements, f"?{last}"])


def _parse_accumulator(text: str) -> Program:
    start, operations = re.fullmatch(r"(\d+)((?:[-+*=]\d+)+)", text).groups()  # type: ignore[union-attr]
    statements = tuple(
        Statement(_ACCUMULATOR, _ACCUMULATOR, op, int(k)) for op, k in re.findall(r"([-+*=])(\d+)", operations)
    )
    return Program({_ACCUMULATOR: int(start)}, statements)


def _parse_variables(text: str) -> Program:
    """Statements that the queried name does not depend on are left out: a solution skips them."""
    *assignments, query = text.split(";")
    values: dict[str, int] = {}
    statements: list[Statement] = []
    for assignment in assignments:
        target, expression = assignment.split("=", 1)
        binary = re.fullmatch(r"(\w+)([-+*])(\w+)", expression)
        if binary:
            statements.append(Statement(target, _operand(binary[1]), binary[2], _operand(binary[3])))
        elif statements:
            statements.append(Statement(target, _operand(expression), "=", _operand(expression)))
        else:
            values[target] = int(expression)
    return Program(values, _needed(statements, query[1:]))


def _operand(text: str) -> _Operand:
    return int(text) if text.isdigit() else text


def _needed(statements: list[Statement], query: str) -> tuple[Statement, ...]:
    """The statements that a solution writes: those the queried name depends on, overwritten ones included."""
    last = max(i for i, s in enumerate(statements) if s.target == query)
    chain = _dependencies(statements, last)
    return tuple(s for i, s in enumerate(statements) if i in chain)


def _dependencies(statements: list[Statement], index: int) -> set[int]:
    wanted, needed = {statements[index].target}, set()
    for i in range(index, -1, -1):
        if statements[i].target in wanted:
            needed.add(i)
            wanted |= {o for o in (statements[i].left, statements[i].right) if isinstance(o, str)}
    return needed
