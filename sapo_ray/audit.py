"""Re-derives labels, predictions, answers and pairs from what a run has stored, and says where one differs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sapo_ray.annotator import Annotation, distinct
from sapo_ray.data import Estimate, LabelledTrajectory, PreferencePair, Question, Rollout, Trajectory
from sapo_ray.estimate import PrefixCheck
from sapo_ray.labelers import (
    Labeler,
    LabelingConfig,
    MakeLabeler,
    drive,
    expand,
    label_correct,
    omega,
    outcome,
    shepherd,
    verify,
)
from sapo_ray.pairs import PairsConfig, make_pairs
from sapo_ray.sandbox import Sandbox
from sapo_ray.tasks import Task


def audit(labelled: Sequence[LabelledTrajectory], rollouts: Iterable[Rollout], config: LabelingConfig) -> Iterator[str]:
    """One line for everything that does not follow from the rest, is missing or is too much; none where all is well.

    Predicted first errors are taken as they are: `audit_predictions` looks at them.
    """
    of_trajectory: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        of_trajectory[rollout.trajectory_id].append(rollout)
    for row in labelled:
        if row.parent_id is None:
            yield from _audit_checks(row, of_trajectory[row.trajectory.id], config)
            yield from _audit_labels(row, config)
    yield from _audit_expanded(labelled, of_trajectory, config)


def audit_predictions(labelled: Iterable[LabelledTrajectory], make_labeler: MakeLabeler) -> Iterator[str]:
    """One line for every predicted first error that the labeler of these rows would not predict, scores and all."""
    for row in labelled:
        if row.parent_id is not None or row.trajectory.correct:
            continue
        try:
            labels = drive(make_labeler(row.trajectory, row.scores), lambda steps: (0,) * len(steps))
        except ValueError as error:
            yield str(error)
            continue
        if labels.predicted_first_error != row.predicted_first_error:
            yield (
                f"{row.trajectory.id}: the predicted first error is {row.predicted_first_error}, "
                f"not {labels.predicted_first_error}"
            )


def audit_answers(
    trajectories: Iterable[Trajectory], questions: Iterable[Question], task: Task, sandbox: Sandbox | None = None
) -> Iterator[str]:
    """One line for every sampled trajectory of another question, or whose answer is not what its steps come to.

    Programs are run again in `sandbox`, a second time where the verdict is another: some end within their time on one
    day and not on the next. Without one their verdicts are taken as they are.
    """
    known = {question.id: question for question in questions}
    for trajectory in trajectories:
        question = known.get(trajectory.question_id)
        if question is None or question.text != trajectory.question:
            yield f"{trajectory.id}: {trajectory.question_id} is no question that is sampled here"
            continue
        answer = None if trajectory.truncated else task.answer(trajectory.steps)
        program = task.program(answer, question.answer)
        if program is None:
            correct = task.is_correct(answer, question.answer)
        else:
            correct = trajectory.correct
            if sandbox and sandbox.run(program).passed != correct:
                correct = sandbox.run(program).passed
        if (trajectory.answer, trajectory.correct) != (answer, correct):
            yield (
                f"{trajectory.id}: its answer {trajectory.answer!r} is {_verdict(trajectory.correct)}, "
                f"but its steps come to {answer!r}, which is {_verdict(correct)}"
            )


def audit_rollouts(
    rollouts: Sequence[Rollout],
    labelled: Iterable[LabelledTrajectory],
    questions: Iterable[Question],
    task: Task,
    sandbox: Sandbox | None = None,
) -> Iterator[str]:
    """One line for every rollout of a trajectory that is not labelled, or whose answer is not what its prefix and its
    steps come to. Programs are run again as by `audit_answers`."""
    parents = {row.trajectory.id: row.trajectory for row in labelled if row.parent_id is None}
    whole = list[Trajectory]()
    for rollout in rollouts:
        parent = parents.get(rollout.trajectory_id)
        if parent is None:
            yield f"{rollout.id}: {rollout.trajectory_id} is no trajectory that is labelled here"
            continue
        whole.append(
            replace(
                parent,
                id=rollout.id,
                question_id=rollout.question_id,
                steps=parent.steps[: rollout.branch_step + 1] + rollout.steps,
                answer=rollout.answer,
                correct=rollout.correct,
                truncated=rollout.truncated,
            )
        )
    yield from audit_answers(whole, questions, task, sandbox)


def audit_pairs(
    pairs: Sequence[PreferencePair], trajectories: Iterable[Trajectory], scored: bool, config: PairsConfig
) -> Iterator[str]:
    """One line for every pair that does not follow from the solutions and their stored scores, is missing or too much.

    Where pairs are `scored`, they are made again of the solutions that some row names: what is best among all is best
    among these. Their scores are taken as they are, as V_i's of the other solutions are not stored.
    """
    scores: dict[str, float] | None = {} if scored else None
    if scores is not None:
        sides = [side for p in pairs for side in ((p.chosen_id, p.chosen_score), (p.rejected_id, p.rejected_score))]
        for name, score in sides:
            if name is None:
                continue
            if score is None or not math.isfinite(score):
                yield f"{name}: its score is {score}"
            elif scores.setdefault(name, score) != score:
                yield f"{name}: its score is {scores[name]} in one pair and {score} in another"
        trajectories = [trajectory for trajectory in trajectories if trajectory.id in scores]
    derived = {(pair.chosen_id, pair.rejected_id): pair for pair in make_pairs(trajectories, scores, config)}
    stored = Counter((pair.chosen_id, pair.rejected_id) for pair in pairs)
    yield from (f"pair {_names(key)} is stored {count} times" for key, count in stored.items() if count > 1)
    for pair in pairs:
        key = pair.chosen_id, pair.rejected_id
        if derived.get(key) != pair:
            yield f"pair {_names(key)} does not follow from its solutions and their scores"
    yield from (f"pair {_names(key)} is missing" for key in derived if key not in stored)


def _names(pair: tuple[str, str | None]) -> str:
    chosen, rejected = pair
    return f"{chosen} over {rejected}" if rejected else f"{chosen} alone"


def _verdict(correct: bool) -> str:
    return "right" if correct else "wrong"


def _audit_checks(row: LabelledTrajectory, rollouts: Sequence[Rollout], config: LabelingConfig) -> Iterator[str]:
    """Do the estimates, and which rollouts are kept, follow from what each rollout reached?"""
    for estimate in row.estimates:
        of_check = [rollout for rollout in rollouts if rollout.branch_step == estimate.step]
        if estimate != _estimate(estimate.step, of_check, config):
            yield f"{row.trajectory.id}: the estimate of step {estimate.step} does not follow from its rollouts"
        for rollout in of_check:
            if rollout.kept != (rollout.id in estimate.rollout_ids):
                yield f"{rollout.id}: it is {'' if rollout.kept else 'not '}kept, against its estimate"
    checked = {estimate.step for estimate in row.estimates}
    yield from (
        f"{rollout.id}: no estimate is made of it" for rollout in rollouts if rollout.branch_step not in checked
    )


def _estimate(step: int, rollouts: Sequence[Rollout], config: LabelingConfig) -> Estimate | None:
    """What a check makes of its rollouts; None where they are no check's or leave it undecided."""
    check = PrefixCheck(config.rollouts, config.rollouts_in_flight, config.early_exit)
    names = {rollout.sample: rollout.id for rollout in rollouts}
    try:
        for rollout in rollouts:
            check.record(rollout.sample, rollout.correct)
        kept = check.kept
    except (ValueError, RuntimeError):
        return None
    return Estimate(step, check.value, check.successes, len(kept), tuple(names[sample] for sample in kept))


