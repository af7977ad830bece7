"""Steps: joined they are the text, and each has content."""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.steps import StepUnit, split_steps

UNITS = get_args(StepUnit)
PIECES = [*"a1\n \t()'\\#:\x0cé\u2028", "\r\n", ". ", "! ", "Mr. ", '"""', "def f():"]


def check(text: str, unit: StepUnit) -> tuple[str, ...]:
    steps = split_steps(text, unit)
    assert "".join(steps) == text
    assert not any(step.isspace() for step in steps) or len(steps) == 1
    assert all(steps)
    return steps


@pytest.mark.parametrize(
    ("unit", "text", "steps"),
    [
        ("line", "a\nb\n\nc", ["a\n", "b\n\n", "c"]),
        ("line", "\n\n a\n", ["\n\n a\n"]),
        ("line", "a\x0bb\u2028c\r\nd", ["a\x0bb\u2028c\r\n", "d"]),
        ("line", "", []),
        ("line", " \n\n", [" \n\n"]),
        ("paragraph", "a\nb\n\nc\n \n\nd\n", ["a\nb\n\n", "c\n \n\n", "d\n"]),
        ("paragraph", "\n\na\n\n", ["\n\na\n\n"]),
        ("sentence", "It is 3.5. Is it? (Yes.) Go", ["It is 3.5. ", "Is it? ", "(Yes.) ", "Go"]),
        ("sentence", "Mr. A. Smith pays 5. Now, e.g. 2!\nEnd", ["Mr. A. Smith pays 5. ", "Now, e.g. 2!\n", "End"]),
        ("sentence", "1. Add\n2. Stop.", ["1. Add\n", "2. Stop."]),
        ("statement", "x = 1; y = 2\nz = 3", ["x = 1; y = 2\n", "z = 3"]),
        ("statement", "x = [\n\n  1,\n]\ny = 2\n", ["x = [\n\n  1,\n]\n", "y = 2\n"]),
        ("statement", 'def f():\n  """a\n\n  b"""\n\n  return 1', ["def f():\n", '  """a\n\n  b"""\n\n', "  return 1"]),
        ("statement", "# why\nx = 1 + \\\n  2\n", ["# why\n", "x = 1 + \\\n  2\n"]),
        ("statement", "        deep = 1\n    back = 2\n", ["        deep = 1\n", "    back = 2\n"]),
        ("statement", "x = 1\ny = f(\n  1,\n  2", ["x = 1\n", "y = f(\n  1,\n  2"]),
        ("statement", "x = 1\ny = '''a\nb", ["x = 1\n", "y = '''a\nb"]),
        ("statement", "It's prose.\nx = 1\n", ["It's prose.\n", "x = 1\n"]),
        ("statement", "```python\nx = 1\ny = 2\n```\nDone.", ["```python\nx = 1\n", "y = 2\n```\n", "Done."]),
        ("statement", "So:\n\n```\nx = 1\n```", ["So:\n\n```\n", "x = 1\n```"]),
        ("statement", "(so:\n```\nx = 1\ny = [\n  2]\n```\n", ["(so:\n```\n", "x = 1\n", "y = [\n  2]\n```\n"]),
        ("statement", "```\nx = [1,\n```\nSo.", ["```\nx = [1,\n```\n", "So."]),
        ("line", "```\nx\n", ["```\n", "x\n"]),
    ],
)  # fmt: skip
def test_steps_by_hand(unit: StepUnit, text: str, steps: list[str]) -> None:
    assert list(check(text, unit)) == steps


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_comes_back(text: str) -> None:
    for unit in UNITS:
        check(text, unit)


def texts(data: Path) -> Iterator[str]:
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "math500/test500.jsonl", "mbpp/mbpp.jsonl"):
        for line in (data / name).open():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))
    for name in ("svamp/SVAMP.json", "mbpp/sanitized-mbpp.json", "processbench/gsm8k.json", "processbench/math.json"):
        for record in json.loads((data / name).read_text()):
            yield from (value for value in record.values() if isinstance(value, str))
            yield "\n".join(record.get("steps", ""))
    for line in gzip.decompress((data / "humaneval/HumanEval.jsonl.gz").read_bytes()).splitlines():
        yield from json.loads(line).values()


@pytest.mark.parametrize("unit", UNITS)
def test_real_texts_come_back(data: Path, unit: StepUnit) -> None:
    for text in texts(data):
        check(text, unit)


def test_statements_of_real_programs_are_those_of_the_parser(data: Path) -> None:
    """Every statement that the parser finds begins a step, but for those that share a line with another one."""
    for record in json.loads((data / "mbpp/sanitized-mbpp.json").read_text()):
        code = record["code"].replace("\r\n", "\n")
        starts, line = set[int](), 1
        for step in check(code, "statement"):
            starts.add(line + len(step) - len(step.lstrip("\n")))
            line += step.count("\n")
        found = {node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)}
        assert found <= starts, code
