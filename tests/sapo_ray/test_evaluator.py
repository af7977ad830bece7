"""What a reasoner and a verifier are worth, worked out by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.data import MASKED, Question, Trajectory
from sapo_ray.evaluator import (
    EvaluationConfig,
    Sampled,
    answer,
    best_of_n_accuracy,
    reasoner_report,
    split_validation,
    step_report,
    verifier_report,
)
from sapo_ray.metrics import accuracy_interval
from sapo_ray.models import character_tokenizer
from sapo_ray.requests import Completion, GenerateRequest
from sapo_ray.sampler import Sampler, SamplingConfig, Solver
from sapo_ray.tasks.answers import same_answer
from sapo_ray.tasks.base import OracleLabels
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig

TASK = Chain(ChainConfig())
QUESTION = Question("q", "7+3*7-5", "5")


def solution(name: str, text: str | None, *, correct: bool = False, question: str = "q") -> Trajectory:
    return Trajectory(name, question, "?", (f"={text}\n",) if text else (), text, correct)


def sampled(greedy: bool, answers: str) -> Sampled:
    """A question whose right answer is 5, and which was answered by sampling as the letters of `answers` say."""
    samples = [solution(f"s{k}", a if a != "-" else None, correct=a == "5") for k, a in enumerate(answers)]
    return Sampled(QUESTION, solution("g", "5" if greedy else "6", correct=greedy), tuple(samples))


def test_one_question_is_answered_greedily_and_by_sampling() -> None:
    asked: list[tuple[str, float]] = []

    async def generate(request: GenerateRequest) -> Completion:
        asked.append((request.id, request.sampling.temperature))
        return Completion(request.id, "=5\n" if "greedy" in request.id else "", (), True, 1, 0)

    solver = Solver(TASK, character_tokenizer(VOCABULARY, 512), generate, seed=0)
    result = asyncio.run(answer(Sampler(solver, SamplingConfig()), QUESTION, "evaluate-1", samples=2))
    assert asked == [
        ("evaluate-1/greedy/q/0", 0.0),
        ("evaluate-1/sampled/q/0", 1.0),
        ("evaluate-1/sampled/q/1", 1.0),
    ]
    assert (result.greedy.answer, result.greedy.correct) == ("5", True)
    assert [s.steps for s in result.samples] == [(), ()]


def test_reasoner_report_by_hand() -> None:
    answered = [sampled(True, "5565"), sampled(False, "6655"), sampled(True, "----"), sampled(True, "")]
    assert reasoner_report(answered, str.__eq__) == {
        "greedy_accuracy": 0.75,
        "n": 4,
        "ci95": accuracy_interval(3, 4),
        "sampled_accuracy": pytest.approx((0.75 + 0.5 + 0) / 3),
        "k": 4,
        "pass_at_k": pytest.approx(2 / 3),
        "majority_accuracy": pytest.approx(1 / 3),
        "repetitiveness": 0.0,
    }


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("18", "$18", "18.00", "17", "17"), 1.0),
        (("18", "17", "$17", "17.0"), 0.0),
        (("1/2", "2", "50%", "2", "0.5"), 1.0),
        (("7", None, None), 0.0),
        ((None,), 0.0),
    ],
)
def test_a_majority_is_of_answers_that_the_task_calls_equal(answers: tuple[str | None, ...], right: float) -> None:
    gold = "18" if "18" in answers else "1/2"
    samples = tuple(solution("s", a, correct=a is not None and same_answer(a, gold)) for a in answers)
    answered = [Sampled(QUESTION, samples[0], samples)]
    assert reasoner_report(answered, same_answer)["majority_accuracy"] == right
    assert reasoner_report(answered, None)["majority_accuracy"] is None


def test_without_questions_or_samples_figures_are_null() -> None:
    assert set(reasoner_report([], str.__eq__).items()) == {
        ("greedy_accuracy", None),
        ("n", 0),
        ("ci95", None),
        ("sampled_accuracy", None),
        ("k", None),
        ("pass_at_k", None),
        ("majority_accuracy", None),
        ("repetitiveness", None),
    }
    assert reasoner_report([sampled(True, "")], str.__eq__)["sampled_accuracy"] is None
    assert best_of_n_accuracy([sampled(True, "")], {}) is None


def test_best_of_n_takes_the_sample_with_the_highest_mean_score() -> None:
    answered = [sampled(True, "65"), sampled(True, "5-")]
    assert best_of_n_accuracy(answered, {"s0": 0.2, "s1": 0.3}) == 0.5
    assert best_of_n_accuracy(answered, {"s0": 0.4, "s1": 0.3}) == 0.5
    assert best_of_n_accuracy(answered[1:], {"s0": 0.0}) == 1.0


# Validation


KINDS = st.sampled_from(["right", "wrong", "unanswered"])
VALIDATION = st.lists(st.tuples(st.integers(0, 5), KINDS), max_size=30).map(sorted)


@given(drawn=VALIDATION, most=st.integers(0, 20))
def test_validation_is_split_by_question_and_balanced(drawn: list[tuple[int, str]], most: int) -> None:
    trajectories = [
        solution(f"t{i}", None if kind == "unanswered" else "5", correct=kind == "right", question=str(question))
        for i, (question, kind) in enumerate(drawn)
    ]
    tuning, fixed = split_validation(trajectories, most)
    answered = [t for t in trajectories if t.answer is not None]
    questions = {t.question_id for t in answered}
    assert {t.question_id for t in tuning}.isdisjoint(t.question_id for t in fixed)
    assert len({t.question_id for t in tuning}) == len(questions) // 2

    rest = [t for t in answered if t not in tuning]
    right, wrong = (sum(t.correct == kind for t in fixed) for kind in (True, False))
    all_right, all_wrong = (sum(t.correct == kind for t in rest) for kind in (True, False))
    assert all(t in rest for t in fixed)
    assert len(fixed) <= most
    assert len(fixed) >= min(most - 1, len(rest))
    assert min(right, wrong) >= min(most // 2, all_right, all_wrong)


# Verifier


def test_verifier_report_by_hand() -> None:
    """True first errors at steps 1 and 0; the second's largest drop, from a start score of 0.9, is elsewhere."""
    wrong_late = ("7+3=0\n", "0*7=1\n", "1-5=6\n")
    wrong_early = ("7+3=1\n", "1*7=7\n", "7-5=2\n")
    right = ("7+3=0\n", "0*7=0\n", "0-5=5\n")
    scored = [
        (QUESTION, Trajectory("a", "q", QUESTION.text, wrong_late, "6", correct=False), (0.9, 0.2, 0.1)),
        (QUESTION, Trajectory("b", "q", QUESTION.text, wrong_early, "2", correct=False), (0.8, 0.7, 0.2)),
        (QUESTION, Trajectory("c", "q", QUESTION.text, right, "5", correct=True), (0.9, 0.8, 0.4)),
    ]
    report = verifier_report(TASK, scored, start_score=0.9, threshold=0.5, allow_first_step=True)
    truth = [1, 0, 0, 0, 0, 0, 1, 1, 1]
    scores = [score for *_, row in scored for score in row]
    assert report == {
        "step_accuracy": pytest.approx(6 / 9),
        "threshold": 0.5,
        "auroc": pytest.approx(17.5 / 20),
        "brier": pytest.approx(sum((s - t) ** 2 for s, t in zip(scores, truth, strict=True)) / 9),
        "first_error_hit_rate": 0.5,
        "random_hit_rate": pytest.approx(1 / 3),
        "wrong_trajectories": 2,
    }
    without_first = verifier_report(TASK, scored, start_score=0.9, threshold=0.5, allow_first_step=False)
    assert without_first["random_hit_rate"] == pytest.approx((1 / 2 + 0) / 2)


