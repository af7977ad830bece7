from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.errors import WorkerError
from actors.pool import ElasticPool
from actors.reasoner import reasoner_pool
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import Completion, EngineConfig, GenerateRequest, Sampling
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks.chain import VOCABULARY

pytestmark = pytest.mark.engine

ReasonerPool = ElasticPool[GenerateRequest, Completion]
GREEDY = Sampling(temperature=0.0, max_tokens=24)
# A step of 160 tokens holds three of the prompts below and most of a fourth, whose prefill would be cut.
CONFIG = EngineConfig(
    cpus_per_worker=0.5,
    max_model_len=128,
    max_num_seqs=32,
    max_num_batched_tokens=160,
    kv_cache_gib=0.125,
    batch_size=8,
    in_flight=4,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random reasoners of one shape, told apart by their weights."""
    paths = {}
    for number, name in enumerate(["tied", "other tied", "untied", "other untied"]):
        shape = ModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_length=128)
        shape.tie_embeddings = "untied" not in name
        path = tmp_path_factory.mktemp("reasoner")
        save_random_reasoner(shape, VOCABULARY, number, path)
        _spread(path)
        paths[name] = str(path)
    return paths


def _spread(path: Path) -> None:
    """Make the weights large enough for greedy choices to be clear, and thus to tell two models apart."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8.0)
    model.save_pretrained(path)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Session:
    """One engine for the whole module, in a loop that outlives each test."""

    def __init__(self, checkpoint: str, config: EngineConfig = CONFIG) -> None:
        self.loop = asyncio.new_event_loop()
        self.start(checkpoint, config)

    def start(self, checkpoint: str, config: EngineConfig) -> None:
        self.others = set(_engines())
        self.pool = reasoner_pool(config, ScalingConfig())
        self.load(checkpoint)
        (self.engine,) = set(_engines()) - self.others

    def run(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def generate(self, requests: list[GenerateRequest]) -> list[Completion]:
        async def all_of_them() -> list[Completion]:
            return list(await asyncio.gather(*map(self.pool.submit, requests)))

        made: list[Completion] = self.run(all_of_them())
        return made

    def load(self, checkpoint: str) -> None:
        self.run(self.pool.load(checkpoint))


@pytest.fixture(scope="module")
def session(checkpoints: dict[str, str]) -> Iterator[Session]:
    session = Session(checkpoints["tied"])
    yield session
    session.run(session.pool.close())


@pytest.fixture(scope="module")
def untied(checkpoints: dict[str, str]) -> Iterator[Session]:
    session = Session(checkpoints["untied"])
    yield session
    session.run(session.pool.close())


def prompts(count: int, length: int = 44) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(2, 2 + len(VOCABULARY)) for _ in range(length)] for _ in range(count)]


def requests(ids: list[list[int]], sampling: Sampling) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{seed}", prompt, seed, sampling) for seed, prompt in enumerate(ids)]


