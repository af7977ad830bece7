"""A sampling stage on a real Ray and null engines, disturbed: what it stores is what an undisturbed one stores."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from actors import client
from actors.client import CoordinatorClient
from launch.session import ray_session
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.manifest import sealed, unsealed
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.shards import Kind
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
KINDS: tuple[Kind, ...] = ("trajectories", "labels", "rollouts")
OVERRIDES = (
    *("engine.kind=null", "verifier.kind=null", "labeling.start_score='1'", "sampling.questions=24"),
    *("simulation.token_seconds=0.02", "ray.questions_in_flight=3", "ray.questions_per_shard=4"),
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


class Disturbance:
    """A reporter that does something once, when this many items are done."""

    def __init__(self, at: int, deed: Callable[[], None]) -> None:
        self._at, self._deed, self.done = at, deed, False

    def begin(self, stage: str) -> None: ...

    def update(self, done: int, total: int, detail: str) -> None:
        if done >= self._at and not self.done:
            self.done = True
            self._deed()

    def end(self, notes: Mapping[str, Any]) -> None: ...

    def warn(self, sign: str) -> None: ...

    def say(self, event: str) -> None: ...


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(RunConfig, TINY, OVERRIDES)


@pytest.fixture(scope="module", autouse=True)
def session(config: RunConfig) -> Iterator[None]:
    with ray_session(config):
        yield


@pytest.fixture(scope="module")
def model(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "base"
    tiny = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=64)
    save_random_reasoner(tiny, VOCABULARY, 0, path)
    return str(path)


def sample(config: RunConfig, model: str, store: RunDirectory, reporter: Disturbance) -> dict[str, Any]:
    """One driver's attempt at round 1's samples and labels: the stage's notes, and every row that is stored."""
    store.create()
    with CoordinatorClient(config, store.location, reporter) as coordinator:
        coordinator.use(reasoner=model, verifier=model)
        notes = coordinator.call("sample_and_label", 1)
    kept = {key: value for key, value in notes.items() if key != "files"}
    return {"notes": kept, **{kind: list(store.read(1, kind)) for kind in KINDS}}


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = RunDirectory(tmp_path_factory.mktemp("run") / "undisturbed")
    result = sample(config, model, store, Disturbance(0, lambda: None))
    assert all(result[kind] for kind in KINDS)
    return result


