"""One driver a run: the second is refused, a crashed one does not hold it, one that lost it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sapo_ray import lease as module
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.lease import LEASE, HeldFolder, Lease, LostLeaseError, holder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from sapo_ray.files import Folder
from sapo_ray.lease import Lease
with Lease(Folder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def folder(location: str) -> Folder:
    return Folder(location)


def entry(folder: Folder) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(folder.read(LEASE))
    return value


def elsewhere(folder: Folder, renewed: float) -> None:
    """A driver on another machine, which gave its last sign at `renewed`."""
    lease = {"driver": "other", "host": "far", "pid": 7, "place": "another boot", "started": 1, "since": 0.0}
    folder.write(LEASE, json.dumps({**lease, "renewed": renewed, "seconds": 60.0}))


def test_the_second_driver_is_refused_and_told_of_the_first(folder: Folder) -> None:
    with Lease(folder):
        for attempt in (Lease(folder).check, Lease(folder).__enter__):
            with pytest.raises(SapoError, match=rf" has a driver already: host .+, pid {os.getpid()}, since 2\d{{3}}-"):
                attempt()
        assert holder(folder) is not None
    assert not folder.has(LEASE)
    with Lease(folder):
        pass


def test_a_killed_driver_of_this_machine_does_not_hold_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        assert driver.stdout.readline() == "held\n"
        with pytest.raises(SapoError, match=f"pid {driver.pid}"):
            Lease(Folder(tmp_path)).check()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert (tmp_path / LEASE).exists()
    with Lease(Folder(tmp_path)):
        assert entry(Folder(tmp_path))["pid"] == os.getpid()


def test_a_driver_elsewhere_is_believed_until_its_lease_ends(folder: Folder) -> None:
    elsewhere(folder, renewed=time.time())
    with pytest.raises(SapoError, match=r"host far, pid 7, since 1970-01-01 00:00:00 UTC; .* the run is free at "):
        Lease(folder).check()
    elsewhere(folder, renewed=time.time() - 61)
    with Lease(folder):
        assert entry(folder)["pid"] == os.getpid()


def test_of_two_that_write_at_once_the_last_one_has_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: elsewhere(folder, renewed=time.time()))
    with pytest.raises(SapoError, match="has a driver already: host far"):
        Lease(folder).__enter__()
    assert holder(folder) == "other"


def test_the_lease_is_renewed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with Lease(folder, seconds=1.0):
        first = entry(folder)
        while (later := entry(folder))["renewed"] == first["renewed"]:
            time.sleep(0.01)
    assert {**later, "renewed": None} == {**first, "renewed": None}


def test_a_driver_that_lost_its_lease_stops_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def drive() -> None:
        with Lease(folder, seconds=1.0):
            elsewhere(folder, renewed=time.time())
            while True:
                time.sleep(0.01)

    with pytest.raises(SapoError, match="was taken over by another driver: host far, pid 7"):
        drive()
    assert holder(folder) == "other"


def test_a_driver_whose_lease_another_one_has_taken_and_given_back_stops(tmp_path: Path) -> None:
    def drive() -> None:
        with Lease(Folder(tmp_path), seconds=1.0):
            while True:
                (tmp_path / LEASE).unlink(missing_ok=True)
                time.sleep(0.01)

    with pytest.raises(SapoError, match=rf"{tmp_path}/lease\.json is gone: another driver may have been at work"):
        drive()
    assert holder(Folder(tmp_path)) is None


def test_a_driver_that_cannot_renew_its_lease_stops_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    def drive() -> None:
        with Lease(Folder(tmp_path), seconds=1.0):
            monkeypatch.setattr(Folder, "write", full)
            while True:
                time.sleep(0.01)

    with pytest.raises(SapoError, match=r"the lease could not be renewed: .*no space left; this driver stops"):
        drive()


def test_a_folder_within_a_run_is_written_while_the_run_s_lease_is_held(folder: Folder) -> None:
    elsewhere(folder, renewed=time.time())
    checkpoints = folder.locate("checkpoints")
    HeldFolder(checkpoints, "other", folder).write("file", "of the holder")
    with pytest.raises(LostLeaseError, match="was taken over by another driver: host far, pid 7"):
        HeldFolder(checkpoints, "mine", folder).write("file", "of the one before")
    assert folder.read("checkpoints/file") == b"of the holder"


def test_a_damaged_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("{")
    with pytest.raises(SapoError, match=rf"{tmp_path}/lease\.json is damaged: .*; remove it if no driver"):
        Lease(Folder(tmp_path)).check()
