"""What a reasoner and a verifier are worth: accuracy on questions, and scores against true step labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sapo_ray.concurrency import together
from sapo_ray.data import MASKED, Question, Trajectory
from sapo_ray.labelers import first_error
from sapo_ray.labelers.base import candidates
from sapo_ray.metrics import (
    Agree,
    accuracy_interval,
    auroc,
    brier,
    first_zero,
    majority_answer,
    pass_at_k,
    repetitiveness,
    step_accuracy,
)
from sapo_ray.sampler import Sampler
from sapo_ray.tasks.base import Task


@dataclass(kw_only=True)
class EvaluationConfig:
    test: int = 500
    """Test questions answered after every round (0: all)."""
    ood: int = 200
    """Longer test questions answered after every round (0: all)."""
    samples: int = 8
    """Sampled answers per test question, for sampled accuracy, pass@k, majority (not of programs) and best-of-N."""
    sampled_questions: int = 200
    """How many of the test questions are sampled."""
    verification: int = 200
    """Trajectories of validation questions, right and wrong in equal parts where possible, that measure the
    self-verification error; fixed for the whole run."""

    def __post_init__(self) -> None:
        for key in ("test", "ood", "samples", "sampled_questions", "verification"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A question, its greedy answer and its sampled solutions."""

    question: Question
    greedy: Trajectory
    samples: tuple[Trajectory, ...]


async def answer(sampler: Sampler, question: Question, stage: str, samples: int) -> Sampled:
    """Answer one question greedily and `samples` times by sampling."""
    greedy, drawn = await together(
        [
            sampler.sample(question, f"{stage}/greedy", [0], greedy=True),
            sampler.sample(question, f"{stage}/sampled", range(samples)),
        ]
    )
    return Sampled(question, greedy[0], tuple(drawn))


def reasoner_report(answered: Sequence[Sampled], agree: Agree | None) -> dict[str, Any]:
    """Greedy accuracy with its 95% interval, and over the sampled questions accuracy, pass@k and majority accuracy.

    `agree` says which answers the majority counts as one. None: they are programs, whose majority is not told.
    """
    greedy = [a.greedy.correct for a in answered]
    sampled = [a for a in answered if a.samples]
    k = len(sampled[0].samples) if sampled else None
    hits = [sum(s.correct for s in a.samples) for a in sampled]
    return {
        "greedy_accuracy": fmean(greedy) if greedy else None,
        "n": len(greedy),
        "ci95": accuracy_interval(sum(greedy), len(greedy)),
        "sampled_accuracy": fmean(h / k for h in hits) if k else None,
        "k": k,
        "pass_at_k": fmean(pass_at_k(h, k, k) for h in hits) if k else None,
        "majority_accuracy": fmean(_majority_is_right(a, agree) for a in sampled) if k and agree else None,
        "repetitiveness": repetitiveness([s for a in sampled for s in a.samples]),
    }


def best_of_n_accuracy(answered: Sequence[Sampled], mean_scores: Mapping[str, float]) -> float | None:
    """Accuracy of the sample that the verifier scores highest, by mean step score r(τ); None without samples."""
    best = [max(a.samples, key=lambda s: mean_scores.get(s.id, -1.0)) for a in answered if a.samples]
    return fmean(b.correct for b in best) if best else None


def split_validation(trajectories: Sequence[Trajectory], most: int) -> tuple[list[Trajectory], list[Trajectory]]:
    """Two parts without a question in common, of half the questions each: one to tune on, one to measure
    self-verification with.

    Trajectories without an answer are in neither. Of the second at most `most` are taken, right and wrong ones in equal
    parts as far as there are so many of both.
    """
    answered = [t for t in trajectories if t.answer is not None]
    questions = list(dict.fromkeys(t.question_id for t in answered))
    tuning = set(questions[: len(questions) // 2])
    rest = [t for t in answered if t.question_id not in tuning]
    right, wrong = [t for t in rest if t.correct], [t for t in rest if not t.correct]
    taken = right[: max(most // 2, most - len(wrong))] + wrong[: max(most // 2, most - len(right))]
    return [t for t in answered if t.question_id in tuning], taken


def step_report(
    scored: Sequence[tuple[Trajectory, Sequence[int], Sequence[float]]],
    start_score: float | None,
    threshold: float,
    allow_first_step: bool,
) -> dict[str, Any]:
    """A verifier's scores against step labels, all trajectories' steps alike; masked steps are left out.

    The hit rate is over wrong trajectories with a first error, which no masked step may precede: how often argmax of
    the drop is that step, beside the rate of a uniform guess among the same candidates. Without a start score (no right
    first step was seen in training) it is taken as 1.
    """
    steps = [(score, label) for _, *row in scored for label, score in zip(*row, strict=True) if label != MASKED]
    flat_scores, flat_labels = [score for score, _ in steps], [label for _, label in steps]
    start = 1.0 if start_score is None else start_score
    hits: list[float] = []
    guesses: list[float] = []
    for trajectory, labels, scores in scored:
        error = first_zero(labels)
        if not trajectory.correct and error < len(labels) and MASKED not in labels[:error]:
            hits.append(float(first_error(scores, start, allow_first_step) == error))
            choices = candidates(len(labels), allow_first_step)
            guesses.append((error in choices) / len(choices))
    return {
        "step_accuracy": step_accuracy(flat_scores, flat_labels, threshold),
        "threshold": threshold,
        "auroc": auroc(flat_scores, flat_labels),
        "brier": brier(flat_scores, flat_labels),
        "first_error_hit_rate": fmean(hits) if hits else None,
        "random_hit_rate": fmean(guesses) if guesses else None,
        "wrong_trajectories": len(hits),
    }


def true_labels(task: Task, question: Question, trajectory: Trajectory) -> tuple[int, ...] | None:
    """The oracle's `reachable` labels, with c_n as the final answer proves it; None where the task has no oracle.

    A solution that stops before its last step states a wrong answer, though its last line could still be gone on from.
    """
    oracle = task.oracle(question, trajectory.steps)
    if oracle is None:
        return None
    if trajectory.answer is None:
        return oracle.reachable
    return (*oracle.reachable[:-1], int(trajectory.correct))


def verifier_report(
    task: Task,
    scored: Sequence[tuple[Question, Trajectory, tuple[float, ...]]],
    start_score: float | None,
    threshold: float,
    allow_first_step: bool,
) -> dict[str, Any]:
    """A verifier's scores against the task's `reachable` oracle (`step_report`); of nothing where the task has none."""
    truth = [true_labels(task, question, trajectory) for question, trajectory, _ in scored]
    known = [(row[1], labels, row[2]) for row, labels in zip(scored, truth, strict=True) if labels is not None]
    return step_report(known, start_score, threshold, allow_first_step)


def _majority_is_right(answered: Sampled, agree: Agree) -> float:
    """All right answers agree with the gold answer, so none of them is compared with another."""
    right = {s.answer for s in answered.samples if s.correct}

    def alike(answer: str, other: str) -> bool:
        return (answer in right) == (other in right) and (answer in right or agree(answer, other))

    return float(majority_answer([s.answer for s in answered.samples], alike) in right)
