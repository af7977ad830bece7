"""Data sets: Parquet shards, written in step by the stages of a run, and read back against the manifest."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_ray.data import LABELS, PAIRS, ROLLOUTS, TRAJECTORIES
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, absolute, split
from sapo_ray.manifest import DamagedError, FileRecord, Files, Recorded, record_of, recorded, sealed, unsealed

Kind = Literal["original", "validation", "trajectories", "labels", "rollouts", "pairs"]
SCHEMAS: dict[Kind, pa.Schema] = {
    "original": TRAJECTORIES,
    "validation": TRAJECTORIES,
    "trajectories": TRAJECTORIES,
    "labels": LABELS,
    "rollouts": ROLLOUTS,
    "pairs": PAIRS,
}
_SHARD_ROWS = 4096
PROGRESS = ".progress.json"
COMMIT_SECONDS = 60.0
"""Between two writes of a stage at most: so much work may be lost with the process that does it."""

Rows = Iterable[Mapping[str, Any]]


class ShardWriter:
    """Collects rows, and with `flush` and `close` writes them as Parquet shards of at most 4,096 rows.

    `files` are the shards so far, named relative to the run.
    """

    def __init__(self, run: Folder, name: str, schema: pa.Schema, files: Mapping[str, FileRecord]) -> None:
        """Goes on after the shards `files`; any other file in the folder `name` is removed."""
        self._run, self._name, self._schema = run, name, schema
        self.files: Files = dict(files)
        self._waiting: list[Mapping[str, Any]] = []
        self.rows = sum(record.get("rows", 0) for record in files.values())
        run.remove(left for left in run.sizes(name) if left not in files)

    def extend(self, rows: Rows) -> None:
        before = len(self._waiting)
        self._waiting += rows
        self.rows += len(self._waiting) - before

    def flush(self) -> None:
        """Write the rows that wait, if any do."""
        while self._waiting:
            self._write(self._waiting[:_SHARD_ROWS])
            del self._waiting[:_SHARD_ROWS]

    def close(self) -> None:
        """Write what waits; an empty shard where there was never a row, so that the data set has its schema."""
        self.flush()
        if not self.files:
            self._write([])

    def _write(self, rows: list[Mapping[str, Any]]) -> None:
        name = f"{self._name}/part-{len(self.files):05d}.parquet"
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=self._schema), buffer)
        content = buffer.getvalue().to_pybytes()
        self._run.write(name, content)
        self.files[name] = {**record_of(content), "rows": len(rows)}


class Progress(TypedDict):
    """How far an unfinished stage is: what a progress record holds."""

    items: int
    seconds: float
    state: dict[str, Any]
    files: Files


class StageWriter:
    """Writes the data sets of a stage in step, item by item, and goes on where an interrupted attempt stopped.

    After every `every` items, or once they have taken `COMMIT_SECONDS`, the rows that wait become a shard of each data
    set, and then the stage's progress record is replaced: how many items are done, the shards that hold them, and what
    `snapshot` returned. A restart goes on at item `items` from the snapshot `state`; shards that the record does not
    name are removed.

    Use as a context manager. Where the work is stopped from outside (its task is cancelled, or a SapoError such as an
    engine's end), the items that are done are recorded; after any other exception the last record stands.
    """

    def __init__(self, run: Folder, stage: str, kinds: Sequence[Kind], every: int) -> None:
        """Raises DamagedError for a progress record that is not what was written."""
        self._run, self._record, self._every = run, progress_file(stage), every
        self._begun, self._writing = time.monotonic(), threading.Lock()
        self._committed = self._begun
        self.resumed = run.has(self._record)
        """Whether there was an attempt before, whose items and snapshot follow."""
        try:
            progress = read_progress(run, self._record)
        except DamagedError as error:
            raise DamagedError(f"{error}; remove it to begin {stage} anew") from error
        self.items, self.state, self._seconds = progress["items"], progress["state"], progress["seconds"]
        self.snapshot: Callable[[], dict[str, Any]] = dict
        """Set it to what gives the state after the items added so far, as JSON."""
        self._done = self.items
        self._writers: dict[Kind, ShardWriter] = {}
        for kind in kinds:
            name = f"{stage.rpartition('/')[0]}/{kind}"
            mine = {file: record for file, record in progress["files"].items() if file.startswith(f"{name}/")}
            self._writers[kind] = ShardWriter(run, name, SCHEMAS[kind], mine)

    def __enter__(self) -> StageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for writer in self._writers.values():
                writer.close()
            self._commit()
        elif self._done > self.items and issubclass(kind, SapoError | asyncio.CancelledError):
            with suppress(SapoError):
                self._commit()

    async def add(self, rows: Mapping[Kind, Rows]) -> None:
        """One more item's rows. Where it is time to write, that is done in a thread: a store may be slow."""
        self.extend(rows)
        self._done += 1
        if self._done % self._every == 0 or time.monotonic() > self._committed + COMMIT_SECONDS:
            await asyncio.to_thread(self._commit)

    def extend(self, rows: Mapping[Kind, Rows]) -> None:
        """Rows that belong to the item that is added next, or before them all in a stage that is not `resumed`."""
        for kind, more in rows.items():
            self._writers[kind].extend(more)

    def _commit(self) -> None:
        """Write what waits and record it."""
        with self._writing:
            for writer in self._writers.values():
                writer.flush()
            progress: Progress = {
                "items": self._done,
                "seconds": self._seconds + time.monotonic() - self._begun,
                "state": self.snapshot(),
                "files": self.files,
            }
            self._run.write(self._record, sealed(self._run.locate(self._record), progress))
            self._committed = time.monotonic()

    @property
    def files(self) -> Files:
        """The shards written so far, with those of earlier attempts."""
        return {name: record for writer in self._writers.values() for name, record in writer.files.items()}

    def rows(self, kind: Kind) -> int:
        """The rows of a data set so far, with those of earlier attempts."""
        return self._writers[kind].rows


def progress_file(stage: str) -> str:
    """The name of a stage's progress record in its run."""
    return f"{stage}{PROGRESS}"


def read_progress(run: Folder, name: str) -> Progress:
    """A progress record; that of a stage that has not begun where there is none. Raises DamagedError."""
    try:
        content = run.read(name)
    except FileNotFoundError:
        return {"items": 0, "seconds": 0.0, "state": {}, "files": {}}
    return cast(Progress, unsealed(run.locate(name), content))


def read_rows(location: str | Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or of the shards in a folder in their order; a folder that is absent has none.

    Shards that a run's manifest names are read against it. Raises DamagedError where one is not what was written,
    SapoError for a file that is absent (a name in `.parquet` is a file's) or cannot be read.
    """
    for at, shard in _shards(absolute(location)):
        try:
            for batch in pq.ParquetFile(shard()).iter_batches(columns=columns):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
            raise SapoError(f"{at} cannot be read: {why}") from error


def _shards(location: str) -> list[tuple[str, Callable[[], pa.NativeFile]]]:
    """The location of every shard of a data set, and how it is opened."""
    folder, (home, name) = Folder(location), split(location)
    if Folder(home).has(name) or (name.endswith(".parquet") and not folder.sizes()):
        folder, names = Folder(home), [name]
    else:
        names = [file for file in folder.sizes() if file.endswith(".parquet") and "/" not in file]
        names = sorted(recorded(location) or names)
    records = recorded(folder.location)
    return [(folder.locate(file), partial(_open, folder, file, records.get(file))) for file in names]


def _open(folder: Folder, name: str, record: Recorded | None) -> pa.NativeFile:
    return folder.open(name) if record is None else pa.BufferReader(record.read())
