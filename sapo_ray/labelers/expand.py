"""The completions that checks sampled, kept as training trajectories (SAPO, arXiv 2601.20312, section 3, "expand")."""

from __future__ import annotations

from collections.abc import Sequence

from sapo_ray.data import LabelledTrajectory, Rollout, Trajectory


def expand(parent: LabelledTrajectory, rollouts: Sequence[Rollout]) -> list[LabelledTrajectory]:
    """The labelled trajectories that the kept rollouts of a trajectory's checks give, by branch step and sample.

    A completion that reaches the answer is right throughout. One that misses it, of a prefix whose corrected label is
    0, keeps the prefix's labels, masked ones included, and is wrong from there on. All others are dropped, for where
    they go wrong is unknown; so are completions without steps, and repetitions of the parent or of one another.
    Raises ValueError for a rollout of another trajectory.
    """
    rows: list[LabelledTrajectory] = []
    seen = {parent.trajectory.steps}
    for rollout in sorted(rollouts, key=lambda r: (r.branch_step, r.sample)):
        if rollout.trajectory_id != parent.trajectory.id:
            raise ValueError(f"rollout {rollout.id} is of {rollout.trajectory_id}, not of {parent.trajectory.id}")
        labels = _labels(parent.step_labels[: rollout.branch_step + 1], rollout)
        row = _row(parent, rollout, labels) if labels else None
        if row and row.trajectory.steps not in seen:
            seen.add(row.trajectory.steps)
            rows.append(row)
    return rows


def _labels(prefix: tuple[int, ...], rollout: Rollout) -> tuple[int, ...] | None:
    """The labels of a prefix's completion, given the prefix's own; None where the completion is to be dropped."""
    if not (rollout.kept and rollout.steps):
        return None
    if rollout.correct:
        return (1,) * (len(prefix) + len(rollout.steps))
    if prefix and prefix[-1] == 0:
        return prefix + (0,) * len(rollout.steps)
    return None


def _row(parent: LabelledTrajectory, rollout: Rollout, labels: tuple[int, ...]) -> LabelledTrajectory:
    origin = parent.trajectory
    trajectory = Trajectory(
        id=f"expanded/{rollout.id}",
        question_id=origin.question_id,
        question=origin.question,
        steps=origin.steps[: rollout.branch_step + 1] + rollout.steps,
        answer=rollout.answer,
        correct=rollout.correct,
        source="expanded",
        truncated=rollout.truncated,
    )
    return LabelledTrajectory(
        trajectory=trajectory,
        labeler=parent.labeler,
        step_labels=labels,
        case="correct" if rollout.correct else None,
        parent_id=origin.id,
        branch_step=rollout.branch_step,
        rollout_id=rollout.id,
    )
