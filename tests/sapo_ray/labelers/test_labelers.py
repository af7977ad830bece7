"""The five labelers against hand-worked examples, a brute-force oracle, and the properties that make them labelers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sapo_ray.data import MASKED, Trajectory
from sapo_ray.labelers import (
    Labeler,
    LabelingConfig,
    Labels,
    drive,
    first_error,
    fixed_start_score,
    is_labelled,
    label_correct,
    make_labeler,
    most_checks,
)
from sapo_ray.labelers.base import LabelerName


def wrong(steps: int, *, answered: bool = True, name: str = "q/0") -> Trajectory:
    """A trajectory of so many steps that missed the answer, or gave none."""
    texts = tuple(f"step {j}\n" for j in range(steps))
    return Trajectory(name, "q", "?", texts, "7" if answered else None, correct=False)


def ask(labeler: Labeler, table: tuple[int, ...]) -> tuple[Labels, list[tuple[int, ...]]]:
    """A labeler's labels where c_j is `table[j]`, and what it asked for, one entry a yield."""
    asked: list[tuple[int, ...]] = []

    def check(steps: tuple[int, ...]) -> tuple[int, ...]:
        asked.append(steps)
        return tuple(table[step] for step in steps)

    return drive(labeler, check), asked


def labeler(name: str, trajectory: Trajectory, scores: list[float] | None = None, **config: object) -> Labeler:
    merged = OmegaConf.to_object(OmegaConf.structured(LabelingConfig(labeler=name, **config)))  # type: ignore[arg-type]
    assert isinstance(merged, LabelingConfig)
    return make_labeler(merged, start_score=0.9, seed=3)(trajectory, scores)


def drop_at(step: int, steps: int) -> list[float]:
    """Scores that fall from 0.9 to 0.1 into `step`."""
    return [0.9 if j < step else 0.1 for j in range(steps)]


# Detection


@pytest.mark.parametrize(
    ("scores", "start", "expected"),
    [
        ([0.9, 0.8, 0.2, 0.1], 0.9, 2),
        ([0.3, 0.2, 0.1, 0.1], 0.9, 0),
        ([0.3, 0.1, 0.05, 0.05], 0.3, 1),
        ([0.5, 0.25, 0.0], 0.5, 1),
        ([0.1, 0.5, 0.9], 0.1, 0),
        ([0.4], 0.9, 0),
    ],
    ids=["largest drop", "first step", "hard question", "earliest of equals", "only rises", "one step"],
)
def test_first_error_is_the_largest_drop(scores: list[float], start: float, expected: int) -> None:
    assert first_error(scores, start, allow_first_step=True) == expected


def test_first_step_is_no_candidate_unless_it_is_the_only_one() -> None:
    assert first_error([0.1, 0.1, 0.05], 1.0, allow_first_step=False) == 2
    assert first_error([0.1], 1.0, allow_first_step=False) == 0


@pytest.mark.parametrize("scores", [[0.9, math.nan, 0.1], [math.nan, 0.5, 0.1], [0.9, 0.5, math.inf]])
def test_a_score_that_is_no_number_names_the_trajectory(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"trajectory q/17: the score of step \d is (nan|inf)"):
        next(labeler("saps", wrong(3, name="q/17"), scores))


def test_scores_must_match_the_steps() -> None:
    with pytest.raises(ValueError, match="trajectory q/0 has 3 steps but 2 scores"):
        next(labeler("saps", wrong(3), [0.9, 0.1]))


# Verification and correction


