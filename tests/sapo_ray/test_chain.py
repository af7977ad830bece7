"""The chain task: its problems, and its oracle against hand-worked solutions and against Python itself."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.data import Question
from sapo_ray.errors import SapoError
from sapo_ray.tasks import SPLITS, Chain, ChainConfig, OracleLabels
from sapo_ray.tasks.chain import VOCABULARY, apply_without_carry

SIZES = {"worked": 40, "pool": 40, "validation": 10, "test": 20, "ood": 20}
CONFIGS: dict[str, dict[str, Any]] = {
    "accumulator": {},
    "accumulator, large modulus": {"modulus": 97},
    "accumulator, forgiving": {"masking": True, "repair": True},
    "variables": {"level": "variables"},
    "variables, unused": {"level": "variables", "unused": 3},
    "variables, forgiving": {"level": "variables", "masking": True, "repair": True, "unused": 2, "modulus": 12},
}
EXACT = ["accumulator", "accumulator, large modulus", "variables", "variables, unused"]


def chain(name: str, **keys: Any) -> Chain:
    return Chain(ChainConfig(**{**SIZES, **CONFIGS[name], **keys}))


TASKS = {name: chain(name) for name in CONFIGS}
every_config = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def question(text: str, answer: str) -> Question:
    return Question("q", text, answer)


def python_answer(text: str, modulus: int) -> str:
    """The answer as Python computes it: each statement of the program, executed as it stands."""
    values: dict[str, int] = {}
    if text[0].isdigit():
        text = re.sub(r"^(\d+)", r"a=\1", text)
        text = re.sub(r"(?<!^a)=(\d+)", r";a=\1", text)
        text = re.sub(r"([-+*])(\d+)", r";a=a\1\2", text) + ";?a"
    *statements, query = text.split(";")
    for statement in statements:
        exec(statement, {}, values)
        values = {name: value % modulus for name, value in values.items()}
    return str(values[query[1:]])


# Problems


@every_config
def test_worked_solutions_are_right_in_every_step(task: Chain) -> None:
    for q in task.questions("worked"):
        assert q.solution is not None
        n = len(q.solution)
        assert task.oracle(q, q.solution) == OracleLabels((1,) * n, (1,) * n)
        assert task.is_correct(task.answer(q.solution), q.answer)
        assert task.split("".join(q.solution)) == q.solution
        assert task.config.min_steps <= n <= task.config.max_steps


@every_config
def test_answers_are_what_python_computes(task: Chain) -> None:
    for split in SPLITS:
        for q in task.questions(split):
            assert q.answer == python_answer(q.text, task.config.modulus), q.text


@every_config
def test_splits_share_no_problem_and_ood_is_longer(task: Chain) -> None:
    texts = [q.text for split in SPLITS for q in task.questions(split)]
    assert len(texts) == len(set(texts)) == sum(SIZES.values())
    ids = {q.id for split in SPLITS for q in task.questions(split)}
    assert len(ids) == len(texts)
    for split in SPLITS:
        lengths = {len(task.solve(task.parse(q.text))) for q in task.questions(split)}
        assert (min(lengths) > task.config.max_steps) == (split == "ood")
        assert all((q.solution is not None) == (split == "worked") for q in task.questions(split))


@every_config
def test_the_vocabulary_covers_questions_and_solutions(task: Chain) -> None:
    for split in SPLITS:
        for q in task.questions(split):
            assert set(task.prompt(q.text) + "".join(task.solve(task.parse(q.text)))) <= set(VOCABULARY)


def test_problems_follow_from_the_seed_and_a_split_from_no_other_ones_size() -> None:
    task = TASKS["variables, forgiving"]
    again, other = chain("variables, forgiving"), chain("variables, forgiving", seed=1)
    grown = chain("variables, forgiving", pool=90, ood=30)
    for split in SPLITS:
        assert again.questions(split) == task.questions(split)
        assert other.questions(split) != task.questions(split)
        assert grown.questions(split)[: SIZES[split]] == task.questions(split)


def test_unused_assignments_are_asked_but_not_solved() -> None:
    for q in TASKS["variables, unused"].questions("worked"):
        assert q.solution is not None
        assert q.text.count(";") == 4 + 3 + len(q.solution)
        assert q.solution[-1][0] == q.text[-1]


def test_options_are_off_by_default_and_show_when_on() -> None:
    def operations(name: str) -> str:
        return " ".join("".join(q.solution or ()) for q in TASKS[name].questions("worked"))

    for plain, forgiving in (("accumulator", "accumulator, forgiving"), ("variables", "variables, forgiving")):
        assert not re.search(r"(^|\s)(=|\w=\d+\n)|\*[024568]=", operations(plain))
        assert re.search(r"\*0=", operations(forgiving))
        assert re.search(r"\s(=\d|[a-z]=\d+\n)", operations(forgiving))


@pytest.mark.parametrize(
    ("op", "left", "right", "modulus", "result"),
    [
        ("+", 28, 3, 100, 21),
        ("+", 27, 2, 100, 29),
        ("+", 99, 1, 100, 90),
        ("+", 1, 9, 97, 0),
        ("+", 28, 13, 100, 31),
        ("+", 95, 7, 97, 92),
        ("-", 31, 3, 100, 28),
        ("*", 28, 3, 100, 84),
        ("=", 28, 31, 100, 31),
    ],
)
def test_a_forgotten_carry_costs_an_addition_ten(op: str, left: int, right: int, modulus: int, result: int) -> None:
    assert apply_without_carry(op, left, right, modulus) == result


@pytest.mark.parametrize("level", ["accumulator", "variables"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_worked_solutions_forget_carries_and_say_what_they_come_to(level: str, share: float) -> None:
    """Every line is right or off by a forgotten carry, given the values before it; the problems stay the same."""
    keys: dict[str, Any] = {"modulus": 100, "max_operand": 3, "worked": 200}
    plain, task = chain(level, **keys), chain(level, **keys, forgotten_carries=share)
    forgotten, carries = 0, 0
    for right, q in zip(plain.questions("worked"), task.questions("worked"), strict=True):
        assert (q.text, q.answer, right.solution_answer) == (right.text, right.answer, None)
        assert q.solution is not None
        assert (q.solution_answer or q.answer) == task.answer(q.solution)
        assert q.solution_answer != q.answer
        strict = task.oracle(q, q.solution).strict
        for line, is_right in zip(q.solution, strict, strict=True):
            left, one, result = map(int, re.findall(r"(\d+)[-+*](\d+)=(\d+)\n", line)[0])
            wraps = "+" in line.split("=")[-2] and left % 10 + one % 10 > 9
            assert is_right or (wraps and result == (left + one - 10) % 100)
            forgotten, carries = forgotten + (not is_right), carries + wraps
    assert forgotten == carries if share == 1 else 0.4 < forgotten / carries < 0.6
    assert carries > 50
    for split in ("pool", "validation", "test", "ood"):
        assert task.questions(split) == plain.questions(split)
    grown = chain(level, **{**keys, "worked": 250}, forgotten_carries=share)
    assert grown.questions("worked")[:200] == task.questions("worked")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"modulus": 1}, "modulus is 1"),
        ({"max_operand": 10}, "max_operand is 10"),
        ({"max_operand": 0}, "max_operand is 0"),
        ({"min_steps": 0}, "min_steps is 0"),
        ({"min_steps": 9}, "min_steps is 9"),
        ({"ood_min_steps": 8}, "ood_min_steps is 8"),
        ({"ood_min_steps": 11}, "ood_min_steps is 11"),
        ({"pool": -1}, "pool is -1"),
        ({"unused": 1}, "unused is 1"),
        ({"forgotten_carries": -0.1}, "forgotten_carries is -0.1"),
        ({"forgotten_carries": 1.5}, "forgotten_carries is 1.5"),
        ({"forgotten_carries": 0.5}, "forgotten_carries is 0.5; modulo 10 a carry into the tens is nothing"),
        ({"level": "variables", "unused": 13}, "ood_max_steps is 10 and unused 13; together they must be at most 22"),
    ],
)
def test_impossible_configs_are_named(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        ChainConfig(**keys)


def test_as_many_names_as_there_are_can_be_used() -> None:
    task = chain("variables", unused=12)
    assert {len(set(re.findall("[a-z]", q.text))) for q in task.questions("ood")} == {4 + 9 + 12, 4 + 10 + 12}


def test_more_problems_than_exist_are_refused() -> None:
    """Modulo 3 with operands 1 and 2: 3 starts and 6 operations make 18 problems of one step."""
    tiny: dict[str, Any] = {"modulus": 3, "max_operand": 2, "min_steps": 1, "max_steps": 1, "ood_min_steps": 2}
    sizes: dict[str, Any] = {"test": 4, "validation": 4, "worked": 4, "ood": 0}
    assert len(Chain(ChainConfig(**tiny, **sizes, pool=6)).questions("pool")) == 6
    with pytest.raises(SapoError, match=r"task\.pool is 7, but only 6 problems .* are found"):
        Chain(ChainConfig(**tiny, **sizes, pool=7)).questions("test")


# Answers


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        (("7+3=0\n", "0*7=0\n"), "0"),
        (("7+3=10",), "10"),
        (("7+3=007\n",), "7"),
        (("=4\n",), "4"),
        (("x=00\n",), "0"),
        (("7+3=0\n", "0*7=\n"), None),
        (("7+3=0\n", "\n"), None),
        (("7+3=0 \n",), None),
        (("42\n",), None),
        (("",), None),
        ((), None),
    ],
)
def test_the_answer_is_the_last_lines_value(steps: tuple[str, ...], answer: str | None) -> None:
    assert TASKS["accumulator"].answer(steps) == answer


def test_no_answer_is_never_correct() -> None:
    task = TASKS["accumulator"]
    assert not task.is_correct(None, "None")
    assert not task.is_correct("10", "0")


@given(text=st.text(alphabet=[*VOCABULARY, "\r", "\x0b", "\u2028", "é"]))
def test_any_text_splits_into_steps_that_give_it_back(text: str) -> None:
    for task in TASKS.values():
        steps = task.split(text)
        assert "".join(steps) == text
        assert all(steps)
        oracle = task.oracle(task.questions("test")[0], steps)
        assert len(oracle.strict) == len(oracle.reachable) == len(steps)


# The oracle


ACCUMULATOR = question("7+3*7-5", "5")
VARIABLES = question("c=4;a=7;f=a+c;s=a+1;b=f*3;d=b-c;?d", "9")


@pytest.mark.parametrize(
    ("q", "steps", "strict", "reachable"),
    [
        (ACCUMULATOR, ["7+3=0", "0*7=0", "0-5=5"], [1, 1, 1], [1, 1, 1]),
        (ACCUMULATOR, ["7+3=1", "1*7=7", "7-5=2"], [0, 1, 1], [0, 0, 0]),
        (ACCUMULATOR, ["7+3=0", "0*7=7", "0-5=5"], [1, 0, 0], [1, 0, 1]),
        (ACCUMULATOR, ["7+3=0", "1*7=0", "0-5=5"], [1, 0, 1], [1, 1, 1]),
        (ACCUMULATOR, ["7+3=00", "0*7=0", "0-5=5"], [0, 1, 1], [1, 1, 1]),
        (ACCUMULATOR, ["7+3=10", "10*7=0", "0-5=15"], [0, 1, 0], [1, 1, 0]),
        (ACCUMULATOR, ["7+3=0", "", "0*7=0", "so 0-5", "0-5=5"], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]),
        (ACCUMULATOR, ["7+3=0", "0*7=0"], [1, 1], [1, 1]),
        (ACCUMULATOR, ["7+3=0", "0*7=0", "0-5=5", "5+1=6"], [1, 1, 1, 0], [1, 1, 1, 0]),
        (ACCUMULATOR, ["7+3=0", "0*7=0", "0-5=5", "5+0=5"], [1, 1, 1, 0], [1, 1, 1, 1]),
        (ACCUMULATOR, ["7+3=0", "0*7=0", "0-5=5", "?"], [1, 1, 1, 0], [1, 1, 1, 0]),
        (ACCUMULATOR, [], [], []),
        (VARIABLES, ["f=a+c=7+4=1", "b=f*3=1*3=3", "d=b-c=3-4=9"], [1, 1, 1], [1, 1, 1]),
        (VARIABLES, ["f=a+c=7+4=2", "b=f*3=2*3=6", "d=b-c=6-4=2"], [0, 1, 1], [0, 0, 0]),
        (VARIABLES, ["f=a+c=7+5=1", "b=f*3=1*3=3", "d=b-c=3-4=9"], [0, 1, 1], [1, 1, 1]),
        (VARIABLES, ["f=a+c=7+4=1", "s=a+1=7+1=8", "b=f*3=1*3=3"], [1, 0, 1], [1, 1, 1]),
        (VARIABLES, ["f=a+c=7+4=1", "f=a+c=7+4=1", "b=f*3=1*3=3"], [1, 0, 1], [1, 1, 1]),
        (VARIABLES, ["f=a+c=7+4=1", "f=a+c=7+4=2", "b=f*3=2*3=6"], [1, 0, 1], [1, 0, 0]),
        (VARIABLES, ["b=f*3=1*3=3", "d=b-c=3-4=9"], [1, 1], [1, 1]),
        (VARIABLES, ["f=a+c=7+4=1", "b=f*3=1*3=3", "d=b-c=3-4=9", "c=4"], [1, 1, 1, 0], [1, 1, 1, 0]),
        (VARIABLES, ["7+4=1", "f=a+c=7+4=1"], [0, 1], [1, 1]),
    ],
)
def test_the_oracle_worked_by_hand(q: Question, steps: list[str], strict: list[int], reachable: list[int]) -> None:
    task = TASKS["accumulator" if q is ACCUMULATOR else "variables"]
    expected = OracleLabels(tuple(strict), tuple(reachable))
    assert task.oracle(q, [step + "\n" for step in steps]) == expected
    assert task.oracle(q, [step + "\n" for step in steps[:-1]] + steps[-1:]) == expected


@pytest.mark.parametrize(
    ("name", "q", "steps", "reachable"),
    [
        ("accumulator, forgiving", question("7+3=5-2", "3"), ["7+3=9", "=5", "5-2=3"], [1, 1, 1]),
        ("accumulator, forgiving", question("7+3*0+1", "1"), ["7+3=9", "9*0=0", "0+1=1"], [1, 1, 1]),
        ("accumulator, forgiving", question("7+3*5+1", "1"), ["7+3=8", "8*5=0", "0+1=1"], [1, 1, 1]),
        ("accumulator, forgiving", question("7+3*5+1", "1"), ["7+3=9", "9*5=5", "5+1=6"], [0, 0, 0]),
        (
            "variables, forgiving",
            question("a=7;f=a+8;f=5;g=f-2;?g", "3"),
            ["f=a+8=7+8=2", "f=5", "g=f-2=5-2=3"],
            [1] * 3,
        ),
        ("variables, forgiving", question("a=7;f=a+7;g=f*6;?g", "0"), ["f=a+7=7+7=4", "g=f*6=4*6=0"], [1, 1]),
    ],
)
def test_with_repair_and_masking_an_early_error_may_not_matter(
    name: str, q: Question, steps: list[str], reachable: list[int]
) -> None:
    """The first step is wrong, the later ones follow from what it states."""
    oracle = TASKS[name].oracle(q, [step + "\n" for step in steps])
    assert oracle == OracleLabels((0, *[1] * (len(steps) - 1)), tuple(reachable))


def corrupted(task: Chain, q: Question, at: int, value: int) -> list[str]:
    """The solution with another value stated at one step, and everything after it following from that value."""
    program = task.parse(q.text)
    lines = list(task.solve(program))[:at]
    values = program.run(task.config.modulus, program.values, 0, at)
    rest = task.solve(type(program)(values, program.statements[at:]))
    lines.append(re.sub(r"\d+\n$", f"{value}\n", rest[0]))
    values |= {program.statements[at].target: value}
    return lines + list(task.solve(type(program)(values, program.statements[at + 1 :])))


@given(data=st.data(), name=st.sampled_from(EXACT), split=st.sampled_from(["test", "ood"]))
def test_a_wrong_value_is_never_forgiven_by_default(data: st.DataObject, name: str, split: Any) -> None:
    task = TASKS[name]
    q = data.draw(st.sampled_from(task.questions(split)))
    right = task.solve(task.parse(q.text))
    at = data.draw(st.integers(0, len(right) - 1))
    true = int(right[at].rpartition("=")[2])
    value = data.draw(st.integers(0, task.config.modulus - 1).filter(lambda v: v != true))
    steps = corrupted(task, q, at, value)
    oracle = task.oracle(q, steps)
    assert oracle.strict == tuple(int(j != at) for j in range(len(right)))
    assert oracle.reachable == tuple(int(j < at) for j in range(len(right)))
    assert not task.is_correct(task.answer(steps), q.answer)


@given(data=st.data(), name=st.sampled_from(list(CONFIGS)), seed=st.integers(0, 999))
def test_reachable_is_what_python_makes_of_the_stated_values(data: st.DataObject, name: str, seed: int) -> None:
    """Any values stated, in any places: from each prefix, Python runs the statements that are left."""
    task, rng = TASKS[name], random.Random(seed)
    q = data.draw(st.sampled_from(task.questions("test")))
    right = task.solve(task.parse(q.text))
    steps = [
        line if rng.random() < 0.6 else re.sub(r"\d+\n$", f"{rng.randrange(task.config.modulus)}\n", line)
        for line in right
    ]
    assert task.oracle(q, steps).reachable == tuple(
        int(_python_continues(task, q.text, steps[: j + 1]) == q.answer) for j in range(len(steps))
    )


def _python_continues(task: Chain, text: str, steps: list[str]) -> str:
    """The answer as Python computes it when the first statements a solution writes are replaced by what it states."""
    stated = [step.strip().rpartition("=")[2] for step in steps]
    if task.config.level == "accumulator":
        operations = re.findall(r"[-+*=]\d+", text)
        return python_answer(stated[-1] + "".join(operations[len(steps) :]), task.config.modulus)
    values: dict[str, int] = {}
    *statements, query = text.split(";")
    lines = [line.strip().split("=") for line in task.solve(task.parse(text))]
    needed = ["=".join(parts[:2]) for parts in lines]
    for statement in statements:
        if needed and statement == needed[0]:
            needed.pop(0)
            done = len(lines) - len(needed)
            if done <= len(steps):
                statement = f"{statement.split('=')[0]}={stated[done - 1]}"
        exec(statement, {}, values)
        values = {name: value % task.config.modulus for name, value in values.items()}
    return str(values[query[1:]])


def test_a_text_of_the_other_level_is_refused() -> None:
    with pytest.raises(ValueError, match="is no chain problem of the level accumulator"):
        TASKS["accumulator"].parse(VARIABLES.text)
    with pytest.raises(ValueError, match="is no chain problem of the level variables"):
        TASKS["variables"].parse(ACCUMULATOR.text)
