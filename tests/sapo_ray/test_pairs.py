"""Preference pairs: who is paired with whom, how many, and by what right."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.data import PreferencePair, Trajectory
from sapo_ray.pairs import PairsConfig, make_pairs, share_unlike, shuffled


def solution(name: str, *, correct: bool, text: str | None = None, question: str = "q") -> Trajectory:
    return Trajectory(name, question, "?", (text or name,), "1", correct)


def config(**keys: object) -> PairsConfig:
    return PairsConfig(**{"keep_unpaired": False, **keys})  # type: ignore[arg-type]


def ids(pairs: list[PreferencePair]) -> list[tuple[str, str | None]]:
    return [(pair.chosen_id, pair.rejected_id) for pair in pairs]


RIGHT = [solution("r0", correct=True), solution("r1", correct=True)]
WRONG = [solution("w0", correct=False), solution("w1", correct=False), solution("w2", correct=False)]
SCORES = {"r0": 0.9, "r1": 0.6, "w0": 0.2, "w1": 0.5, "w2": 0.8}


def test_pairs_are_right_against_wrong_by_a_margin() -> None:
    pairs = make_pairs(RIGHT + WRONG, SCORES, config(eta=0.2, max_per_question=99))
    assert set(ids(pairs)) == {("r0", "w0"), ("r0", "w1"), ("r1", "w0")}
    best = pairs[0]
    assert (best.question_id, best.chosen, best.rejected) == ("q", ("r0",), ("w0",))
    assert (best.chosen_score, best.rejected_score) == (0.9, 0.2)


def test_the_cap_prefers_solutions_not_used_yet_then_wide_margins() -> None:
    everything = config(eta=-1.0, max_per_question=3)
    scores = {"r0": 0.6, "r1": 0.9, "w0": 0.8, "w1": 0.5, "w2": 0.1}
    assert ids(make_pairs(RIGHT + WRONG, scores, everything)) == [("r1", "w2"), ("r0", "w1"), ("r1", "w0")]


def test_solutions_that_were_cut_off_are_in_no_pair() -> None:
    cut = [replace(WRONG[0], truncated=True), WRONG[1], replace(RIGHT[0], truncated=True), RIGHT[1]]
    assert ids(make_pairs(cut, SCORES, config(eta=0.05))) == [("r1", "w1")]


def test_without_outcome_any_two_may_be_paired() -> None:
    pairs = make_pairs(RIGHT + WRONG, SCORES, config(eta=0.25, max_per_question=99, require_outcome=False))
    expected = {(a, b) for a in SCORES for b in SCORES if SCORES[a] - SCORES[b] >= 0.25}
    assert set(ids(pairs)) == expected
    assert ("w2", "w1") in expected


def test_without_scores_outcome_alone_pairs() -> None:
    pairs = make_pairs(RIGHT + WRONG, None, config(eta=0.5, max_per_question=2))
    assert ids(pairs) == [("r0", "w0"), ("r1", "w1")]
    assert {pair.chosen_score for pair in pairs} == {pair.rejected_score for pair in pairs} == {None}


def test_right_solutions_without_a_partner_still_teach() -> None:
    others = [solution("x", correct=True, question="p"), solution("y", correct=False, question="o")]
    scores = SCORES | {"x": 0.4, "y": 0.4}
    keep = config(eta=0.6, keep_unpaired=True, max_unpaired_per_question=1)
    pairs = make_pairs(RIGHT + WRONG + others, scores, keep)
    assert ids(pairs) == [("x", None), ("r0", "w0"), ("r1", None)]
    assert (pairs[0].rejected, pairs[0].rejected_score, pairs[0].chosen_score) == (None, None, 0.4)


def test_the_best_unpaired_are_kept() -> None:
    keep = config(keep_unpaired=True, max_unpaired_per_question=1)
    assert ids(make_pairs(RIGHT, {"r0": 0.2, "r1": 0.3}, keep)) == [("r1", None)]
    assert ids(make_pairs(RIGHT, None, keep)) == [("r0", None)]


def test_nothing_to_pair_gives_nothing() -> None:
    assert make_pairs([], {}, config()) == []
    assert make_pairs(WRONG, SCORES, PairsConfig()) == []
    empty = Trajectory("e", "q", "?", (), None, correct=False)
    assert make_pairs([RIGHT[0], empty], {"r0": 0.9}, config(eta=-1.0)) == []


def test_equal_texts_count_once_and_never_against_each_other() -> None:
    same = [solution("a", correct=True, text="t"), solution("b", correct=True, text="t"), WRONG[0]]
    scores = {"a": 0.9, "b": 0.5, "w0": 0.1}
    assert ids(make_pairs(same, scores, config(require_outcome=False))) == [("a", "w0")]


@pytest.mark.parametrize("scores", [SCORES | {"w1": math.nan}, {k: v for k, v in SCORES.items() if k != "w1"}])
def test_a_score_that_is_missing_or_no_number_names_the_trajectory(scores: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="trajectory w1 has a mean score that is missing or no number"):
        make_pairs(RIGHT + WRONG, scores, config())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eta": math.nan}, "^eta is nan"),
        ({"eta": 0.0, "require_outcome": False}, "^eta is 0.0; without require_outcome"),
        ({"max_per_question": -1}, "^max_per_question is -1"),
    ],
)
def test_impossible_configs_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**keys)


def test_without_outcome_and_scores_there_is_nothing_to_pair_by() -> None:
    with pytest.raises(ValueError, match="nothing else to pair by"):
        make_pairs([], None, config(require_outcome=False))


@given(
    drawn=st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.integers(0, 1)), max_size=12),
    eta=st.sampled_from([-1.0, 0.1, 0.4]),
    cap=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_every_pair_is_lawful_and_the_choice_depends_on_no_order(
    drawn: list[tuple[bool, float, int]], eta: float, cap: int, seed: int
) -> None:
    solutions = [
        solution(f"s{i}", correct=right, question=f"q{question}") for i, (right, _, question) in enumerate(drawn)
    ]
    scores = {f"s{i}": score for i, (_, score, _) in enumerate(drawn)}
    by_id = {t.id: t for t in solutions}
    settings = config(eta=eta, max_per_question=cap)
    pairs = make_pairs(solutions, scores, settings)

    lawful = {
        (a.id, b.id)
        for a in solutions
        for b in solutions
        if a.question_id == b.question_id and a.correct and not b.correct and scores[a.id] - scores[b.id] >= eta
    }
    found = Counter(pair.question_id for pair in pairs)
    assert set(ids(pairs)) <= lawful
    assert len(set(ids(pairs))) == len(pairs)
    assert found == {
        q: n for q in ("q0", "q1") if (n := min(cap, sum(by_id[chosen].question_id == q for chosen, _ in lawful)))
    }
    shuffled = random.Random(seed).sample(solutions, len(solutions))
    assert make_pairs(shuffled, scores, settings) == pairs


@given(right=st.integers(1, 5), wrong=st.integers(1, 5), seed=st.integers(0, 999))
def test_solutions_are_used_evenly(right: int, wrong: int, seed: int) -> None:
    """With all pairs lawful, as many pairs as the larger side has solutions use each of both sides evenly."""
    solutions = [solution(f"s{i}", correct=i < right) for i in range(right + wrong)]
    rng = random.Random(seed)
    scores = {t.id: rng.random() for t in solutions}
    pairs = make_pairs(solutions, scores, config(eta=-1.0, max_per_question=max(right, wrong)))
    chosen = Counter(pair.chosen_id for pair in pairs)
    rejected = Counter(pair.rejected_id for pair in pairs)
    assert len(chosen) == right
    assert len(rejected) == wrong
    assert max(chosen.values()) - min(chosen.values()) <= 1
    assert max(rejected.values()) - min(rejected.values()) <= 1


def test_share_unlike_counts_pairs_only() -> None:
    def pair(chosen: str, rejected: str | None) -> PreferencePair:
        return PreferencePair("q", "?", chosen, (chosen,), None, rejected, (rejected,) if rejected else None, None)

    mine = [pair("a", "x"), pair("a", "y"), pair("b", None), pair("b", "x"), pair("c", "x")]
    other = [pair("a", "x"), pair("b", "x"), pair("c", "y"), pair("b", None)]
    assert share_unlike(mine, other) == 0.5
    assert share_unlike([pair("b", None)], other) is None


def test_scores_that_tell_nothing_give_the_share_of_a_coin_by_hand() -> None:
    """One right and two wrong solutions, one pair a question. Outcome alone pairs `r` with `w0`, the first by id; a
    shuffle makes either wrong one the lower: half of the pairs are unlike. True scores are lowest at `w1`: all are."""
    solutions, scores = list[Trajectory](), dict[str, float]()
    for q in range(400):
        for name, correct, score in (("r", True, 0.9), ("w0", False, 0.5), ("w1", False, 0.1)):
            solutions.append(solution(f"{q}/{name}", correct=correct, question=f"q{q}"))
            scores[f"{q}/{name}"] = score
    settings = config(eta=-1.0, max_per_question=1)
    by_outcome = make_pairs(solutions, None, settings)
    assert share_unlike(make_pairs(solutions, scores, settings), by_outcome) == 1.0
    by_chance = share_unlike(make_pairs(solutions, shuffled(solutions, scores, 0), settings), by_outcome)
    assert by_chance == pytest.approx(0.5, abs=0.1)
    assert by_chance == share_unlike(make_pairs(solutions, shuffled(solutions, scores, 0), settings), by_outcome)
    assert shuffled(solutions, scores, 0) != shuffled(solutions, scores, 1)


def test_the_margin_holds_for_shuffled_scores_too() -> None:
    """A right and a wrong solution, 0.8 apart: a shuffle leaves the one pair there is, or turns it into none."""
    solutions, scores = [RIGHT[0], WRONG[0]], {"r0": 0.9, "w0": 0.1}
    found = {tuple(ids(make_pairs(solutions, shuffled(solutions, scores, seed), config()))) for seed in range(20)}
    assert found == {(("r0", "w0"),), ()}


@given(
    drawn=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1), st.booleans(), st.integers(0, 4)), max_size=14),
    seed=st.integers(0, 99),
)
def test_a_shuffle_deals_out_each_questions_scores_among_its_solutions(
    drawn: list[tuple[int, float, bool, int]], seed: int
) -> None:
    """Solutions that were cut off, and equal texts but for the first, take no part in it."""
    solutions = [
        replace(solution(f"s{i:02}", correct=True, question=f"q{q}", text=str(text)), truncated=cut)
        for i, (q, _, cut, text) in enumerate(drawn)
    ]
    scores = {f"s{i:02}": score for i, (_, score, _, _) in enumerate(drawn)}
    dealt = shuffled(solutions, scores, seed)
    for q in ("q0", "q1", "q2"):
        texts = {t.steps: t.id for t in reversed(solutions) if t.question_id == q and not t.truncated}
        members = set(texts.values())
        assert members == {name for name in dealt if any(t.id == name and t.question_id == q for t in solutions)}
        assert Counter(dealt[name] for name in members) == Counter(scores[name] for name in members)
    assert shuffled(random.Random(seed).sample(solutions, len(solutions)), scores, seed) == dealt
