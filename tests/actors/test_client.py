"""A sampling stage on a real Ray and null engines, disturbed: what it stores is what an undisturbed one stores."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import client
from actors.client import CoordinatorClient
from launch.session import ray_session
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
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


class Mute:
    """A coordinator whose process lives and answers nothing."""

    def __init__(self, *_: object) -> None: ...

    async def enter(self, stage: str) -> None: ...

    async def progress(self) -> None:
        await asyncio.Event().wait()

    async def evaluate(self, stage: str) -> None:
        await asyncio.Event().wait()


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_started_again_and_at_last_given_up(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "Coordinator", Mute)
    monkeypatch.setattr(client, "HUNG_AFTER", 0.5)
    warnings = list[str]()

    class Listening(Disturbance):
        def warn(self, sign: str) -> None:
            warnings.append(sign)

    with (
        pytest.raises(SapoError, match=r"^evaluate: the coordinator died 3 times: hung: no answer for 0.5 s$"),
        CoordinatorClient(config, str(tmp_path), Listening(0, lambda: None)) as coordinator,
    ):
        coordinator.call("evaluate", "evaluate-0")
    assert warnings == ["evaluate: the coordinator died (hung: no answer for 0.5 s) and is started again"] * 2


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
