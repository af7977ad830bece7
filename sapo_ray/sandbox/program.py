"""What is judged, and what comes of it."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Mapping, Sequence, Set
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

    Raises SyntaxError for tests that are no Python, ValueError for such that would hold whatever a solution is.
    """
    text = "\n".join(tests)
    scopes = [top := symtable.symtable(text, "tests", "exec")]
    for scope in scopes:
        scopes += scope.get_children()
    symbols = [s for scope in scopes for s in scope.get_symbols() if scope is top or s.is_global()]
    used = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    names = used - bound - set(dir(builtins))
    if not names:
        raise ValueError("they use no name that a program must define (a builtin is none)")
    if not any(_asserts(node, bound) for node in ast.parse(text).body):
        raise ValueError("nothing is asserted when they run; what they define must be called")
    return Program(solution, tuple(sorted(names)), tuple(tests))


def _asserts(statement: ast.stmt, bound: Set[str]) -> bool:
    """Whether a statement of tests asserts something, or calls what could: a name that they bind themselves."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    called = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    roots = {node.id for function in called for node in ast.walk(function) if isinstance(node, ast.Name)}
    return bool(roots & bound) or any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(statement))


def humaneval_program(record: Mapping[str, Any], solution: str) -> Program:
    """A solution of a HumanEval question: the whole of it, the prompt's part included.

    Some tests use functions that the prompt defines; theirs are the prompt's own, whatever the solution makes of them.
    """
    entry_point = record["entry_point"]
    return Program(solution, (entry_point,), (f"check({entry_point})",), f"{record['prompt']}\n{record['test']}")
