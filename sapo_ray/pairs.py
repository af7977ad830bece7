"""Preference pairs from verifier scores (SAPO, arXiv 2601.20312, algorithm 1): r(τ^w) - r(τ^l) ≥ η, r the mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from sapo_ray.data import PreferencePair, Trajectory


@dataclass(kw_only=True)
class PairsConfig:
    eta: float = 0.1
    """Least margin by which the chosen solution's mean verifier score exceeds the rejected one's (η)."""
    max_per_question: int = 4
    """Most pairs of one question."""
    require_outcome: bool = True
    """Pair only a right solution with a wrong one; otherwise any two whose scores differ by `eta`."""
    keep_unpaired: bool = True
    """Keep right solutions that are in no pair, so that every right sample teaches."""
    max_unpaired_per_question: int = 4
    """Most right solutions of one question kept without a partner."""

    def __post_init__(self) -> None:
        if not -1 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; scores lie in 0 … 1, so it must lie between -1 and 1")
        if not self.require_outcome and self.eta <= 0:
            raise ValueError(f"eta is {self.eta}; without require_outcome it must be above 0, or pairs go both ways")
        for key in ("max_per_question", "max_unpaired_per_question"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 0")


def make_pairs(
    trajectories: Iterable[Trajectory], scores: Mapping[str, float] | None, config: PairsConfig
) -> list[PreferencePair]:
    """Pairs of solutions of the same question, by question id; the order of the input does not matter.

    `scores` maps trajectory ids to mean step scores. None pairs by outcome alone and needs `require_outcome`.
    Solutions without steps or cut off (they have no end to learn from) are left out, and of equal texts of a question
    all but the first by id. Raises ValueError where neither scores nor outcomes tell who is better, and for a score
    that is missing or not a number.
    """
    if scores is None and not config.require_outcome:
        raise ValueError("pairs.require_outcome is false, but without a verifier there is nothing else to pair by")
    return [pair for solutions in _by_question(trajectories) for pair in _of_question(solutions, scores, config)]


def shuffled(trajectories: Iterable[Trajectory], scores: Mapping[str, float], seed: int) -> dict[str, float]:
    """The scores of the solutions that `make_pairs` pairs, dealt out anew within each question.

    They say nothing of which solution is better, but are as far apart as the scores themselves: what pairs by them have
    in common with others is chance. The same for every order of the input.
    """
    rng, dealt = Random(seed), dict[str, float]()
    for solutions in _by_question(trajectories):
        names = [solution.id for solution in solutions]
        dealt |= zip(names, rng.sample([scores[name] for name in names], len(names)), strict=True)
    return dealt


def share_unlike(pairs: Sequence[PreferencePair], other: Sequence[PreferencePair]) -> float | None:
    """The share of the pairs (those with a rejected side) that are not in `other`; None where there are none."""
    mine = {(pair.chosen_id, pair.rejected_id) for pair in pairs if pair.rejected_id is not None}
    theirs = {(pair.chosen_id, pair.rejected_id) for pair in other}
    return len(mine - theirs) / len(mine) if mine else None


def _by_question(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    """The different whole solutions of each question, by question id and by their own."""
    questions: dict[str, dict[str, Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: (t.question_id, t.id)):
        if trajectory.steps and not trajectory.truncated:
            questions.setdefault(trajectory.question_id, {}).setdefault("".join(trajectory.steps), trajectory)
    return [list(solutions.values()) for solutions in questions.values()]


def _of_question(
    solutions: list[Trajectory], scores: Mapping[str, float] | None, config: PairsConfig
) -> list[PreferencePair]:
    rewards = {t.id: _reward(t, scores) for t in solutions}
    margins = {
        (i, j): margin
        for i, j in permutations(range(len(solutions)), 2)
        if (margin := _margin(solutions[i], solutions[j], rewards, config)) is not None
    }
    chosen = _select(margins, config.max_per_question)
    pairs = [_pair(solutions[i], solutions[j], rewards) for i, j in chosen]
    if not config.keep_unpaired:
        return pairs
    paired = {i for pair in chosen for i in pair}
    alone = [t for i, t in enumerate(solutions) if t.correct and i not in paired]
    alone.sort(key=lambda t: (-(rewards[t.id] or 0.0), t.id))
    return pairs + [_pair(t, None, rewards) for t in alone[: config.max_unpaired_per_question]]


def _reward(trajectory: Trajectory, scores: Mapping[str, float] | None) -> float | None:
    if scores is None:
        return None
    score = scores.get(trajectory.id, math.nan)
    if not math.isfinite(score):
        raise ValueError(f"trajectory {trajectory.id} has a mean score that is missing or no number: score it again")
    return score


def _margin(
    chosen: Trajectory, rejected: Trajectory, rewards: Mapping[str, float | None], config: PairsConfig
) -> float | None:
    """The margin of a pair, 0 where nothing is scored; None where the two are no pair."""
    if config.require_outcome and not (chosen.correct and not rejected.correct):
        return None
    better, worse = rewards[chosen.id], rewards[rejected.id]
    if better is None or worse is None:
        return 0.0
    return better - worse if better - worse >= config.eta else None


def _select(margins: Mapping[tuple[int, int], float], most: int) -> list[tuple[int, int]]:
    """Up to `most` pairs, each time the one whose sides were used least; then the widest margin, then the first ids.

    So the solutions of a question are used as evenly as possible, rather than one very good against one very bad.
    """
    left, used, selected = dict(margins), Counter[int](), list[tuple[int, int]]()
    while left and len(selected) < most:
        pair = min(left, key=lambda p: (used[p[0]] + used[p[1]], -left[p], p))
        del left[pair]
        used.update(pair)
        selected.append(pair)
    return selected


def _pair(chosen: Trajectory, rejected: Trajectory | None, rewards: Mapping[str, float | None]) -> PreferencePair:
    return PreferencePair(
        question_id=chosen.question_id,
        question=chosen.question,
        chosen_id=chosen.id,
        chosen=chosen.steps,
        chosen_score=rewards[chosen.id],
        rejected_id=rejected.id if rejected else None,
        rejected=rejected.steps if rejected else None,
        rejected_score=rewards[rejected.id] if rejected else None,
    )
