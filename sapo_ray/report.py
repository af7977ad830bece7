"""What a run tells about itself: counts of a stream, the paper's warning signs, and summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sapo_ray.annotator import Annotation, distinct
from sapo_ray.cost import Cost
from sapo_ray.metrics import label_counts, largest_drop, repetitiveness
from sapo_ray.sampler import Samples

Notes = Mapping[str, Any]
FLATTENED = 0.5
"""Warn when the mean largest score drop falls below this share of the largest in a round before."""
RISEN = 0.1
"""Warn when the self-verification error, or a share of duplicates above `DUPLICATED`, has risen by more than this over
the least in a round before."""
REPETITIVE = 0.2
"""Warn when this share of a trajectory's steps, on average, repeats an earlier step of it."""
DUPLICATED = 0.8
"""Warn when more than this share of a question's samples but the first, on average, repeats an earlier one, and it has
risen (`RISEN`)."""
EMPTY = 0.2
"""Warn when more than this share of a question's samples, on average, has no finished step."""
MEASURING = ("validation", "self-verification", "self-verification-aligned", "evaluate")
"""Stages that only measure: the method would do without them."""
_SUMS = ("drops", "repeats", "duplicates", "empty")


@dataclass
class Sum:
    """A sum of figures, and how many there were."""

    total: float = 0.0
    terms: int = 0

    def add(self, figure: float) -> None:
        self.total += figure
        self.terms += 1

    @property
    def mean(self) -> float | None:
        return self.total / self.terms if self.terms else None


@dataclass
class StreamReport:
    """Counts over a stream of sampled and labelled trajectories, without keeping them."""

    start_score: float | None
    allow_first_step: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    drops: Sum = field(default_factory=Sum)
    repeats: Sum = field(default_factory=Sum)
    duplicates: Sum = field(default_factory=Sum)
    empty: Sum = field(default_factory=Sum)

    @staticmethod
    def restored(
        start_score: float | None, allow_first_step: bool, state: Mapping[str, Mapping[str, Any]] | None
    ) -> StreamReport:
        """The report that `state` was taken of; an empty one without."""
        if state is None:
            return StreamReport(start_score, allow_first_step)
        fields: dict[str, Any] = {name: Counter(state[name]) for name in ("counts", "cases", "steps")}
        fields |= {name: Sum(**state[name]) for name in _SUMS if name in state}  # an older version counted less
        return StreamReport(start_score, allow_first_step, **fields)

    def state(self) -> dict[str, dict[str, Any]]:
        """What was counted so far, as JSON."""
        counts = {"counts": self.counts, "cases": self.cases, "steps": self.steps}
        sums = {name: asdict(getattr(self, name)) for name in _SUMS}
        return {name: dict(count) for name, count in counts.items()} | sums

    def add(self, samples: Samples, annotations: Sequence[Annotation]) -> None:
        """Count one question's samples, and the rows that became of its trajectories, repeated ones left out."""
        trajectories, duplicates, empty = samples
        self.counts["sampled"] += len(trajectories)
        self.counts["correct"] += sum(t.correct for t in trajectories)
        self.counts["truncated"] += sum(t.truncated for t in trajectories)
        self.counts["unanswered_questions"] += not any(t.answer is not None for t in trajectories)
        rows = distinct(annotations)
        self.counts["expanded"] += sum(row.parent_id is not None for row in rows)
        self.steps.update(label_counts(rows))
        if (repeats := repetitiveness(trajectories)) is not None:
            self.repeats.add(repeats)
        if (further := len(trajectories) + duplicates - 1) > 0:
            self.duplicates.add(duplicates / further)
        self.empty.add(empty / (len(trajectories) + duplicates + empty))
        for annotation in annotations:
            row = annotation.labelled[0]
            self.cases.update([row.case] if row.case else [])
            if row.scores is not None:
                start = 1.0 if self.start_score is None else self.start_score
                self.drops.add(largest_drop(row.scores, start, allow_first_step=self.allow_first_step))

    def notes(self) -> dict[str, Any]:
        return {
            "trajectories": dict(self.counts),
            "cases": dict(self.cases),
            "step_labels": dict(self.steps),
            "mean_largest_drop": self.drops.mean,
            "repetitiveness": self.repeats.mean,
            "duplicates": self.duplicates.mean,
            "empty": self.empty.mean,
        }


