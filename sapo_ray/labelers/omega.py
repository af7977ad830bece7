"""Binary search for the first error (OmegaPRM, arXiv 2406.06592, section 3.2)."""

from __future__ import annotations

from sapo_ray.data import Trajectory
from sapo_ray.labelers.base import Labeler, Labels, boundary, known_labels, monotone


def omega(trajectory: Trajectory) -> Labeler:
    """One check after the other: ⌈log2(n+1)⌉ for steps 0 … n, ⌈log2(n+2)⌉ where the last step's label is unknown."""
    count = len(trajectory.steps)
    right, wrong = boundary(known_labels(trajectory), count)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        (value,) = yield (middle,)
        right, wrong = (middle, wrong) if value else (right, middle)
    return Labels(monotone(wrong, count))
