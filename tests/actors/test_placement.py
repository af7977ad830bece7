"""What waits on a real Ray whose CPUs are taken, so that no worker ever starts: it is shown, and nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.trainer import Trainer, TrainingError
from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.training import TrainConfig, TrainerConfig, TrainJob

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def taken() -> Iterator[Any]:
    """All CPUs, until the group is removed."""
    group = ray.util.placement_group([{"CPU": 1}])
    assert group.wait(60)
    yield group
    ray.util.remove_placement_group(group)


def train(home: Path, on_progress: Callable[[int, int, str], None]) -> None:
    trainer = Trainer(TrainerConfig(workers=2, cpus_per_worker=0.4), home / "ray", "waiting")
    job = TrainJob(
        objective="sft",
        init=str(home / "base"),
        data=(str(home / "data"),),
        out=str(home / "out"),
        task=Chain(ChainConfig()),
        config=TrainConfig(),
        seed=0,
    )
    trainer.train(job, on_progress)


def kill_soon(name: str) -> None:
    """Kill the process of that name as soon as there is one."""
    while not (victims := [p for p in psutil.Process().children(recursive=True) if p.name().startswith(name)]):
        time.sleep(0.1)
    victims[0].kill()


def test_a_training_whose_board_died_ends_with_an_error(taken: Any, tmp_path: Path) -> None:
    threading.Thread(target=kill_soon, args=["ray::JobBoard"], daemon=True).start()
    with pytest.raises(TrainingError, match=r"out: the board that its workers take it from died \(.*start again to go"):
        train(tmp_path, lambda *_: None)
