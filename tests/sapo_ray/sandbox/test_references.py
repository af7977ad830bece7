"""MBPP's and HumanEval's own solutions pass; the same with answers that are none do not."""

from __future__ import annotations

import ast
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapo_ray.sandbox import Program, Sandbox, SandboxConfig, humaneval_program, mbpp_program

DATA = Path(os.environ.get("SAPO_DATA") or Path(__file__).parents[4] / "shared" / "data")
WRONG = {
    "nothing": "return None",
    "an object of no kind": "return object()",
    "one that equals everything": "return type('', (), {'__eq__': lambda *a: True, '__ne__': lambda *a: False})()",
}

pytestmark = pytest.mark.usefixtures("needs_bubblewrap")


@pytest.fixture(scope="module")
def references() -> dict[str, Program]:
    """Every reference solution, by edition and task."""
    if not (DATA / "mbpp").is_dir() or not (DATA / "humaneval").is_dir():
        pytest.skip(f"no MBPP and HumanEval in {DATA}; SAPO_DATA names the folder that holds them")
    found = {}
    for line in (DATA / "mbpp" / "mbpp.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[f"mbpp-{record['task_id']}"] = mbpp_program(record, record["code"])
    for record in json.loads((DATA / "mbpp" / "sanitized-mbpp.json").read_text()):
        found[f"sanitized-{record['task_id']}"] = mbpp_program(record, record["code"])
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            found[record["task_id"]] = humaneval_program(record, record["prompt"] + record["canonical_solution"])
    assert len(found) == 974 + 427 + 164
    return found


@pytest.fixture(scope="module")
def patient() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(cpu_seconds=60, wall_seconds=600)) as box:
        yield box


def wrong(program: Program, body: str) -> Program:
    """The solution with its functions, classes left out, replaced by some that answer with `body`."""
    functions = {node.name for node in ast.parse(program.solution).body if isinstance(node, ast.FunctionDef)}
    replaced = "".join(f"\ndef {name}(*a, **k): {body}" for name in program.names if name in functions)
    return Program(program.solution + replaced, program.names, program.tests, program.setup)


def test_some_references_pass_and_wrong_answers_do_not(references: dict[str, Program], patient: Sandbox) -> None:
    """A sample, and those that need more than values: classes, a type, a module, a function named like a builtin."""
    odd = [f"mbpp-{task}" for task in (126, 367, 533, 596, 601, 927)] + ["HumanEval/32", "HumanEval/38", "HumanEval/50"]
    for name in [*odd, *list(references)[7::60]]:
        program = references[name]
        assert patient.run(program).verdict == "pass", name
        for body in WRONG.values():
            assert patient.run(wrong(program, body)).verdict in ("fail", "error"), name


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_references_pass(references: dict[str, Program], patient: Sandbox) -> None:
    found = {name: patient.run(program) for name, program in references.items()}
    assert {name: verdict for name, verdict in found.items() if verdict.verdict != "pass"} == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", WRONG)
def test_no_wrong_answer_passes(references: dict[str, Program], patient: Sandbox, kind: str) -> None:
    found = {name: patient.run(wrong(program, WRONG[kind])).verdict for name, program in references.items()}
    assert set(found.values()) <= {"fail", "error"}, [name for name, verdict in found.items() if verdict == "pass"]