@pytest.mark.parametrize(
    ("predicted", "table", "case", "asked", "keep", "mask"),
    [
        (3, (1, 1, 1, 0, 0, 0), "a", (2, 3), (1, 1, 1, 0, 0, 0), (1, 1, 1, 0, 0, 0)),
        (2, (1, 1, 1, 1, 0, 0), "b", (1, 2), (1, 1, 1, 0, 0, 0), (1, 1, 1, -1, -1, 0)),
        (4, (1, 0, 0, 0, 0, 0), "c", (3, 4), (1, 1, 1, 0, 0, 0), (-1, -1, -1, 0, 0, 0)),
        (2, (1, 0, 1, 0, 0, 0), "d", (1, 2), (1, 1, 1, 0, 0, 0), (1, 1, 1, -1, -1, 0)),
        (0, (0, 0, 0, 0, 0, 0), "a", (0,), (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
        (0, (1, 1, 0, 0, 0, 0), "b", (0,), (1, 0, 0, 0, 0, 0), (1, -1, -1, -1, -1, 0)),
        (1, (0, 0, 0, 0, 0, 0), "c", (0, 1), (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
        (5, (1, 1, 1, 1, 1, 0), "a", (4,), (1, 1, 1, 1, 1, 0), (1, 1, 1, 1, 1, 0)),
        (5, (1, 1, 0, 0, 0, 0), "c", (4,), (1, 1, 1, 1, 0, 0), (-1, -1, -1, -1, 0, 0)),
        (4, (1, 1, 1, 1, 1, 0), "b", (3, 4), (1, 1, 1, 1, 1, 0), (1, 1, 1, 1, 1, 0)),
    ],
)
def test_saps_checks_and_corrects(
    predicted: int,
    table: tuple[int, ...],
    case: str,
    asked: tuple[int, ...],
    keep: tuple[int, ...],
    mask: tuple[int, ...],
) -> None:
    scores = drop_at(predicted, 6)
    kept = ask(labeler("saps", wrong(6), scores, unproven="keep"), table)
    masked = ask(labeler("saps", wrong(6), scores, unproven="mask"), table)
    assert kept == (Labels(keep, case, predicted), [asked])  # type: ignore[arg-type]
    assert masked == (Labels(mask, case, predicted), [asked])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predicted", "table", "case", "mask"),
    [
        (2, (1, 1, 0), "a", (1, 1, 0)),
        (2, (1, 1, 1), "b", (1, 1, 1)),
        (2, (1, 0, 1), "d", (1, 1, 1)),
        (2, (1, 0, 0), "c", (MASKED, 0, 0)),
        (1, (1, 1, 0), "b", (1, 1, MASKED)),
    ],
)
def test_without_an_answer_the_last_step_is_checked_like_any_other(
    predicted: int, table: tuple[int, ...], case: str, mask: tuple[int, ...]
) -> None:
    trajectory = wrong(3, answered=False)
    labels, asked = ask(labeler("saps", trajectory, drop_at(predicted, 3), unproven="mask"), table)
    assert asked == [(predicted - 1, predicted)]
    assert labels == Labels(mask, case, predicted)  # type: ignore[arg-type]


def test_one_step_needs_no_check_where_its_answer_is_wrong() -> None:
    for name in ("saps", "random", "omega", "shepherd", "outcome"):
        labels, asked = ask(labeler(name, wrong(1), [0.5], allow_first_step=False), (0,))
        assert (labels.step_labels, asked) == ((0,), [])


@pytest.mark.parametrize("value", [0, 1])
def test_one_step_without_an_answer_takes_its_check(value: int) -> None:
    for name in ("saps", "random", "omega", "shepherd"):
        labels, asked = ask(labeler(name, wrong(1, answered=False), [0.5]), (value,))
        assert (labels.step_labels, asked) == ((value,), [(0,)])


def test_random_step_follows_from_seed_and_trajectory() -> None:
    def step(name: str, seed: int, *, first: bool = True) -> int | None:
        config = LabelingConfig(labeler="random", allow_first_step=first)
        return ask(make_labeler(config, None, seed)(wrong(6, name=name), None), (0,) * 6)[0].predicted_first_error

    names = [f"q/{i}" for i in range(200)]
    drawn = [step(name, 1) for name in names]
    assert drawn == [step(name, 1) for name in names]
    assert drawn != [step(name, 2) for name in names]
    assert set(drawn) == set(range(6))
    assert {step(name, 1, first=False) for name in names} == set(range(1, 6))


# The step-by-step labelers


def test_shepherd_checks_every_open_step_at_once() -> None:
    table = (1, 0, 1, 0, 0)
    assert ask(labeler("shepherd", wrong(5)), table) == (Labels((1, 1, 1, 0, 0)), [(0, 1, 2, 3)])
    assert ask(labeler("shepherd", wrong(5), raw=True), table) == (Labels((1, 0, 1, 0, 0)), [(0, 1, 2, 3)])
    assert ask(labeler("shepherd", wrong(2, answered=False)), (1, 1)) == (Labels((1, 1)), [(0, 1)])


def test_omega_halves_the_open_steps() -> None:
    labels, asked = ask(labeler("omega", wrong(8)), (1, 1, 1, 1, 1, 0, 0, 0))
    assert (labels, asked) == (Labels((1, 1, 1, 1, 1, 0, 0, 0)), [(3,), (5,), (4,)])


def test_outcome_asks_nothing() -> None:
    assert ask(labeler("outcome", wrong(3, answered=False)), ()) == (Labels((0, 0, 0)), [])


def test_right_trajectories_need_no_labeler() -> None:
    right = replace(wrong(2), correct=True)
    assert label_correct(right) == Labels((1, 1), "correct")
    with pytest.raises(ValueError, match="q/0 is right"):
        labeler("omega", right)
    with pytest.raises(ValueError, match="has no steps"):
        labeler("omega", wrong(0))


# Properties


@st.composite
def problems(draw: st.DrawFn) -> tuple[Trajectory, list[float], tuple[int, ...]]:
    """A wrong trajectory, its scores, and any table of estimates that agrees with a wrong answer."""
    count, answered = draw(st.integers(1, 9)), draw(st.booleans())
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=count, max_size=count))
    table = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return wrong(count, answered=answered), scores, (*table[:-1], 0 if answered else table[-1])


def bound(name: str, trajectory: Trajectory) -> int:
    """Most checks a labeler may make, as the method states them (n + 1 steps, s_0 … s_n)."""
    unknown = len(trajectory.steps) - (trajectory.answer is not None)
    paired = min(2, unknown)
    search = math.ceil(math.log2(unknown + 1))
    return {"saps": paired, "random": paired, "omega": search, "shepherd": unknown, "outcome": 0}[name]


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("name", get_args(LabelerName))
def test_most_checks_are_reached_and_never_exceeded(name: LabelerName, count: int) -> None:
    tables = [(*table, 0) for table in product((0, 1), repeat=count - 1)]
    trajectories = [(wrong(count, name=f"q/{step}"), drop_at(step, count)) for step in range(count)]
    asked = [ask(labeler(name, *trajectory), table)[1] for table in tables for trajectory in trajectories]
    assert max(sum(map(len, steps)) for steps in asked) == most_checks(name, count)


NAMES = st.sampled_from(["saps", "random", "omega", "shepherd", "outcome"])


@given(problem=problems(), name=NAMES, unproven=st.sampled_from(["keep", "mask"]), first=st.booleans())
def test_labels_are_monotone_true_to_every_success_and_within_the_bound(
    problem: tuple[Trajectory, list[float], tuple[int, ...]], name: str, unproven: str, first: bool
) -> None:
    trajectory, scores, table = problem
    labels, asked = ask(labeler(name, trajectory, scores, unproven=unproven, allow_first_step=first), table)
    checked = [step for steps in asked for step in steps]
    unmasked = [label for label in labels.step_labels if label != MASKED]

    assert len(labels.step_labels) == len(trajectory.steps)
    assert unmasked == sorted(unmasked, reverse=True)
    assert all(set(labels.step_labels[: step + 1]) == {1} for step in checked if table[step])
    assert len(checked) == len(set(checked)) <= bound(name, trajectory)
    assert all(0 <= step < len(trajectory.steps) for step in checked)
    assert all(asked), "an empty question is none"
    if unproven == "keep":
        assert MASKED not in labels.step_labels


@given(problem=problems(), first=st.booleans())
def test_saps_agrees_with_the_case_table_read_out_literally(
    problem: tuple[Trajectory, list[float], tuple[int, ...]], first: bool
) -> None:
    trajectory, scores, table = problem
    labels, _ = ask(labeler("saps", trajectory, scores, allow_first_step=first), table)
    t, count = labels.predicted_first_error, len(trajectory.steps)
    assert t is not None
    before, at = (1 if t == 0 else table[t - 1]), table[t]
    right = {"a": range(t), "b": range(t + 1), "c": range(t - 1), "d": range(t + 1)}
    case = {(1, 0): "a", (1, 1): "b", (0, 0): "c", (0, 1): "d"}[before, at]
    assert labels.case == case
    assert labels.step_labels == tuple(int(j in right[case]) for j in range(count))


@given(problem=problems(), name=st.sampled_from(["saps", "random"]))
def test_exactly_the_labels_that_the_checks_leave_open_are_masked(
    problem: tuple[Trajectory, list[float], tuple[int, ...]], name: str
) -> None:
    """The oracle tries every monotone truth that agrees with what was seen: a step is open if they differ on it."""
    trajectory, scores, table = problem
    labels, asked = ask(labeler(name, trajectory, scores, unproven="mask"), table)
    count = len(trajectory.steps)
    seen = {step: table[step] for steps in asked for step in steps}
    if trajectory.answer is not None:
        seen[count - 1] = 0
    last_success = max((step for step, value in seen.items() if value), default=-1)
    believed = {step: value for step, value in seen.items() if value or step > last_success}
    truths = [(1,) * t + (0,) * (count - t) for t in range(count + 1)]
    possible = [truth for truth in truths if all(truth[step] == value for step, value in believed.items())]
    expected = tuple(values.pop() if len(values) == 1 else MASKED for values in map(set, zip(*possible, strict=True)))
    assert labels.step_labels == expected


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=9),
    answered=st.booleans(),
    first=st.booleans(),
    unproven=st.sampled_from(["keep", "mask"]),
)
def test_saps_is_the_truth_where_detection_is_right(
    scores: list[float], answered: bool, first: bool, unproven: str
) -> None:
    """Whatever the scores, there is one truth that they detect: the one whose first error is theirs."""
    error, count = first_error(scores, 0.9, allow_first_step=first), len(scores)
    truth = (1,) * error + (0,) * (count - error)
    trajectory = wrong(count, answered=answered)
    labels, _ = ask(labeler("saps", trajectory, scores, unproven=unproven, allow_first_step=first), truth)
    assert labels == Labels(truth, "a", error)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("count", range(1, 14))
