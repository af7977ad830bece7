"""The manifest of a run: its finished stages, what they note about themselves, and the files they wrote.

Each file is entered with its size and its SHA-256: the standard that `sha256sum` prints and Hugging Face keeps of
weights, safe to name cached copies by, and computed by today's CPUs at 1 to 2 GB/s a core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

import pyarrow as pa

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, joined, relative

MANIFEST = "manifest.json"
_CHUNK = 16 * 2**20
_SEAL = "sha256"


class FileRecord(TypedDict):
    """A file as it was written: its bytes, its SHA-256 in hex, and for a shard its rows."""

    size: int
    sha256: str
    rows: NotRequired[int]


Files = dict[str, FileRecord]
"""By name: in the manifest relative to the run directory, elsewhere to the folder they lie in."""


class DamagedError(SapoError):
    """A file is not what was written. The text names it, what was expected and what was found."""


class Manifest:
    """RUN/manifest.json, read once; a new object sees what was entered since."""

    def __init__(self, run: Folder) -> None:
        """Raises SapoError where the file is no manifest."""
        self._run, self._entries = run, _load(run)

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every finished stage, in the order in which they finished, with its notes."""
        return {stage: {k: v for k, v in entry.items() if k != "files"} for stage, entry in self._entries.items()}

    def files(self) -> dict[str, Files]:
        """Every finished stage with the files it wrote."""
        found = {stage: entry.get("files", {}) for stage, entry in self._entries.items()}
        return {stage: files if isinstance(files, dict) else {} for stage, files in found.items()}

    def enter(self, stage: str, notes: Mapping[str, Any]) -> None:
        """Enter a finished stage: its notes, among them as `files` what it wrote."""
        self._write({**self._entries, stage: notes})

    def forget(self, first: str) -> list[str]:
        """Take out a stage and all that finished after it; their names."""
        stages = list(self._entries)
        forgotten = stages[stages.index(first) :]
        self._write({stage: entry for stage, entry in self._entries.items() if stage not in forgotten})
        return forgotten

    def _write(self, entries: dict[str, Any]) -> None:
        self._run.write(MANIFEST, to_json(self._run.locate(MANIFEST), entries, indent=1))
        self._entries = entries


def _load(run: Folder) -> dict[str, Any]:
    try:
        entries = json.loads(run.read(MANIFEST))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SapoError(f"{run.locate(MANIFEST)} is damaged: {error}; restore it from a copy") from error
    # Any other shape is somebody else's file of that name, above data of a user's own.
    return entries if isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values()) else {}


def to_json(location: str, value: Mapping[str, Any], indent: int | None = None) -> str:
    """Text for the file `location`. Raises SapoError for a NaN or an infinity: JSON has no word for them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise SapoError(f"{location}: a figure is not a number: {error}") from error


def sealed(location: str, value: Mapping[str, Any]) -> str:
    """Text for the file `location`, with a SHA-256 of itself. Raises SapoError for a NaN or an infinity."""
    return json.dumps({**value, _SEAL: _seal(to_json(location, value))})


def unsealed(location: str, content: bytes) -> dict[str, Any]:
    """What `sealed` was given, from the file `location`. Raises DamagedError where the content is anything else."""
    try:
        value: dict[str, Any] = json.loads(content)
        seal = value.pop(_SEAL)
    except ValueError as error:
        raise DamagedError(f"{location} is damaged: {error}") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise DamagedError(f"{location} has no {_SEAL} of itself: it is damaged, or of an earlier version") from error
    if seal != _seal(json.dumps(value)):
        raise DamagedError(f"{location} is damaged: its {_SEAL} of itself is of another content")
    return value


def _seal(text: str) -> str:
    return record_of(text.encode())["sha256"]


@dataclass(frozen=True)
class Recorded:
    """A file that a manifest names: the folder it is looked for in, its name there, its record, the stage it is of."""

    folder: Folder
    name: str
    record: FileRecord
    stage: str

    def read(self) -> bytes:
        """Its content. Raises DamagedError where that is not what was written."""
        with remedy(self.stage):
            location = self.folder.locate(self.name)
            try:
                content = self.folder.read(self.name)
            except FileNotFoundError:
                check(location, None, None, self.record)
                raise
            found = record_of(content)
            check(location, found["size"], found["sha256"], self.record)
        return content


def recorded(location: str) -> dict[str, Recorded]:
    """The files of a data set or a checkpoint, by name, of which the manifest two levels above it tells.

    None where there is no manifest: such as for files of the user's own.
    """
    home = joined(location, "../..")
    folder, prefix = Folder(location), relative(location, home) + "/"
    return {
        name.removeprefix(prefix): Recorded(folder, name.removeprefix(prefix), record, stage)
        for stage, files in Manifest(Folder(home)).files().items()
        for name, record in files.items()
        if name.startswith(prefix)
    }


def content_of(location: str) -> str | None:
    """One SHA-256 over names, sizes and SHA-256s of all files of a data set or a checkpoint of a run.

    None for what no manifest tells of: files of the user's own, a model's name on a hub.
    """
    records = {name: entry.record for name, entry in recorded(location).items()}
    return record_of(json.dumps(records, sort_keys=True).encode())["sha256"] if records else None


@contextmanager
def remedy(stage: str) -> Iterator[None]:
    """Adds to a DamagedError what can be done about a file of a finished stage."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(
            f"{error}; restore it from a copy, or do {stage} and all that came after it again: "
            f"sapo run … --redo {stage}"
        ) from error


def record_of(content: bytes) -> FileRecord:
    """The record of a file that holds `content`."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def records_of(directory: Path) -> Files:
    """The records of all files in a local directory, read in parallel."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as threads:
        records = threads.map(_record, files)
        return {str(file.relative_to(directory)): record for file, record in zip(files, records, strict=True)}


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": _digest(file)}


def _digest(file: BinaryIO | pa.NativeFile) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):  # in an object store every read is a request
        digest.update(chunk)
    return digest.hexdigest()


def check_sizes(folder: Folder, files: Mapping[str, FileRecord], sizes: Mapping[str, int]) -> None:
    """Raises DamagedError for the first of `files` that is missing from `sizes` or has another size there."""
    for name, record in files.items():
        check(folder.locate(name), sizes.get(name), None, record)


def check_files(folder: Folder, files: Mapping[str, FileRecord], original: Folder | None = None) -> None:
    """Raises DamagedError for the first of `files` that is not what was written. Reads all of them.

    Where `folder` is a copy, the error names the file in the `original`.
    """

    def one(name: str) -> tuple[int | None, str | None]:
        try:
            with folder.open(name) as file:
                return file.size(), _digest(file)
        except FileNotFoundError:
            return None, None

    with ThreadPoolExecutor() as threads:
        for (name, record), found in zip(files.items(), threads.map(one, files), strict=True):
            check((original or folder).locate(name), *found, record)


def check(location: str, size: int | None, sha256: str | None, record: FileRecord) -> None:
    """Raises DamagedError where a file's size (None: it is missing) or SHA-256 (None: not read) is not as recorded."""
    if size is None:
        raise DamagedError(f"{location} is missing; {record['size']} bytes were written")
    if size != record["size"]:
        raise DamagedError(f"{location} is damaged: {record['size']} bytes were written, {size} are there")
    if sha256 is not None and sha256 != record["sha256"]:
        raise DamagedError(f"{location} is damaged: its SHA-256 was {record['sha256']} and is {sha256}")