def test_nothing_scored_is_null() -> None:
    report = verifier_report(TASK, [], start_score=None, threshold=0.5, allow_first_step=True)
    assert {key: value for key, value in report.items() if value is not None} == {
        "threshold": 0.5,
        "wrong_trajectories": 0,
    }


def test_a_task_without_an_oracle_has_no_verifier_figures() -> None:
    class Silent(Chain):
        def oracle(self, question: Question, steps: Any) -> OracleLabels:
            return None  # type: ignore[return-value]

    scored = [(QUESTION, Trajectory("a", "q", QUESTION.text, ("=6\n",), "6", correct=False), (0.3,))]
    report = verifier_report(Silent(ChainConfig()), scored, 0.9, 0.5, allow_first_step=True)
    assert report == verifier_report(TASK, [], 0.9, 0.5, allow_first_step=True)


def test_masked_steps_are_left_out_of_a_step_report() -> None:
    """Nor is a first error known that follows a masked step. The one that is known is missed, from 1 at the start."""
    wrong, right = solution("w", "6"), solution("r", "5", correct=True)
    scored = [(wrong, (1, MASKED, 0), (0.9, 0.4, 0.2)), (wrong, (0, 0), (0.6, 0.1)), (right, (1, 0), (0.9, 0.8))]
    report = step_report(scored, start_score=None, threshold=0.5, allow_first_step=True)
    assert report == {
        "step_accuracy": pytest.approx(4 / 6),
        "threshold": 0.5,
        "auroc": 1.0,
        "brier": pytest.approx((0.01 + 0.04 + 0.36 + 0.01 + 0.01 + 0.64) / 6),
        "first_error_hit_rate": 0.0,
        "random_hit_rate": 0.5,
        "wrong_trajectories": 1,
    }
    without_first = step_report(scored, start_score=None, threshold=0.5, allow_first_step=False)
    assert without_first["random_hit_rate"] == 0.0


@pytest.mark.parametrize("key", ["test", "ood", "samples", "sampled_questions", "verification"])
def test_impossible_configs_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is -1"):
        EvaluationConfig(**{key: -1})
