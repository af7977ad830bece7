"""Self-adaptive process supervision: predict the first error from the verifier's scores, check it, correct the labels.

SAPO, arXiv 2601.20312, section 3. The paper's eq. 9 prints a rise of the score; its text, figure 3 and case table need
the drop, which is what is used here. Its predicted step is the last right one, ours the one after it, the first wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sapo_ray.data import MASKED, Case, Trajectory
from sapo_ray.labelers.base import Labeler, Labels, Unproven, boundary, candidates, known_labels, monotone

_CASES: dict[tuple[int, int], Case] = {(1, 0): "a", (1, 1): "b", (0, 0): "c", (0, 1): "d"}


def saps(
    trajectory: Trajectory,
    scores: Sequence[float],
    *,
    unproven: Unproven,
    start_score: float,
    allow_first_step: bool,
) -> Labeler:
    """Detect the first error and verify it: at most 2 checks, in one go.

    Raises ValueError, on the first `next`, for a score that is missing or not a number.
    """
    if len(scores) != len(trajectory.steps):
        raise ValueError(f"trajectory {trajectory.id} has {len(trajectory.steps)} steps but {len(scores)} scores")
    try:
        predicted = first_error(scores, start_score, allow_first_step)
    except ValueError as error:
        raise ValueError(f"trajectory {trajectory.id}: {error}") from None
    return (yield from verify(trajectory, predicted, unproven))


def first_error(scores: Sequence[float], start_score: float, allow_first_step: bool) -> int:
    """The predicted first error t̂: the step into which the score drops most, the earliest of equals.

    `scores` are ĉ_0 … ĉ_n, `start_score` stands for ĉ_{-1}. Raises ValueError for one that is not a finite number.
    """
    for step, score in enumerate((start_score, *scores), start=-1):
        if not math.isfinite(score):
            raise ValueError(f"the score of step {step} is {score}; no error can be detected from it")
    drops = [before - after for before, after in zip((start_score, *scores), scores, strict=False)]
    return max(candidates(len(scores), allow_first_step), key=drops.__getitem__)


def verify(trajectory: Trajectory, predicted: int, unproven: Unproven) -> Labeler:
    """Check the predicted first error and the step before it, as far as their labels are not known, and correct."""
    values = known_labels(trajectory)
    unknown = tuple(step for step in (predicted - 1, predicted) if step not in values)
    if unknown:
        values |= zip(unknown, (yield unknown), strict=True)
    labels = _corrected(values, predicted, len(trajectory.steps), unproven)
    return Labels(labels, _CASES[values[predicted - 1], values[predicted]], predicted)


def _corrected(values: Mapping[int, int], predicted: int, count: int, unproven: Unproven) -> tuple[int, ...]:
    """What `values` prove, over the pre-assigned labels: 1 before the predicted first error, 0 from it on.

    In case a they prove every step. In b and d those after the predicted error are unproven (but the last, where its
    label is known), in c those before the checked ones.
    """
    last_right, first_wrong = boundary(values, count)
    labels = monotone(min(max(predicted, last_right + 1), first_wrong), count)
    if unproven == "keep":
        return labels
    return tuple(MASKED if last_right < step < first_wrong else label for step, label in enumerate(labels))
