"""Checkpoints as directories of this node, which is what engines and trainers can load.

A local path stays where it is. What lies in an object store is copied once to a node, under `cache_folder()`, however
many processes ask for it. Either way sizes are held against the run's manifest before anything is loaded. Checksums are
where a copy is made, and of a local path the first time that a driver's processes on a node ask for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, cache_folder, into_place, is_uri, reason
from sapo_ray.manifest import DamagedError, FileRecord, check_files, check_sizes, recorded, remedy

logger = logging.getLogger(__name__)

DRIVER = "SAPO_DRIVER"
"""The environment variable with an id that all processes of a command share, on any node, and no other command's do."""
_SPARE = 0.1
"""Share of the disk that old copies leave free."""
_GRACE_SECONDS = 3600.0
"""A copy that was asked for more recently than this may still be loading: it is not removed."""


def local_checkpoint(location: str, *, weights: bool = True) -> str:
    """The checkpoint at a path or URI as a directory of this node; without its weights where they are not wanted.

    What is neither, such as a model's name on a hub, is returned as it is. Raises DamagedError where a file is not what
    the run's manifest says, SapoError for a URI of which no manifest tells.
    """
    if not is_uri(location) and not Path(location).is_dir():
        return location
    folder, entries = Folder(location), recorded(location)
    if "config.json" not in entries:
        if folder.path is None:
            raise SapoError(f"{location} is no checkpoint of a run: no manifest.json tells of it; use a path instead")
        return location
    # The files of the stage that made the model: what was added since, a calibration, is read where it lies.
    stage = entries["config.json"].stage
    files = {name: entry.record for name, entry in entries.items() if entry.stage == stage}
    if not weights:
        files = {name: record for name, record in files.items() if not name.endswith(".safetensors")}
    with remedy(stage):
        return str(local_copy(folder, files))


def local_copy(folder: Folder, files: Mapping[str, FileRecord]) -> Path:
    """A folder with these files as a directory of this node. Raises DamagedError where one is not what was written."""
    if folder.path is not None:
        _check_once(folder, folder.path, files)
        return folder.path
    copies = cache_folder() / "copies"
    copy = copies / _key(folder, files)
    with _locked(copy):
        if not _is_whole(copy, files):
            check_sizes(folder, files, folder.sizes())
            _make_room(copies, sum(record["size"] for record in files.values()))
            _fetch(folder, files, copy)
        os.utime(copy)
    return copy


def _check_once(folder: Folder, path: Path, files: Mapping[str, FileRecord]) -> None:
    """Check a local folder's files, unless a process of this node and driver has done so since they were written.

    The next driver does so again: what a disk does to a file shows in neither size nor time.
    """
    check_sizes(folder, files, folder.sizes())
    checked = cache_folder() / "checked" / _key(folder, files)
    state = json.dumps([_driver(), *((path / name).stat().st_mtime_ns for name in files)])
    with _locked(checked):
        if not checked.exists() or checked.read_text(encoding="utf-8") != state:
            check_files(folder, files)
            checked.write_text(state, encoding="utf-8")


def _driver() -> str:
    """A process that has the id from nobody shares one with its children alone."""
    return os.environ.setdefault(DRIVER, uuid4().hex)


def _is_whole(copy: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether these files are in a copy, each in its size."""
    if not copy.exists():
        return False
    try:
        check_sizes(Folder(copy), files, Folder(copy).sizes())
    except DamagedError as error:
        logger.warning("%s; it is fetched anew", error)
        return False
    return True


def _fetch(folder: Folder, files: Mapping[str, FileRecord], copy: Path) -> None:
    unfinished = copy.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        folder.fetch(files, unfinished)
        check_files(Folder(unfinished), files, folder)
        shutil.rmtree(copy, ignore_errors=True)
        into_place(unfinished, copy)
    except OSError as error:
        raise SapoError(f"{folder.location} cannot be copied to {copy.parent} (SAPO_CACHE): {reason(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_room(copies: Path, size: int) -> None:
    """Remove the copies that were last asked for longest ago, as far as the disk would else be nearly full."""
    ages = sorted((entry.stat().st_mtime, entry) for entry in copies.iterdir() if entry.is_dir())
    for asked, entry in ages:
        disk = shutil.disk_usage(copies)
        if disk.free - size > _SPARE * disk.total or asked > time.time() - _GRACE_SECONDS:
            return
        shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this node at a time; a lock ends with its process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise SapoError(f"{path.parent} (SAPO_CACHE) cannot be written: {reason(error)}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(folder: Folder, *content: object) -> str:
    return hashlib.sha256(json.dumps([folder.location, *content]).encode()).hexdigest()[:32]
