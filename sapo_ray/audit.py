"""Re-derives every label of a round from its labels and rollouts alone, and says where one differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from sapo_ray.data import Estimate, LabelledTrajectory, Rollout
from sapo_ray.labelers import Labeler, LabelingConfig, drive, expand, label_correct, omega, outcome, shepherd, verify


def audit(labelled: Sequence[LabelledTrajectory], rollouts: Iterable[Rollout], config: LabelingConfig) -> Iterator[str]:
    """One line for every row whose estimates or labels do not follow from the rollouts; none where all do."""
    of_trajectory: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        of_trajectory[rollout.trajectory_id].append(rollout)
    originals = [row for row in labelled if row.parent_id is None]
    derived = {
        row.trajectory.id: row.step_labels
        for parent in originals
        if config.expand
        for row in expand(parent, of_trajectory[parent.trajectory.id])
    }
    for row in originals:
        yield from _audit_sampled(row, of_trajectory[row.trajectory.id], config)
    for row in labelled:
        if row.parent_id is not None and derived.get(row.trajectory.id) != row.step_labels:
            yield f"{row.trajectory.id}: {row.step_labels} does not follow from its parent {row.parent_id}"


def _audit_sampled(row: LabelledTrajectory, rollouts: Sequence[Rollout], config: LabelingConfig) -> Iterator[str]:
    for estimate in row.estimates:
        if estimate != _estimate(estimate.step, rollouts):
            yield f"{row.trajectory.id}: the estimate of step {estimate.step} does not follow from its rollouts"
    values = {estimate.step: estimate.value for estimate in row.estimates}
    try:
        labels = drive(_labeler(row, config), lambda steps: tuple(values[step] for step in steps))
    except KeyError as missing:
        yield f"{row.trajectory.id}: the check of step {missing} is missing"
        return
    if labels.step_labels != row.step_labels or labels.case != row.case:
        yield f"{row.trajectory.id}: {row.step_labels} (case {row.case}) does not follow from its estimates"


def _estimate(step: int, rollouts: Sequence[Rollout]) -> Estimate:
    kept = sorted((r for r in rollouts if r.branch_step == step and r.kept), key=lambda r: r.sample)
    successes = sum(r.correct for r in kept)
    return Estimate(step, int(successes > 0), successes, len(kept), tuple(r.id for r in kept))


def _labeler(row: LabelledTrajectory, config: LabelingConfig) -> Labeler:
    """The labeler of a row, its prediction taken as it was: that a prediction follows from scores is not at issue."""
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
