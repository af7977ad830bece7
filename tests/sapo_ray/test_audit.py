"""The audit of a round worked out by hand: it is silent about a sound one and names everything that is damaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sapo_ray.audit import audit, audit_predictions
from sapo_ray.data import Estimate, LabelledTrajectory, Rollout, Trajectory
from sapo_ray.labelers import LabelingConfig, expand, make_labeler

CONFIG = LabelingConfig(rollouts=3)
WRONG = Trajectory("w", "q", "?", ("a", "b", "c", "d"), "9", correct=False)
RIGHT = Trajectory("r", "q", "?", ("a", "e"), "8", correct=True)


def rollout(step: int, sample: int, *steps: str, kept: bool = True) -> Rollout:
    """A completion of WRONG's prefix. It is right if it ends with "8"."""
    right = steps[-1] == "8"
    return Rollout(f"w/{step}/{sample}", "w", "q", step, sample, steps, steps[-1], right, False, kept)


ROLLOUTS = [
    rollout(0, 0, "x", "9"),
    rollout(0, 1, "x", "8"),
    rollout(0, 2, "y", "8", kept=False),
    rollout(1, 0, "x", "9"),
    rollout(1, 1, "x", "9"),
    rollout(1, 2, "y", "9"),
]
LABELLED = LabelledTrajectory(
    WRONG,
    "saps",
    (1, 0, 0, 0),
    (0.8, 0.3, 0.2, 0.1),
    1,
    (Estimate(0, 1, 1, 2, ("w/0/0", "w/0/1")), Estimate(1, 0, 0, 3, ("w/1/0", "w/1/1", "w/1/2"))),
    "a",
)
EXPANDED = expand(LABELLED, ROLLOUTS)
ROWS = [LABELLED, LabelledTrajectory(RIGHT, "saps", (1, 1), case="correct"), *EXPANDED]


def problems(rows: list[LabelledTrajectory], rollouts: list[Rollout], **config: Any) -> list[str]:
    return list(audit(rows, rollouts, replace(CONFIG, **config)))


def test_a_sound_round_has_no_problem() -> None:
    assert [row.trajectory.steps for row in EXPANDED] == [("a", "x", "8"), ("a", "b", "x", "9"), ("a", "b", "y", "9")]
    assert problems(ROWS, ROLLOUTS) == problems(ROWS[::-1], ROLLOUTS[::-1]) == []
    assert problems(ROWS[:2], ROLLOUTS, expand=False) == []


@pytest.mark.parametrize(
    ("number", "damage", "problem"),
    [
        (0, {"step_labels": (1, 1, 0, 0)}, "w: (1, 1, 0, 0) (case a) does not follow from its estimates"),
        (0, {"case": "b"}, "w: (1, 0, 0, 0) (case b) does not follow from its estimates"),
        (0, {"estimates": LABELLED.estimates[:1]}, "w: the check of step 1 is missing"),
        (0, {"estimates": LABELLED.estimates[:1]}, "w/1/2: no estimate is made of it"),
        (
            0,
            {"estimates": LABELLED.estimates[::-1]},
            "w: the steps [1, 0] are checked, but its labeler asks for [0, 1]",
        ),
        (
            0,
            {"estimates": (replace(LABELLED.estimates[0], successes=2), LABELLED.estimates[1])},
            "w: the estimate of step 0 does not follow from its rollouts",
        ),
        (1, {"step_labels": (1, 0)}, "r: (1, 0) (case correct) does not follow from its estimates"),
        (1, {"estimates": LABELLED.estimates[:1]}, "r: the steps [0] are checked, but its labeler asks for []"),
        (2, {"step_labels": (1, 1, 0)}, "expanded/w/0/1: the row does not follow from its parent w"),
        (2, {"branch_step": 1}, "expanded/w/0/1: the row does not follow from its parent w"),
        (3, {"parent_id": "r"}, "expanded/w/1/0: the row does not follow from its parent r"),
        (3, {"trajectory": replace(EXPANDED[1].trajectory, answer="7")}, "expanded/w/1/0: the row does not follow"),
    ],
)
def test_a_damaged_row_is_named(number: int, damage: dict[str, Any], problem: str) -> None:
    rows = [replace(row, **damage) if i == number else row for i, row in enumerate(ROWS)]
    assert any(line.startswith(problem) for line in problems(rows, ROLLOUTS)), problems(rows, ROLLOUTS)


