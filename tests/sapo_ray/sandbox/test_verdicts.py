"""What verdicts come of what, in both kinds of sandbox."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sapo_ray.sandbox import Program, Sandbox, SandboxConfig, SandboxError, bubblewrap, humaneval_program, mbpp_program


def judged(box: Sandbox, solution: str, *tests: str, setup: str = "") -> tuple[str, str]:
    verdict = box.run(Program(solution, ("f",), tests, setup))
    return verdict.verdict, verdict.reason


@pytest.mark.parametrize(
    ("body", "test", "wanted"),
    [
        ("return x + 1", "assert f(1) == 2", ("pass", "")),
        ("return x", "assert f(1) == 2", ("fail", "assert f(1) == 2")),
        ("return x", "assert f(1) == 2, 'one\\ntoo few'", ("fail", "assert f(1) == 2, 'one\\ntoo few': one too few")),
        ("return x / 0", "assert f(1) == 2", ("error", "ZeroDivisionError: division by zero")),
        ("assert x == 2", "assert f(1) == 2", ("error", "AssertionError:")),
        ("return x +", "assert f(1) == 2", ("error", "SyntaxError: invalid syntax (solution, line 2)")),
        ("return None", "assert abs(f(1) - 2) < 1", None),
        ("import numpy", "assert f(1) == 2", ("error", "ModuleNotFoundError: No module named 'numpy'")),
        ("return input()", "assert f(1) == ''", ("error", "EOFError: EOF when reading a line")),
    ],
)
def test_verdict_and_reason(box: Sandbox, body: str, test: str, wanted: tuple[str, str] | None) -> None:
    found = judged(box, f"def f(x):\n    {body}", test)
    if wanted is None:
        assert found[0] == "error"
        assert found[1].startswith("a test raised TypeError: ")
    else:
        assert found == wanted


def test_all_tests_must_hold(box: Sandbox) -> None:
    assert judged(box, "def f(x): return x", "assert f(1) == 1", "assert f(2) == 2")[0] == "pass"
    assert judged(box, "def f(x): return 1", "assert f(1) == 1", "assert f(2) == 2") == ("fail", "assert f(2) == 2")
    assert judged(box, "def f(x): return 2", "assert f(1) == 1", "assert f(2) == 2") == ("fail", "assert f(1) == 1")


def test_tests_may_expect_an_exception_but_not_an_end(box: Sandbox) -> None:
    source = (
        "import os\nclass Odd(KeyError): pass\n"
        "def f(x):\n    if x == 1: raise Odd('one')\n    if x == 2: b'\\xff'.decode()\n    if x == 3: os._exit(0)\n"
        "    if x == 4: raise SystemExit\n    return x"
    )

    def verdict(x: int, expected: str) -> str:
        return judged(box, source, f"try:\n    f({x})\n    assert False\nexcept {expected}:\n    pass")[0]

    assert [verdict(1, kind) for kind in ("LookupError", "KeyError", "Exception")] == ["pass"] * 3
    assert [verdict(2, kind) for kind in ("UnicodeError", "ValueError")] == ["pass"] * 2
    assert [verdict(1, "OSError"), verdict(3, "Exception"), verdict(4, "Exception")] == ["error"] * 3
    assert verdict(0, "ValueError") == "fail"
    assert judged(box, source, "f(1)") == ("error", "Odd: 'one'")


def test_a_reason_is_cut_whoever_gives_it(box: Sandbox) -> None:
    long = "class Long:\n    def __str__(self): return 'xy ' * 4_000_000\ndef f(): return Long()"
    for test, wanted in (("assert False, f()", "fail"), ("raise LookupError(f())", "error"), ("{}[str(f())]", "error")):
        verdict, reason = judged(box, long, test)
        assert verdict == wanted
        assert len(reason) <= 300
        assert "xy xy xy" in reason


def test_annotations_are_evaluated(box: Sandbox) -> None:
    assert judged(box, "def f(x: Nope): return x", "assert f(1) == 1") == (
        "error",
        "NameError: name 'Nope' is not defined",
    )
    assert judged(box, "def f(x): return x", "def g(x: Nope): pass")[1].startswith("a test raised NameError")


def test_a_missing_function_is_named(box: Sandbox) -> None:
    assert judged(box, "def g(x): return x", "assert f(1) == 1") == (
        "error",
        "AttributeError: module 'solution' has no attribute 'f'",
    )


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "2**200", "1.5",
        "float('-inf')", "3 + 4j", "'é\\ud800\\n'", "b'\\x00\\xff'", "[]", "()",
        "set()", "{1, (2, 'three')}", "frozenset({1})", "{1: [2], (3,): {4}, None: {}}",
        "[[(1, 2.0)], {'a': {'b': None}}]",
    ],
)  # fmt: skip
def test_plain_data_goes_both_ways(box: Sandbox, value: str) -> None:
    """As a value and with its type, all the way down: repr tells 1 from True and 1.0, and a list from a tuple."""
    tests = (f"assert f({value}) == {value}", f"assert repr(f({value})) == repr({value})", f"assert f({value}) != [7]")
    assert judged(box, "def f(x): return x", *tests) == ("pass", "")
    assert judged(box, f"def f(x): return repr(x) == repr({value})", f"assert f({value}) is True") == ("pass", "")


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        ("collections.Counter('aab')", "{'a': 2, 'b': 1}"),
        ("collections.OrderedDict(a=1)", "{'a': 1}"),
        ("collections.namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("enum.IntEnum('E', 'a b').b", "2"),
    ],
)
def test_subclasses_of_plain_data_come_back_as_plain_data(box: Sandbox, made: str, plain: str) -> None:
    assert judged(box, f"import collections, enum\ndef f(): return {made}", f"assert f() == {plain}") == ("pass", "")


def test_other_values_stay_with_the_solution(box: Sandbox) -> None:
    node = "class f:\n    def __init__(self, v): self.value, self.next = v, None\n    def up(self, d): return d + 1"
    tests = (
        "a = f(1); a.next = f(2)",
        "assert a.next.value == 2",
        "assert a.next.next is None",
        "assert a.up(d=1) == 2",
        "b = a.next; assert b is a.next and b == a.next and b != a and a not in [b, 1, None]",
    )
    assert judged(box, node, *tests) == ("pass", "")
    assert (
        judged(box, "def f(x): return map(str, range(x))", "assert list(f(2)) == ['0', '1']", "assert '1' in f(2)")[0]
        == "pass"
    )
    assert judged(box, "def f(x): return lambda y: x + y", "assert f(1)(2) == 3") == ("pass", "")
    assert judged(box, "def f(x, kind): return kind(x)", "assert f('1', int) == 1") == ("pass", "")
    assert judged(box, "def f(g): return g(1)", "assert f(lambda x: x) == 1")[1].endswith("not plain data")


@pytest.mark.parametrize(
    ("value", "test", "wanted"),
    [
        ("Fraction(0)", "assert f()", "fail"),
        ("Fraction(1)", "assert f()", "pass"),
        ("deque()", "assert f()", "fail"),
        ("range(0)", "assert not f()", "pass"),
        ("deque([7])", "assert len(f()) == 1", "pass"),
        ("deque([7])", "assert len(f()) != 1", "fail"),
        ("Fraction(1)", "assert len(f()) == 0", "error"),
        ("Fraction(5)", "assert f() == 5", "fail"),
        ("Fraction(5)", "assert f() != 5", "fail"),
        ("Fraction(5)", "assert not [f()] == [5]", "fail"),
        ("Fraction(5)", "assert f() not in {5}", "fail"),
        ("{Fraction(5), Fraction(6)}", "assert len(f()) == 2", "pass"),
        ("iter(())", "assert f() != 5 and f() not in {5}", "pass"),
        ("Fraction(1, 2)", "assert str(f()) == '1/2' and repr(f()) == 'Fraction(1, 2)'", "pass"),
        ("Fraction(1, 2)", "assert str(f()) != '1/2'", "fail"),
        ("deque()", "assert callable(f())", "fail"),
        ("deque", "assert callable(f())", "pass"),
    ],
)
def test_what_is_asked_of_other_values_is_true_of_them(box: Sandbox, value: str, test: str, wanted: str) -> None:
    solution = f"from collections import deque\nfrom fractions import Fraction\ndef f(): return {value}"
    assert judged(box, solution, test)[0] == wanted


def test_a_value_that_cannot_be_printed_is_left_out_of_a_reason(box: Sandbox) -> None:
    solution = "class f:\n    def __str__(self): return 7"
    assert judged(box, solution, "assert 0, f()") == ("fail", "assert 0, f()")


def test_tests_see_of_a_solution_only_what_they_name(box: Sandbox) -> None:
    """A solution that redefines what the tests are made of would pass otherwise."""
    solution = "import math\nabs = len = isinstance = set = math.isclose = lambda *a: 3\ndef f(x): return 1"
    for test in (
        "abs(f(1)) == 3",
        "len([f(1)]) == 3",
        "isinstance(f(1), str)",
        "math.isclose(f(1), 3)",
        "set([f(1)]) == 3",
    ):
        assert judged(box, solution, f"assert {test}", setup="import math")[0] == "fail"


def test_the_first_lines_of_what_is_printed_are_kept(box: Sandbox) -> None:
    solution = (
        "import sys\nprint('begun')\ndef f(x):\n    print('é', file=sys.stderr)\n    print('\\n' * 99)\n    return x"
    )
    verdict = box.run(Program(solution, ("f",), ("print('from a test')", "assert f(1) == 2")))
    assert verdict.output.splitlines()[:3] == ["begun", "from a test", "é"]
    assert len(verdict.output.splitlines()) < 99
    assert verdict.verdict == "fail"


def test_output_up_to_the_limit_is_none_of_a_violation(kind: Any) -> None:
    with Sandbox(SandboxConfig(kind=kind, output_kib=1)) as box:
        for size, wanted in ((1024, "pass"), (1025, "violation")):
            solution = f"import os\ndef f(x):\n    os.write(1, b'y' * {size})\n    return x"
            assert box.run(Program(solution, ("f",), ("assert f(1) == 1",))).verdict == wanted


def test_the_order_of_a_set_is_the_same_each_time(box: Sandbox) -> None:
    program = Program("def f(): print(list({str(n) for n in range(50)}))", ("f",), ("assert f() == 1",))
    assert len({box.run(program).output for _ in range(3)}) == 1


def test_a_sandbox_may_be_closed_and_used_again_and_by_threads_that_end(kind: Any) -> None:
    box = Sandbox(SandboxConfig(kind=kind))
    found: list[str] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(judged(box, "def f(x): return x", "assert f(1) == 1")[0]))
        thread.start()
        thread.join()
    box.close()
    found.append(judged(box, "def f(x): return x", "assert f(1) == 1")[0])
    box.close()
    assert found == ["pass"] * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("cpu_seconds", 0), ("wall_seconds", 0.0), ("wall_seconds", float("nan")), ("memory_mib", 63), ("processes", 0),
     ("file_mib", 0), ("output_kib", 0)],
)  # fmt: skip
def test_impossible_limits_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} is "):
        SandboxConfig(**{key: value})


def test_a_program_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tests is empty"):
        Program("x = 1", (), ())


def test_a_machine_without_bubblewrap_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="apt-get install -y bubblewrap, or choose process"):
        Sandbox(SandboxConfig())


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("[ $1 = --version ] && echo bubblewrap 0.6.1", "0.6.1 is too old"),
        ("[ $1 = --version ] && echo bubblewrap 0.8.0 || { echo 'No permissions' >&2; exit 1; }", "No permissions"),
    ],
)
def test_a_bubblewrap_that_does_not_work_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, script: str, wanted: str
) -> None:
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SandboxError, match=wanted):
        Sandbox(SandboxConfig())


def test_mbpp_tests_get_what_the_reference_defines_and_imports() -> None:
    """Not its helpers, which a solution need not have; functions named like a builtin are the solution's."""
    record = {
        "code": "import sys\nclass Node: pass\ndef helper(): pass\ndef sum(a): return helper()",
        "test_setup_code": "root = Node()",
        "test_list": ["assert sum(root) == sys.maxsize"],
        "challenge_test_list": ["assert sum(None) == 1"],
    }
    program = mbpp_program(record, "SOLUTION")
    assert program.solution == "SOLUTION"
    assert program.names == ("Node", "sum")
    assert program.tests == ("assert sum(root) == sys.maxsize", "assert sum(None) == 1")
    assert program.setup == "import sys\nroot = Node()"
    sanitized = {"code": "def f(): pass", "test_imports": ["import math"], "test_list": ["assert f()"]}
    assert mbpp_program(sanitized, "").setup == "import math"


def test_humaneval_tests_use_the_prompts_helpers(box: Sandbox) -> None:
    """A solution that redefines the function that judges it gains nothing."""
    prompt = "def twice(x):\n    return 2 * x\n\ndef half(x):\n    '''The inverse of twice.'''\n"
    test = "def check(candidate):\n    for x in range(3):\n        assert twice(candidate(x)) == x"
    record = {"prompt": prompt, "entry_point": "half", "test": test}
    for rest, wanted in (
        ("    return x / 2", "pass"),
        ("    return x", "fail"),
        ("    return x\ndef twice(x): return x", "fail"),
        ("    return x\ndef check(candidate): pass", "fail"),
    ):
        assert box.run(humaneval_program(record, prompt + rest)).verdict == wanted
