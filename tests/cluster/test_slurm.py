"""The Slurm script: what shellcheck says of it, and what it does, with stand-ins for the commands that it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "sapo.sbatch"
STANDINS = {
    "hostname": "echo 10.0.0.7 10.1.0.7",
    "python": 'until (($(grep -c "^ray start" "$LOG") == 2)); do sleep 0.05; done',
    "scontrol": 'echo "scontrol $*" >> "$LOG"',
    "squeue": 'echo "$STATE"',
    "ray": 'echo "ray $*" >> "$LOG"; exec sleep 60',
    # Two nodes on this machine.
    "srun": 'shift; for SLURM_PROCID in 0 1; do SLURM_PROCID=$SLURM_PROCID "$@" & done; wait',
    "sapo": """
        trap 'sleep 0.3; echo flushed >> "$LOG"; exit "$STOPPED"' TERM
        echo "sapo $* at $RAY_ADDRESS, $RAY_AUTH_MODE of ${#RAY_AUTH_TOKEN}" >> "$LOG"
        [[ $RESULT ]] && exit "$RESULT"
        while sleep 0.1; do :; done
    """,
}


class Job:
    """The script as Slurm's batch step runs it, until the test ends."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], **variables: str) -> None:
        for name, body in STANDINS.items():
            program = folder / name
            program.write_text(f"#!/bin/bash\n{body}\n")
            program.chmod(0o755)
        self._log = folder / "log"
        self._log.touch()
        slurm = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_NUM_NODES": "2"}
        path = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(self._log)}
        defaults = {"STATE": "RUNNING", "RESULT": "", "STOPPED": "143"}
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=defaults | slurm | path | variables, start_new_session=True
        )

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    def until_it_logs(self, start: str) -> None:
        while not any(line.startswith(start) for line in self.log):
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def status(self) -> int:
        return self.process.wait(timeout=60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*arguments: str, **variables: str) -> Job:
        jobs.append(Job(tmp_path, arguments, **variables))
        return jobs[-1]

    yield start
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def test_shellcheck_has_nothing_to_say() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["shellcheck", str(SCRIPT)], env=os.environ | {"PATH": path}, check=True)


def test_without_a_config_nothing_is_started(start: Callable[..., Job]) -> None:
    job = start()
    assert job.status() == 2
    assert job.log == []


def test_a_head_and_a_worker_and_the_run_beside_them(start: Callable[..., Job]) -> None:
    job = start("my.yaml", "run_dir=/shared/runs/mine", RESULT="0")
    assert job.status() == 0
    starts = sorted(line for line in job.log if "start" in line)
    assert starts == [
        "ray start --block --num-cpus=4 --address=10.0.0.7:6379",
        "ray start --block --num-cpus=4 --head --port=6379 --node-ip-address=10.0.0.7",
    ]
    assert job.log[-1] == "sapo run my.yaml run_dir=/shared/runs/mine at 10.0.0.7:6379, token of 64"


def test_the_runs_exit_status_is_the_jobs(start: Callable[..., Job]) -> None:
    assert start("my.yaml", RESULT="2").status() == 2


@pytest.mark.parametrize(
    ("state", "stopped", "requeued"),
    [
        ("RUNNING", "143", True),
        ("CANCELLED", "143", False),  # scancel
        ("RUNNING", "0", False),  # the signal came when the run had just ended
    ],
)
def test_a_signal_lets_the_run_write_first(start: Callable[..., Job], state: str, stopped: str, requeued: bool) -> None:
    job = start("my.yaml", STATE=state, STOPPED=stopped)
    job.until_it_logs("sapo run")
    job.process.send_signal(signal.SIGTERM)
    assert job.status() == int(stopped)
    after = job.log[job.log.index("flushed") :]
    assert after == ["flushed", "scontrol requeue 77"][: 1 + requeued]


def test_a_cluster_that_does_not_start_ends_the_job(start: Callable[..., Job], tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.mkdir()
    for name in ("srun", "python"):
        (failing / name).write_text("#!/bin/sh\nexit 1\n")
        (failing / name).chmod(0o755)
    job = start("my.yaml", PATH=f"{failing}:{tmp_path}:{os.environ['PATH']}")
    assert job.status() == 1
    assert not any(line.startswith("sapo") for line in job.log)