def greedy(checkpoint: str, ids: list[list[int]]) -> list[tuple[int, ...]]:
    """What transformers generates, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    made = []
    for prompt in ids:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False)
        made.append(tuple(output[0, len(prompt) :].tolist()))
    return made


def assert_greedy(session: Session, checkpoint: str) -> None:
    ids = prompts(6)
    found = session.generate(requests(ids, GREEDY))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for completion, expected in zip(found, greedy(checkpoint, ids), strict=True):
        assert completion.token_ids == expected
        assert completion.text == tokenizer.decode(list(expected), skip_special_tokens=True)
        assert completion.finished == (expected[-1] == tokenizer.eos_token_id)
        assert completion.generated_tokens == len(expected)


def test_greedy_equals_transformers_after_the_start_and_after_reloads(
    session: Session, checkpoints: dict[str, str]
) -> None:
    assert greedy(checkpoints["tied"], prompts(6)) != greedy(checkpoints["other tied"], prompts(6))
    for name in ["tied", "other tied", "tied"]:
        session.load(checkpoints[name])
        assert_greedy(session, checkpoints[name])


def test_greedy_equals_transformers_with_untied_embeddings(untied: Session, checkpoints: dict[str, str]) -> None:
    assert_greedy(untied, checkpoints["untied"])
    untied.load(checkpoints["other untied"])
    assert_greedy(untied, checkpoints["other untied"])


def test_a_seed_gives_the_same_tokens_in_batches_of_eight_and_of_three(session: Session) -> None:
    """The batches of eight do not fit one step of the engine, which without our guard would die of it."""
    asked = requests(prompts(24), Sampling(temperature=1.0, top_p=0.95, max_tokens=32))
    of_eight = [c for i in range(0, 24, 8) for c in session.generate(asked[i : i + 8])]
    session.run(session.pool.broadcast("reset_prefix_cache"))
    of_three = [c for i in range(0, 24, 3) for c in session.generate(asked[i : i + 3])]
    assert [c.token_ids for c in of_eight] == [c.token_ids for c in of_three]
    other_seeds = session.generate([replace(request, seed=request.seed + 100) for request in asked])
    assert sum(a.token_ids == b.token_ids for a, b in zip(of_eight, other_seeds, strict=True)) < 3


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(session: Session) -> None:
    asked = requests(prompts(8), Sampling(temperature=1.0, max_tokens=64, ignore_eos=True))
    stop = session.generate(asked)[0].text[5:7]
    for whole, stopped in zip(
        session.generate(asked),
        session.generate([replace(r, sampling=replace(r.sampling, stop=(stop,))) for r in asked]),
        strict=True,
    ):
        assert stopped.text == whole.text.split(stop)[0]
        assert stopped.finished == (stop in whole.text)


def test_prefixes_are_cached_until_new_weights_come(session: Session, checkpoints: dict[str, str]) -> None:
    session.load(checkpoints["tied"])
    asked = requests(prompts(1, length=80), GREEDY)
    assert [c.cached_tokens for c in session.generate(asked)] == [0]
    (again,) = session.generate(asked)
    assert (again.prompt_tokens, again.cached_tokens) == (80, 64)  # whole blocks of 32
    session.load(checkpoints["tied"])
    assert [c.cached_tokens for c in session.generate(asked)] == [0]


def test_a_prompt_that_does_not_fit_fails_alone_and_by_name(session: Session) -> None:
    long, *others = requests([*prompts(1, length=200), *prompts(3)], GREEDY)

    async def both() -> list[Any]:
        return await asyncio.gather(*map(session.pool.submit, [long, *others]), return_exceptions=True)

    refused, *answered = session.run(both())
    assert isinstance(refused, ValueError)
    assert "request r0" in str(refused)
    assert "128" in str(refused)
    assert all(isinstance(completion, Completion) for completion in answered)


def test_a_missing_checkpoint_is_named_and_the_engine_keeps_its_weights(
    session: Session, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """Asked of the worker itself: a load that fails is the end of its pool."""
    session.load(checkpoints["tied"])
    (worker,) = session.pool._workers
    with pytest.raises(RayTaskError, match=f"no checkpoint to load at {tmp_path}"):
        ray.get(worker.actor.load.remote(str(tmp_path)))
    assert_greedy(session, checkpoints["tied"])


def test_an_engine_that_cannot_start_gives_its_own_cause(tmp_path: Path) -> None:
    cause = f"vLLM engine for {tmp_path} did not start: .*Invalid repository ID or local directory"
    with pytest.raises(WorkerError, match=cause) as caught:
        Session(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_engine_that_fails_in_its_own_process_gives_its_own_cause(checkpoints: dict[str, str]) -> None:
    async def start() -> None:
        await reasoner_pool(replace(CONFIG, kv_cache_gib=1e6), ScalingConfig()).load(checkpoints["tied"])

    with pytest.raises(WorkerError, match=r"Available memory .* is less than requested") as caught:
        asyncio.run(start())
    assert "\n" not in str(caught.value)


def test_an_idle_engine_holds_no_core(session: Session) -> None:
    session.generate(requests(prompts(3), GREEDY))
    before = session.engine.cpu_times()
    time.sleep(2)
    after = session.engine.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.2  # seconds; a core that polls takes 2


@pytest.mark.parametrize("victim", ["engine", "worker"])
def test_a_killed_engine_or_worker_is_replaced_and_its_requests_are_answered_as_they_would_have_been(
    untied: Session, checkpoints: dict[str, str], victim: str
) -> None:
    untied.load(checkpoints["untied"])
    asked = requests(prompts(6), Sampling(temperature=1.0, max_tokens=80, ignore_eos=True))
    undisturbed = untied.generate(asked)

    async def killed() -> list[Completion]:
        answers = [asyncio.ensure_future(untied.pool.submit(request)) for request in asked]
        while not untied.pool.stats().in_flight:
            await asyncio.sleep(0.01)
        engine = untied.engine
        (engine if victim == "engine" else engine.parent()).kill()
        return await asyncio.gather(*answers)

    engine, before = untied.engine, untied.pool.stats().counts.get("dead", 0)
    again = untied.run(killed())
    assert [c.token_ids for c in again] == [c.token_ids for c in undisturbed]
    assert untied.pool.stats().counts["dead"] == before + 1
    engine.wait(30)  # a worker takes its engine along
    (untied.engine,) = set(_engines()) - {engine, *untied.others}


def test_an_engine_that_died_idle_is_replaced_when_the_next_checkpoint_comes(
    untied: Session, checkpoints: dict[str, str]
) -> None:
    engine, before = untied.engine, untied.pool.stats().counts.get("dead", 0)
    engine.kill()
    engine.wait(30)
    untied.load(checkpoints["untied"])
    (completion,) = untied.generate(requests(prompts(1), Sampling(max_tokens=4)))
    assert completion.generated_tokens
    assert untied.pool.stats().counts["dead"] == before + 1
    (untied.engine,) = set(_engines()) - {engine, *untied.others}


@pytest.mark.slow
def test_two_processes_of_one_engine_are_greedy_as_one_is_and_end_together(checkpoints: dict[str, str]) -> None:
    session = Session(checkpoints["tied"], replace(CONFIG, tensor_parallel_size=2))
    assert_greedy(session, checkpoints["tied"])
    session.load(checkpoints["other tied"])
    assert_greedy(session, checkpoints["other tied"])
    shards = [process for process in session.engine.children() if process.name().startswith("VLLM::Worker_TP")]
    assert len(shards) == 2
    shards[1].kill()
    session.load(checkpoints["tied"])
    assert_greedy(session, checkpoints["tied"])
    assert session.pool.stats().counts["dead"] == 1
    assert not psutil.wait_procs([session.engine, *shards], timeout=30)[1]
    session.run(session.pool.close())


def _engines() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if process.name() == "VLLM::EngineCore"]