def warning_signs(number: int, notes: Mapping[str, Notes]) -> list[str]:
    """The signs of a failing run that the paper names: a round's notes held against the best of the rounds before."""
    stream, test = (notes.get(f"round-{number}/{stage}", {}) for stage in ("sample", "evaluate"))
    signs = []
    drop, drops = _by_round(number, notes, "sample", "mean_largest_drop")
    error, errors = _by_round(number, notes, "self-verification", "all")
    share, shares = _by_round(number, notes, "sample", "duplicates")
    if drop is not None and drops and drop < FLATTENED * max(drops):
        signs.append(f"score drops flatten: {drop:.3f} after {max(drops):.3f}; detection may be turning random")
    if error is not None and errors and error > min(errors) + RISEN:
        signs.append(f"self-verification error rises: {error:.3f} after {min(errors):.3f}")
    for what, figures in (("samples", stream), ("the new reasoner's test samples", test.get("test") or {})):
        if (repeats := figures.get("repetitiveness")) is not None and repeats > REPETITIVE:
            signs.append(f"{what} are repetitive: {repeats:.0%} of a solution's steps repeat an earlier one")
    if (empty := stream.get("empty")) is not None and empty > EMPTY:
        signs.append(f"samples are empty: {empty:.0%} of a question's samples have no finished step")
    if share is not None and shares and share > max(DUPLICATED, min(shares) + RISEN):
        all_but_first = f"{share:.0%} of a question's samples but the first repeat an earlier one"
        signs.append(f"samples hardly differ: {all_but_first}, {min(shares):.0%} before")
    if stream.get("labels"):
        kinds = [kind for kind in ("right", "wrong") if not stream.get("step_labels", {}).get(kind)]
        signs += [f"no step of a sampled solution is labelled {kind}" for kind in kinds]
    return signs


def _by_round(number: int, notes: Mapping[str, Notes], stage: str, figure: str) -> tuple[float | None, list[float]]:
    """A round's figure, None where it has none, and those of the rounds before."""
    now, *before = (notes.get(f"round-{i}/{stage}", {}).get(figure) for i in range(number, -1, -1))
    return now, [value for value in before if value is not None]


def summary(notes: Mapping[str, Notes], rounds: int) -> dict[str, Any]:
    """The text of summary.json: one entry a round that has been evaluated. What a round lacks is null."""
    done = [i for i in range(rounds + 1) if f"round-{i}/evaluate" in notes]
    return {"rounds": [_round(i, _stages(i, notes)) for i in done]}


def _stages(number: int, notes: Mapping[str, Notes]) -> dict[str, Notes]:
    prefix = f"round-{number}/"
    return {name.removeprefix(prefix): note for name, note in notes.items() if name.startswith(prefix)}


def _round(number: int, stages: Mapping[str, Notes]) -> dict[str, Any]:
    evaluation, self_verification = stages["evaluate"], stages.get("self-verification", {})
    verifier = evaluation["verifier"]
    if verifier is not None:
        verifier = {
            **verifier,
            "self_verification_error": self_verification.get("all"),
            "self_verification": {
                checker: {kind: stages.get(name, {}).get(kind) for kind in ("right", "wrong", "all")}
                for checker, name in (("trained_from", "self-verification"), ("aligned", "self-verification-aligned"))
            },
        }
    return {
        "round": number,
        "test": evaluation["test"],
        "ood": evaluation["ood"],
        "verifier": verifier,
        "samples": {k: v for k, v in stages.get("sample", {}).items() if k not in ("cost", "seconds")} or None,
        "pairs": {k: v for k, v in stages.get("pairs", {}).items() if k not in ("cost", "seconds")} or None,
        "quarantined": sum(len(stage.get("quarantined", ())) for stage in stages.values()),
        "cost": _cost(stages),
        "warnings": stages.get("warnings", {}).get("signs", []),
    }


def _cost(stages: Mapping[str, Notes]) -> dict[str, Any]:
    """What the method's own stages cost in all; seconds and counts of every stage, those that only measure too."""
    total = Cost()
    for name, stage in stages.items():
        total += Cost(**stage.get("cost", {})) if name not in MEASURING else Cost()
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    by_stage = {name: stage["cost"] for name, stage in stages.items() if "cost" in stage}
    return {**total.as_dict(), "seconds": seconds, "stages": by_stage}
