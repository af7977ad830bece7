"""Labelling with rollouts: the same labels and kept rollouts in whatever order they arrive, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.annotator import Annotation, Annotator, distinct
from sapo_ray.audit import audit, audit_predictions
from sapo_ray.data import LabelledTrajectory, Question, Trajectory, seed_of
from sapo_ray.labelers import LabelingConfig, drive, label_correct, make_labeler
from sapo_ray.labelers.base import LabelerName
from sapo_ray.models import character_tokenizer
from sapo_ray.requests import Completion, GenerateRequest, Sampling
from sapo_ray.sampler import Solver
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig

TASK = Chain(ChainConfig())
TOKENIZER = character_tokenizer(VOCABULARY, 512)
QUESTION = Question("q", "7+3*7-5+1+2", "8")
WRONG = Trajectory(
    "s/q/0", "q", QUESTION.text, ("7+3=0\n", "0*7=1\n", "1-5=6\n", "6+1=7\n", "7+2=9\n"), "9", correct=False
)
SCORES = (0.9, 0.8, 0.2, 0.1, 0.1)  # the predicted first error is step 2
ROLLOUTS = 4

Table = Mapping[tuple[int, int], str]
"""(step, sample) -> what the reasoner says."""


def said(right: bool, step: int, sample: int) -> str:
    """A completion in two lines, no two of them alike."""
    return f"{step}+{sample}=1\n=8\n" if right else f"{step}-{sample}=1\n=3\n"


class Reasoner:
    """Says what the table holds for a request's step and sample, after pseudo-random delays."""

    def __init__(self, table: Table, delays: int = 0) -> None:
        self._table, self._rng = table, random.Random(delays)
        self.requests: list[GenerateRequest] = []

    async def __call__(self, request: GenerateRequest) -> Completion:
        self.requests.append(request)
        for _ in range(self._rng.randrange(6)):
            await asyncio.sleep(0)
        step, sample = request.id.rsplit("/", 2)[1:]
        text = self._table[int(step.removeprefix("step-")), int(sample)]
        finished = not text.endswith("…")
        text = text.removesuffix("…")
        return Completion(request.id, text, tuple(TOKENIZER.encode(text)), finished, len(request.prompt_ids), 0)


def annotate(generate: Callable[[GenerateRequest], Any], trajectory: Trajectory = WRONG, **config: Any) -> Annotation:
    """Label one trajectory; afterwards no task may be left, whether that succeeds or fails."""
    labeling = LabelingConfig(**{"rollouts": ROLLOUTS, **config})
    solver = Solver(TASK, TOKENIZER, generate, seed=5)
    annotator = Annotator(solver, make_labeler(labeling, 0.9, seed=1), labeling, Sampling())

    async def main() -> Annotation:
        try:
            return await annotator.annotate(QUESTION, trajectory, SCORES if annotator.needs_scores else None, "round-1")
        finally:
            assert len(asyncio.all_tasks()) == 1

    return asyncio.run(main())


def always(right: bool) -> Table:
    return {(j, k): said(right, j, k) for j in range(-1, 5) for k in range(ROLLOUTS)}


NAMES = st.sampled_from(["saps", "random", "omega", "shepherd", "outcome"])
TABLES = st.builds(
    lambda successes: {
        (j, k): said(successes[j * ROLLOUTS + k], j, k) for j in range(len(WRONG.steps)) for k in range(ROLLOUTS)
    },
    st.lists(st.sampled_from([False, False, True]), min_size=20, max_size=20),
)


@given(
    table=TABLES,
    name=NAMES,
    in_flight=st.integers(1, ROLLOUTS + 1),
    delays=st.integers(0, 99),
    unproven=st.sampled_from(["keep", "mask"]),
)
def test_labels_and_kept_rollouts_do_not_depend_on_the_order_of_arrival(
    table: Table, name: LabelerName, in_flight: int, delays: int, unproven: str
) -> None:
    keys: dict[str, Any] = {"labeler": name, "unproven": unproven, "rollouts_in_flight": in_flight}
    reasoner = Reasoner(table, delays)
    one, other = annotate(reasoner, **keys), annotate(Reasoner(table, delays + 1), **keys)
    everything = annotate(Reasoner(table, delays), early_exit=False, **keys)
    config = LabelingConfig(rollouts=ROLLOUTS, **keys)

    def first_success(step: int) -> int | None:
        return next((k for k in range(ROLLOUTS) if table[step, k].endswith("=8\n")), None)

    def check(steps: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(first_success(step) is not None) for step in steps)

    expected = drive(make_labeler(config, 0.9, seed=1)(WRONG, SCORES), check)
    assert one.labelled == other.labelled
    assert one.labelled[0].step_labels == everything.labelled[0].step_labels == expected.step_labels
    assert [r for r in one.rollouts if r.kept] == [r for r in other.rollouts if r.kept]
    for estimate in one.labelled[0].estimates:
        last = first_success(estimate.step)
        kept = ROLLOUTS if last is None else last + 1
        assert (estimate.value, estimate.successes, estimate.tried) == (last is not None, last is not None, kept)
        ids = tuple(r.id for r in one.rollouts if r.branch_step == estimate.step and r.kept)
        assert estimate.rollout_ids == ids
        assert [int(name.rpartition("/")[2]) for name in ids] == list(range(kept))
    assert {r.sample for r in everything.rollouts} == (set(range(ROLLOUTS)) if everything.rollouts else set())
    assert all(r.kept for r in everything.rollouts)
    assert one.checks == len(one.labelled[0].estimates)
    for annotation, early_exit in ((one, True), (everything, False)):
        assert list(audit(annotation.labelled, annotation.rollouts, replace(config, early_exit=early_exit))) == []
        assert list(audit_predictions(annotation.labelled, make_labeler(config, 0.9, seed=1))) == []
    ids = tuple(request.id for request in reasoner.requests)
    assert len(set(ids)) == len(ids) == len(one.rollouts)
    assert all(request.seed == seed_of(5, request.id) for request in reasoner.requests)


