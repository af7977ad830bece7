"""Labelers: who says which steps of a trajectory are right. They ask, someone else answers (see `base`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sapo_ray.data import Trajectory
from sapo_ray.labelers.base import (
    Labeler,
    LabelerName,
    LabelingConfig,
    Labels,
    drive,
    fixed_start_score,
    is_labelled,
    label_correct,
)
from sapo_ray.labelers.expand import expand
from sapo_ray.labelers.omega import omega
from sapo_ray.labelers.outcome import outcome
from sapo_ray.labelers.random_step import random_step
from sapo_ray.labelers.saps import first_error, saps, verify
from sapo_ray.labelers.shepherd import shepherd

__all__ = [
    "Labeler",
    "LabelingConfig",
    "Labels",
    "drive",
    "expand",
    "first_error",
    "fixed_start_score",
    "is_labelled",
    "label_correct",
    "make_labeler",
    "most_checks",
    "omega",
    "outcome",
    "random_step",
    "saps",
    "shepherd",
    "verify",
]

MakeLabeler = Callable[[Trajectory, Sequence[float] | None], Labeler]
"""A wrong trajectory, and its scores where a verifier gave them -> its labeler."""


def make_labeler(config: LabelingConfig, start_score: float | None, seed: int) -> MakeLabeler:
    """The labeler that the config names, ready to be given trajectories.

    `start_score` is the verifier's own (None without a verifier); a number in the config goes before it. Raises
    ValueError where saps has neither; what it returns does for a trajectory that is right or has no steps.
    """
    fixed, allow_first_step = fixed_start_score(config), config.allow_first_step
    start = start_score if fixed is None else fixed
    if config.labeler == "saps" and start is None:
        raise ValueError("labeling.start_score is `auto`, but no verifier gave one: set it to a number")

    def label(trajectory: Trajectory, scores: Sequence[float] | None) -> Labeler:
        if trajectory.correct or not trajectory.steps:
            raise ValueError(f"trajectory {trajectory.id} is right or has no steps: no first error to search for")
        match config.labeler:
            case "saps":
                if scores is None or start is None:
                    raise ValueError(f"trajectory {trajectory.id} has no scores: saps needs a verifier")
                return saps(
                    trajectory, scores, unproven=config.unproven, start_score=start, allow_first_step=allow_first_step
                )
            case "random":
                return random_step(trajectory, unproven=config.unproven, allow_first_step=allow_first_step, seed=seed)
            case "shepherd":
                return shepherd(trajectory, raw=config.raw)
            case "omega":
                return omega(trajectory)
            case "outcome":
                return outcome(trajectory)

    return label


def most_checks(labeler: LabelerName, steps: int) -> int:
    """The most checks that a labeler makes of a wrong trajectory with so many steps, whose answer was read."""
    match labeler:
        case "saps" | "random":
            return min(2, steps - 1)
        case "shepherd":
            return steps - 1
        case "omega":
            return math.ceil(math.log2(steps))
        case "outcome":
            return 0
