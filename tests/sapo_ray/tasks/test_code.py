"""The task `code`: what its programs are made of, and what its own solutions come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.errors import SapoError
from sapo_ray.sandbox import Program, Sandbox, SandboxConfig, asserts_program
from sapo_ray.tasks import SPLITS, Code, CodeConfig
from sapo_ray.tasks.code import CodeSource
from sapo_ray.tasks.prompts import PromptConfig

DOUBLE = {
    "question": "Write double(x).",
    "tests": ["assert double(2) == 4", "assert double('a') == 'aa'"],
    "code": "def double(x):\n    return x + x",
}


def one(tmp_path: Path, record: dict[str, Any], **keys: Any) -> Code:
    """The task of one question, with a worked solution; `keys` are of its source."""
    (tmp_path / "code.jsonl").write_text(json.dumps(record))
    source = CodeSource(path=str(tmp_path / "code.jsonl"), answer="tests", solution="code", **keys)
    return Code(CodeConfig(train_data=source, worked=1, validation=0, test=0))


def program_of(task: Code, *steps: str) -> Program:
    (question,) = task.questions("worked")
    program = task.program(task.answer(steps), question.answer)
    assert program is not None
    return program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Like this:\n\n```\nx = 1\n```\nor\n```python\ny = 2\n```\n", "x = 1\n"),
        ("  ```py\nx = '```'\ny = 2", "x = '```'\ny = 2"),
        ("First:\n```bash\npip install x\n```\nthen:\n```Python3\nx = 1\n```", "x = 1\n"),
        ("1. Do\n   ```python\n   if x:\n       y = 2\n   ```\n", "if x:\n    y = 2\n"),
        ("def f(x):\n    return x\n```\nThis function returns x.\n", "def f(x):\n    return x\n"),
        ("    return x\n```\nThis function returns x.\n", "    return x\n"),
        ("Sure\n```\nx = 1\n", "x = 1\n"),
        ("", None),
        (" \n", None),
        ("```python\n```", None),
    ],
)
def test_the_program_of_a_solution(tmp_path: Path, text: str, program: str | None) -> None:
    task = one(tmp_path, DOUBLE)
    assert task.answer([text]) == program
    assert task.answer(task.split(text)) == program


def test_no_answer_is_wrong_and_no_program_is_judged_unrun(tmp_path: Path) -> None:
    task = one(tmp_path, DOUBLE)
    assert task.program(None, "{}") is None
    assert not task.is_correct(None, "{}")
    with pytest.raises(ValueError, match="before it has run"):
        task.is_correct("x = 1", "{}")


@pytest.mark.usefixtures("needs_bubblewrap")
@pytest.mark.parametrize("tests", [DOUBLE["tests"], "\n".join(DOUBLE["tests"]), json.dumps(DOUBLE["tests"])])
def test_tests_in_a_column_of_ones_own(tmp_path: Path, tests: Any) -> None:
    task = one(tmp_path, DOUBLE | {"tests": tests})
    with Sandbox(SandboxConfig()) as box:
        assert box.run(program_of(task, *task.questions("worked")[0].solution or ())).verdict == "pass"
        assert box.run(program_of(task, "def double(x):\n    return 2 * (x or 1) if x == 2 else x")).verdict == "fail"


def test_tests_see_the_names_that_they_use_and_do_not_bind() -> None:
    tests = [
        "import math as m, os.path",
        "def check(f, *more):\n    for x in [1]:\n        assert f(x, m.pi) == g(abs(x), os.sep)",
        "try:\n    check(solve)\nexcept ValueError as e:\n    print(e)",
    ]
    assert asserts_program(tests, "…") == Program("…", ("g", "solve"), tuple(tests))


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("def check(f):\n    assert f(1) == 2\ncheck(f)", ("f",)),  # an argument of the same name
        ("match f(1):\n    case [x]:\n        assert x", ("f",)),
        ("assert [y for y in f(3)] == [g(y := 2)]", ("f", "g")),
        ("def check():\n    global seen\n    seen = f(1)\ncheck()\nassert seen == 1", ("f",)),
        ("import abc\nclass C:\n    x = f(1)\n    def test(self):\n        assert self.x == g\nC().test()", ("f", "g")),
        ("for x in f(2):\n    assert x", ("f",)),
        ("try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError", ("f",)),
    ],
)
def test_names_are_read_by_pythons_scopes(tests: str, names: tuple[str, ...]) -> None:
    assert asserts_program([tests], "").names == names


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ("# todo", "they use no name"),
        ("assert True", "they use no name"),
        ("assert sum([1, 2]) == 3", "they use no name"),  # Python's own would be asked, whatever the solution's does
        ('{"inputs": ["1 2"], "outputs": ["3"]}', "they use no name"),
        ("def test_add():\n    assert add(1, 2) == 3", "nothing is asserted"),
        ("class Test:\n    def test_add(self):\n        assert add(1, 2) == 3", "nothing is asserted"),
        ("x = add(1, 2)", "nothing is asserted"),
    ],
)
def test_tests_that_any_program_would_pass_are_no_tests(tmp_path: Path, tests: str, fault: str) -> None:
    task = one(tmp_path, DOUBLE | {"tests": tests})
    with pytest.raises(SapoError, match=rf"line 1: its tests cannot be read: {fault}"):
        task.questions("worked")


@pytest.mark.parametrize(
    ("record", "keys", "fault"),
    [
        (DOUBLE | {"tests": []}, {}, "'tests' is list, no text or number"),
        (DOUBLE | {"tests": ["assert ("]}, {}, "its tests cannot be read: '\\(' was never closed"),
        (DOUBLE | {"tests": " "}, {}, "answer is empty"),
        ({"question": "?"}, {}, "there is no 'tests'; answer must name one of question"),
        (DOUBLE, {"tests": "mbpp"}, "there is no 'test_list', which records of mbpp have"),
        (DOUBLE, {"tests": "humaneval"}, "there is no 'entry_point', which records of humaneval have"),
    ],
)
def test_a_record_that_does_not_fit_is_named(
    tmp_path: Path, record: dict[str, Any], keys: dict[str, Any], fault: str
) -> None:
    task = one(tmp_path, record, **keys)
    with pytest.raises(
        SapoError, match=rf"1 of 1 records of task.train_data do not fit: \S*code.jsonl, line 1: {fault}"
    ):
        task.questions("worked")


def real(data: Path, name: str, tests: str, prompt: str, **source: Any) -> Code:
    return Code(
        CodeConfig(
            train_data=CodeSource(path=str(data / name), tests=tests, **source),  # type: ignore[arg-type]
            worked=100,
            test=20,
            validation=5,
            prompt=PromptConfig(template=prompt),
        )
    )


@pytest.mark.usefixtures("needs_bubblewrap")
def test_worked_solutions_pass_and_can_be_gone_on_from(data: Path) -> None:
    """MBPP's as a chat model writes them, in a block; HumanEval's as they go on from the prompt."""
    mbpp = real(
        data,
        "mbpp/mbpp.jsonl",
        "mbpp",
        "code",
        question="{{ text }}\n\n{{ test_list | join('\n') }}",
        solution="```python\n{{ code }}\n```",
        strip="\r",
    )
    sanitized = real(data, "mbpp/sanitized-mbpp.json", "mbpp", "code", question="prompt", solution="code")
    humaneval = real(
        data, "humaneval/HumanEval.jsonl.gz", "humaneval", "bare", question="prompt", solution="canonical_solution"
    )
    assert [len(mbpp.questions(split)) for split in SPLITS] == [100, 849, 5, 20, 0]
    with Sandbox(SandboxConfig(cpu_seconds=60, wall_seconds=600)) as box:
        for task in (mbpp, sanitized, humaneval):
            for question in task.questions("worked")[::20]:
                solution = question.solution or ()
                assert task.split("".join(solution)) == solution
                program = task.program(task.answer(solution), question.answer)
                assert program
                assert box.run(program).verdict == "pass", question
                wrong = task.program("".join(f"def {name}(*a): pass\n" for name in program.names), question.answer)
                assert wrong
                assert box.run(wrong).verdict in ("fail", "error"), question
