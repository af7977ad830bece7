"""What a run's driver does by itself: no Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.run import Run
from actors.trainer import TrainingError
from launch.progress import ConsoleReporter
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.store import RunDirectory
from sapo_ray.training import TrainJob

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


class Refusal:
    """In a trainer's place: remembers the job, and refuses it."""

    def train(self, job: TrainJob, *_: Any) -> None:
        self.job = job
        raise TrainingError("refused")


def asked(store: RunDirectory, *overrides: str) -> TrainJob:
    """The job that a run with these overrides comes to first."""
    config = load_config(RunConfig, TINY, ["tracking=none", *overrides])
    run, trainer = Run(config, store, ConsoleReporter()), Refusal()
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
