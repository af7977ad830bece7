"""What all labelers share: what they ask, what they return, and what is known before anything is checked.

A labeler is a generator without I/O. It yields the steps whose prefixes it wants checked, receives their estimates, and
returns the labels; so the same code runs against a table, an oracle, or a thousand workers. Labelers see only
trajectories that missed the answer: one that reached it proves all of its own steps (`label_correct`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Literal

from sapo_ray.data import Case, Trajectory, seed_of

LabelerName = Literal["saps", "shepherd", "omega", "random", "outcome"]
Unproven = Literal["keep", "mask"]


@dataclass(kw_only=True)
class LabelingConfig:
    labeler: LabelerName = "saps"
    """Who labels the steps of wrong trajectories: `saps`, `shepherd`, `omega`, `random` (a random step instead of
    detection) or `outcome` (every step takes the final answer's label)."""
    rollouts: int = 8
    """Completions sampled per checked prefix (T)."""
    rollouts_in_flight: int = 2
    """How many completions of one prefix are sampled at a time: more wait less and waste more. Without `early_exit`
    nothing is wasted and all are sampled at once."""
    early_exit: bool = True
    """Stop sampling a prefix at its first success. The labels of sampled trajectories stay the same."""
    unproven: Unproven = "keep"
    """Steps whose label no check has proven (`saps`, `random`): `keep` trains on them, `mask` leaves them out."""
    truncated: Literal["drop", "check"] = "drop"
    """A trajectory cut off without an answer: `drop` it, or `check` its last finished step like any other, under the
    same `sampling.max_tokens` for the whole: a prefix that leaves too few of them to get to the answer is wrong."""
    start_score: str = "auto"
    """The score before the first step, which `saps` compares the first step's with: a number from 0 to 1, or `auto`,
    the verifier's mean score of right first steps among the samples it was trained on."""
    allow_first_step: bool = True
    """Whether the first step may be the predicted first error (`saps`, `random`)."""
    raw: bool = False
    """Train on `shepherd`'s estimates as they are, where a later step may be right after a wrong one."""
    expand: bool = True
    """Turn the completions of checked prefixes into labelled trajectories of their own."""
    fraction: float = 1.0
    """Share of the sampled wrong trajectories that are labelled."""
    right_fraction: float = 1.0
    """Share of the sampled right trajectories that are labelled."""

    def __post_init__(self) -> None:
        for key in ("rollouts", "rollouts_in_flight"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("fraction", "right_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must lie between 0 and 1")
        fixed_start_score(self)

    @property
    def uses_scores(self) -> bool:
        """Whether the labeler goes by a verifier's scores."""
        return self.labeler == "saps"


@dataclass(frozen=True, slots=True)
class Labels:
    """One label a step (1, 0, or `MASKED`); `case` and `predicted_first_error` where a prediction was verified."""

    step_labels: tuple[int, ...]
    case: Case | None = None
    predicted_first_error: int | None = None


Labeler = Generator[tuple[int, ...], tuple[int, ...], Labels]
"""Yields steps to check (those of one yield may be checked at once) and receives their values, 0 or 1 each."""


def label_correct(trajectory: Trajectory) -> Labels:
    """The labels of a trajectory that reached the answer: 1 everywhere."""
    return Labels((1,) * len(trajectory.steps), "correct")


def known_labels(trajectory: Trajectory) -> dict[int, int]:
    """The labels of a wrong trajectory that need no check, by step.

    The bare question, step -1, is taken as 1. Where an answer was read, it is wrong, and the last step is 0.
    """
    known = {-1: 1}
    if trajectory.answer is not None:
        known[len(trajectory.steps) - 1] = 0
    return known


def boundary(values: Mapping[int, int], count: int) -> tuple[int, int]:
    """The last step shown right and the first one after it shown wrong, of `count` steps (`count` itself: none).

    Labels are monotone, so every step up to the first is right and every step from the second on wrong; those between
    are unproven. A failure before a success counts for nothing: the success shows that the prefix can reach the answer.
    `values` maps steps to 0 or 1 and must hold step -1.
    """
    last_right = max(step for step, value in values.items() if value)
    return last_right, min((step for step, value in values.items() if not value and step > last_right), default=count)


def monotone(first_wrong: int, count: int) -> tuple[int, ...]:
    """Labels of `count` steps: 1 before `first_wrong`, 0 from it on."""
    return tuple(int(step < first_wrong) for step in range(count))


def candidates(count: int, allow_first_step: bool) -> range:
    """The steps that may be predicted as the first error. A lone step always may: there is no other."""
    return range(0 if allow_first_step or count == 1 else 1, count)


def drive(labeler: Labeler, check: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Labels:
    """Run a labeler to its end, answering each of its questions with `check`: the steps asked for -> their values."""
    try:
        steps = next(labeler)
        while True:
            steps = labeler.send(check(steps))
    except StopIteration as end:
        labels: Labels = end.value
        return labels


def is_labelled(trajectory: Trajectory, config: LabelingConfig, seed: int) -> bool:
    """Whether a sampled trajectory is labelled at all; the same choice on every machine, whatever comes first.

    Left out are trajectories without steps, those cut off without an answer where `truncated` is `drop`, and all that
    `fraction` (wrong ones) or `right_fraction` does not draw.
    """
    cut_off = trajectory.truncated and trajectory.answer is None
    if not trajectory.steps or (cut_off and config.truncated == "drop"):
        return False
    share = config.right_fraction if trajectory.correct else config.fraction
    return seed_of(seed, f"{trajectory.id}/labelled") < share * 2**31


def fixed_start_score(config: LabelingConfig) -> float | None:
    """The start score that the config sets, None for `auto`. Raises ValueError for anything but that or 0 … 1."""
    if config.start_score == "auto":
        return None
    try:
        score = float(config.start_score)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise ValueError(f"start_score is {config.start_score!r}; it must be `auto` or a number from 0 to 1")
    return score
