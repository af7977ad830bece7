"""`chain`: multi-step arithmetic modulo m, made on the spot, whose true step labels are known.

`accumulator`: one number, to which each step applies the next operation:

    7+3*7-5         7+3=0 / 0*7=0 / 0-5=5

`variables`: a straight-line program over shuffled names. Each step computes the next variable from the last one and
from a constant or a *leaf* (a name whose value the question gives), which the solver must look up:

    c=4;a=7;f=a+c;b=f*3;?b         f=a+c=7+4=1 / b=f*3=1*3=3

Both are the same thing underneath: a list of statements over named values. The answer is the last value written.

As made by default, no wrong value is ever forgiven: every step maps different values to different ones. Two options
change that, so that a `strict` error need not cost the answer and `reachable` stays 1 after it:

    repair      7+3=5-2        7+3=9 (wrong) / =5 / 5-2=3      a later statement sets the value anew
    masking     7+3*5-2        7+3=8 (wrong) / 8*5=0 / 0-2=8   ×5 modulo 10 takes all even values to 0

`unused` adds assignments to a `variables` question that its answer does not depend on and that a solution skips.

Worked solutions are right, unless `forgotten_carries` puts a habit into them that a reasoner then learns: some
additions leave out the carry from the ones to the tens (28+3=21), and the lines after them go on from there. So it errs
again and again in the same way, which a verifier can come to know.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sapo_ray.data import Question
from sapo_ray.errors import SapoError
from sapo_ray.tasks.base import OracleLabels, Split, Task

VOCABULARY = string.digits + string.ascii_lowercase + "+-*=;?\n"
"""Every character that a question or a solution can hold; the tokenizer's alphabet."""

_ACCUMULATOR = "acc"
_LEAVES = 4
_MISSES = 2000
"""Problems drawn in a row that all exist already, after which there are taken to be no more."""
_ACCUMULATOR_TEXT = r"[0-9]+([-+*=][0-9]+)+"
_VARIABLES_TEXT = r"([a-z]=[0-9]+;)+([a-z]=([a-z][-+*])?([a-z]|[0-9]+);)+\?[a-z]"
_Operand = str | int
Compute = Callable[[str, int, int, int], int]
"""An operator, its operands and the modulus -> the result."""


