"""The ablation without detection (the paper's "w/o DV"): verify a random step instead of the predicted one."""

from __future__ import annotations

import random

from sapo_ray.data import Trajectory, seed_of
from sapo_ray.labelers.base import Labeler, Unproven, candidates
from sapo_ray.labelers.saps import verify


def random_step(trajectory: Trajectory, *, unproven: Unproven, allow_first_step: bool, seed: int) -> Labeler:
    """At most 2 checks, in one go. The step follows from the seed and the trajectory's id alone."""
    steps = candidates(len(trajectory.steps), allow_first_step)
    predicted = random.Random(seed_of(seed, f"{trajectory.id}/random_step")).choice(steps)
    return (yield from verify(trajectory, predicted, unproven))
