"""`code`: questions that ask for a Python program, which is judged by running tests: MBPP, HumanEval, your own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sapo_ray.errors import SapoError
from sapo_ray.sandbox.program import Program, asserts_program, humaneval_program, mbpp_program
from sapo_ray.steps import StepUnit
from sapo_ray.tasks.dataset import DataConfig, DataTask, Record, field_of
from sapo_ray.tasks.sources import SourceConfig

_BLOCK = re.compile(r"(?ms)^[^\S\n]*```[\w+-]*[^\S\n]*\n(.*?)(?:^[^\S\n]*```|\Z)")


@dataclass(kw_only=True)
class CodeSource(SourceConfig):
    """One data set of such questions, and what is read of its records."""

    tests: Literal["column", "mbpp", "humaneval"] = "column"
    """Where a record's tests are. `column`: in the column that `answer` names, a list of statements or a text; they may
    use whatever the program defines. `mbpp`, `humaneval`: where these data sets have them, and `answer` is not used."""


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
        """The program: the first Markdown code block, or all of the text where there is none."""
        text = "".join(steps)
        block = _BLOCK.search(text)
        program = block[1] if block else text
        return program if program.strip() else None

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """False for no answer. Raises ValueError for any other, which has a `program`."""
        if answer is None:
            return False
        raise ValueError("whether a program is right is not known before it has run")

    def program(self, answer: str | None, gold: str) -> Program | None:
        """The answer with its tests; what a question begins is put before an answer that goes on with it."""
        if answer is None:
            return None
        tests: dict[str, Any] = json.loads(gold)
        before = tests.pop("before")
        goes_on = before and not any(re.search(rf"(?m)^(async )?def {name}\b", answer) for name in tests["names"])
        return Program(**tests | {"solution": before + answer if goes_on else answer})


def _tests(source: SourceConfig, record: Record) -> list[str]:
    tests = record.get(source.answer)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return tests
    return [field_of(source, "answer", record)]
