"""ProcessBench's figures against cases worked by hand, a search over all thresholds, and the published files."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.errors import SapoError
from sapo_ray.processbench import Case, choose_threshold, first_below, first_error_report, read_cases

# Four wrong solutions, then three right ones. At 0.5 the answers are 1, 0, 2, -1; -1, -1, 1.
SCORES = [[0.9, 0.2, 0.1], [0.42, 0.41], [0.8, 0.6, 0.4], [0.9, 0.7], [0.9], [0.5, 0.6], [0.7, 0.45]]
LABELS = [1, 1, 2, 0, -1, -1, -1]


def test_a_score_at_the_threshold_is_no_error() -> None:
    assert first_below([0.5, 0.4, 0.3], 0.5) == 1
    assert first_below([0.5, 0.5], 0.5) == -1


def test_figures_by_hand() -> None:
    """Two of four first errors are hit, two of three right solutions pass: F1 = 2 · 1/2 · 2/3 / (1/2 + 2/3) = 4/7."""
    report = first_error_report(SCORES, LABELS, 0.5)
    assert report["f1"] == pytest.approx(4 / 7)
    assert (report["wrong_accuracy"], report["wrong"]) == (0.5, 4)
    assert (report["right_accuracy"], report["right"]) == (pytest.approx(2 / 3), 3)
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
    assert report["wrong_ci95"] == pytest.approx([0.1500, 0.8500], abs=1e-4)
    assert report["right_ci95"] == pytest.approx([0.2077, 0.9385], abs=1e-4)


def test_an_error_found_too_early_or_too_late_is_missed() -> None:
    """And a wrong solution without an error found, too, though its answer is wrong."""
    scores = [[0.1, 0.1, 0.9], [0.9, 0.9, 0.1], [0.9, 0.9, 0.9], [0.9, 0.1, 0.1]]
    assert first_error_report(scores, [1, 1, 1, 1], 0.5)["wrong_accuracy"] == 0.25


@pytest.mark.parametrize(("labels", "missing"), [([1, 0], "right"), ([-1, -1], "wrong")])
def test_one_kind_alone_has_no_f1(labels: list[int], missing: str) -> None:
    report = first_error_report([[0.9, 0.1], [0.8, 0.7]], labels, 0.5)
    assert (report["f1"], report[f"{missing}_accuracy"], report[f"{missing}_ci95"]) == (None, None, None)
    with pytest.raises(SapoError, match="one of the two kinds is missing"):
        choose_threshold([[0.9, 0.1], [0.8, 0.7]], labels)


def test_no_hit_at_all_is_an_f1_of_0() -> None:
    assert first_error_report([[0.9], [0.1]], [0, -1], 0.5)["f1"] == 0


def test_a_threshold_by_hand() -> None:
    """0.42 hits three of four first errors and lets all right solutions pass: F1 = 2 · 3/4 · 1 / (3/4 + 1) = 6/7.

    The next lower one, 0.41, misses the second error, and the next higher one, 0.45, finds it a step too early.
    """
    assert choose_threshold(SCORES, LABELS) == 0.42
    assert first_error_report(SCORES, LABELS, 0.42)["f1"] == pytest.approx(6 / 7)
    assert first_error_report(SCORES, LABELS, 0.41)["wrong_accuracy"] == 0.5
    assert first_error_report(SCORES, LABELS, 0.45)["wrong_accuracy"] == 0.5


def test_the_lowest_of_equally_good_thresholds() -> None:
    assert choose_threshold([[0.9, 0.1], [0.8, 0.7, 0.6]], [1, -1]) == 0.6


UNIT = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]) | st.floats(0, 1)
SOLUTION = st.lists(UNIT, min_size=1, max_size=5).flatmap(
    lambda scores: st.tuples(st.just(scores), st.integers(-1, len(scores) - 1))
)


def _f1(solutions: list[tuple[list[float], int]], threshold: float) -> Fraction:
    """From the definition, without rounding."""
    accuracy = []
    for kind in (True, False):
        hits = []
        for scores, label in solutions:
            if (label == -1) == kind:
                below = [j for j in range(len(scores)) if scores[j] < threshold]
                hits.append((below[0] if below else -1) == label)
        accuracy.append(Fraction(sum(hits), len(hits)))
    right, wrong = accuracy
    return 2 * right * wrong / (right + wrong) if right + wrong else Fraction(0)


@given(st.lists(SOLUTION, min_size=2, max_size=12).filter(lambda rows: len({label == -1 for _, label in rows}) == 2))
def test_no_threshold_is_better_than_the_one_chosen(solutions: list[tuple[list[float], int]]) -> None:
    """Nor as good and lower among the scores; those between and beyond the scores are tried, too."""
    scores, labels = [row for row, _ in solutions], [label for _, label in solutions]
    chosen = choose_threshold(scores, labels)
    best = _f1(solutions, chosen)
    assert first_error_report(scores, labels, chosen)["f1"] == pytest.approx(float(best))
    levels = sorted({score for row in scores for score in row})
    between = [(low + high) / 2 for low, high in pairwise(levels)]
    assert all(_f1(solutions, threshold) <= best for threshold in [-1.0, *levels, *between, 2.0])
    assert all(_f1(solutions, threshold) < best for threshold in levels if threshold < chosen)


RECORD = {"id": "a-1", "problem": "1 + 1?", "steps": ["1 + 1 = 3", "3"], "label": 0}


def test_json_and_json_lines(tmp_path: Path) -> None:
    plain = {"question": "2 + 2?", "steps": ["4"], "label": -1, "generator": "who"}
    (tmp_path / "a.json").write_text(json.dumps([RECORD, plain]))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(plain)}\n")
    first = Case("a-1", "1 + 1?", ("1 + 1 = 3", "3"), 0)
    for name, place in (("a.json", "record 2"), ("a.jsonl", "line 3")):
        file = str(tmp_path / name)
        assert read_cases(file) == [first, Case(f"{file}, {place}", "2 + 2?", ("4",), -1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "`label` is 2; it must be the first wrong step, 0 to 1, or -1 for none"),
        ({"label": -2}, "`label` is -2; "),
        ({"label": True}, "`label` is True; "),
        ({"label": 1.0}, "`label` is 1.0; "),
        ({"label": None}, "`label` is None; "),
        ({"steps": []}, "`steps` must be a list of texts, none of them empty"),
        ({"steps": ["1", " \n"]}, "`steps` must be a list of texts, none of them empty"),
        ({"steps": "1 + 1 = 3"}, "`steps` must be a list of texts, none of them empty"),
        ({"problem": ""}, "`problem` (or `question`) must be a text"),
        ({"problem": 7}, "`problem` (or `question`) must be a text"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(RECORD)}\n{json.dumps(RECORD | change)}\n")
    with pytest.raises(SapoError) as error:
        read_cases(str(file))
    assert str(error.value).startswith(f"{file}, line 2: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"problem"\n', "{}, line 1: no JSON: "),
        ("a.json", "{}", "{}: holds no list of records; "),
        ("a.json", "[[1]]", "{}, record 1: it is list, no object"),
        ("a.json", "[]", "{} holds no records"),
        ("a.json", "[", "{}: not what its name says: "),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SapoError) as error:
        read_cases(str(tmp_path / name))
    assert str(error.value).startswith(message.format(tmp_path / name))


@pytest.mark.parametrize(("name", "wrong", "right"), [("gsm8k", 207, 193), ("math", 594, 406)])
def test_the_published_files_are_read_whole(data: Path, name: str, wrong: int, right: int) -> None:
    """As many wrong and right solutions as the paper counts; oracle scores are worth an F1 of 1."""
    file = data / "processbench" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    cases = read_cases(str(file))
    assert [case.id for case in cases] == [f"{name}-{i}" for i in range(wrong + right)]
    labels = [case.label for case in cases]
    scores = [[0.9 - 0.8 * (j == case.label) for j in range(len(case.steps))] for case in cases]
    assert choose_threshold(scores, labels) == 0.9
    report = first_error_report(scores, labels, 0.9)
    assert (report["f1"], report["wrong"], report["right"]) == (1, wrong, right)
