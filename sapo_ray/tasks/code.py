"""`code`: questions that ask for a Python program, which is judged by running tests: MBPP, HumanEval, your own."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sapo_ray.errors import SapoError
from sapo_ray.sandbox.program import Program, asserts_program, humaneval_program, mbpp_program
from sapo_ray.steps import StepUnit
from sapo_ray.tasks.dataset import DataConfig, DataTask, Record, field_of
from sapo_ray.tasks.sources import SourceConfig

_BLOCK = re.compile(
    r"(?ms)^(?P<indent>[^\S\n]*)```(?P<tag>[\w+-]*)[^\S\n]*\n(?P<text>.*?)(?P<end>^[^\S\n]*```[^\S\n]*$|\Z)"
)
_TAGS = (r"(py(thon)?3?)?", r".*")
"""Blocks that could be the program, by their tags: one of the first kind, else one of the second."""


@dataclass(kw_only=True)
class CodeSource(SourceConfig):
    """One data set of such questions, and what is read of its records."""

    tests: Literal["column", "mbpp", "humaneval"] = "column"
    """Where a record's tests are. `column`: in the column that `answer` names, a list of statements (which may be
    written as JSON) or a text; they may use whatever the program defines. `mbpp`, `humaneval`: where these data sets
    have them, and `answer` is not used."""


@dataclass(kw_only=True)
class CodeConfig(DataConfig):
    """Questions that ask for a program, which `sandbox` runs with the tests of the data set."""

    kind: Literal["code"] = "code"
    """Questions that ask for a Python program, which is judged by running tests."""
    train_data: CodeSource = field(default_factory=CodeSource)
    test_data: CodeSource | None = None
    ood_data: CodeSource | None = None
    steps: StepUnit = "statement"
    """What a step of a solution is: a statement of Python, a line, a paragraph, or a sentence."""


class Code(DataTask):
    """The `code` task. A gold answer is the tests, as JSON."""

    config: CodeConfig

    def variables(self) -> dict[str, object]:
        return {}

    def gold(self, source: SourceConfig, record: Record) -> str:
        assert isinstance(source, CodeSource)
        before = ""
        try:
            match source.tests:
                case "mbpp":
                    program = mbpp_program(record, "")
                case "humaneval":
                    program, before = humaneval_program(record, ""), record["prompt"]
                case "column":
                    program = asserts_program(_tests(source, record), "")
        except KeyError as error:
            raise SapoError(f"there is no {error}, which records of {source.tests} have") from error
        except (SyntaxError, TypeError, ValueError) as error:
            raise SapoError(f"its tests cannot be read: {error}") from error
        return json.dumps({"before": before, **asdict(program)})

    def learned(self, solution: str, gold: str) -> str:
        return solution

    def answer(self, steps: Sequence[str]) -> str | None:
        """The program: a Markdown code block, the first of Python before others, or the whole text if it has none.

        Where a fence has no other, what lies before it is the program if it is one, else what lies behind it.
        """
        text = "".join(steps)
        blocks = list(_BLOCK.finditer(text))
        program = text
        if blocks and blocks[-1]["end"] == blocks[-1]["tag"] == "" and _is_python(text[: blocks[0].start()]):
            program = text[: blocks[0].start()]
        elif blocks:
            block = next(b for tag in _TAGS for b in blocks if re.fullmatch(tag, b["tag"], re.IGNORECASE))
            program = re.sub(rf"(?m)^{block['indent']}", "", block["text"])
        return program if program.strip() else None

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """False for no answer. Raises ValueError for any other, which has a `program`."""
        if answer is None:
            return False
        raise ValueError("whether a program is right is not known before it has run")

    def program(self, answer: str | None, gold: str) -> Program | None:
        """The answer with its tests. What a question begins is put before an answer that goes on with it; before one
        that has the function anew, what the question imports and defines above it."""
        if answer is None:
            return None
        tests: dict[str, Any] = json.loads(gold)
        before = tests.pop("before")
        functions = re.compile(rf"(?m)^(async )?def ({'|'.join(tests['names'])})\b")
        if functions.search(answer) and (function := functions.search(before)):
            before = before[: function.start()]
        return Program(**tests | {"solution": before + answer})


def _is_python(text: str) -> bool:
    """Whether it is some, or the rest of a function's body."""
    for program in (text, f"if True:\n{text}"):
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            return any(not isinstance(node, ast.Expr) for node in ast.parse(program).body)  # a word is an expression
    return False


def _tests(source: SourceConfig, record: Record) -> list[str]:
    """A list of statements, which may be written as JSON, or one text."""
    tests = record.get(source.answer)
    if isinstance(tests, str):
        with suppress(ValueError):
            tests = json.loads(tests)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return tests
    return [field_of(source, "answer", record)]