def test_saps_by_hand() -> None:
    """Steps 1 and 2 are checked. Step 1 fails but for its third sample, step 2 fails throughout: case a."""
    table = {**always(right=False), (1, 2): said(True, 1, 2)}
    reasoner = Reasoner(table)
    annotation = annotate(reasoner, rollouts_in_flight=1)
    row, *expanded = annotation.labelled
    assert (row.trajectory, row.scores, row.labeler) == (WRONG, SCORES, "saps")
    assert (row.case, row.predicted_first_error, row.step_labels) == ("a", 2, (1, 1, 0, 0, 0))
    assert [(e.step, e.value, e.successes, e.tried) for e in row.estimates] == [(1, 1, 1, 3), (2, 0, 0, 4)]
    assert row.estimates[0].rollout_ids == tuple(f"round-1/s/q/0/step-1/{k}" for k in range(3))
    assert (annotation.checks, len(annotation.rollouts)) == (2, 7)
    prompts = {TOKENIZER.decode(list(request.prompt_ids)) for request in reasoner.requests}
    assert prompts == {"7+3*7-5+1+2\n7+3=0\n0*7=1\n", "7+3*7-5+1+2\n7+3=0\n0*7=1\n1-5=6\n"}
    assert [(e.branch_step, e.step_labels, e.trajectory.correct) for e in expanded] == [
        (1, (1, 1, 1, 1), True),
        *[(2, (1, 1, 0, 0, 0), False)] * 4,
    ]
    assert expanded[0].trajectory.steps == ("7+3=0\n", "0*7=1\n", "1+2=1\n", "=8\n")
    assert {(e.parent_id, e.trajectory.source) for e in expanded} == {("s/q/0", "expanded")}


def test_samples_after_the_first_success_are_kept_out_but_recorded() -> None:
    """Sample 1 of step 1 ends first; then sample 0 succeeds, and decides. Both were asked for, and sample 2."""

    async def generate(request: GenerateRequest) -> Completion:
        slow = request.id.endswith("/0")
        for _ in range(20 if slow else 1):
            await asyncio.sleep(0)
        step, sample = request.id.rsplit("/", 2)[1:]
        text = said(slow, int(step[-1]), int(sample))
        return Completion(request.id, text, (), True, 1, 0)

    annotation = annotate(generate, labeler="omega", rollouts_in_flight=2)
    first = [(r.sample, r.correct, r.kept) for r in annotation.rollouts if r.branch_step == 1]
    assert first == [(0, True, True), (1, False, False), (2, False, False), (3, False, False)]
    assert annotation.labelled[0].estimates[0].tried == 1
    assert all(row.trajectory.correct for row in annotation.labelled[1:])


def test_a_right_trajectory_needs_no_rollout() -> None:
    right = Trajectory("s/q/1", "q", QUESTION.text, ("=8\n",), "8", correct=True)
    reasoner = Reasoner({})
    annotation = annotate(reasoner, right, labeler="shepherd")
    assert reasoner.requests == []
    assert annotation == Annotation([LabelledTrajectory(right, "shepherd", (1,), case="correct")])


def test_the_last_step_is_checked_where_no_answer_was_read() -> None:
    cut_off = Trajectory("s/q/2", "q", QUESTION.text, ("7+3=0\n", "0*7=0\n"), None, correct=False, truncated=True)
    annotation = annotate(Reasoner({**always(right=False), (1, 0): "0-5=5\n=8\n"}), cut_off, labeler="shepherd")
    assert annotation.labelled[0].step_labels == (1, 1)
    assert annotation.labelled[1].trajectory.steps == ("7+3=0\n", "0*7=0\n", "0-5=5\n", "=8\n")


