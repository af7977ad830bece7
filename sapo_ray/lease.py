"""The lease on a run directory: one driver at a time writes into it.

`lease.json` names the driver and when it last gave a sign. A driver takes the lease by writing the file and reading it
back a moment later: of two that write at once, the last one holds it and the other is refused. The holder renews it
and, where it finds another's name, stops. That needs no conditional write, which pyarrow does not have for object
stores. So two drivers may overlap where one is held up between its look at the lease and its own entry for longer than
that moment, until the first of them renews; and clocks must agree to well within the lease's length.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder

LEASE = "lease.json"
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long is free."""
_RENEWALS = 6
_SETTLE_SECONDS = 1.0


class LostLeaseError(SapoError):
    """The lease is not this driver's any more. The text names who has it."""


class Lease:
    """The right to write into a run. Use as a context manager, in the main thread; it is renewed meanwhile.

    Where it is lost, the main thread is interrupted, and leaving the context raises SapoError.
    """

    def __init__(self, run: Folder, seconds: float = LEASE_SECONDS) -> None:
        self._run, self._seconds, self._renewed = run, seconds, 0.0
        self.driver = uuid4().hex
        """Who holds it: what is written for this driver is written by this id (see `HeldFolder`)."""
        self._mine = {"driver": self.driver, **_process(), "since": time.time()}
        self._end = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def check(self) -> None:
        """Raises SapoError, naming the other driver, where one holds the lease."""
        lease = _read(self._run)
        if lease and lease["driver"] != self.driver and _is_held(lease):
            free = datetime.fromtimestamp(lease["renewed"] + lease["seconds"], UTC)
            raise SapoError(
                f"{self._run.location} has a driver already: {_name(lease)}; wait for its end or stop it "
                f"(if it is gone, the run is free at {free:%H:%M:%S} UTC)"
            )

    def __enter__(self) -> Lease:
        self.check()
        self._write()
        time.sleep(min(_SETTLE_SECONDS, self._seconds / 10))
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._lost:
            raise SapoError(self._lost)
        with suppress(SapoError, OSError):  # what cannot be removed ends by itself
            if holder(self._run) == self.driver:
                self._run.remove([LEASE])

    def _write(self) -> None:
        now = time.time()
        self._run.write(LEASE, json.dumps({**self._mine, "renewed": now, "seconds": self._seconds}))
        self._renewed = now

    def _renew(self) -> None:
        while not self._lost and not self._end.wait(self._seconds / _RENEWALS):
            try:
                _check_held(self._run, self.driver)
                self._write()
            except LostLeaseError as error:
                self._lost = str(error)
            except (SapoError, OSError) as error:
                if time.time() > self._renewed + self._seconds:
                    self._lost = f"{self._run.location}: the lease could not be renewed: {error}; this driver stops"
        if self._lost:
            os.kill(os.getpid(), signal.SIGINT)


class HeldFolder(Folder):
    """A run's folder as one driver writes it: each write looks first whether the lease is still that driver's.

    Raises LostLeaseError, before anything is changed, where it is not.
    """

    def __init__(self, location: str | Path, driver: str, run: Folder | None = None) -> None:
        """A folder within a run names the `run`, in which its lease lies."""
        super().__init__(location)
        self._run, self._driver = run or self, driver

    # `put` and `copy` begin with `clear`.

    def write(self, name: str, data: bytes | str) -> None:
        _check_held(self._run, self._driver)
        super().write(name, data)

    def remove(self, names: Iterable[str]) -> None:
        _check_held(self._run, self._driver)
        super().remove(names)

    def clear(self, name: str) -> None:
        _check_held(self._run, self._driver)
        super().clear(name)

    def add(self, source: Path, names: Iterable[str], name: str) -> None:
        _check_held(self._run, self._driver)
        super().add(source, names, name)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        _check_held(self._run, self._driver)  # or it would remove what the new holder prepares in the same place
        with super().staging(name) as directory:
            yield directory


def holder(run: Folder) -> str | None:
    """The id of the driver that has the lease, or had it last; None where none has it."""
    lease = _read(run)
    return lease["driver"] if lease else None


def _check_held(run: Folder, driver: str) -> None:
    """Raises LostLeaseError where another driver has the lease, or had it and ended."""
    lease = _read(run)
    if lease is None:
        raise LostLeaseError(f"{run.locate(LEASE)} is gone: another driver may have been at work; this one stops")
    if lease["driver"] != driver:
        raise LostLeaseError(f"{run.location} was taken over by another driver: {_name(lease)}; this one stops")


def _read(run: Folder) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = json.loads(run.read(LEASE))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SapoError(f"{run.locate(LEASE)} cannot be read: {error}") from error
    except ValueError as error:
        raise SapoError(f"{run.locate(LEASE)} is damaged: {error}; remove it if no driver of this run lives") from error
    return lease


def _is_held(lease: dict[str, Any]) -> bool:
    """A holder that ran where this process runs is looked up; any other is believed until its lease ends."""
    here = _process()
    if lease["place"] == here["place"]:
        return _started(lease["pid"]) == int(lease["started"])
    return time.time() < float(lease["renewed"] + lease["seconds"])


def _name(lease: dict[str, Any]) -> str:
    since = datetime.fromtimestamp(lease["since"], UTC)
    return f"host {lease['host']}, pid {lease['pid']}, since {since:%Y-%m-%d %H:%M:%S} UTC"


def _process() -> dict[str, Any]:
    """This process. `place` is where its pid has a meaning: a boot of a machine, and a namespace there."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": socket.gethostname(), "pid": os.getpid(), "place": place, "started": _started(os.getpid())}


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None where there is none (or a zombie is left of it)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
