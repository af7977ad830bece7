"""What waits on a real Ray whose CPUs are taken, so that no worker ever starts: it is shown, and nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from actors import client, trainer
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
    """Does something once, when it is told for the `at`-th time that something waits."""

    def __init__(self, deed: Callable[[], None], at: int = 1) -> None:
        self._deed, self._at, self.told = deed, at, list[str]()

    def __call__(self, done: int, total: int, detail: str) -> None:
        if "wait" in detail and len(self.told) < self._at:
            self.told.append(detail)
            if len(self.told) == self._at:
                self._deed()


def kill_board() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others of Ray's come and go
            if process.name().startswith("ray::JobBoard"):
                return process.kill()
    raise AssertionError("there is no board")


@pytest.mark.usefixtures("taken")
def test_a_training_without_nodes_says_what_it_waits_for_and_ends_where_its_board_dies(tmp_path: Path) -> None:
    group = Trainer(TrainerConfig(workers=2, cpus_per_worker=0.4), tmp_path / "ray", "train", pytest.fail)
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
        group.train(job, listener)
    assert listener.told == ["2 training workers wait for nodes with 0.4 CPU each"]


@pytest.mark.usefixtures("taken")
def test_training_workers_that_do_not_go_are_killed_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups() -> list[str]:
        return sorted(group["state"] for group in ray.util.placement_group_table().values())

    monkeypatch.setattr(trainer, "CLOSE_SECONDS", 0.5)
    warnings = list[str]()
    workers = Trainer(TrainerConfig(cpus_per_worker=0.4), tmp_path / "ray", "train", warnings.append)
    workers.start()
    while groups() != ["CREATED", "PENDING"]:  # they wait for a CPU: so they cannot end
        time.sleep(0.1)
    workers.close()
    assert warnings == ["the training workers have not ended within 0.5 s; they are killed"]
    while groups() != ["REMOVED", "REMOVED"]:  # what was taken is of the same job
        time.sleep(0.1)


def test_a_coordinator_without_a_node_says_what_it_waits_for_and_is_not_taken_for_hung(
    taken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_room() -> None:
        monkeypatch.undo()
        ray.util.remove_placement_group(taken)

    monkeypatch.setattr(client, "HUNG_AFTER", 0.5)
    reporter, listener = ConsoleReporter(), Listener(make_room, at=2)
    reporter.update = listener  # type: ignore[method-assign]
    with CoordinatorClient(load_config(RunConfig, TINY), str(tmp_path), reporter) as coordinator:
        assert coordinator.call("progress")["done"] == 0
    assert listener.told == ["the coordinator waits for a node with 0.1 CPU"] * 2


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """The driver's node and another, of a CPU each."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    yield ray.get_runtime_context().get_node_id(), other.node_id
    ray.shutdown()
    cluster.shutdown()


def test_a_coordinator_is_beside_its_driver_unless_there_is_no_room(
    nodes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Placed:
        def __init__(self, *_: object) -> None: ...

        async def enter(self, stage: str) -> None: ...

        async def evaluate(self) -> str:
            return ray.get_runtime_context().get_node_id()

        async def close(self) -> None: ...

    def place() -> str:
        with CoordinatorClient(load_config(RunConfig, TINY), str(tmp_path), ConsoleReporter()) as coordinator:
            return coordinator.call("evaluate")

    monkeypatch.setattr(client, "Coordinator", Placed)
    here, other = nodes
    groups = [ray.util.placement_group([{"CPU": n}], "STRICT_PACK", _soft_target_node_id=here) for n in (0.7, 0.3)]
    assert all(group.wait(60) for group in groups)
    assert place() == other
    ray.util.remove_placement_group(groups[1])
    assert place() == here  # though Ray itself would rather have the idle one
