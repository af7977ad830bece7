"""The coordinator's sampling stages, killed and gone on with, on engines whose answer follows from the request's id."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.coordinator import Coordinator
from actors.engines import Engines, spend
from actors.errors import QuarantinedError
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.cost import Cost
from sapo_ray.data import Question, Trajectory
from sapo_ray.errors import SapoError
from sapo_ray.lease import LEASE, LostLeaseError
from sapo_ray.models import Calibration, character_tokenizer
from sapo_ray.requests import Completion, GenerateRequest
from sapo_ray.sampler import Sampler, Solver, original_trajectory
from sapo_ray.store import RunDirectory, trajectory_row
from sapo_ray.tasks.chain import VOCABULARY, Chain

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
TEXTS = ("1+1=2\n", "2+2=4\n", "1*3=3\n2+1=3\n")


class KilledError(Exception):
    """Stands for the end of the coordinator's process."""


class NullEngines(Engines):
    """Answers by the request's id, dies at request number `deadly`, and sets aside what asks for question `poison`."""

    poison = ""

    def __init__(self, config: RunConfig, task: Chain, deadly: int | None, death: type[Exception]) -> None:
        super().__init__(config, task, "null")
        self.tokenizer = character_tokenizer(VOCABULARY, 512)
        self.calibration = Calibration(0.5, 0.5)
        self._left, self._death = deadly, death

    async def generate(self, request: GenerateRequest) -> Completion:
        drawn = await self._answer(request.id)
        if self.poison and f"/{self.poison}/" in request.id:
            raise QuarantinedError(request.id, 3, "it died", "its last line")
        text = "".join(drawn.choices(TEXTS, k=drawn.randrange(4)))
        spend(Cost(prompt_tokens=len(request.prompt_ids), generated_tokens=len(text), flops=0.1 * len(text)))
        return Completion(request.id, text, tuple(range(len(text))), drawn.random() < 0.9, len(request.prompt_ids), 0)

    async def score(self, trajectory: Trajectory) -> tuple[float, ...]:
        drawn = await self._answer(trajectory.id)
        spend(Cost(scored_tokens=len(trajectory.steps)))
        return tuple(drawn.random() for _ in trajectory.steps)

    async def _answer(self, request_id: str) -> random.Random:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise self._death(request_id)
        await asyncio.sleep(0)
        return random.Random(request_id)


def stage(
    config: RunConfig,
    path: Path,
    number: int,
    deadly: int | None = None,
    death: type[Exception] = KilledError,
    driver: str | None = None,
) -> dict[str, Any]:
    """One attempt at a round's sampling and labelling, with a coordinator of its own; its notes."""
    coordinator = Coordinator(config, str(path), driver)
    engines = NullEngines(config, Chain(config.task), deadly, death)
    coordinator._engines = engines
    coordinator._solver = Solver(Chain(config.task), engines.tokenizer, engines.generate, config.seed)
    coordinator._sampler = Sampler(coordinator._solver, config.sampling)
    return asyncio.run(coordinator.sample_and_label(number))


def begun(config: RunConfig, path: Path) -> RunDirectory:
    """A run that has its worked solutions."""
    store = RunDirectory(path)
    with closing(store.writer(0, "original")) as writer:
        writer.extend(trajectory_row(original_trajectory(q)) for q in Chain(config.task).questions("worked"))
    return store


def shards(store: RunDirectory, notes: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: store.folder.read(name) for name in notes["files"]}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    tiny = load_config(RunConfig, TINY, ["task.pool=20", "sampling.questions=10", "task.worked=5"])
    return replace(tiny, ray=replace(tiny.ray, questions_in_flight=4, questions_per_shard=3))


@pytest.mark.parametrize("number", [0, 1])
@settings(max_examples=15)
@given(deaths=st.lists(st.integers(0, 120), max_size=4))
def test_a_coordinator_killed_at_any_request_and_started_again_makes_the_same_stage(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory, number: int, deaths: list[int]
) -> None:
    """Every label, rollout and trajectory, byte for byte, and the same counts and costs."""
    undisturbed = begun(config, tmp_path_factory.mktemp("run") / "undisturbed")
    expected = stage(config, undisturbed.path, number)
    killed = begun(config, tmp_path_factory.mktemp("run") / "killed")
    for deadly in deaths:
        try:
            stage(config, killed.path, number, deadly)
        except KilledError:
            continue
    notes = stage(config, killed.path, number)
    assert notes == expected
    assert shards(killed, notes) == shards(undisturbed, expected)
    assert notes["cost"]["generated_tokens"] > 0
    assert notes["trajectories"]["sampled"] > 0


