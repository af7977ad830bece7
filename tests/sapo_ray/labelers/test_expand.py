"""Expansion's three rules, worked by hand."""

from __future__ import annotations

import pytest

from sapo_ray.data import MASKED, Case, LabelledTrajectory, Rollout, Trajectory
from sapo_ray.labelers import expand

PARENT = Trajectory("p", "q", "?", ("s0 ", "s1 ", "s2 ", "s3 "), "7", correct=False)


def labelled(case: Case, *labels: int) -> LabelledTrajectory:
    return LabelledTrajectory(PARENT, "saps", labels, scores=(0.9, 0.8, 0.2, 0.1), predicted_first_error=2, case=case)


def rollout(step: int, sample: int, text: str, *, correct: bool = False, kept: bool = True) -> Rollout:
    steps = tuple(part + " " for part in text.split())
    answer = "5" if correct else "8"
    return Rollout(f"p/{step}/{sample}", "p", "q", step, sample, steps, answer, correct, truncated=False, kept=kept)


def rows(parent: LabelledTrajectory, *rollouts: Rollout) -> list[tuple[str, tuple[int, ...]]]:
    return [("".join(row.trajectory.steps).strip(), row.step_labels) for row in expand(parent, rollouts)]


def test_case_a_keeps_successes_before_the_error_and_failures_after_it() -> None:
    parent = labelled("a", 1, 1, 0, 0)
    failed_before = rollout(1, 0, "x y")
    reached = rollout(1, 1, "u", correct=True)
    failures = rollout(2, 0, "v"), rollout(2, 1, "v w")
    assert rows(parent, failed_before, reached, *failures) == [
        ("s0 s1 u", (1, 1, 1)),
        ("s0 s1 s2 v", (1, 1, 0, 0)),
        ("s0 s1 s2 v w", (1, 1, 0, 0, 0)),
    ]


def test_case_b_keeps_successes_only() -> None:
    parent = labelled("b", 1, 1, 1, 0)
    sampled = [rollout(1, 0, "x"), rollout(1, 1, "u", correct=True), rollout(2, 0, "v", correct=True)]
    assert rows(parent, *sampled) == [("s0 s1 u", (1, 1, 1)), ("s0 s1 s2 v", (1, 1, 1, 1))]


def test_case_c_keeps_all_failures_with_the_prefix_as_labelled() -> None:
    sampled = [rollout(1, 0, "x y"), rollout(2, 0, "v")]
    assert rows(labelled("c", 1, 0, 0, 0), *sampled) == [("s0 s1 x y", (1, 0, 0, 0)), ("s0 s1 s2 v", (1, 0, 0, 0))]
    assert rows(labelled("c", MASKED, 0, 0, 0), *sampled) == [
        ("s0 s1 x y", (MASKED, 0, 0, 0)),
        ("s0 s1 s2 v", (MASKED, 0, 0, 0)),
    ]


def test_case_d_drops_failures_on_both_sides() -> None:
    parent = labelled("d", 1, 1, 1, 0)
    sampled = [rollout(1, 0, "x"), rollout(1, 1, "y"), rollout(2, 0, "v"), rollout(2, 1, "u", correct=True)]
    assert rows(parent, *sampled) == [("s0 s1 s2 u", (1, 1, 1, 1))]


def test_failures_of_the_bare_question_are_dropped() -> None:
    sampled = [rollout(-1, 0, "x"), rollout(-1, 1, "u v", correct=True)]
    assert rows(labelled("a", 0, 0, 0, 0), *sampled) == [("u v", (1, 1))]


def test_discarded_empty_and_repeated_completions_are_dropped() -> None:
    parent = labelled("c", 1, 0, 0, 0)
    sampled = [
        rollout(2, 0, "s3"),
        rollout(1, 0, "s2 s3"),
        rollout(1, 1, "s2 x"),
        rollout(2, 1, "x"),
        rollout(2, 2, ""),
        rollout(2, 3, "late", correct=True, kept=False),
    ]
    assert rows(parent, *sampled) == [("s0 s1 s2 x", (1, 0, 0, 0))]


def test_rows_say_where_they_come_from_whatever_the_order_of_arrival() -> None:
    parent = labelled("a", 1, 1, 0, 0)
    sampled = [rollout(2, 0, "v"), rollout(1, 0, "u", correct=True)]
    made = expand(parent, sampled)
    assert made == expand(parent, sampled[::-1])
    assert made[0] == LabelledTrajectory(
        Trajectory("expanded/p/1/0", "q", "?", ("s0 ", "s1 ", "u "), "5", correct=True, source="expanded"),
        "saps",
        (1, 1, 1),
        case="correct",
        parent_id="p",
        branch_step=1,
        rollout_id="p/1/0",
    )
    assert (made[1].case, made[1].trajectory.correct, made[1].scores, made[1].estimates) == (None, False, None, ())


def test_a_rollout_of_another_trajectory_is_refused() -> None:
    stray = Rollout("z/0/0", "z", "q", 0, 0, ("x",), None, correct=False, truncated=False, kept=True)
    with pytest.raises(ValueError, match="rollout z/0/0 is of z, not of p"):
        expand(labelled("a", 1, 1, 0, 0), [stray])