def test_empty_and_truncated_completions_fail_and_give_no_row_without_steps() -> None:
    table = {(j, k): "" if k % 2 else "1+1=2\n1+…" for j in range(5) for k in range(ROLLOUTS)}
    annotation = annotate(Reasoner(table), labeler="omega")
    assert annotation.labelled[0].step_labels == (0, 0, 0, 0, 0)
    assert {(r.steps, r.answer, r.correct, r.truncated) for r in annotation.rollouts if r.sample % 2 == 0} == {
        (("1+1=2\n",), None, False, True)
    }
    # An empty completion ends the solution at its prefix, whose last value is the answer.
    assert {(r.branch_step, r.answer) for r in annotation.rollouts if r.sample % 2} == {(0, "0"), (1, "1")}
    assert [row.trajectory.steps[-1] for row in annotation.labelled[1:]] == ["1+1=2\n", "1+1=2\n"]


def test_without_expansion_there_is_one_row() -> None:
    annotation = annotate(Reasoner(always(right=False)), expand=False)
    assert len(annotation.labelled) == 1
    assert len(annotation.rollouts) == 2 * ROLLOUTS


def test_an_original_solution_gets_a_row_without_a_labeler() -> None:
    labeling = LabelingConfig()
    solver = Solver(TASK, TOKENIZER, Reasoner({}), seed=0)
    annotator = Annotator(solver, make_labeler(labeling, 0.9, 0), labeling, Sampling())
    original = Trajectory("o", "q", "?", ("=8\n", "=8\n"), "8", correct=True, source="original")
    row = annotator.labelled(original, label_correct(original))
    assert (row.step_labels, row.case, row.scores, row.estimates) == ((1, 1), "correct", None, ())


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("failing", ["step-1/0", "step-1/1", "step-2/1", "step-2/3"])
def test_a_failed_rollout_fails_the_annotation_and_ends_the_others(failing: str, early_exit: bool) -> None:
    """Every other rollout fails its attempt, or never ends."""
    begun, ended = [], []

    async def generate(request: GenerateRequest) -> Completion:
        begun.append(request.id)
        try:
            await asyncio.sleep(0)
            if request.id.endswith(failing):
                raise ConnectionError(f"{request.id} is lost")
            if request.id.endswith("/3"):
                await asyncio.Future()
            return Completion(request.id, "=3\n", (), True, 1, 0)
        finally:
            ended.append(request.id)

    with pytest.raises(ConnectionError, match=f"{failing} is lost"):
        annotate(generate, early_exit=early_exit)
    assert sorted(begun) == sorted(ended)


def test_a_failed_rollout_that_does_not_count_fails_too() -> None:
    async def generate(request: GenerateRequest) -> Completion:
        if request.id.endswith("/1"):
            for _ in range(9):
                await asyncio.sleep(0)
            raise ConnectionError("lost")
        return Completion(request.id, "=8\n", (), True, 1, 0)

    with pytest.raises(ConnectionError, match="lost"):
        annotate(generate)


def test_an_interrupted_annotation_leaves_no_task() -> None:
    async def main() -> None:
        async def generate(request: GenerateRequest) -> Completion:
            return await asyncio.Future()

        labeling = LabelingConfig()
        solver = Solver(TASK, TOKENIZER, generate, seed=0)
        annotator = Annotator(solver, make_labeler(labeling, 0.9, 0), labeling, Sampling())
        task = asyncio.create_task(annotator.annotate(QUESTION, WRONG, SCORES, "s"))
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) > 2
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_scores_that_are_no_numbers_are_refused() -> None:
    labeling = LabelingConfig()
    solver = Solver(TASK, TOKENIZER, Reasoner({}), seed=0)
    annotator = Annotator(solver, make_labeler(labeling, 0.9, 0), labeling, Sampling())
    with pytest.raises(ValueError, match="trajectory s/q/0: the score of step 1 is nan"):
        asyncio.run(annotator.annotate(QUESTION, WRONG, (0.9, float("nan"), 0.2, 0.1, 0.1), "s"))


def test_rows_that_repeat_another_are_dropped_and_given_ones_go_first() -> None:
    def row(name: str, steps: str, *labels: int, question: str = "q", parent: str | None = None) -> LabelledTrajectory:
        trajectory = Trajectory(name, question, "?", tuple(steps), "1", correct=False)
        return LabelledTrajectory(trajectory, "saps", labels, parent_id=parent)

    first = [row("a", "xy", 1, 0), row("a1", "xz", 1, 0, parent="a"), row("a2", "uv", 0, 0, parent="a")]
    second = [row("b", "uv", 1, 0), row("b1", "xz", 0, 0, parent="b"), row("b2", "xw", 1, 0, parent="b")]
    third = [row("c", "xy", 0, 0, question="p")]
    kept = distinct([Annotation(first), Annotation(second), Annotation(third)])
    assert [r.trajectory.id for r in kept] == ["a", "b", "c", "a1", "b2"]
    assert [r.trajectory.id for r in distinct([Annotation(first), Annotation(first)])] == ["a", "a1", "a2"]
    assert distinct([]) == []
