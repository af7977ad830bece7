"""What a run measures: accuracy, label quality, self-verification error, and the warning signs of a failing run.

Pure functions of plain lists; intervals come from scipy, the ranking metric from scikit-learn. Where there is nothing
to measure the figure is None, never NaN.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from sapo_ray.data import MASKED, LabelledTrajectory, Trajectory
from sapo_ray.labelers import first_error

Agree = Callable[[str, str], bool]
"""Whether two answers mean the same."""


def accuracy_interval(successes: int, n: int) -> list[float] | None:
    """The 95% Wilson interval of a success rate; None without trials."""
    if n == 0:
        return None
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def pass_at_k(successes: int, n: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs between {k} and more samples, got {n}")
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def majority_answer(answers: Sequence[str | None], agree: Agree) -> str | None:
    """The most frequent answer, the earliest of equals; None where no sample answers.

    Answers that `agree` count together, as the first of them; of equal texts this is not asked.
    """
    counts, stand_in = Counter[str](), dict[str, str]()
    for answer in answers:
        if answer is None:
            continue
        if answer not in stand_in:
            stand_in[answer] = next((other for other in counts if agree(answer, other)), answer)
        counts[stand_in[answer]] += 1
    return counts.most_common(1)[0][0] if counts else None


def first_zero(labels: Sequence[int]) -> int:
    """Index of the first 0 in a row of labels: the first error. `len(labels)` where there is none."""
    return next((j for j, label in enumerate(labels) if label == 0), len(labels))


def auroc(scores: Sequence[float], labels: Sequence[int]) -> float | None:
    """Area under the ROC curve of step scores against 0/1 labels; None unless both labels occur."""
    if len(set(labels)) != 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def brier(scores: Sequence[float], labels: Sequence[int]) -> float | None:
    """Mean squared distance of step scores from 0/1 labels; None without steps."""
    return fmean((score - label) ** 2 for score, label in zip(scores, labels, strict=True)) if labels else None


def step_accuracy(scores: Sequence[float], labels: Sequence[int], threshold: float) -> float | None:
    """Share of steps whose score falls on the label's side of `threshold`; None without steps."""
    if not labels:
        return None
    return fmean(float((score >= threshold) == bool(label)) for score, label in zip(scores, labels, strict=True))


def label_accuracy(step_labels: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> float | None:
    """Share of all step labels that equal the oracle's; a masked step counts as wrong. None without steps."""
    hits = [
        float(label == true)
        for labels, trues in zip(step_labels, truth, strict=True)
        for label, true in zip(labels, trues, strict=True)
    ]
    return fmean(hits) if hits else None


def best_threshold(lowest_scores: Sequence[float], correct: Sequence[bool]) -> float:
    """The threshold on a trajectory's lowest step score that best tells right trajectories from wrong ones.

    The two error rates count alike (balanced accuracy), as right and wrong trajectories are seldom equally many. The
    lowest of equally good thresholds; 0.5 where one of the two kinds is missing. Raises ValueError for a score that is
    not a finite number.
    """
    if not all(map(math.isfinite, lowest_scores)):
        raise ValueError("a trajectory's lowest step score is nan or infinite: the verifier's training has diverged")
    right = sorted(score for score, is_right in zip(lowest_scores, correct, strict=True) if is_right)
    wrong = sorted(score for score, is_right in zip(lowest_scores, correct, strict=True) if not is_right)
    if not right or not wrong:
        return 0.5

    def balanced(threshold: float) -> float:
        accepted = len(right) - bisect_left(right, threshold)
        return accepted / len(right) + bisect_left(wrong, threshold) / len(wrong)

    return max(sorted({*right, *wrong}), key=balanced)


def self_verification_error(
    labelled: Sequence[LabelledTrajectory], scores: Sequence[Sequence[float]], threshold: float
) -> dict[str, float | None]:
    """Share of trajectories whose pre-assigned labels the reasoner's check contradicts (paper, section 4).

    The verifier says "no error" when every score reaches `threshold`. A right trajectory is judged right iff it says
    so; a wrong one iff it does not and the reasoner's checks give case a. `labelled` holds saps's labels of the same
    trajectories, in the order of `scores`. Reported for `right`, `wrong` and `all`; None where there are none.
    """
    errors: dict[str, list[float]] = {"right": [], "wrong": [], "all": []}
    for row, row_scores in zip(labelled, scores, strict=True):
        no_error = all(score >= threshold for score in row_scores)
        judged_right = no_error if row.trajectory.correct else not no_error and row.case == "a"
        for kind in ("right" if row.trajectory.correct else "wrong", "all"):
            errors[kind].append(float(not judged_right))
    return {kind: fmean(values) if values else None for kind, values in errors.items()}


def largest_drop(scores: Sequence[float], start_score: float, *, allow_first_step: bool = True) -> float:
    """The score drop into the predicted first error: what detection goes by."""
    step = first_error(scores, start_score, allow_first_step)
    return (start_score, *scores)[step] - scores[step]


def repetitiveness(trajectories: Sequence[Trajectory]) -> float | None:
    """Mean share of a trajectory's steps that repeat an earlier one of the same trajectory; None without any."""
    shares = [1 - len(set(t.steps)) / len(t.steps) for t in trajectories if t.steps]
    return fmean(shares) if shares else None


def label_counts(labelled: Sequence[LabelledTrajectory]) -> dict[str, int]:
    """How many steps are labelled 1, 0 and masked."""
    counts = Counter(label for row in labelled for label in row.step_labels)
    return {"right": counts[1], "wrong": counts[0], "masked": counts[MASKED]}
