"""What a run says about itself: counts, warning signs at their thresholds, and the shape of summary.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from sapo_ray.annotator import Annotation
from sapo_ray.cost import Cost
from sapo_ray.data import Case, LabelledTrajectory, Trajectory
from sapo_ray.report import StreamReport, summary, warning_signs
from sapo_ray.sampler import Samples


def trajectory(name: str, steps: str, *, correct: bool = False, answer: str | None = "1") -> Trajectory:
    return Trajectory(name, "q", "?", tuple(steps), answer, correct, truncated=answer is None)


def labelled(
    trajectory: Trajectory,
    labels: tuple[int, ...],
    case: Case | None = None,
    scores: tuple[float, ...] | None = None,
    parent: str | None = None,
) -> LabelledTrajectory:
    return LabelledTrajectory(trajectory, "saps", labels, scores=scores, case=case, parent_id=parent)


def test_stream_report_by_hand() -> None:
    report = StreamReport(start_score=0.9)
    right, wrong, cut = trajectory("r", "ab", correct=True), trajectory("w", "aa"), trajectory("c", "x", answer=None)
    expansion = labelled(trajectory("e", "ac"), (1, 0), parent="w")
    again = labelled(right, (0, 0), parent="w")
    report.add(
        Samples([right, wrong, cut], 1, 0),
        [
            Annotation([labelled(right, (1, 1), "correct")]),
            Annotation([labelled(wrong, (1, -1), "b", (0.8, 0.2)), expansion, again]),
        ],
    )
    report.add(Samples([cut], 1, 2), [])
    report.add(Samples([cut], 0, 0), [])  # a first sample repeats none
    report.add(Samples([], 0, 4), [])
    assert report.notes() == {
        "trajectories": {
            "sampled": 5,
            "correct": 1,
            "truncated": 3,
            "unanswered_questions": 3,
            "expanded": 1,
        },
        "cases": {"correct": 1, "b": 1},
        "step_labels": {"right": 4, "wrong": 1, "masked": 1},
        "mean_largest_drop": pytest.approx(0.6),
        "repetitiveness": pytest.approx((0.5 / 3 + 0 + 0) / 3),
        "duplicates": pytest.approx((1 / 3 + 1) / 2),
        "empty": pytest.approx((0 + 2 / 4 + 0 + 1) / 4),
    }
    restored = StreamReport.restored(0.9, True, json.loads(json.dumps(report.state())))
    assert restored.notes() == report.notes()
    older = {name: count for name, count in report.state().items() if name != "empty"}
    assert StreamReport.restored(0.9, True, older).notes() == {**report.notes(), "empty": None}


def test_a_stream_of_nothing_has_null_figures() -> None:
    notes = StreamReport(start_score=None).notes()
    assert notes["mean_largest_drop"] is None
    assert notes["repetitiveness"] is None
    assert notes["duplicates"] is None
    assert notes["empty"] is None


def test_drops_are_those_that_detection_may_go_by() -> None:
    report = StreamReport(start_score=0.9, allow_first_step=False)
    wrong = trajectory("w", "abc")
    report.add(Samples([wrong], 0, 0), [Annotation([labelled(wrong, (0, 0, 0), "c", (0.2, 0.2, 0.1))])])
    assert report.notes()["mean_largest_drop"] == pytest.approx(0.1)


def signs(before: dict[str, Any], now: dict[str, Any], errors: Sequence[float | None] = (None, None)) -> list[str]:
    notes = {
        "round-1/sample": before,
        "round-2/sample": now,
        "round-1/self-verification": {"all": errors[0]},
        "round-2/self-verification": {"all": errors[1]},
    }
    return [sign.split(":")[0] for sign in warning_signs(2, notes)]


@pytest.mark.parametrize(
    ("drop", "repeats", "error", "expected"),
    [
        (0.21, 0.2, 0.59, []),
        (0.19, 0.2, 0.59, ["score drops flatten"]),
        (0.21, 0.21, 0.59, ["samples are repetitive"]),
        (0.21, 0.2, 0.61, ["self-verification error rises"]),
        (0.9, 0.0, 0.1, []),
        (0.0, 1.0, 1.0, ["score drops flatten", "self-verification error rises", "samples are repetitive"]),
        (None, None, None, []),
    ],
)
def test_each_warning_sign_comes_at_its_threshold(
    drop: float | None, repeats: float | None, error: float | None, expected: list[str]
) -> None:
    before = {"mean_largest_drop": 0.4, "repetitiveness": 0.9}
    assert signs(before, {"mean_largest_drop": drop, "repetitiveness": repeats}, (0.5, error)) == expected


@pytest.mark.parametrize(
    ("before", "now", "warned"),
    [
        (0.5, 0.79, False),
        (0.5, 0.81, True),
        (0.75, 0.84, False),
        (0.75, 0.86, True),
        (0.9, 0.9, False),
        (None, 1.0, False),
    ],
)
def test_samples_that_differ_less_and_less_are_a_sign(before: float | None, now: float, warned: bool) -> None:
    assert signs({"duplicates": before}, {"duplicates": now}) == ["samples hardly differ"] * warned


def test_a_sign_that_grows_slowly_is_seen() -> None:
    """Held against the best round so far: 0.08 more error in each of two rounds is 0.16 more."""
    notes = {
        **{f"round-{i}/self-verification": {"all": 0.4 + 0.08 * i} for i in range(3)},
        **{f"round-{i}/sample": {"mean_largest_drop": 0.5 * 0.6**i} for i in range(3)},
    }
    assert warning_signs(1, notes) == []
    assert warning_signs(2, notes) == [
        "score drops flatten: 0.180 after 0.500; detection may be turning random",
        "self-verification error rises: 0.560 after 0.400",
    ]


def test_without_a_round_before_there_is_nothing_to_compare_with() -> None:
    assert signs({}, {"mean_largest_drop": 0.0}, (None, 1.0)) == []
    assert warning_signs(0, {}) == []
    alone = {"round-0/sample": {"repetitiveness": 0.5}}
    assert warning_signs(0, alone) == ["samples are repetitive: 50% of a solution's steps repeat an earlier one"]


def test_the_last_reasoner_is_looked_at_too() -> None:
    notes = {"round-2/evaluate": {"test": {"repetitiveness": 0.95}}}
    (sign,) = warning_signs(2, notes)
    assert sign.startswith("the new reasoner's test samples are repetitive: 95%")


@pytest.mark.parametrize(("share", "warned"), [(0.2, False), (0.21, True), (1.0, True), (None, False)])
def test_samples_without_a_finished_step_are_a_sign(share: float | None, warned: bool) -> None:
    assert signs({}, {"empty": share}) == ["samples are empty"] * warned


TEST = {"greedy_accuracy": 0.5, "n": 4, "ci95": [0.15, 0.85], "pass_at_k": 0.75}
VERIFIER = {"step_accuracy": 0.9, "auroc": 0.8, "brier": 0.1, "first_error_hit_rate": 0.6}
NOTES: dict[str, Any] = {
    "round-0/sft": {"updates": 3, "cost": {"trained_tokens": 10, "flops": 60.0}, "seconds": 1.5},
    "round-0/sample": {
        "labels": 7,
        "repetitiveness": 0.0,
        "cost": {"checks": 2, "generated_tokens": 5},
        "seconds": 2.0,
    },
    "round-0/self-verification": {"right": 0.1, "wrong": 0.3, "all": 0.2, "trajectories": 9},
    "round-0/evaluate": {
        "test": TEST,
        "ood": TEST,
        "verifier": VERIFIER,
        "cost": {"generated_tokens": 3},
        "seconds": 4,
    },
    "round-0/warnings": {"signs": ["look out"]},
    "round-1/evaluate": {"test": TEST, "ood": TEST, "verifier": None, "cost": {}},
    "round-1/pairs": {"pairs": 3, "share_unlike_outcome": None, "cost": {}, "seconds": 1},
    "round-10/sample": {"labels": 99},
    "round-2/sample": {"labels": 1},
}


def test_the_summary_has_the_promised_shape() -> None:
    zero, one = summary(NOTES, rounds=2)["rounds"]
    assert (zero["round"], zero["test"], zero["ood"]) == (0, TEST, TEST)
    assert {key: zero["verifier"][key] for key in VERIFIER} == VERIFIER
    assert zero["verifier"]["self_verification_error"] == 0.2
    assert zero["verifier"]["self_verification"] == {
        "trained_from": {"right": 0.1, "wrong": 0.3, "all": 0.2},
        "aligned": {"right": None, "wrong": None, "all": None},
    }
    assert zero["samples"] == {"labels": 7, "repetitiveness": 0.0}
    assert zero["cost"] == {
        **Cost(checks=2, generated_tokens=5, trained_tokens=10, flops=60.0).as_dict(),
        "seconds": {"sft": 1.5, "sample": 2.0, "evaluate": 4},
        "stages": {name: NOTES[f"round-0/{name}"]["cost"] for name in ("sft", "sample", "evaluate")},
    }
    assert (zero["pairs"], zero["warnings"]) == (None, ["look out"])

    assert (one["round"], one["verifier"], one["samples"], one["warnings"]) == (1, None, None, [])
    assert one["pairs"] == {"pairs": 3, "share_unlike_outcome": None}
    assert one["cost"]["generated_tokens"] == 0
    assert zero.keys() == one.keys() >= {"round", "test", "ood", "verifier", "cost"}


def test_only_rounds_that_were_evaluated_are_summed_up() -> None:
    assert [entry["round"] for entry in summary(NOTES, rounds=0)["rounds"]] == [0]
    assert summary({}, rounds=3) == {"rounds": []}
    assert json.loads(json.dumps(summary(NOTES, rounds=2))) == summary(NOTES, rounds=2)


def test_costs_add_up_field_by_field() -> None:
    cost = Cost(checks=1, flops=2.0)
    cost += Cost(checks=2, rollouts=3, flops=0.5)
    assert cost == Cost(checks=3, rollouts=3, flops=2.5)
