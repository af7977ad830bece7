"""A run as a user starts it, in a process of its own, and what it must come to whatever happens to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from sapo_ray.manifest import Manifest
from sapo_ray.shards import PROGRESS, Kind, read_progress
from sapo_ray.store import RunDirectory

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
DRIVER = "driver"
NULL = ("engine.kind=null", "verifier.kind=null", "simulation.token_seconds=0.05", "simulation.score_seconds=0.2")
"""Workers without a model, slow enough to be met at work."""


class Running:
    """`sapo run` as a process of its own, its stages as they end, and its Ray's processes by name."""

    def __init__(self, location: str | Path, *overrides: str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "launch", "run", str(TINY), f"run_dir={location}", *overrides]
        self.store = RunDirectory(location)
        self.process = subprocess.Popen(
            command,
            env=os.environ | dict(environment or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(line for line in self.process.stderr)

    def wait_for_stage(self, name: str) -> None:
        while name not in self.store.stages():
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def kill(self, victim: str) -> bool:
        """SIGKILL a process by the name Ray gives it; whether there was one."""
        if victim == DRIVER:
            daemons = psutil.Process(self.process.pid).children()
            self.process.kill()
            for daemon in daemons:  # Ray's own, which outlive a driver that is killed
                with suppress(psutil.NoSuchProcess):
                    daemon.kill()
            return True
        for process in psutil.process_iter(["name", "cmdline"]):
            title = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
            if title.startswith(victim) and self.process.pid in {p.pid for p in _ancestors(process)}:
                process.kill()
                return True
        return False

    def kill_soon(self, victim: str, seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while not self.kill(victim):
            assert time.monotonic() < until, f"no {victim} to kill: {''.join(self.lines)}"
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(900)


def _ancestors(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


def assert_nothing_is_lost(store: RunDirectory, undisturbed: RunDirectory) -> None:
    """Every question has its samples, nothing is stored twice, and every label follows from the stored rollouts."""
    audit = subprocess.run(
        [sys.executable, "-m", "launch", "audit", str(store.path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert audit.returncode == 0, audit.stdout
    assert json.loads(audit.stdout)["checked"]["labels"] > 0
    assert store.stages().keys() == undisturbed.stages().keys()
    for number in (0, 1):
        questions = [{row["question_id"] for row in s.read(number, "trajectories")} for s in (store, undisturbed)]
        assert questions[0] == questions[1]
    assert [entry["quarantined"] for entry in store.summary()["rounds"]] == [0, 0]


def shards(store: RunDirectory) -> dict[str, str]:
    """The checksums of all shards of finished stages, and of those that an unfinished one goes on from."""
    records = list(Manifest(store.folder).files().values())
    records += [read_progress(store.folder, name)["files"] for name in store.folder.sizes() if name.endswith(PROGRESS)]
    return {name: r["sha256"] for files in records for name, r in files.items() if name.endswith(".parquet")}


def rows(store: RunDirectory) -> dict[str, bytes]:
    """All that a run has sampled, labelled and paired, as bytes."""
    kinds: tuple[Kind, ...] = ("trajectories", "labels", "rollouts", "pairs")
    return {f"{n}/{kind}": json.dumps(list(store.read(n, kind))).encode() for n in (0, 1) for kind in kinds}