@pytest.mark.parametrize(
    ("number", "damage", "problem"),
    [
        (1, {"correct": False}, "w: the estimate of step 0 does not follow from its rollouts"),
        (2, {"kept": True}, "w/0/2: it is kept, against its estimate"),
        (3, {"kept": False}, "w/1/0: it is not kept, against its estimate"),
        (3, {"sample": 3}, "w: the estimate of step 1 does not follow from its rollouts"),
        (4, {"sample": 0}, "w: the estimate of step 1 does not follow from its rollouts"),
        (4, {"branch_step": 2}, "w/1/1: no estimate is made of it"),
        (5, {"steps": ("z", "9")}, "expanded/w/1/2: the row does not follow from its parent w"),
    ],
)
def test_a_damaged_rollout_is_named(number: int, damage: dict[str, Any], problem: str) -> None:
    rollouts = [replace(one, **damage) if i == number else one for i, one in enumerate(ROLLOUTS)]
    assert problem in problems(ROWS, rollouts)


@pytest.mark.parametrize("lost", [0, 1, 3, 4, 5])
def test_a_lost_rollout_is_missed(lost: int) -> None:
    step = ROLLOUTS[lost].branch_step
    found = problems(ROWS, ROLLOUTS[:lost] + ROLLOUTS[lost + 1 :])
    assert f"w: the estimate of step {step} does not follow from its rollouts" in found


def test_a_surplus_check_is_named() -> None:
    """An estimate that follows from rollouts of its own, of a step that saps had no reason to check."""
    more = [rollout(2, 0, "8")]
    surplus = replace(LABELLED, estimates=(*LABELLED.estimates, Estimate(2, 1, 1, 1, ("w/2/0",))))
    rows = [surplus, *ROWS[1:], *expand(surplus, more)]
    assert problems(rows, ROLLOUTS + more) == ["w: the steps [0, 1, 2] are checked, but its labeler asks for [0, 1]"]


@pytest.mark.parametrize("lost", [2, 3, 4])
def test_a_lost_expanded_row_is_missed(lost: int) -> None:
    name = ROWS[lost].trajectory.id
    assert problems(ROWS[:lost] + ROWS[lost + 1 :], ROLLOUTS) == [f"{name}: the row that expansion makes is missing"]


def test_an_expanded_row_that_repeats_a_given_one_is_to_be_left_out() -> None:
    same = LabelledTrajectory(
        replace(EXPANDED[0].trajectory, id="s", source="sampled"), "saps", (1,) * 3, case="correct"
    )
    assert problems([*ROWS[:2], same, *ROWS[3:]], ROLLOUTS) == []
    assert problems([*ROWS, same], ROLLOUTS) == ["expanded/w/0/1: the row does not follow from its parent w"]


@pytest.mark.parametrize(
    ("damage", "start", "problem"),
    [
        ({}, 0.9, None),
        ({"predicted_first_error": 2}, 0.9, "w: the predicted first error is 2, not 1"),
        ({"predicted_first_error": None}, 0.9, "w: the predicted first error is None, not 1"),
        ({}, 1.4, "w: the predicted first error is 1, not 0"),
        ({"scores": (0.8, 0.7, 0.2, 0.1)}, 0.9, "w: the predicted first error is 1, not 2"),
        ({"scores": None}, 0.9, "trajectory w has no scores: saps needs a verifier"),
        ({"scores": (0.8, float("nan"), 0.2, 0.1)}, 0.9, "trajectory w: the score of step 1 is nan"),
    ],
)
def test_predictions_follow_from_scores(damage: dict[str, Any], start: float, problem: str | None) -> None:
    rows = [replace(LABELLED, **damage), *ROWS[1:]]
    found = list(audit_predictions(rows, make_labeler(CONFIG, start, seed=0)))
    assert found == [] if problem is None else len(found) == 1 and found[0].startswith(problem)


def test_random_predictions_follow_from_the_seed() -> None:
    rows = [replace(LABELLED, labeler="random", scores=None, predicted_first_error=step) for step in range(4)]

    def sound(seed: int) -> list[int]:
        make = make_labeler(LabelingConfig(labeler="random"), None, seed)
        return [step for step, row in enumerate(rows) if not list(audit_predictions([row], make))]

    assert {len(sound(seed)) for seed in range(20)} == {1}
    assert len({tuple(sound(seed)) for seed in range(20)}) > 1
