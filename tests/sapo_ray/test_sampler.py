"""Sampling of whole solutions: ids and seeds, repeats, truncation, and indifference to the order of arrival."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.data import Question, Trajectory, seed_of
from sapo_ray.models import character_tokenizer
from sapo_ray.requests import Completion, ExecuteRequest, GenerateRequest
from sapo_ray.sampler import Sampler, Samples, SamplingConfig, Solver, original_trajectory, round_questions
from sapo_ray.sandbox import Verdict
from sapo_ray.tasks import Code, CodeConfig
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig
from sapo_ray.tasks.code import CodeSource

TASK = Chain(ChainConfig())
TOKENIZER = character_tokenizer(VOCABULARY, 512)
QUESTION = Question("q", "7+3*7", "0")


class Reasoner:
    """Completions by the last part of a request's id, after pseudo-random delays; and what was asked."""

    def __init__(self, answer: Callable[[int], str], delays: int = 0) -> None:
        self._answer, self._rng = answer, random.Random(delays)
        self.requests: list[GenerateRequest] = []

    async def __call__(self, request: GenerateRequest) -> Completion:
        self.requests.append(request)
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)
        text = self._answer(int(request.id.rpartition("/")[2]))
        finished = not text.endswith("…")
        text = text.removesuffix("…")
        return Completion(request.id, text, tuple(TOKENIZER.encode(text)), finished, len(request.prompt_ids), 0)


def drawn(reasoner: Reasoner, **config: Any) -> Samples:
    sampler = Sampler(Solver(TASK, TOKENIZER, reasoner, seed=5), SamplingConfig(**config))
    return asyncio.run(sampler.unique(QUESTION, "round-1"))


def unique(reasoner: Reasoner, **config: Any) -> list[Trajectory]:
    return drawn(reasoner, **config).trajectories


TEXTS = ["7+3=0\n0*7=0\n", "7+3=1\n1*7=7\n", "7+3=0\n0*7=0\n", "7+3=0\n0*7=0", "", "7+3=0\n0*…", "\n"]


def test_a_solution_is_read_as_it_stands() -> None:
    found = unique(Reasoner(TEXTS.__getitem__), samples=7, max_samples=7)
    assert [(t.id, t.steps, t.answer, t.correct, t.truncated) for t in found] == [
        ("round-1/q/0", ("7+3=0\n", "0*7=0\n"), "0", True, False),
        ("round-1/q/1", ("7+3=1\n", "1*7=7\n"), "7", False, False),
        ("round-1/q/3", ("7+3=0\n", "0*7=0"), "0", True, False),
        ("round-1/q/5", ("7+3=0\n",), None, False, True),
        ("round-1/q/6", ("\n",), None, False, False),
    ]
    assert {(t.question_id, t.question, t.source) for t in found} == {("q", QUESTION.text, "sampled")}


def test_a_truncated_solution_has_no_answer_even_where_it_shows_one() -> None:
    (found,) = unique(Reasoner(lambda _: "7+3=0\n0*7=0…"), samples=1)
    assert (found.answer, found.correct, found.truncated) == (None, False, True)
    assert found.steps == ("7+3=0\n",)  # the step it was in is unfinished


def test_a_solution_cut_off_in_its_first_step_is_none() -> None:
    assert drawn(Reasoner(lambda _: "7+3…"), samples=2) == ([], 0, 4)


def test_a_program_is_run_and_its_verdict_says_whether_it_is_right(tmp_path: Path) -> None:
    record = {"question": "Double x.", "tests": ["assert f(2) == 4"]}
    (tmp_path / "code.jsonl").write_text(json.dumps(record))
    source = CodeSource(path=str(tmp_path / "code.jsonl"), answer="tests")
    task = Code(CodeConfig(train_data=source, worked=0, validation=0, test=1))
    (question,) = task.questions("test")
    asked: list[ExecuteRequest] = []

    async def execute(request: ExecuteRequest) -> Verdict:
        asked.append(request)
        right = "2" in request.program.solution
        return Verdict("pass" if right else "timeout", "", "", 0.1)

    texts = ["def f(x):\n    return 2 * x", "def f(x):\n    return x", "", "def f(x):\n    return 2 * x…"]
    solver = Solver(task, TOKENIZER, Reasoner(texts.__getitem__), 0, execute)
    samples = asyncio.run(Sampler(solver, SamplingConfig()).sample(question, "s", range(4)))
    assert [sample.correct for sample in samples] == [True, False, False, False]
    assert [(r.id, r.program.solution) for r in asked] == [("s/train-1/0", texts[0]), ("s/train-1/1", texts[1])]
    blind = Sampler(Solver(task, TOKENIZER, Reasoner(texts.__getitem__), 0), SamplingConfig())
    with pytest.raises(RuntimeError, match=r"request s/train-1/0: nothing runs its program"):
        asyncio.run(blind.sample(question, "s", [0]))


def test_answers_that_are_slow_to_judge_do_not_wait_for_each_other() -> None:
    both_at_work = threading.Barrier(2)

    class Slow(Chain):
        slow_to_judge = True

        def is_correct(self, answer: str | None, gold: str) -> bool:
            both_at_work.wait(timeout=30)
            return super().is_correct(answer, gold)

    sampler = Sampler(Solver(Slow(ChainConfig()), TOKENIZER, Reasoner(TEXTS.__getitem__), 0), SamplingConfig())
    samples = asyncio.run(sampler.sample(QUESTION, "s", [0, 1]))
    assert [sample.correct for sample in samples] == [True, False]


