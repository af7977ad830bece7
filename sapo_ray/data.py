"""The records that flow through a run, and the Parquet schemas they are stored with.

A solution is a sequence of *steps*: substrings that, joined with nothing between them, give the text back exactly.
Steps are numbered from 0; step -1 stands for the bare question (SAPO, arXiv 2601.20312, section 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Source = Literal["sampled", "expanded", "original"]
Case = Literal["correct", "a", "b", "c", "d"]

MASKED = -1
"""Step label of a step that is left out of the verifier's loss."""


def seed_of(run_seed: int, request_id: str) -> int:
    """The sampling seed of a request: 31 bits of a hash of the run's seed and the request's id."""
    digest = hashlib.blake2b(f"{run_seed}:{request_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answer, and its worked solution where one is known.

    `solution_answer` is what that comes to where it is not the gold answer, else None.
    """

    id: str
    text: str
    answer: str
    solution: tuple[str, ...] | None = None
    solution_answer: str | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A solution s_0 … s_n of a question.

    `answer` is None where none could be read; `truncated` says that the token limit cut it off, after the last of
    `steps`: the step it was in is left out.
    """

    id: str
    question_id: str
    question: str
    steps: tuple[str, ...]
    answer: str | None
    correct: bool
    source: Source = "sampled"
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completion number `sample` of the prefix that ends with step `branch_step` of the trajectory `trajectory_id`.

    `steps` are the steps after the prefix. `kept` is False for a sample after the first success of its estimate.
    """

    id: str
    trajectory_id: str
    question_id: str
    branch_step: int
    sample: int
    steps: tuple[str, ...]
    answer: str | None
    correct: bool
    truncated: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """The Monte Carlo estimate c_j of a prefix (paper eq. 3-5): `value` is 1 if any kept rollout reached the answer."""

    step: int
    value: int
    successes: int
    tried: int
    rollout_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelledTrajectory:
    """A trajectory with one label a step (1, 0, or `MASKED`) and all that the labels were made from.

    The last three fields are set on expanded rows only: the trajectory and step it branched from, and its rollout.
    """

    trajectory: Trajectory
    labeler: str
    step_labels: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    predicted_first_error: int | None = None
    estimates: tuple[Estimate, ...] = ()
    case: Case | None = None
    parent_id: str | None = None
    branch_step: int | None = None
    rollout_id: str | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A preferred and a rejected solution of one question, with their mean verifier scores r(τ).

    `rejected` is None for a right solution without a partner: it teaches through the likelihood term alone.
    """

    question_id: str
    question: str
    chosen_id: str
    chosen: tuple[str, ...]
    chosen_score: float | None
    rejected_id: str | None = None
    rejected: tuple[str, ...] | None = None
    rejected_score: float | None = None


_STEPS = pa.list_(pa.string())
_ESTIMATE = pa.struct(
    [
        ("step", pa.int32()),
        ("value", pa.int8()),
        ("successes", pa.int32()),
        ("tried", pa.int32()),
        ("rollout_ids", pa.list_(pa.string())),
    ]
)

TRAJECTORIES = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("steps", _STEPS),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("source", pa.string()),
        ("truncated", pa.bool_()),
    ]
)
LABELS = pa.schema(
    [
        *TRAJECTORIES,
        pa.field("labeler", pa.string()),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("predicted_first_error", pa.int32()),
        pa.field("estimates", pa.list_(_ESTIMATE)),
        pa.field("case", pa.string()),
        pa.field("step_labels", pa.list_(pa.int8())),
        pa.field("parent_id", pa.string()),
        pa.field("branch_step", pa.int32()),
        pa.field("rollout_id", pa.string()),
    ]
)
ROLLOUTS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("trajectory_id", pa.string()),
        ("question_id", pa.string()),
        ("branch_step", pa.int32()),
        ("sample", pa.int32()),
        ("steps", _STEPS),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("truncated", pa.bool_()),
        ("kept", pa.bool_()),
    ]
)
PAIRS = pa.schema(
    [
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("chosen_id", pa.string()),
        ("chosen", _STEPS),
        ("chosen_score", pa.float64()),  # as they were compared, so that the pairs can be derived again
        ("rejected_id", pa.string()),
        ("rejected", _STEPS),
        ("rejected_score", pa.float64()),
    ]
)
