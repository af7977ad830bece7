"""First-error benchmarks such as ProcessBench (arXiv 2412.06559): does a verifier find the first wrong step?

A verifier answers with the first step whose score falls below a threshold, or with "none". The benchmark's F1 is the
harmonic mean of two accuracies: how often the first error of a wrong solution is hit exactly, and how often a right
solution is found to have none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo_ray.errors import SapoError
from sapo_ray.metrics import accuracy_interval
from sapo_ray.tasks.sources import SourceConfig, read_source

NO_ERROR = -1
"""Label and answer of a solution without a wrong step."""


@dataclass(frozen=True, slots=True)
class Case:
    """A solution and the index of its first wrong step, or `NO_ERROR`."""

    id: str
    problem: str
    steps: tuple[str, ...]
    label: int


def read_cases(location: str) -> list[Case]:
    """The records of a .json, .jsonl or .parquet file, or of a directory of such, local or in an object store.

    A record has `problem` (or `question`), `steps` (a list of texts) and `label`; its `id` is its place where it has
    none. Raises SapoError for the first record that does not fit, by file and line, or where there is none.
    """
    cases = []
    for place, record in read_source(SourceConfig(path=location)):
        try:
            if isinstance(record, str):
                raise SapoError(record)
            cases.append(_case(place, record))
        except SapoError as error:
            raise SapoError(f"{place}: {error}") from error
    if not cases:
        raise SapoError(f"{location} holds no records")
    return cases


def _case(place: str, record: Mapping[str, Any]) -> Case:
    problem, steps, label = record.get("problem", record.get("question")), record.get("steps"), record.get("label")
    if not isinstance(problem, str) or not problem.strip():
        raise SapoError("`problem` (or `question`) must be a text")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise SapoError("`steps` must be a list of texts, none of them empty")
    if type(label) is not int or not NO_ERROR <= label < len(steps):
        raise SapoError(f"`label` is {label!r}; it must be the first wrong step, 0 to {len(steps) - 1}, or -1 for none")
    return Case(str(record.get("id", place)), problem, tuple(steps), label)


def first_below(scores: Sequence[float], threshold: float) -> int:
    """The first step whose score is below the threshold, or `NO_ERROR`."""
    return next((j for j, score in enumerate(scores) if score < threshold), NO_ERROR)


def choose_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The step score that is the best threshold by F1 on these solutions; the lowest of equally good ones.

    A threshold above all scores calls every first step wrong, so its F1 is 0: no score need be left out. Raises
    SapoError unless there are right and wrong solutions.
    """
    wrong = [_span(row, label) for row, label in zip(scores, labels, strict=True) if label != NO_ERROR]
    right = [_span(row, label) for row, label in zip(scores, labels, strict=True) if label == NO_ERROR]
    if not wrong or not right:
        raise SapoError("a threshold is chosen on right and wrong solutions; one of the two kinds is missing")
    hits_wrong, hits_right = _Hits(wrong), _Hits(right)
    return max(
        sorted({score for row in scores for score in row}),
        key=lambda threshold: f1(hits_wrong(threshold), len(wrong), hits_right(threshold), len(right)),
    )


def f1(hits_wrong: int, wrong: int, hits_right: int, right: int) -> float:
    """The harmonic mean of hits_wrong / wrong and hits_right / right; 0 where both are 0.

    One division, so that means which are equal are equal numbers.
    """
    return 2 * hits_wrong * hits_right / ((hits_wrong * right + hits_right * wrong) or 1)


def first_error_report(
    scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float
) -> dict[str, float | list[float] | None]:
    """F1 and the two accuracies with their 95% intervals; None where a kind of solution is missing."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row, label in zip(scores, labels, strict=True):
        hits[label == NO_ERROR].append(first_below(row, threshold) == label)
    wrong, right = hits[False], hits[True]
    return {
        "f1": f1(sum(wrong), len(wrong), sum(right), len(right)) if wrong and right else None,
        "wrong_accuracy": sum(wrong) / len(wrong) if wrong else None,
        "wrong_ci95": accuracy_interval(sum(wrong), len(wrong)),
        "wrong": len(wrong),
        "right_accuracy": sum(right) / len(right) if right else None,
        "right_ci95": accuracy_interval(sum(right), len(right)),
        "right": len(right),
    }


def _span(scores: Sequence[float], label: int) -> tuple[float, float]:
    """(low, high]: the thresholds by which a solution is answered as its label says.

    The scores before the first error must reach the threshold, that of the error must not.
    """
    if label == NO_ERROR:
        return -math.inf, min(scores)
    return scores[label], min(scores[:label], default=math.inf)


class _Hits:
    """How many of many spans hold a threshold."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        spans = [(low, high) for low, high in spans if low < high]
        self._lows, self._highs = sorted(low for low, _ in spans), sorted(high for _, high in spans)

    def __call__(self, threshold: float) -> int:
        return bisect_left(self._lows, threshold) - bisect_left(self._highs, threshold)
