"""The run directory: the truth about a run. What is written appears whole or not at all.

    RUN/config.yaml  metrics.jsonl  summary.json  manifest.json
    RUN/round-0/{original,validation}/  RUN/round-i/{trajectories,labels,rollouts,pairs}/part-00000.parquet …
    RUN/checkpoints/{reasoner,verifier}-i/

A stage is entered in the manifest once all it wrote is in place; a stage that is not in the manifest is redone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_ray.data import (
    LABELS,
    PAIRS,
    ROLLOUTS,
    TRAJECTORIES,
    Estimate,
    LabelledTrajectory,
    PreferencePair,
    Rollout,
    Trajectory,
)
from sapo_ray.errors import SapoError

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


class RunDirectory:
    """One run's files. Creating the object touches nothing; `create` makes the directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def name(self) -> str:
        """The run's name in logs, metrics and trackers."""
        return self.path.name

    def create(self) -> None:
        """Make the directory. Raises OSError where it cannot be made or written."""
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def checkpoint(self, role: Literal["reasoner", "verifier"], number: int | str) -> Path:
        return self.path / "checkpoints" / f"{role}-{number}"

    def dataset(self, round_number: int, kind: Kind) -> Path:
        return self.path / f"round-{round_number}" / kind

    def writer(self, round_number: int, kind: Kind) -> ShardWriter:
        """A writer for one data set of a stage that (re)starts: what an interrupted attempt left there is removed."""
        folder = self.dataset(round_number, kind)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return ShardWriter(folder, SCHEMAS[kind])

    def read(self, round_number: int, kind: Kind) -> Iterator[dict[str, Any]]:
        """The rows of a data set, shard by shard; none where it was never written."""
        yield from read_rows(self.dataset(round_number, kind))

    def trajectories_until(self, round_number: int) -> list[Trajectory]:
        """D_i: the worked solutions and all that was sampled up to a round, without repeats (question and text)."""
        sources: list[tuple[int, Kind]] = [(0, "original")]
        sources += [(number, "trajectories") for number in range(round_number + 1)]
        found: dict[tuple[str, tuple[str, ...]], Trajectory] = {}
        for source in sources:
            for trajectory in map(trajectory_of, self.read(*source)):
                found.setdefault((trajectory.question_id, trajectory.steps), trajectory)
        return list(found.values())

    def done(self, stage: str) -> Mapping[str, Any] | None:
        """What a finished stage noted about itself, or None where it has not finished."""
        return self.stages().get(stage)

    def stages(self) -> dict[str, Any]:
        """Every finished stage with its notes."""
        path = self.path / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def finish(self, stage: str, notes: Mapping[str, Any]) -> None:
        """Enter a stage in the manifest."""
        path = self.path / "manifest.json"
        write_text(path, _json(path, {**self.stages(), stage: notes}, indent=1))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        line = _json(path, record) + "\n"
        with path.open("a", encoding="utf-8") as file:
            file.write(line)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        path = self.path / "summary.json"
        write_text(path, _json(path, summary, indent=1))

    def summary(self) -> dict[str, Any]:
        """Raises FileNotFoundError where no round has ended yet."""
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


class ShardWriter:
    """Collects rows and writes them as Parquet shards of at most 4,096 rows. `close` writes the last one."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        self._rows: list[dict[str, Any]] = []
        self._shards = 0
        self.rows = 0

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._rows.append(row)
            self.rows += 1
            if len(self._rows) == _SHARD_ROWS:
                self._flush()

    def close(self) -> None:
        if self._rows or not self._shards:
            self._flush()

    def _flush(self) -> None:
        target = self._folder / f"part-{self._shards:05d}.parquet"
        temporary = target.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), temporary)
        os.replace(temporary, target)
        self._shards += 1
        self._rows = []


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or of the shards in a directory in their order; a directory that is absent has none.

    Raises SapoError for a file that is absent (a name in `.parquet` is a file's) or cannot be read.
    """
    is_file = path.is_file() or (path.suffix == ".parquet" and not path.is_dir())
    for file in [path] if is_file else sorted(path.glob("*.parquet")):
        try:
            shard = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).partition("\n")[0] if file.exists() else "no such file"
            raise SapoError(f"{file} cannot be read: {reason}") from error
        for batch in shard.iter_batches():
            yield from batch.to_pylist()


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _json(path: Path, value: Mapping[str, Any], indent: int | None = None) -> str:
    """Text for the file `path`. Raises SapoError for a NaN or an infinity: JSON has no word for them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise SapoError(f"{path}: a figure is not a number: {error}") from error


def trajectory_row(trajectory: Trajectory) -> dict[str, Any]:
    row = asdict(trajectory)
    return {"trajectory_id": row.pop("id"), **row}


def label_row(labelled: LabelledTrajectory) -> dict[str, Any]:
    row = asdict(labelled)
    row.pop("trajectory")
    return {**trajectory_row(labelled.trajectory), **row}


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    row = asdict(rollout)
    return {"rollout_id": row.pop("id"), **row}


def pair_row(pair: PreferencePair) -> dict[str, Any]:
    return asdict(pair)


def trajectory_of(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row of `trajectories` or `labels`."""
    return Trajectory(
        id=row["trajectory_id"],
        question_id=row["question_id"],
        question=row["question"],
        steps=tuple(row["steps"]),
        answer=row["answer"],
        correct=row["correct"],
        source=row["source"],
        truncated=row["truncated"],
    )


def labelled_of(row: Mapping[str, Any]) -> LabelledTrajectory:
    """The labelled trajectory of a row of `labels`."""
    return LabelledTrajectory(
        trajectory=trajectory_of(row),
        labeler=row["labeler"],
        step_labels=tuple(row["step_labels"]),
        scores=_tuple_or_none(row["scores"]),
        predicted_first_error=row["predicted_first_error"],
        estimates=tuple(
            Estimate(e["step"], e["value"], e["successes"], e["tried"], tuple(e["rollout_ids"]))
            for e in row["estimates"]
        ),
        case=row["case"],
        parent_id=row["parent_id"],
        branch_step=row["branch_step"],
        rollout_id=row["rollout_id"],
    )


def rollout_of(row: Mapping[str, Any]) -> Rollout:
    """The rollout of a row of `rollouts`."""
    values = {**row, "steps": tuple(row["steps"])}
    return Rollout(id=values.pop("rollout_id"), **values)


def _tuple_or_none(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)
