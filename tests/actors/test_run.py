"""What a run's driver does by itself: no Ray is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import run as driver
from actors.run import Run
from actors.trainer import TrainingError
from launch.progress import ConsoleReporter
from sapo_ray import shards
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.files import Folder
from sapo_ray.lease import LEASE, Lease, LostLeaseError
from sapo_ray.store import RunDirectory
from sapo_ray.training import TrainJob

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


class Refusal:
    """In a trainer's place: remembers the job, and refuses it."""

    def train(self, job: TrainJob, *_: Any) -> None:
        self.job = job
        raise TrainingError("refused")


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, TINY, ["tracking=none", *overrides])


def asked(store: RunDirectory, *overrides: str) -> TrainJob:
    """The job that a run with these overrides comes to first."""
    run, trainer = Run(config(*overrides), store, ConsoleReporter()), Refusal()
    run._trainer = trainer  # type: ignore[assignment]
    run.originals()
    with pytest.raises(TrainingError):
        run.finetune()
    return trainer.job


def test_a_training_is_asked_for_by_what_its_data_and_its_first_model_hold(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    store.create()
    first = asked(store)
    assert asked(store).content == first.content
    store.forget("round-0/original")  # and the base model, which came after it
    assert asked(store).content == first.content
    store.forget("round-0/original")
    other = asked(store, "task.worked=59", "model.intermediate_size=64")
    assert (other.init, other.data) == (first.init, first.data)
    assert None not in other.content
    assert all(one != another for one, another in zip(first.content, other.content, strict=True))


def test_a_driver_that_lost_its_lease_within_a_stage_enters_nothing(tmp_path: Path) -> None:
    folder, lost = Folder(tmp_path / "run"), list[str]()
    lease = {"driver": "other", "host": "far", "pid": 7, "place": "another boot", "started": 1, "since": 0.0}

    def work() -> dict[str, Any]:
        folder.write(LEASE, json.dumps({**lease, "renewed": 0.0, "seconds": 60.0}))
        lost.extend(folder.sizes())
        return {"labels": 3, "metrics": [{"update": 1, "loss": 0.5}]}

    with Lease(folder, seconds=600) as held:
        run = Run(config("tracking=tensorboard"), RunDirectory(folder.location, held.driver), ConsoleReporter())
        run.originals()
        with pytest.raises(LostLeaseError, match="taken over by another driver: host far, pid 7"):
            run._stage("round-0/sft", work)
        assert list(folder.sizes()) == lost
    assert list(RunDirectory(folder.location).stages()) == ["round-0/original"]


def test_a_stage_takes_its_drivers_seconds_and_those_that_an_earlier_one_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more those of a coordinator that died under this driver, though its successor finds them recorded."""
    store, now, stage = RunDirectory(tmp_path / "run"), [0.0], "round-1/sample"
    store.create()
    for module in (driver, shards):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def coordinator(seconds: float) -> None:
        with store.stage_writer(stage, ["trajectories"], 1) as writer:
            now[0] += seconds
            asyncio.run(writer.add({}))

    def work() -> dict[str, Any]:
        coordinator(20)
        now[0] += 5  # until another one is up
        coordinator(30)
        return {}

    coordinator(10)
    notes = Run(config(), store, ConsoleReporter())._stage(stage, work)
    assert notes["seconds"] == store.stages()[stage]["seconds"] == 10 + 20 + 5 + 30
