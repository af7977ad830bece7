"""The audit of a round worked out by hand: it is silent about a sound one and names everything that is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.audit import audit, audit_answers, audit_pairs, audit_predictions
from sapo_ray.data import Estimate, LabelledTrajectory, PreferencePair, Rollout, Trajectory
from sapo_ray.labelers import LabelingConfig, expand, make_labeler
from sapo_ray.pairs import PairsConfig, make_pairs
from sapo_ray.sampler import original_trajectory
from sapo_ray.sandbox import Sandbox, SandboxConfig
from sapo_ray.tasks import Code, CodeConfig
from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.tasks.code import CodeSource

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


SOLUTION = st.tuples(st.sampled_from("pq"), st.text("ab", max_size=3), st.booleans(), st.integers(0, 8))
"""Question, text, whether it is right, and eighths of a score: many are equal."""
PAIRING = st.builds(
    PairsConfig,
    eta=st.sampled_from([0.125, 0.25, 0.5]),
    max_per_question=st.integers(0, 5),
    require_outcome=st.booleans(),
    keep_unpaired=st.booleans(),
    max_unpaired_per_question=st.integers(0, 2),
)


@given(drawn=st.lists(SOLUTION, max_size=12), config=PAIRING, scored=st.booleans())
def test_pairs_follow_from_the_solutions_that_they_name(
    drawn: list[tuple[str, str, bool, int]], config: PairsConfig, scored: bool
) -> None:
    solutions = [
        Trajectory(f"{i}", question, "?", tuple(text), None, correct=right)
        for i, (question, text, right, _) in enumerate(drawn)
    ]
    scores = {f"{i}": score / 8 for i, (*_, score) in enumerate(drawn)} if scored else None
    config = config if scored else replace(config, require_outcome=True)
    assert list(audit_pairs(make_pairs(solutions, scores, config), solutions, scored, config)) == []


SOLUTIONS = [
    Trajectory(name, "q", "?", (name,), None, correct=name.startswith("r")) for name in ("r1", "r2", "r3", "w1", "w2")
]
PAIRING_BY_HAND = PairsConfig(eta=0.25, max_per_question=2)
BY_HAND = [
    PreferencePair("q", "?", "r1", ("r1",), 0.875, "w1", ("w1",), 0.125),
    PreferencePair("q", "?", "r2", ("r2",), 0.75, "w2", ("w2",), 0.25),
    PreferencePair("q", "?", "r3", ("r3",), 0.375),
]


@pytest.mark.parametrize(
    ("number", "damage", "problem"),
    [
        (0, {"chosen_score": 0.25}, "pair r1 over w1 does not follow from its solutions and their scores"),
        (0, {"chosen_score": None}, "r1: its score is None"),
        (0, {"rejected_score": float("nan")}, "w1: its score is nan"),
        (1, {"rejected": ("w1",)}, "pair r2 over w2 does not follow from its solutions and their scores"),
        (1, {"chosen": ("r1",)}, "pair r2 over w2 does not follow from its solutions and their scores"),
        (1, {"question": "!"}, "pair r2 over w2 does not follow from its solutions and their scores"),
        (1, {"rejected_id": "r3"}, "pair r2 over r3 does not follow from its solutions and their scores"),
        (1, {"rejected_id": "w1"}, "w1: its score is 0.125 in one pair and 0.25 in another"),
        (1, {"rejected_score": 0.6}, "pair r2 over w2 does not follow from its solutions and their scores"),
        (2, {"chosen_id": "r9"}, "pair r9 alone does not follow from its solutions and their scores"),
        (2, {"chosen_id": "w2"}, "pair w2 alone does not follow from its solutions and their scores"),
    ],
)
def test_a_damaged_pair_is_named(number: int, damage: dict[str, Any], problem: str) -> None:
    def found(rows: list[PreferencePair]) -> list[str]:
        return list(audit_pairs(rows, SOLUTIONS, True, PAIRING_BY_HAND))

    assert found(BY_HAND) == []
    assert problem in found([replace(row, **damage) if i == number else row for i, row in enumerate(BY_HAND)])
    assert found([*BY_HAND, BY_HAND[0]]) == ["pair r1 over w1 is stored 2 times"]


def test_a_pair_by_outcome_alone_that_is_lost_is_missed() -> None:
    pairs = make_pairs(SOLUTIONS, None, PAIRING_BY_HAND)
    assert list(audit_pairs(pairs[1:], SOLUTIONS, False, PAIRING_BY_HAND)) == ["pair r1 over w1 is missing"]


def test_answers_follow_from_steps() -> None:
    task = Chain(ChainConfig(worked=2, pool=1, validation=1, test=1, ood=1))
    questions = task.questions("worked")
    right = replace(original_trajectory(questions[0]), id="t", source="sampled")
    cut = replace(right, answer=None, correct=False, truncated=True)

    def found(trajectory: Trajectory) -> list[str]:
        return list(audit_answers([trajectory], questions, task))

    assert found(right) == found(cut) == []
    assert found(replace(right, question="?")) == [f"t: {right.question_id} is no question that is sampled here"]
    assert found(replace(right, correct=False)) == [
        f"t: its answer {right.answer!r} is wrong, but its steps come to {right.answer!r}, which is right"
    ]
    assert found(replace(right, answer="x"))
    assert found(replace(right, truncated=True))
    assert found(replace(right, steps=right.steps[:-1]))


@pytest.mark.usefixtures("needs_bubblewrap")
def test_programs_are_run_again_where_there_is_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_text(json.dumps({"question": "?", "tests": ["assert f(2) == 4"]}))
    source = CodeSource(path=str(tmp_path / "code.jsonl"), answer="tests")
    task = Code(CodeConfig(train_data=source, worked=0, validation=0, test=1))
    (question,) = task.questions("test")
    right = Trajectory("t", question.id, "?", ("def f(x):\n", "    return 2 * x\n"), "", correct=True)
    right = replace(right, answer="".join(right.steps))
    wrong = replace(right, correct=False)
    with Sandbox(SandboxConfig()) as sandbox:
        assert list(audit_answers([right], [question], task, sandbox)) == []
        (found,) = audit_answers([wrong], [question], task, sandbox)
    assert "is wrong, but its steps come to" in found
    assert list(audit_answers([right, wrong], [question], task)) == []  # taken as they are
    assert len(list(audit_answers([replace(right, answer="x")], [question], task))) == 1