def kill(name: str) -> None:
    victims = [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    assert victims
    for victim in victims:
        victim.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::Coordinator", "ray::NullReasoner", "ray::NullVerifier"])
def test_a_killed_process_changes_nothing(
    config: RunConfig, model: str, undisturbed: dict[str, Any], tmp_path: Path, victim: str
) -> None:
    disturbance = Disturbance(6, lambda: kill(victim))
    assert sample(config, model, RunDirectory(tmp_path), disturbance) == undisturbed
    assert disturbance.done


def test_a_coordinator_that_cannot_start_says_why_at_once(config: RunConfig) -> None:
    class Silent(Disturbance):
        def warn(self, sign: str) -> None:
            raise AssertionError(sign)

    with (
        pytest.raises(SapoError, match=r"^sample_and_label: the coordinator cannot start: .*nowhere://run"),
        CoordinatorClient(config, "nowhere://run", Silent(0, lambda: None)) as coordinator,
    ):
        coordinator.call("sample_and_label", 1)


class Listening(Disturbance):
    """A reporter that keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(0, lambda: None)
        self.warnings = list[str]()

    def warn(self, sign: str) -> None:
        self.warnings.append(sign)


def mute(*methods: str) -> type:
    """A coordinator of which these methods never answer, and the others do at once. Ray pickles it by value."""

    async def answer(self: object, *_: object) -> dict[str, Any]:
        return {"done": 0, "total": 0, "tokens": 0, "unplaced": {}, "events": []}

    async def never(self: object, *_: object) -> None:
        await asyncio.Event().wait()

    names = ("__init__", "enter", "progress", "evaluate", "pause", "resume", "close")
    made = {"__init__": lambda self, *_: None, **dict.fromkeys(names[1:], answer), **dict.fromkeys(methods, never)}
    return type("Mute", (), made)


@pytest.mark.parametrize(
    "methods", [("enter",), pytest.param(("evaluate", "progress"), marks=pytest.mark.slow)], ids=" ".join
)
def test_a_coordinator_that_does_not_answer_is_started_again_and_at_last_given_up(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: tuple[str, ...]
) -> None:
    monkeypatch.setattr(client, "Coordinator", mute(*methods))
    monkeypatch.setattr(client, "HUNG_AFTER", 2.0)
    reporter = Listening()
    cause = "hung: no answer for 2 s"
    with (
        pytest.raises(SapoError, match=rf"^evaluate: the coordinator died 3 times without progress: {cause}$"),
        CoordinatorClient(config, str(tmp_path), reporter) as coordinator,
    ):
        coordinator.call("evaluate", "evaluate-0")
    assert reporter.warnings == [f"evaluate: the coordinator died ({cause}) and is started again"] * 2


def test_a_coordinator_that_neither_pauses_nor_closes_is_ended(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "Coordinator", mute("pause", "progress", "close"))
    reporter = Listening()
    with CoordinatorClient(config, str(tmp_path), reporter) as coordinator:
        coordinator.call("evaluate", "evaluate-0")
        with monkeypatch.context() as impatient:
            impatient.setattr(client, "HUNG_AFTER", 0.5)
            coordinator.pause()
        coordinator.call("evaluate", "evaluate-1")
        monkeypatch.setattr(client, "HUNG_AFTER", 0.5)
    assert reporter.warnings == [
        "pause: the coordinator died (hung: no answer for 0.5 s); the next stage starts another",
        "close: the coordinator hung: no answer for 0.5 s; it is killed",
    ]


@pytest.mark.parametrize("error", [OutOfMemoryError("its node ran out of memory"), WorkerCrashedError()], ids=repr)
def test_a_coordinator_that_ray_kills_is_started_again(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RayError
) -> None:
    """Ray's memory monitor, and some deaths of a process, are told by errors that are no RayActorError."""
    monkeypatch.setattr(client, "Coordinator", mute())
    wait, deaths = CoordinatorClient._wait, [error]

    def die_once(self: CoordinatorClient, answer: Any) -> Any:
        if deaths:
            raise deaths.pop()
        return wait(self, answer)

    monkeypatch.setattr(CoordinatorClient, "_wait", die_once)
    reporter = Listening()
    with CoordinatorClient(config, str(tmp_path), reporter) as coordinator:
        assert coordinator.call("evaluate", "evaluate-0")["done"] == 0
    assert reporter.warnings == [f"evaluate: the coordinator died ({error}) and is started again"]


def test_deaths_count_only_where_nothing_was_recorded_before_them(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, recorded = tmp_path / "round-1" / "sample.progress.json", 4
    record.parent.mkdir()
    earlier = {"items": 1, "seconds": 0.0, "state": {}, "files": {}}
    record.write_text(sealed("", earlier))  # an earlier driver's

    async def die(self: object) -> None:
        items = unsealed("", record.read_bytes())["items"]
        if items < recorded:
            record.write_text(sealed("", {**earlier, "items": items + 1}))
        os._exit(1)

    dying = mute()
    dying.sample = die  # type: ignore[attr-defined]
    monkeypatch.setattr(client, "Coordinator", dying)
    reporter = Listening()
    coordinator = CoordinatorClient(config, str(tmp_path), reporter)
    coordinator.stage = "round-1/sample"
    with pytest.raises(SapoError, match=r"^sample: the coordinator died 3 times without progress: "), coordinator:
        coordinator.call("sample")
    assert len(reporter.warnings) == recorded - 1 + 2


@pytest.mark.slow
def test_a_driver_that_is_interrupted_records_what_is_done(
    config: RunConfig, model: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    store = RunDirectory(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sample(config, model, store, Disturbance(6, lambda: signal.raise_signal(signal.SIGINT)))
    progress = json.loads(store.folder.read("round-1/sample.progress.json"))
    assert 6 <= progress["items"] < 24
    assert sample(config, model, store, Disturbance(0, lambda: None)) == undisturbed
