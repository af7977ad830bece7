"""Every figure against a value worked out by hand, a brute-force count, or another library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from sapo_ray.data import MASKED, Case, LabelledTrajectory, Trajectory
from sapo_ray.metrics import (
    accuracy_interval,
    auroc,
    best_threshold,
    brier,
    first_zero,
    label_accuracy,
    label_counts,
    largest_drop,
    majority_answer,
    pass_at_k,
    repetitiveness,
    self_verification_error,
    step_accuracy,
)


def trajectory(steps: Sequence[str], *, correct: bool = False) -> Trajectory:
    return Trajectory("t", "q", "?", tuple(steps), "1", correct)


def labelled(labels: tuple[int, ...], case: Case | None = None, *, correct: bool = False) -> LabelledTrajectory:
    return LabelledTrajectory(trajectory(["s"] * len(labels), correct=correct), "saps", labels, case=case)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_intervals_equal_the_published_ones(successes: int, n: int, low: float, high: float) -> None:
    """Values of the Wilson score interval without continuity correction, z = 1.96."""
    assert accuracy_interval(successes, n) == pytest.approx([low, high], abs=5e-5)


@given(n=st.integers(1, 400), data=st.data())
def test_wilson_intervals_follow_their_formula(n: int, data: st.DataObject) -> None:
    successes, z = data.draw(st.integers(0, n)), 1.959964
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert accuracy_interval(successes, n) == pytest.approx([centre - half, centre + half], abs=1e-6)


def test_without_trials_there_is_no_interval() -> None:
    assert accuracy_interval(0, 0) is None


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_counts_the_draws_with_a_success(n: int) -> None:
    for successes, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        expected = fmean(any(sample < successes for sample in draw) for draw in draws)
        assert pass_at_k(successes, n, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(1, 3, k)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["3", "5", "5", None], "5"), (["3", "5"], "3"), ([None, None, "4"], "4"), ([None], None), ([], None)],
)
def test_majority_is_the_most_frequent_answer(answers: list[str | None], expected: str | None) -> None:
    assert majority_answer(answers, str.__eq__) == expected


def test_answers_that_agree_count_together() -> None:
    """As the first of them, and each text is compared once."""
    asked: list[tuple[str, str]] = []

    def agree(answer: str, other: str) -> bool:
        asked.append((answer, other))
        return float(answer) == float(other)

    assert majority_answer(["3", "18", "3", "18.0", "18.0", "3", "18.0", "5", "5"], agree) == "18"
    assert asked == [("18", "3"), ("18.0", "3"), ("18.0", "18"), ("5", "3"), ("5", "18")]


def test_first_zero() -> None:
    assert first_zero((1, 1, 0, 1)) == 2
    assert first_zero((1, 1)) == 2
    assert first_zero((MASKED, 0)) == 1
    assert first_zero(()) == 0


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, labels = [0.9, 0.4, 0.6, 0.4, 0.1], [1, 1, 0, 0, 0]
    pairs = [(0.9, 0.6), (0.9, 0.4), (0.9, 0.1), (0.4, 0.6), (0.4, 0.4), (0.4, 0.1)]
    assert auroc(scores, labels) == pytest.approx(fmean((r > w) + (r == w) / 2 for r, w in pairs))
    assert auroc([0.2, 0.3], [1, 1]) is None
    assert auroc([], []) is None


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1))
def test_brier_agrees_with_scikit_learn(rows: list[tuple[float, int]]) -> None:
    scores, labels = zip(*rows, strict=True)
    assert brier(scores, labels) == pytest.approx(brier_score_loss(labels, scores, pos_label=1))


def test_brier_and_step_accuracy_by_hand() -> None:
    assert brier([0.9, 0.5, 0.2], [1, 0, 0]) == pytest.approx((0.01 + 0.25 + 0.04) / 3)
    assert step_accuracy([0.9, 0.5, 0.2, 0.5], [1, 0, 0, 1], threshold=0.5) == 0.75
    assert brier([], []) is None
    assert step_accuracy([], [], 0.5) is None


def test_a_masked_label_counts_as_wrong() -> None:
    assert label_accuracy([(1, MASKED, 0), (0,)], [(1, 1, 0), (1,)]) == 0.5
    assert label_accuracy([], []) is None
    with pytest.raises(ValueError, match="shorter"):
        label_accuracy([(1, 0)], [(1,)])


@pytest.mark.parametrize(
    ("lowest", "correct", "expected"),
    [
        ([0.9, 0.8, 0.3, 0.2], [True, True, False, False], 0.8),
        ([0.9, 0.8, 0.85, 0.2, 0.1], [True, True, False, False, False], 0.8),
        ([0.9, 0.4, 0.5, 0.45, 0.42], [True, True, False, False, False], 0.9),
        ([0.7, 0.7], [True, False], 0.7),
        ([0.1, 0.9], [True, False], 0.1),
        ([0.9, 0.8], [True, True], 0.5),
        ([0.3], [False], 0.5),
        ([], [], 0.5),
    ],
    ids=["apart", "overlap", "many wrong", "all the same", "upside down", "only right", "only wrong", "none"],
)
def test_best_threshold_by_hand(lowest: list[float], correct: list[bool], expected: float) -> None:
    assert best_threshold(lowest, correct) == expected


SCORED = st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.8]) | st.floats(0, 1), st.booleans())


@given(st.lists(SCORED, max_size=12).filter(lambda rows: len({right for _, right in rows}) == 2))
def test_the_best_threshold_is_the_lowest_of_those_that_no_other_beats(rows: list[tuple[float, bool]]) -> None:
    """Against a count of both kinds at every threshold that a score could be."""
    rights, wrongs = [s for s, right in rows if right], [s for s, right in rows if not right]

    def balanced(threshold: float) -> float:
        return fmean(s >= threshold for s in rights) + fmean(s < threshold for s in wrongs)

    chosen = best_threshold([score for score, _ in rows], [right for _, right in rows])
    thresholds = sorted(rights + wrongs)
    best = max(map(balanced, thresholds))
    assert chosen == next(t for t in thresholds if balanced(t) == best)
    assert best >= max(map(balanced, [0.0, 0.2, 0.4, 0.6, 1.0]))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("correct", [True, False])
def test_no_threshold_is_taken_from_scores_that_are_no_numbers(score: float, correct: bool) -> None:
    with pytest.raises(ValueError, match="nan or infinite"):
        best_threshold([0.5, score, 0.5], [True, correct, True])


def test_self_verification_error_by_hand() -> None:
    rows = [
        (labelled((1, 1), "correct", correct=True), (0.9, 0.8)),  # "no error", and there is none
        (labelled((1, 1), "correct", correct=True), (0.9, 0.4)),  # an error seen where there is none: contradicted
        (labelled((1, 0), "a"), (0.9, 0.2)),  # the predicted first error is the first error
        (labelled((1, 1), "b"), (0.2, 0.2)),  # it lies later: contradicted
        (labelled((1, 0), "a"), (0.9, 0.8)),  # "no error", but the answer is wrong: contradicted
    ]
    error = self_verification_error([row for row, _ in rows], [scores for _, scores in rows], threshold=0.5)
    assert error == {"right": 0.5, "wrong": pytest.approx(2 / 3), "all": 0.6}
    only_right = self_verification_error([rows[0][0]], [rows[0][1]], threshold=0.8)
    assert only_right == {"right": 0.0, "wrong": None, "all": 0.0}
    assert self_verification_error([], [], 0.5) == {"right": None, "wrong": None, "all": None}


def test_largest_drop_starts_at_the_start_score() -> None:
    assert largest_drop((0.9, 0.8, 0.3), 1.0) == pytest.approx(0.5)
    assert largest_drop((0.3, 0.2), 1.0) == pytest.approx(0.7)
    assert largest_drop((0.5, 0.6), 0.4) == pytest.approx(-0.1)


def test_repetitiveness_is_the_mean_share_of_repeated_steps() -> None:
    trajectories = [trajectory("abab"), trajectory("abc"), trajectory("")]
    assert repetitiveness(trajectories) == 0.25
    assert repetitiveness([trajectory("")]) is None


def test_label_counts() -> None:
    assert label_counts([labelled((1, MASKED, 0)), labelled((0, 0))]) == {"right": 1, "wrong": 3, "masked": 1}
    assert label_counts([]) == {"right": 0, "wrong": 0, "masked": 0}
