"""What is judged, and what comes of it."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Program:
    """A solution and the tests that it must pass, all of them.

    `tests` are statements; they run one after another, after `setup`, in a namespace of their own that holds of the
    solution only `names`. Raises ValueError where there are no tests, which anything would pass.
    """

    solution: str
    names: tuple[str, ...]
    tests: tuple[str, ...]
    setup: str = ""

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("tests is empty; without any, every solution would pass")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a program.

    `pass`: every test ran and held. `fail`: an assertion did not hold. `error`: the solution or a test raised, or the
    solution's process ended. `timeout`, `memory`: it took too much. `violation`: it broke another limit, or reached for
    what it may not have and stumbled over that. `reason` is one line on all but `pass`, `output` the first lines
    printed, `seconds` the time from the program's arrival at its sandbox to its verdict.
    """

    verdict: Literal["pass", "fail", "error", "timeout", "memory", "violation"]
    reason: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


def mbpp_program(record: Mapping[str, Any], solution: str) -> Program:
    """A solution of an MBPP question, given as its record in either edition of the data set.

    The tests see of the solution what they use and the reference defines; what the reference imports is imported for
    them, since some count on it.
    """
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports", ()))
    tests = (*record["test_list"], *record.get("challenge_test_list", ()))
    reference = ast.parse(record["code"]).body
    imports = [ast.unparse(node) for node in reference if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined = [node.name for node in reference if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    used = {node.id for node in ast.walk(ast.parse("\n".join((setup, *tests)))) if isinstance(node, ast.Name)}
    return Program(solution, tuple(name for name in defined if name in used), tests, "\n".join((*imports, setup)))


def asserts_program(tests: Sequence[str], solution: str) -> Program:
    """A solution of any question whose tests are statements. They see of it the names that they use and do not bind.

    Raises SyntaxError for tests that are no Python, ValueError where there are none.
    """
    used, bound = set[str](), set(dir(builtins))
    for node in ast.walk(ast.parse("\n".join(tests))):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.alias(name=name, asname=None) | ast.alias(asname=name):
                bound.add(str(name).partition(".")[0])
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
    return Program(solution, tuple(sorted(used - bound)), tuple(tests))


def humaneval_program(record: Mapping[str, Any], solution: str) -> Program:
    """A solution of a HumanEval question: the whole of it, the prompt's part included.

    Some tests use functions that the prompt defines; theirs are the prompt's own, whatever the solution makes of them.
    """
    entry_point = record["entry_point"]
    return Program(solution, (entry_point,), (f"check({entry_point})",), f"{record['prompt']}\n{record['test']}")
