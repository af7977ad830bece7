"""Step by step: check every prefix (Math-Shepherd, arXiv 2312.08935, hard estimation)."""

from __future__ import annotations

from sapo_ray.data import Trajectory
from sapo_ray.labelers.base import Labeler, Labels, boundary, known_labels, monotone


def shepherd(trajectory: Trajectory, *, raw: bool) -> Labeler:
    """Check every step whose label is not known, in one go, even where a later success implies it.

    Labels are 1 up to the last success; with `raw` they are the estimates themselves.
    """
    count = len(trajectory.steps)
    values = known_labels(trajectory)
    unknown = tuple(step for step in range(count) if step not in values)
    if unknown:
        values |= zip(unknown, (yield unknown), strict=True)
    if raw:
        return Labels(tuple(values[step] for step in range(count)))
    last_right, _ = boundary(values, count)
    return Labels(monotone(last_right + 1, count))