@dataclass(kw_only=True)
class ChainConfig:
    """Arithmetic made on the spot, whose true step labels are known."""

    kind: Literal["chain"] = "chain"
    """Arithmetic made on the spot."""
    level: Literal["accumulator", "variables"] = "accumulator"
    """`accumulator`: apply the next operation to the last result. `variables`: a little program with look-ups."""
    modulus: int = 10
    """Every result is taken modulo this."""
    max_operand: int = 9
    """Constants of statements are drawn from 1 … this, which lies below the modulus. Without `masking` those that are
    multiplied by have no divisor in common with it."""
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
    """Let a later statement set the value anew, so that an error before it does not matter. The first and the last
    statement never do."""
    masking: bool = False
    """Let a step lose information (× 0, × a number that shares a divisor with the modulus): two values may collide."""
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
    forgotten_carries: float = 0.0
    """Share of the additions with a carry into the tens whose carry the worked solutions forget (28+3=21)."""
    seed: int = 0
    """Seed of the problems, apart from the run's seed, so that runs can share them."""

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"modulus is {self.modulus}; it must be at least 2")
        if not 1 <= self.max_operand < self.modulus:
            raise ValueError(f"max_operand is {self.max_operand}; it must lie between 1 and modulus - 1")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"min_steps is {self.min_steps}; it must lie between 1 and max_steps = {self.max_steps}")
        if not self.max_steps < self.ood_min_steps <= self.ood_max_steps:
            raise ValueError(
                f"ood_min_steps is {self.ood_min_steps}; it must lie above max_steps = {self.max_steps} and at most "
                f"at ood_max_steps = {self.ood_max_steps}"
            )
        for key in ("unused", "worked", "pool", "validation", "test", "ood"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")
        if not 0 <= self.forgotten_carries <= 1:
            raise ValueError(f"forgotten_carries is {self.forgotten_carries}; it must lie between 0 and 1")
        if self.forgotten_carries and 10 % self.modulus == 0:
            raise ValueError(
                f"forgotten_carries is {self.forgotten_carries}; modulo {self.modulus} a carry into the tens is nothing"
            )
        if self.unused and self.level != "variables":
            raise ValueError(f"unused is {self.unused}; only problems of the level `variables` have assignments")
        most = len(string.ascii_lowercase) - _LEAVES
        if self.level == "variables" and self.ood_max_steps + self.unused > most:
            raise ValueError(
                f"ood_max_steps is {self.ood_max_steps} and unused {self.unused}; together they must be at most "
                f"{most}, for lack of names"
            )


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

    def run(self, modulus: int, values: dict[str, int], start: int, end: int) -> dict[str, int]:
        """All values after the statements `start` … `end` - 1, beginning with `values`, which is left as it is."""
        values = dict(values)
        for s in self.statements[start:end]:
            values[s.target] = apply(s.op, _value(s.left, values), _value(s.right, values), modulus)
        return values

    def find(self, target: str, start: int) -> int | None:
        """The first statement from `start` on that computes `target`; None where there is none."""
        return next((i for i in range(start, len(self.statements)) if self.statements[i].target == target), None)


def apply(op: str, left: int, right: int, modulus: int) -> int:
    """One operation modulo `modulus`."""
    result = {"+": left + right, "-": left - right, "*": left * right, "=": right}[op]
    return result % modulus


def apply_without_carry(op: str, left: int, right: int, modulus: int) -> int:
    """One operation modulo `modulus`, whose carry from the ones into the tens is forgotten if it is an addition."""
    carry = 10 if op == "+" and left % 10 + right % 10 > 9 else 0
    return (apply(op, left, right, modulus) - carry) % modulus


def _value(operand: _Operand, values: dict[str, int]) -> int:
    return operand if isinstance(operand, int) else values[operand]


class Chain(Task):
    """The `chain` task (see the module's text)."""

    alphabet = VOCABULARY

    def __init__(self, config: ChainConfig) -> None:
        self.config = config

    def questions(self, split: Split) -> Sequence[Question]:
        return self._splits[split]

    def prompt(self, question: str) -> str:
        return question + "\n"

    def split(self, text: str) -> tuple[str, ...]:
        return tuple(text.splitlines(keepends=True))

    def answer(self, steps: Sequence[str]) -> str | None:
        found = re.fullmatch(r".*=0*([0-9]+)\n?", steps[-1]) if steps else None
        return found[1] if found else None

    def is_correct(self, answer: str | None, gold: str) -> bool:
        return answer == gold

    def oracle(self, question: Question, steps: Sequence[str]) -> OracleLabels:
        """True labels of every step of a solution, right or wrong.

        `strict`: the line is, letter by letter, what a solution without mistakes would have here, given the values that
        the lines before it state. `reachable`: whoever works out the rest without a mistake, from the values stated so
        far, ends with the gold answer. So a wrong line that states the right value is wrong by the first label only,
        and a right line that builds on a wrong value by the second only. `reachable` rises again where two errors
        cancel. That a solution stops too early is no line's fault.

        A line that states no value, or sets a name anew whose statements are all done, is not `strict`; the second
        changes that value. A statement left out is taken as done in the head. After the last statement the answer is
        what the last line says.
        """
        program = self.parse(question.text)
        values, done = program.values, 0
        strict, reachable = [], []
        for number, step in enumerate(steps):
            values, done, is_strict = self._follow(program, values, done, step)
            strict.append(int(is_strict))
            finished = done == len(program.statements)
            answer = self.answer(steps[: number + 1]) if finished else self._finish(program, values, done)
            reachable.append(int(self.is_correct(answer, question.answer)))
        return OracleLabels(tuple(strict), tuple(reachable))

    def parse(self, text: str) -> Program:
        """The program a question's text stands for. Raises ValueError for a text that is no problem of this level."""
        pattern = _VARIABLES_TEXT if self.config.level == "variables" else _ACCUMULATOR_TEXT
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is no chain problem of the level {self.config.level}")
        return _parse_variables(text) if self.config.level == "variables" else _parse_accumulator(text)

    def solve(self, program: Program, steps: Iterable[str] = (), compute: Compute = apply) -> tuple[str, ...]:
        """The solution, from the values on that `steps` state: one line a statement, each ended by a newline.

        `compute` works every operation out; later lines go on from what it says, be it a mistake.
        """
        values, done, lines = program.values, 0, []
        for step in steps:
            values, done, _ = self._follow(program, values, done, step)
        for statement in program.statements[done:]:
            result = self._result(statement, values, compute)
            lines.append(self._line(statement, values, result) + "\n")
            values = {**values, statement.target: result}
        return tuple(lines)

    def _follow(
        self, program: Program, values: dict[str, int], done: int, step: str
    ) -> tuple[dict[str, int], int, bool]:
        """The values and the number of statements done after a line as well, and whether the line is `strict`."""
        if not (stated := self._read(step)):
            return values, done, False
        target, value = stated
        strict = False
        if (found := program.find(target, done)) is not None:
            values = program.run(self.config.modulus, values, done, found)
            statement = program.statements[found]
            strict = step.removesuffix("\n") == self._line(statement, values, self._result(statement, values))
            done = found + 1
        return {**values, target: value}, done, strict

    def _finish(self, program: Program, values: dict[str, int], done: int) -> str:
        values = program.run(self.config.modulus, values, done, len(program.statements))
        return str(values[program.statements[-1].target])

    def _read(self, line: str) -> tuple[str, int] | None:
        """The name that a line sets and the value it states; None for a line that states none."""
        if self.config.level == "variables":
            found = re.fullmatch(r"([a-z])=(?:.*=)?([0-9]+)\n?", line)
            return (found[1], int(found[2])) if found else None
        found = re.fullmatch(r".*=([0-9]+)\n?", line)
        return (_ACCUMULATOR, int(found[1])) if found else None

    def _result(self, s: Statement, values: dict[str, int], compute: Compute = apply) -> int:
        return compute(s.op, _value(s.left, values), _value(s.right, values), self.config.modulus)

    def _line(self, s: Statement, values: dict[str, int], result: int) -> str:
        operation = f"{_value(s.left, values)}{s.op}{_value(s.right, values)}"
        computed = f"={result}" if s.op == "=" else f"{operation}={result}"
        if self.config.level == "accumulator":
            return computed
        return f"{s.target}={result}" if s.op == "=" else f"{s.target}={s.left}{s.op}{s.right}={computed}"

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
        seen: set[str] = set()
        return {split: self._unseen(split, count, steps, seen) for split, (count, steps) in sizes.items()}

    def _unseen(self, split: Split, count: int, steps: tuple[int, int], seen: set[str]) -> list[Question]:
        """`count` questions that are not `seen`, and now are. Raises SapoError where not so many are found.

        A split's draws are its own: the first questions stay the same when it, or a split after it, grows.
        """
        rng, made, misses = random.Random(f"{self.config.seed}/{split}"), list[Question](), 0
        while len(made) < count:
            text = self._draw(rng, rng.randint(*steps))
            misses = misses + 1 if text in seen else 0
            if misses > _MISSES:
                raise SapoError(
                    f"task.{split} is {count}, but only {len(made)} problems more than the other splits' are found; "
                    "ask for fewer, or raise task.max_steps, task.ood_max_steps or task.modulus"
                )
            if not misses:
                seen.add(text)
                made.append(self._question(f"{split}-{len(made)}", text, worked=split == "worked"))
        return made

    def _question(self, name: str, text: str, *, worked: bool) -> Question:
        program = self.parse(text)
        answer = self._finish(program, program.values, 0)
        if not worked:
            return Question(name, text, answer)
        solution = self.solve(program, compute=self._habit(name))
        stated = self.answer(solution)
        return Question(name, text, answer, solution, None if stated == answer else stated)

    def _habit(self, name: str) -> Compute:
        """How the worked solution of a question computes."""
        rng, share = random.Random(f"{self.config.seed}/{name}/carries"), self.config.forgotten_carries

        def compute(op: str, left: int, right: int, modulus: int) -> int:
            return (apply_without_carry if rng.random() < share else apply)(op, left, right, modulus)

        return compute

    def _draw(self, rng: random.Random, steps: int) -> str:
        draw = self._draw_variables if self.config.level == "variables" else self._draw_accumulator
        return draw(rng, steps)

    def _draw_accumulator(self, rng: random.Random, steps: int) -> str:
        start = rng.randrange(self.config.modulus)
        return str(start) + "".join(self._operation(rng, inner=0 < i < steps - 1) for i in range(steps))

    def _operation(self, rng: random.Random, *, inner: bool) -> str:
        """An operator and a constant. Without `masking`, multipliers are units of the ring: no two values collide."""
        op = rng.choice("+-*=" if self.config.repair and inner else "+-*")
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
            operation = self._operation(rng, inner=0 < i < steps - 1)
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
    start, *operations = re.findall(r"[-+*=]?[0-9]+", text)
    statements = tuple(Statement(_ACCUMULATOR, _ACCUMULATOR, o[0], int(o[1:])) for o in operations)
    return Program({_ACCUMULATOR: int(start)}, statements)


def _parse_variables(text: str) -> Program:
    """The first assignments of constants are given; from the first operation on, an assignment is a statement."""
    *assignments, query = text.split(";")
    values: dict[str, int] = {}
    statements: list[Statement] = []
    for assignment in assignments:
        target, expression = assignment.split("=")
        left, op, right = re.fullmatch(r"(?:(\w+)([-+*]))?(\w+)", expression).groups()  # type: ignore[union-attr]
        if op:
            statements.append(Statement(target, _operand(left), op, _operand(right)))
        elif statements:
            statements.append(Statement(target, _operand(right), "=", _operand(right)))
        else:
            values[target] = int(right)
    return Program(values, _needed(statements, query[1:]))


def _operand(text: str) -> _Operand:
    return int(text) if text.isdigit() else text


def _needed(statements: list[Statement], query: str) -> tuple[Statement, ...]:
    """The statements that a solution writes: those the queried name depends on, overwritten ones included."""
    wanted, needed = {query}, list[Statement]()
    for statement in reversed(statements):
        if statement.target in wanted:
            needed.append(statement)
            wanted |= {operand for operand in (statement.left, statement.right) if isinstance(operand, str)}
    return tuple(reversed(needed))
