"""What waits on a real Ray whose CPUs are taken, so that no worker ever starts: it is shown, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.client import CoordinatorClient
from actors.trainer import Trainer, TrainingError
from launch.progress import ConsoleReporter
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.training import TrainConfig, TrainerConfig, TrainJob

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"

pytestmark = pytest.mark.engine


@pytest.fixture
def taken() -> Iterator[Any]:
    """All CPUs of a Ray of the test's own, until the group is removed: what waits when a test ends would take them."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    group = ray.util.placement_group([{"CPU": 1}])
    assert group.wait(60)
    yield group
    ray.shutdown()


class Listener:
    """Does something once, when it is told that something waits."""

    def __init__(self, deed: Callable[[], None]) -> None:
        self._deed, self.told = deed, list[str]()

    def __call__(self, done: int, total: int, detail: str) -> None:
        if "wait" in detail and not self.told:
            self.told.append(detail)
            self._deed()


def kill_board() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others of Ray's come and go
            if process.name().startswith("ray::JobBoard"):
                return process.kill()
    raise AssertionError("there is no board")


@pytest.mark.usefixtures("taken")
def test_a_training_without_nodes_says_what_it_waits_for_and_ends_where_its_board_dies(tmp_path: Path) -> None:
    trainer = Trainer(TrainerConfig(workers=2, cpus_per_worker=0.4), tmp_path / "ray", "train")
    listener = Listener(kill_board)
    job = TrainJob(
        objective="sft",
        init=str(tmp_path / "base"),
        data=(str(tmp_path / "data"),),
        out=str(tmp_path / "out"),
        task=Chain(ChainConfig()),
        config=TrainConfig(),
        seed=0,
    )
    with pytest.raises(TrainingError, match=r"out: the board that its workers take it from died \(.*start again to go"):
        trainer.train(job, listener)
    assert listener.told == ["2 training workers wait for nodes with 0.4 CPU each"]


def test_a_coordinator_without_a_node_says_what_it_waits_for(taken: Any, tmp_path: Path) -> None:
    reporter, listener = ConsoleReporter(), Listener(lambda: ray.util.remove_placement_group(taken))
    reporter.update = listener  # type: ignore[method-assign]
    with CoordinatorClient(load_config(RunConfig, TINY), str(tmp_path), reporter) as client:
        assert client.call("progress")["done"] == 0
    assert listener.told == ["the coordinator waits for a node with 0.1 CPU"]