def test_omega_and_shepherd_find_every_monotone_truth(count: int, answered: bool) -> None:
    trajectory = wrong(count, answered=answered)
    for error in range(count if answered else count + 1):
        truth = (1,) * error + (0,) * (count - error)
        assert ask(labeler("omega", trajectory), truth)[0] == Labels(truth)
        assert ask(labeler("shepherd", trajectory), truth)[0] == Labels(truth)


def test_shepherd_closes_every_table_and_raw_leaves_it() -> None:
    for table in product((0, 1), repeat=5):
        closed = tuple(int(any(table[j:])) for j in range(5))
        trajectory = wrong(5, answered=False)
        assert ask(labeler("shepherd", trajectory), table)[0].step_labels == closed
        assert ask(labeler("shepherd", trajectory, raw=True), table)[0].step_labels == table


# Configuration


def test_config_holds_a_number_or_auto_as_start_score() -> None:
    schema = OmegaConf.structured(LabelingConfig)
    for given_value, expected in (("0.25", 0.25), ("1", 1.0), ("auto", None)):
        merged = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(f"start_score: {given_value}")))
        assert isinstance(merged, LabelingConfig)
        assert fixed_start_score(merged) == expected


def test_a_fixed_start_score_goes_before_the_verifiers() -> None:
    scores = [0.5, 0.4, 0.0]
    auto = make_labeler(LabelingConfig(), 1.0, 0)(wrong(3), scores)
    fixed = make_labeler(LabelingConfig(start_score="0.5"), 1.0, 0)(wrong(3), scores)
    assert ask(auto, (0, 0, 0))[0].predicted_first_error == 0
    assert ask(fixed, (0, 0, 0))[0].predicted_first_error == 2
    with pytest.raises(ValueError, match="no verifier gave one"):
        make_labeler(LabelingConfig(), None, 0)
    with pytest.raises(ValueError, match="q/0 has no scores"):
        make_labeler(LabelingConfig(), 1.0, 0)(wrong(3), None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollouts", 0),
        ("rollouts_in_flight", 0),
        ("fraction", 1.5),
        ("right_fraction", math.nan),
        ("start_score", "high"),
        ("start_score", "nan"),
    ],
)
def test_impossible_values_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key} is {value!r}"):
        LabelingConfig(**{key: value})  # type: ignore[arg-type]


def test_which_trajectories_are_labelled() -> None:
    cut_off = replace(wrong(2, answered=False), truncated=True)
    assert not is_labelled(cut_off, LabelingConfig(), 0)
    assert is_labelled(cut_off, LabelingConfig(truncated="check"), 0)
    assert is_labelled(wrong(2, answered=False), LabelingConfig(), 0)
    assert not is_labelled(wrong(0), LabelingConfig(), 0)

    some = LabelingConfig(fraction=0.25, right_fraction=0.0)
    drawn = [is_labelled(wrong(2, name=f"q/{i}"), some, 0) for i in range(2000)]
    assert 0.2 < sum(drawn) / len(drawn) < 0.3
    assert not is_labelled(replace(wrong(2), correct=True), some, 0)
    assert is_labelled(replace(wrong(2), correct=True), LabelingConfig(fraction=0.0), 0)


def test_only_saps_goes_by_scores() -> None:
    names: list[LabelerName] = ["saps", "shepherd", "omega", "random", "outcome"]
    assert [name for name in names if LabelingConfig(labeler=name).uses_scores] == ["saps"]