def test_requests_carry_prompt_seed_and_decoding() -> None:
    reasoner = Reasoner(TEXTS.__getitem__)
    unique(reasoner, samples=3, max_samples=3, temperature=0.7, top_p=0.9, max_tokens=11, stop=["#"])
    assert [r.id for r in reasoner.requests] == ["round-1/q/0", "round-1/q/1", "round-1/q/2"]
    for request in reasoner.requests:
        assert TOKENIZER.decode(list(request.prompt_ids)) == "7+3*7\n"
        assert request.seed == seed_of(5, request.id)
        decoding = request.sampling
        assert (decoding.temperature, decoding.top_p, decoding.max_tokens, decoding.stop) == (0.7, 0.9, 11, ("#",))
    assert len({request.seed for request in reasoner.requests}) == 3


def test_greedy_decoding_ignores_temperature() -> None:
    greedy = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=11, stop=["#"]).decoding(greedy=True)
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens, greedy.stop) == (0.0, 1.0, 11, ("#",))


@pytest.mark.parametrize(
    ("texts", "min_unique", "asked", "kept", "repeats"),
    [
        (["a"] * 9, 1, 2, [0], 1),
        (["a", "b", "c"] * 3, 1, 2, [0, 1], 0),
        (["a", "a", "a", "b", "c"] * 2, 2, 4, [0, 3], 2),
        (["a"] * 9, 2, 5, [0], 4),
        ([""] * 9, 1, 5, [], 0),
        (["", "", "", "", "a"], 1, 5, [4], 0),
    ],
    ids=["enough", "all different", "until two differ", "until the most", "nothing but empty ones", "the last of all"],
)
def test_sampling_goes_on_until_enough_differ(
    texts: list[str], min_unique: int, asked: int, kept: list[int], repeats: int
) -> None:
    reasoner = Reasoner(texts.__getitem__)
    found, dropped, _ = drawn(reasoner, samples=2, min_unique=min_unique, max_samples=5)
    assert sorted(r.id for r in reasoner.requests) == [f"round-1/q/{k}" for k in range(asked)]
    assert dropped == repeats
    assert [t.id for t in found] == [f"round-1/q/{k}" for k in kept]


@given(texts=st.lists(st.sampled_from(TEXTS), min_size=8, max_size=8), delays=st.integers(0, 99))
def test_what_is_kept_does_not_depend_on_the_order_of_arrival(texts: list[str], delays: int) -> None:
    keys: dict[str, Any] = {"samples": 3, "max_samples": 8, "min_unique": 3}
    reasoner = Reasoner(texts.__getitem__, delays)
    assert unique(reasoner, **keys) == unique(Reasoner(texts.__getitem__, delays + 1), **keys)
    assert max(Counter(r.id for r in reasoner.requests).values()) == 1


def test_a_failed_request_fails_the_sample_and_ends_the_others() -> None:
    ended = []

    async def generate(request: GenerateRequest) -> Completion:
        try:
            if request.id.endswith("/1"):
                raise ConnectionError("the engine is gone")
            return await asyncio.Future()
        finally:
            ended.append(request.id)

    async def main() -> None:
        sampler = Sampler(Solver(TASK, TOKENIZER, generate, seed=0), SamplingConfig(samples=4))
        with pytest.raises(ConnectionError, match="the engine is gone"):
            await sampler.unique(QUESTION, "s")
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert sorted(ended) == [f"s/q/{k}" for k in range(4)]


def test_rounds_take_the_pool_part_by_part() -> None:
    pool = [Question(str(i), "", "") for i in range(5)]

    def ids(number: int, count: int) -> str:
        return "".join(q.id for q in round_questions(pool, number, count))

    assert [ids(i, 2) for i in range(4)] == ["01", "23", "40", "12"]
    assert [ids(i, count) for i in range(2) for count in (0, 5, 9)] == ["01234"] * 6


def test_a_worked_solution_is_an_original_trajectory() -> None:
    question = TASK.questions("worked")[0]
    original = original_trajectory(question)
    assert (original.steps, original.answer, original.correct) == (question.solution, question.answer, True)
    assert (original.id, original.source) == ("original/worked-0", "original")
    with pytest.raises(ValueError, match="question q has no worked solution"):
        original_trajectory(QUESTION)


def test_a_worked_solution_that_comes_to_another_answer_is_a_wrong_trajectory() -> None:
    question = Question("q", "28+3", "31", ("28+3=21\n",), "21")
    original = original_trajectory(question)
    assert (original.answer, original.correct) == ("21", False)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_samples": 3}, "max_samples is 3"),
        ({"min_unique": 5}, "min_unique is 5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 2.5}, "temperature is 2.5; it must lie between 0 and 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"questions": -1}, "questions is -1"),
        ({"stop": ["\n\n", ""]}, r"stop is \['\\n\\n', ''\]; an empty string"),
    ],
)
def test_impossible_configs_are_named(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        SamplingConfig(**keys)
