"""Jobs on a real cluster of two nodes, whose Python has the dependencies but not this project."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from sapo_ray.store import RunDirectory

ROOT = Path(__file__).parents[2]
TINY = "tests/configs/tiny.yaml"

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Cluster:
    """A head without CPUs, so that every actor runs on the other node, which has another directory for its files."""

    address: str
    head: Path
    worker: Path
    token: str
    environment: dict[str, str]

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """A command on the user's machine: in the checkout, with a PYTHONPATH of its own."""
        environment = {**self.environment, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=600)
        assert self.token not in stdout + stderr
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def submit(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("launch", "submit", TINY, "--address", self.address, "--json", *arguments)

    def ray_job_submit(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, from the checkout."""
        options = ("--address", self.address, "--working-dir", ROOT)
        return self.run("ray.scripts.scripts", "job", "submit", *options, "--", *command)

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets want a short path
        folder, (port, dashboard, agent, other_agent, client) = Path(name), _free_ports(5)
        venv.create(folder / "venv", with_pip=False)
        # The packages beside ours, not ours: a directory named in a .pth file has its own .pth files ignored.
        path = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
        Path(path, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        (folder / "token").write_text(token := secrets.token_hex(32))
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        }
        inside = {**environment, "PATH": f"{folder}/venv/bin:{environment['PATH']}"}
        imports = ["python", "-c", "import ray, sapo_ray"]
        lacking = subprocess.run(imports, cwd=folder, env=inside, capture_output=True, check=False)
        assert b"No module named 'sapo_ray'" in lacking.stderr
        head = ["--head", f"--port={port}", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        head += [f"--dashboard-agent-listen-port={agent}"]
        worker = [f"--address=127.0.0.1:{port}", "--num-cpus=2", f"--dashboard-agent-listen-port={other_agent}"]
        nodes = []
        try:
            for directory, options in (("head", head), ("worker", worker)):
                nodes.append(_start_node(folder / directory, options, inside))
            address = f"http://127.0.0.1:{dashboard}"
            yield Cluster(address, folder / "head", folder / "worker", token, environment)
        finally:
            for node in reversed(nodes):
                node.terminate()
                node.wait(timeout=120)


def _start_node(directory: Path, options: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`ray start --block`, once it says that the node is up."""
    log = directory.with_suffix(".log")
    command = ["python", "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={directory}", *options]
    with log.open("w") as output:
        node = subprocess.Popen(command, cwd=directory.parent, env=environment, stdout=output, stderr=subprocess.STDOUT)
    _wait(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
    assert node.poll() is None, log.read_text()
    return node


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(condition: Callable[[], Any]) -> None:
    """Until the condition holds, or pytest's timeout ends the test."""
    while not condition():
        time.sleep(0.2)


def test_a_run_is_submitted_left_stopped_and_gone_on_with(cluster: Cluster, tmp_path: Path) -> None:
    """Ctrl-C leaves the job running; a job that is stopped ends by itself; the last one goes on where it was."""
    run, arguments = RunDirectory(tmp_path / "run"), ["rounds=0", f"run_dir={tmp_path / 'run'}"]
    following = cluster.start("launch", "submit", TINY, "--address", cluster.address, *arguments)
    assert following.stdout
    assert any(TINY in line for line in following.stdout)  # after what Ray itself says
    following.send_signal(signal.SIGINT)
    _, stderr = following.communicate(timeout=600)
    assert following.returncode == 128 + signal.SIGINT
    job = stderr.split()[1]
    follow = f"ray job logs --address {cluster.address} --follow {job}"
    assert stderr.splitlines() == [
        f"job {job} submitted",
        f"to follow it: {follow}",
        f"to stop it:   ray job stop --address {cluster.address} {job}",
        f"job {job} goes on; to follow it: {follow}",
        "interrupted",
    ]
    _wait(lambda: run.done("round-0/original") or cluster.client.get_job_status(job).is_terminal())
    assert cluster.client.get_job_status(job) == "RUNNING", cluster.client.get_job_logs(job)

    stopped = cluster.run("ray.scripts.scripts", "job", "stop", "--address", cluster.address, job)
    assert stopped.returncode == 0, stopped.stderr
    assert cluster.client.get_job_status(job) == "STOPPED"
    assert cluster.client.get_job_logs(job).splitlines()[-1] == "terminated"
    original = run.stages()["round-0/original"]

    result = cluster.ray_job_submit("python", "-m", "launch", "run", TINY, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert run.stages()["round-0/original"] == original
    assert [entry["round"] for entry in run.summary()["rounds"]] == [0]

    result = cluster.submit(*arguments)  # there is nothing left to do
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout).items() >= {("status", "SUCCEEDED"), ("exit_status", 0)}
    assert "Reasoner" in result.stderr


def test_actors_find_the_packages_on_their_own_node(cluster: Cluster) -> None:
    source = f"""
import json, os, ray
from launch.session import ray_session
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config

@ray.remote(num_cpus=1)
def there():
    import actors, launch, sapo_ray
    return [actors.__file__, launch.__file__, sapo_ray.__file__], os.environ["PYTHONPATH"], dict(os.environ)

with ray_session(load_config(RunConfig, "{TINY}")):
    print(json.dumps(ray.get(there.remote())))
"""
    result = cluster.ray_job_submit("python", "-c", source)
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("[["))
    files, python_path, environment = json.loads(line)
    assert all(file.startswith(str(cluster.worker)) for file in files)
    assert python_path.startswith(str(cluster.worker))
    assert str(cluster.head) not in python_path
    assert str(ROOT) not in python_path
    assert environment["RAY_TRAIN_V2_ENABLED"] == "1"


def test_a_job_that_fails_says_why(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.submit(f"run_dir={tmp_path}", "model.path=/nowhere")
    assert (result.returncode, json.loads(result.stdout)["exit_status"]) == (2, 2)
    cause = "model.path /nowhere is no checkpoint directory: config.json is missing; `sapo model import` makes one"
    assert result.stderr.splitlines()[-2:] == [
        f"error: {cause}",
        f"error: job {json.loads(result.stdout)['job']}: {cause}",
    ]


def test_no_wait_returns_while_the_job_is_to_come(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.submit(f"run_dir={tmp_path}", "model.path=/nowhere", "--no-wait")
    assert result.returncode == 0, result.stderr
    submitted = json.loads(result.stdout)
    assert (submitted["address"], submitted["status"], submitted["exit_status"]) == (cluster.address, "PENDING", None)
    _wait(lambda: cluster.client.get_job_status(submitted["job"]).is_terminal())
    assert cluster.client.get_job_info(submitted["job"]).driver_exit_code == 2


def test_a_relative_run_dir_is_refused_in_a_job_submitted_by_hand(cluster: Cluster) -> None:
    result = cluster.ray_job_submit("python", "-m", "launch", "run", TINY, "run_dir=runs/mine")
    assert result.returncode == 1
    assert "error: run_dir is runs/mine; a job needs an absolute path" in result.stdout


def test_without_the_token_nothing_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    before = len(cluster.client.list_jobs())
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        command = [sys.executable, "-m", "launch", "submit", TINY, "--address", cluster.address, f"run_dir={tmp_path}"]
        result = subprocess.run(
            command, cwd=ROOT, env={**cluster.environment, **mode}, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert (
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token" in result.stderr
        )
        assert result.stderr.count("\n") == 1
    assert len(cluster.client.list_jobs()) == before