def _audit_labels(row: LabelledTrajectory, config: LabelingConfig) -> Iterator[str]:
    """Do the labels follow from the estimates, and are these the ones that the labeler asks for?"""
    values, asked = {estimate.step: estimate.value for estimate in row.estimates}, list[int]()

    def check(steps: tuple[int, ...]) -> tuple[int, ...]:
        asked.extend(steps)
        return tuple(values[step] for step in steps)

    try:
        labels = drive(_labeler(row, config), check)
    except KeyError as missing:
        yield f"{row.trajectory.id}: the check of step {missing} is missing"
        return
    if (stored := [estimate.step for estimate in row.estimates]) != asked:
        yield f"{row.trajectory.id}: the steps {stored} are checked, but its labeler asks for {asked}"
    if labels.step_labels != row.step_labels or labels.case != row.case:
        yield f"{row.trajectory.id}: {row.step_labels} (case {row.case}) does not follow from its estimates"


def _audit_expanded(
    labelled: Sequence[LabelledTrajectory], rollouts: Mapping[str, Sequence[Rollout]], config: LabelingConfig
) -> Iterator[str]:
    """Are the expanded rows those, and all those, that expansion makes, repeated ones left out?"""
    annotations = [
        Annotation([row, *(expand(row, rollouts[row.trajectory.id]) if config.expand else [])])
        for row in labelled
        if row.parent_id is None
    ]
    derived = {row.trajectory.id: row for row in distinct(annotations) if row.parent_id is not None}
    stored = {row.trajectory.id: row for row in labelled if row.parent_id is not None}
    for name, row in stored.items():
        if derived.get(name) != row:
            yield f"{name}: the row does not follow from its parent {row.parent_id}"
    yield from (f"{name}: the row that expansion makes is missing" for name in derived if name not in stored)


def _labeler(row: LabelledTrajectory, config: LabelingConfig) -> Labeler:
    """The labeler of a row, its prediction taken as it was."""
    if row.trajectory.correct:
        return _known(row)
    if row.predicted_first_error is not None:
        return verify(row.trajectory, row.predicted_first_error, config.unproven)
    match row.labeler:
        case "shepherd":
            return shepherd(row.trajectory, raw=config.raw)
        case "omega":
            return omega(row.trajectory)
        case _:
            return outcome(row.trajectory)


def _known(row: LabelledTrajectory) -> Labeler:
    return label_correct(row.trajectory)
    yield ()  # makes this a labeler: one that asks nothing
