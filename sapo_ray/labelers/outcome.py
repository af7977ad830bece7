"""Labels by the final answer alone: an outcome reward model's data, and the paper's "w/o PF" ablation."""

from __future__ import annotations

from sapo_ray.data import Trajectory
from sapo_ray.labelers.base import Labeler, Labels, monotone


def outcome(trajectory: Trajectory) -> Labeler:
    """No checks: every step of a wrong trajectory is 0."""
    yield from ()
    return Labels(monotone(0, len(trajectory.steps)))