def test_what_is_done_when_an_engine_dies_is_not_done_again(config: RunConfig, tmp_path: Path) -> None:
    expected = stage(config, begun(config, tmp_path / "undisturbed").path, 1)
    stopped = begun(config, tmp_path / "stopped")
    with pytest.raises(SapoError):
        stage(config, stopped.path, 1, deadly=70, death=SapoError)
    progress = json.loads(stopped.folder.read("round-1/sample.progress.json"))
    assert 0 < progress["items"] < 10
    assert 0 < progress["state"]["cost"]["generated_tokens"] < expected["cost"]["generated_tokens"]
    before = shards(stopped, progress)
    notes = stage(config, stopped.path, 1)
    assert {**notes, "files": 0} == {**expected, "files": 0}
    assert shards(stopped, progress) == before


def test_worked_solutions_that_miss_the_answer_are_not_labelled(config: RunConfig, tmp_path: Path) -> None:
    task = replace(config.task, modulus=100, worked=60, forgotten_carries=0.5)
    config, worked = replace(config, task=task), Chain(task).questions("worked")
    right = {f"original/{q.id}" for q in worked if q.solution_answer is None}
    store = begun(config, tmp_path)
    stage(config, store.path, 0)
    rows = [row for row in store.read(0, "labels") if row["source"] == "original"]
    assert {row["trajectory_id"] for row in rows} == right
    assert all(set(row["step_labels"]) == {1} for row in rows)
    assert 0 < len(right) < len(worked) == len(list(store.read(0, "original")))


def test_a_coordinator_of_a_driver_that_lost_its_lease_writes_nothing(config: RunConfig, tmp_path: Path) -> None:
    """Though the lease was another's when its stage began."""
    store = begun(config, tmp_path)
    store.folder.write(LEASE, json.dumps({"driver": "other", "host": "far", "pid": 7, "since": 0.0}))
    before = store.folder.sizes()
    with pytest.raises(LostLeaseError, match="taken over by another driver: host far, pid 7"):
        stage(config, tmp_path, 1, driver="mine")
    assert store.folder.sizes() == before


def test_a_question_that_is_left_out_is_noted_once_and_moves_no_other(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begun(config, tmp_path / "whole")
    stage(config, whole.path, 1)
    questions = [row["question_id"] for row in whole.read(1, "trajectories")]
    monkeypatch.setattr(NullEngines, "poison", questions[0])
    undisturbed, stopped = begun(config, tmp_path / "undisturbed"), begun(config, tmp_path / "stopped")
    expected = stage(config, undisturbed.path, 1)
    with pytest.raises(KilledError):
        stage(config, stopped.path, 1, deadly=100)
    assert json.loads(stopped.folder.read("round-1/sample.progress.json"))["state"]["quarantined"]
    notes = stage(config, stopped.path, 1)
    assert notes == expected
    assert shards(stopped, notes) == shards(undisturbed, expected)
    assert [left_out["question_id"] for left_out in notes["quarantined"]] == questions[:1]
    assert [row["question_id"] for row in stopped.read(1, "trajectories")] == [
        q for q in questions if q != questions[0]
    ]


def test_a_stage_that_breaks_off_leaves_nothing_that_pools_expect(config: RunConfig) -> None:
    engines = NullEngines(config, Chain(config.task), deadly=30, death=SapoError)
    expected = set[float]()

    async def one(question: Question) -> None:
        engines._asked[engines._reasoners] += 1
        expected.add(engines._reasoners.upcoming)
        await engines._answer(question.id)

    async def stream() -> None:
        engines.begin(60)
        async for _ in engines.stream([*Chain(config.task).questions("pool")] * 3, one):
            pass

    with pytest.raises(SapoError):
        asyncio.run(stream())
    assert max(expected) > 0
    assert [pool.upcoming for pool in engines._pools] == [0, 0]
