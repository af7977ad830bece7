"""Final answers: how they are read from solutions, and near misses made from the gold answers of real data."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.tasks import answers
from sapo_ray.tasks.answers import read_answer, same_answer, same_text


def math_500(data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / "math500/test500.jsonl").open()]


def gsm8k(data: Path) -> list[str]:
    return [json.loads(line)["answer"] for name in ("train", "test") for line in (data / f"gsm8k/{name}.jsonl").open()]


@pytest.mark.parametrize(
    ("text", "hashes", "boxed"),
    [
        ("2+2=4\n#### 4", "4", "4"),
        ("2+2=4\n#### 4\n#### 5\nDone.", "5", "5"),
        ("2+2=4\n  ####   $1,000  \n", "$1,000", "$1,000"),
        ("so #### 4", None, None),
        ("#### \n4", None, None),
        (r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{1} or \fbox{2}", "2", "2"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed 3.", "3", "3"),
        (r"cut off in \boxed{\frac{1}{2}", None, None),
        ("\\boxed{1}\n#### 2", "2", "1"),
        ("the answer is 4", None, None),
        ("", None, None),
    ],
)
def test_an_answer_is_read_by_the_convention_else_by_the_other(
    text: str, hashes: str | None, boxed: str | None
) -> None:
    assert (read_answer(text, "hashes"), read_answer(text, "boxed")) == (hashes, boxed)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("1234", ["1,234", "$1,234", "1234.00", "1234 dollars", "+1234", r"\$1,\!234", "1234."], ["1,23", "234"]),
        ("-5", ["−5", "- 5", r"\frac{-10}{2}"], ["5", "--5"]),
        ("0.5", [".5", "1/2", r"\frac12", r"\dfrac{1}{2}", r"50\%", "0.50"], ["5", "0.05", "2/1", "5%", r"\frac21"]),
        ("50", ["50%", r"50\%", "50 percent", "100/2", "5000%"], ["0.5", "5%", "500%"]),
        (r"10\%", ["10", "0.1", r"\frac{1}{10}", "10%"], ["1%", "0.01", r"\frac{1}{100}", "100"]),
        ("1 1/2", ["3/2", "1.5", r"1\frac{1}{2}", "1½", "1 ½"], ["11/2", "1", "1/2", "½", "1¼"]),
        ("0.5", ["½", "$½$"], ["¼", "-½"]),
        ("1", [], ["1 1/2", "11/2", "1 million", "1 and 2"]),
        ("0.333333", [], ["1/3"]),
        ("5", ["**5**", "`5`", "5 km/h", "$5/day", "5 °C", "5°", "5€"], ["**6**", "5/x", "5/hundred", "6°"]),
        ("0.5", [r"50\text{ percent}"], [r"5\text{ percent}"]),
        ("5 cm/s", ["5", "5 cm/s"], ["5 m/s", "5 km"]),
        ("5", [r"5\text{ cm}", "5 apples", "$5$", r"\(5\)", "x=5"], ["5 million", "5 pi", "5x", "5/0", "5 or 6"]),
        (r"5\text{ cm}", ["5", r"5\mbox{ cm}", r"\frac{10}{2}\text{ cm}"], [r"5\text{ m}", r"6\text{ cm}"]),
        (r"5\text{ cm}^2", [r"5\text{ cm}^2"], [r"5\text{ cm}^3", r"5\text{ cm}"]),
        ("5 hours", ["5 hour", "5"], ["5 minutes"]),
        (r"\text{Evelyn}", ["Evelyn", "evelyn"], ["Nelvey", "Briana", "5"]),
        (r"2\sqrt{3}", [r"\sqrt{12}", r"\sqrt{4}\sqrt{3}"], [r"3\sqrt{2}", "3.46"]),
        ("(1,2)", ["(1, 2)", r"\left(1,2\right)", r"(1,\frac{4}{2})"], ["(2,1)", "1,2,3", "[1,2]"]),
        ("1,-2", ["-2,1", "-2, 1", "1 and -2", "$1$ and $-2$"], ["1,2", "1", "1 and 2"]),
        ("1,2,3", ["1, 2, and 3"], ["1, 2 and 4", "1, 2"]),
        ("x+1", ["1+x", r"\frac{2x+2}{2}"], ["x-1", "x"]),
        ("2516_8", ["2516_{8}", "2516"], ["2516_7", "2517_8"]),
    ],
)  # fmt: skip
def test_what_agrees_and_what_does_not(gold: str, right: list[str], wrong: list[str]) -> None:
    assert [answer for answer in right if not same_answer(answer, gold)] == []
    assert [answer for answer in wrong if same_answer(answer, gold)] == []


def test_words_are_compared_as_text_where_a_task_says_so() -> None:
    assert same_text(" (B)  cat. ", "(b) Cat")
    assert not same_text("1.0", "1")


def test_all_gold_answers_are_right(data: Path) -> None:
    stated = [(read_answer(text, "hashes"), text.rpartition("#### ")[2]) for text in gsm8k(data)]
    stated += [(read_answer(r["solution"], "boxed"), r["answer"]) for r in math_500(data)]
    stated += [(str(r["Answer"]), f"{r['Answer']:.10g}") for r in json.loads((data / "svamp/SVAMP.json").read_text())]
    assert len(stated) == 7473 + 1319 + 500 + 1000
    assert [pair for pair in stated if pair[0] is None or not same_answer(*pair)] == []


def test_math_verify_itself_can_judge_every_gold_answer_of_math_500(data: Path) -> None:
    """Equal texts are right without it. Were one beyond it, no other way to write that answer would be right."""
    golds = {r["answer"] for r in math_500(data)}
    assert [gold for gold in golds if not answers._judge.agrees(gold, gold)] == []


def near_misses(gold: str) -> Iterator[str]:
    """Other answers than the gold one, by the mistakes that people and models make."""
    if re.fullmatch(r"-?[\d,]+(\.\d+)?", gold):
        value = float(gold.replace(",", ""))
        yield from (f"{value + 1:.10g}", f"{value - 1:.10g}", f"{gold}1" if value else "0.1")
        if value:
            yield from (f"{-value:.10g}", f"{value * 10:.10g}", f"{value / 1000:.10g}", f"{value / 10:.10g}%")
        if len(gold) > 1 and value >= 10:
            yield gold[1:] if gold[1] not in ",." else gold[2:]
    if found := re.fullmatch(r"\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        above, below = map(int, found.groups())
        yield from (
            rf"\frac{{{above + 1}}}{{{below}}}",
            rf"-{gold}",
            f"{above / below * 10:.6f}",
            f"{above + below}\\%",
        )
        yield rf"\frac{{{below}}}{{{above}}}"
    if found := re.search(r"\\text\{ (\w+)\}", gold):
        yield gold.replace(found[1], "furlongs")
    if found := re.fullmatch(r"\\text\{(\w+)\}", gold):
        yield rf"\text{{{found[1][::-1]}}}"
    if found := re.fullmatch(r"\\left\(\s*(.*?),(.*)\\right\)", gold):
        yield rf"\left({found[2]},{found[1]}\right)"
    if found := re.search(r"(?<![\d_{.])\d+(?![\d}])", gold):
        yield gold[: found.start()] + str(int(found[0]) + 1) + gold[found.end() :]
    if found := re.search(r"\\sqrt\{(\d+)\}", gold):
        yield gold.replace(found[0], rf"\sqrt{{{int(found[1]) + 1}}}")


def test_near_misses_are_wrong(data: Path) -> None:
    golds = [text.rpartition("#### ")[2] for text in gsm8k(data)]
    pairs = {(miss, gold) for gold in golds for miss in near_misses(gold)}
    hard = {(miss, r["answer"]) for r in math_500(data) for miss in near_misses(r["answer"])}
    assert len(pairs) > 5000
    assert len(hard) > 1000
    assert sorted(pair for pair in pairs | hard if same_answer(*pair)) == []


@pytest.mark.parametrize(
    "answer", ["{} thirds", "{} squared", "{} plus x", "{} minus two", "{} point five", "{} remainder two", "{} grand",
               "{} divided by two", "{} is wrong", "{} dozen", "{} or so", "not {}"]
)  # fmt: skip
def test_words_that_change_a_number_are_no_unit(answer: str) -> None:
    assert same_answer("5 apples per child", "5")
    assert not same_answer(answer.format(5), "5")
    assert not same_answer(re.sub(r"\{\} (.+)", r"{}\\text{ \1}", answer).replace("{}", "5"), "5")


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${}", "{}.0", "{} apples", "{}.", r"\text{{{}}}"]))
def test_a_number_is_right_as_people_write_it_and_the_next_one_is_not(number: int, written: str) -> None:
    assert same_answer(written.format(number), str(number))
    assert not same_answer(written.format(number + 1), str(number))


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", r"\frac{10000000000!}{3}", "(" * 300, "\\", "{", "}}", "", "\n", "1" * 100_000]
)
def test_what_has_no_end_or_no_sense_is_wrong_and_the_next_answer_is_judged(answer: str) -> None:  # fmt: skip
    assert not same_answer(answer, "x+1")
    assert same_answer("1+x", "x+1")


def test_an_answer_too_long_to_be_judged_is_right_where_it_is_the_gold_answers_text() -> None:
    assert same_answer("x+" * 300 + "1", "x+" * 300 + "1")
    assert not same_answer("x+" * 300 + "1", "1+" + "x+" * 299 + "x")


def test_answers_are_judged_in_any_thread_and_after_the_judge_was_killed() -> None:
    verdicts = list[bool]()

    def ask() -> None:
        verdicts.append(same_answer("2+x", "x+2"))

    assert same_answer("1+x", "x+1")
    assert answers._judge._process
    os.kill(answers._judge._process.pid, signal.SIGKILL)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_a_judge_that_dies_between_two_questions_leaves_their_verdicts_in_order() -> None:
    judge = answers._Judge()
    assert judge.agrees("y+1", "1+y")
    process = judge._process
    assert process
    for n in range(20):  # that at times die with a question in hand
        (idle,) = psutil.Process(process.pid).children()
        idle.kill()
        assert [judge.agrees(f"{n}+y", f"y+{n + k % 2}") for k in range(4)] == [True, False] * 2
    assert judge._process is process
    process.kill()
    process.wait()
