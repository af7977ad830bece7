"""Workers without a model: what they answer follows from the request alone. They are asked here without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.null import NullReasoner, NullVerifier
from sapo_ray.config import RunConfig
from sapo_ray.data import Question
from sapo_ray.encoding import encode
from sapo_ray.errors import SapoError
from sapo_ray.models import ModelConfig, character_tokenizer, save_random_reasoner
from sapo_ray.requests import Completion, GenerateRequest, Sampling, ScoreRequest, SimulationConfig
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig

CHAIN = ChainConfig(modulus=7, max_operand=6, min_steps=3, max_steps=5, worked=1, pool=40, validation=1, test=1, ood=0)
TASK, TOKENIZER = Chain(CHAIN), character_tokenizer(VOCABULARY, 128)
QUESTIONS = TASK.questions("pool")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "base"
    tiny = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=128)
    save_random_reasoner(tiny, VOCABULARY, 0, path)
    return str(path)


def reasoner(checkpoint: str, error_rate: float, token_seconds: float = 0.0) -> NullReasoner:
    simulation = SimulationConfig(error_rate=error_rate, token_seconds=token_seconds)
    worker = NullReasoner(RunConfig(task=CHAIN, simulation=simulation), checkpoint)
    worker.ready()
    return worker


def request(question: Question, seed: int = 0, steps: Sequence[str] = (), max_tokens: int = 96) -> GenerateRequest:
    ids = encode(TOKENIZER, TASK.prompt(question.text), steps).ids
    return GenerateRequest(f"{question.id}/{seed}", tuple(ids), seed, Sampling(max_tokens=max_tokens))


def texts(worker: NullReasoner, requests: Sequence[GenerateRequest]) -> list[str]:
    completions = asyncio.run(worker.generate(requests))
    assert all(isinstance(completion, Completion) for completion in completions)
    return [completion.text for completion in completions if isinstance(completion, Completion)]


def test_an_answer_depends_on_its_request_and_on_nothing_else(checkpoint: str) -> None:
    requests = [request(question, seed) for question in QUESTIONS for seed in range(3)]
    together = texts(reasoner(checkpoint, 0.3), requests)
    alone = [texts(reasoner(checkpoint, 0.3, token_seconds=1e-5), [one])[0] for one in requests[:10]]
    backwards = texts(reasoner(checkpoint, 0.3), requests[::-1])
    assert together == backwards[::-1]
    assert together[:10] == alone
    assert len(set(together[:3])) + len(set(together[3:6])) > 2  # and other seeds give other answers


def test_without_mistakes_every_question_is_solved(checkpoint: str) -> None:
    for question, text in zip(
        QUESTIONS, texts(reasoner(checkpoint, 0.0), [request(question) for question in QUESTIONS]), strict=True
    ):
        assert TASK.answer(TASK.split(text)) == question.answer


def test_with_a_mistake_in_every_step_no_step_is_right(checkpoint: str) -> None:
    for question, text in zip(
        QUESTIONS, texts(reasoner(checkpoint, 1.0), [request(question) for question in QUESTIONS]), strict=True
    ):
        steps = TASK.split(text)
        assert len(steps) == len(TASK.solve(TASK.parse(question.text)))
        assert not any(TASK.oracle(question, steps).strict)


def test_a_prefix_is_gone_on_from_as_it_stands(checkpoint: str) -> None:
    """Mistakes in it included: what follows is right given what it states, and the answer with it is wrong."""
    for question in QUESTIONS:
        (wrong,) = texts(reasoner(checkpoint, 1.0), [request(question)])
        prefix = TASK.split(wrong)[:1]
        (rest,) = texts(reasoner(checkpoint, 0.0), [request(question, steps=prefix)])
        assert TASK.oracle(question, [*prefix, *TASK.split(rest)]).strict == (0, *[1] * len(TASK.split(rest)))


def test_a_limit_cuts_a_completion_and_a_stop_ends_it(checkpoint: str) -> None:
    whole, cut = request(QUESTIONS[0]), request(QUESTIONS[0], max_tokens=4)
    stopped = replace(whole, sampling=replace(whole.sampling, stop=("\n",)))
    full, short, first = asyncio.run(reasoner(checkpoint, 0.0).generate([whole, cut, stopped]))
    assert isinstance(full, Completion)
    assert isinstance(short, Completion)
    assert isinstance(first, Completion)
    assert (full.finished, short.finished, first.finished) == (True, False, True)
    assert (short.generated_tokens, short.text) == (4, full.text[:4])
    assert first.text == full.text.partition("\n")[0]


def test_a_prompt_that_is_no_problem_fails_alone(checkpoint: str) -> None:
    nonsense = replace(request(QUESTIONS[0]), id="odd", prompt_ids=tuple(TOKENIZER.encode("a=\n")))
    good, bad = asyncio.run(reasoner(checkpoint, 0.0).generate([request(QUESTIONS[1]), nonsense]))
    assert isinstance(good, Completion)
    assert isinstance(bad, ValueError)
    assert str(bad).startswith("request odd: ")


def test_scores_tell_reachable_steps_from_others_and_depend_on_the_request_alone(checkpoint: str) -> None:
    verifier = NullVerifier(RunConfig(task=CHAIN), checkpoint)
    verifier.ready()
    solutions = [
        TASK.split(text)
        for text in texts(reasoner(checkpoint, 0.3), [request(q, seed) for seed, q in enumerate(QUESTIONS)])
    ]
    requests = [
        ScoreRequest(q.id, encode(TOKENIZER, TASK.prompt(q.text), steps))
        for q, steps in zip(QUESTIONS, solutions, strict=True)
    ]
    scores = asyncio.run(verifier.score(requests))
    assert asyncio.run(verifier.score(requests[::-1]))[::-1] == scores
    reachable, others = [], []
    for question, steps, row in zip(QUESTIONS, solutions, scores, strict=True):
        assert isinstance(row, list)
        for right, score in zip(TASK.oracle(question, steps).reachable, row, strict=True):
            (reachable if right else others).append(score)
    assert sum(0.85 <= score <= 0.95 for score in reachable) / len(reachable) > 0.8
    assert sum(score < 0.85 for score in others) / len(others) > 0.6


@pytest.mark.parametrize("worker", [NullReasoner, NullVerifier])
def test_without_a_checkpoint_none_starts(tmp_path: Path, worker: type[NullReasoner] | type[NullVerifier]) -> None:
    with pytest.raises(SapoError, match=r"no checkpoint to load at .*nowhere: config\.json is missing"):
        worker(RunConfig(task=CHAIN), str(tmp_path / "nowhere")).ready()
