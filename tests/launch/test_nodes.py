"""A whole node of a two-node Ray is killed under a run; the run ends by itself, with nothing lost or doubled."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.util import get_node_ip_address

from cluster.local.autoscaling import MARK, OBJECT_STORE, clean_up, processes_of
from sapo_ray.store import RunDirectory
from sapo_ray.training import RESULT_FILE
from tests.launch.runs import DRIVER, NULL, Running, assert_nothing_is_lost, rows

CONFIG = (
    *NULL,
    "engine.workers=2",
    "engine.cpus_per_worker=0.3",
    "trainer.workers=2",
    "trainer.cpus_per_worker=0.4",
    "prm.epochs=20",
    "prm.checkpoint_every=1",
)
"""1.7 CPUs in all: with the verifier's 0.2 and the coordinator's 0.1."""
HEAD, SECOND = get_node_ip_address(), "127.0.0.2"
"""A driver joins the node that has the machine's own address."""
TRIES = 4
"""A raylet waits 15 s for its agents to start, which is not enough on a busy machine."""

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]


class Nodes:
    """A head and a second node on addresses of this machine: raylets of their own, with their own workers."""

    def __init__(self, directory: Path, cpus: int) -> None:
        """`cpus` of each node."""
        self._directory, self._cpus = directory, cpus
        self._port, self._client = _free_ports(2)
        self.variables = {
            "RAY_ADDRESS": f"{HEAD}:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        }

    def start(self) -> None:
        (self._directory / "token").write_text(secrets.token_hex(32))
        ports = [f"--port={self._port}", f"--ray-client-server-port={self._client}"]
        here = [f"--temp-dir={self._directory / 'ray'}", "--disable-usage-stats"]
        self._start(HEAD, "--head", "--include-dashboard=false", *ports, *here)
        self.add_second()

    def add_second(self) -> None:
        self._start(SECOND, f"--address={self.variables['RAY_ADDRESS']}")

    def _start(self, address: str, *options: str) -> None:
        common = {
            "node-ip-address": address,
            "num-cpus": self._cpus,
            "object-store-memory": OBJECT_STORE,
            "dashboard-agent-listen-port": 0,
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += [f"--{name}={value}" for name, value in common.items()]
        environment = {**os.environ, **self.variables, MARK: self._mark(address), "SPT_NOENV": "1"}
        environment.pop("RAY_ADDRESS")
        path = self._directory / f"{address}.log"
        with path.open("w") as log:
            for _ in range(TRIES):
                if subprocess.call(command, env=environment, stdout=log, stderr=log, start_new_session=True) == 0:
                    return
        raise RuntimeError(path.read_text())

    def count(self, title: str, address: str) -> int:
        """A node's processes by the name that Ray gives them."""
        found = 0
        for process in processes_of(self._mark(address)):
            with suppress(psutil.NoSuchProcess):
                found += " ".join(process.cmdline()).startswith(title)
        return found

    def kill_second(self) -> None:
        """SIGKILL the raylet, then all that it leaves behind."""
        for process in processes_of(self._mark(SECOND)):
            if process.name() == "raylet":
                process.kill()
        while left := list(processes_of(self._mark(SECOND))):
            for process in left:
                with suppress(psutil.NoSuchProcess):  # it has died of the loss of its raylet
                    process.kill()

    def end(self) -> None:
        for address in (SECOND, HEAD):
            clean_up(self._mark(address))

    def _mark(self, address: str) -> str:
        return f"{self._directory}/{address}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((HEAD, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    directory = Path(tempfile.mkdtemp(prefix="sapo-", dir="/tmp"))  # Ray's sockets need a short path
    nodes = Nodes(directory, request.param)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.end()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run on a Ray of one node, that nothing happens to."""
    run = Running(tmp_path_factory.mktemp("runs") / "one", *CONFIG)
    assert run.end() == 0, "".join(run.lines)
    return run.store


def results(store: RunDirectory) -> dict[str, dict[str, Any]]:
    """What each training of a run has come to, by its checkpoint."""
    files = Path(store.path, "checkpoints").glob(f"*/{RESULT_FILE}")
    return {file.parent.name: json.loads(file.read_text())["result"] for file in files}


def assert_is(store: RunDirectory, undisturbed: RunDirectory) -> None:
    """The same rows, byte for byte, and the same loss curves."""
    assert_nothing_is_lost(store, undisturbed)
    assert rows(store) == rows(undisturbed)
    found, expected = results(store), results(undisturbed)
    assert found.keys() == expected.keys() >= {"reasoner-0", "verifier-0", "reasoner-1", "verifier-1"}
    for name, result in expected.items():
        losses = [update["loss"] for update in found[name]["metrics"]]
        assert losses == pytest.approx([update["loss"] for update in result["metrics"]], abs=1e-5), name


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_a_node_is_killed_while_questions_are_sampled_and_the_other_has_room_for_all(
    nodes: Nodes, on_one_node: RunDirectory, tmp_path: Path
) -> None:
    """The first training has run on both nodes, and its losses are those of the run on one."""
    options = (*CONFIG, "engine.workers=3", "trainer.placement=spread")
    run = Running(tmp_path / "run", *options, environment=nodes.variables)
    run.wait_for_stage("round-0/validation")
    assert [nodes.count("ray::RayTrainWorker", address) for address in (HEAD, SECOND)] == [1, 1]
    assert nodes.count("ray::NullReasoner", SECOND)
    time.sleep(1)
    nodes.kill_second()
    assert run.end() == 0, "".join(run.lines)
    assert "is lost" in "".join(run.lines)
    assert_is(run.store, on_one_node)


@pytest.mark.parametrize("nodes", [1], indirect=True)
def test_a_node_is_killed_within_a_training_which_goes_on_when_another_one_comes(
    nodes: Nodes, on_one_node: RunDirectory, tmp_path: Path
) -> None:
    run = Running(tmp_path / "run", *CONFIG, "trainer.placement=spread", environment=nodes.variables)
    run.wait_for_stage("round-0/sample")
    while not Path(run.store.path, "checkpoints", "verifier-0.partial", "latest.json").exists():
        assert run.process.poll() is None, "".join(run.lines)
        time.sleep(0.01)
    assert [nodes.count("ray::RayTrainWorker", address) for address in (HEAD, SECOND)] == [1, 1]
    assert nodes.count("ray::NullReasoner", SECOND)
    nodes.kill_second()
    nodes.add_second()
    assert run.end() == 0, "".join(run.lines)
    assert results(run.store)["verifier-0"]["resumed_from"] > 0
    assert_is(run.store, on_one_node)


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_a_driver_is_killed_on_a_cluster_that_lives_on(nodes: Nodes, on_one_node: RunDirectory, tmp_path: Path) -> None:
    """What it has left there, a coordinator at work and then a training group, writes nothing beside its successor."""
    run = Running(tmp_path / "run", *CONFIG, environment=nodes.variables)
    for stage in ("round-0/validation", "round-0/sample"):
        run.wait_for_stage(stage)
        time.sleep(1)
        run.kill(DRIVER)
        assert run.end() == -signal.SIGKILL, "".join(run.lines)
        run = Running(tmp_path / "run", *CONFIG, environment=nodes.variables)
    assert run.end() == 0, "".join(run.lines)
    assert_is(run.store, on_one_node)
