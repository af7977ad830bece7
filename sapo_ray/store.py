"""The run directory: the truth about a run, on any file system that pyarrow reaches.

    RUN/config.yaml  metrics.jsonl  summary.json  manifest.json  lease.json
    RUN/round-0/{original,validation}/  RUN/round-i/{trajectories,labels,rollouts,pairs}/part-00000.parquet …
    RUN/checkpoints/{base,reasoner-i,verifier-i}/

A stage is entered in the manifest, with its files, once all of them are in place. One that is not there is done
(again); a sampling stage goes on from its progress record (`StageWriter`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from sapo_ray.data import (
    Estimate,
    LabelledTrajectory,
    PreferencePair,
    Rollout,
    Trajectory,
)
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, split
from sapo_ray.lease import HeldFolder
from sapo_ray.manifest import (
    DamagedError,
    Files,
    Manifest,
    check_files,
    check_sizes,
    record_of,
    recorded,
    records_of,
    remedy,
    to_json,
)
from sapo_ray.shards import (
    PROGRESS,
    SCHEMAS,
    Kind,
    Progress,
    ShardWriter,
    StageWriter,
    progress_file,
    read_progress,
    read_rows,
)
from sapo_ray.training import RESULT_FILE

T = TypeVar("T")
Role = Literal["reasoner", "verifier"]
_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"


class RunDirectory:
    """One run's files, at a path or URI. Creating the object touches nothing; `create` makes the directory."""

    def __init__(self, location: str | Path, driver: str | None = None) -> None:
        """With a `driver`'s id, every write raises LostLeaseError where that one has lost its lease.

        Raises SapoError for a URI that cannot be opened, or that holds credentials.
        """
        self.folder = Folder(location) if driver is None else HeldFolder(location, driver)
        self.location, self.driver = self.folder.location, driver

    @property
    def path(self) -> Path:
        """The directory of a run that has a local path."""
        assert self.folder.path is not None
        return self.folder.path

    @property
    def name(self) -> str:
        """The run's name in logs, metrics and trackers."""
        return split(self.location)[1]

    def create(self) -> None:
        """Make the directory. Raises OSError where it cannot be made or written."""
        if self.folder.path is not None:
            (self.folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def checkpoint(self, role: Role, number: int) -> str:
        """Where a checkpoint lies; `local_checkpoint` makes it a directory of a node."""
        return self.folder.locate(checkpoint_name(role, number))

    def dataset(self, round_number: int, kind: Kind) -> str:
        """Where a data set lies; `read_rows` reads it."""
        return self.folder.locate(f"round-{round_number}/{kind}")

    def writer(self, round_number: int, kind: Kind) -> ShardWriter:
        """A writer for one data set that is written anew: what an earlier attempt left there is removed."""
        return ShardWriter(self.folder, f"round-{round_number}/{kind}", SCHEMAS[kind], {})

    def stage_writer(self, stage: str, kinds: Sequence[Kind], every: int) -> StageWriter:
        """A writer for the data sets of a stage, which goes on where an interrupted attempt stopped."""
        return StageWriter(self.folder, stage, kinds, every)

    def read(self, round_number: int, kind: Kind) -> Iterator[dict[str, Any]]:
        """The rows of a data set, shard by shard; none where it was never written. Raises DamagedError."""
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

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every finished stage with its notes, in the order in which they finished."""
        return Manifest(self.folder).stages()

    def progress(self, stage: str) -> Progress:
        """How far a stage is that has not finished. Raises DamagedError."""
        return read_progress(self.folder, progress_file(stage))

    def finish(self, stage: str, notes: Mapping[str, Any]) -> None:
        """Enter a stage in the manifest: its notes, among them as `files` the records of what it wrote."""
        Manifest(self.folder).enter(stage, notes)
        self._remove_progress(progress_file(stage))

    def check(self) -> list[str]:
        """Hold the finished stages' files against the manifest; what has to be done again on that account, in words.

        Of all files the sizes are compared, which reads none; those of the last stage that wrote any are read, too. The
        last stage is forgotten where one of its files is damaged, and so is the progress of an unfinished one. Raises
        DamagedError where later stages have finished: the file may have gone into what they made.
        """
        manifest, sizes = Manifest(self.folder), self.folder.sizes()
        last, redone = next(reversed(manifest.stages()), None), []
        written = {stage: files for stage, files in manifest.files().items() if files}
        for number, (stage, files) in enumerate(written.items(), 1):
            try:
                with remedy(stage):
                    check_sizes(self.folder, files, sizes)
                    if number == len(written):
                        check_files(self.folder, files)
            except DamagedError as error:
                if stage != last:
                    raise
                redone.append(f"{error.__cause__}; {stage} is done again")
                self.forget(stage)
        return redone + self._check_progress()

    def _check_progress(self) -> list[str]:
        redone, entered = [], {progress_file(stage) for stage in self.stages()}
        for name in [name for name in self.folder.sizes() if name.endswith(PROGRESS)]:
            if name in entered:  # a kill came between the stage's entry and this
                self._remove_progress(name)
                continue
            try:
                check_files(self.folder, read_progress(self.folder, name)["files"])
            except DamagedError as error:
                redone.append(f"{error}; {name.removesuffix(PROGRESS)} begins anew")
                self._remove_progress(name)
        return redone

    def check_finished(self, stage: str) -> None:
        """Raises SapoError for a stage that has not finished."""
        if stage not in (stages := self.stages()):
            raise SapoError(
                f"{self.location}: {stage} is no finished stage; finished are {', '.join(stages) or 'none'}"
            )

    def forget(self, stage: str) -> list[str]:
        """Take a stage and all that finished after it out of the manifest, and remove their files; their names.

        So are all other files of data sets and checkpoints that no finished stage names: an unfinished stage began from
        what is now forgotten. Raises SapoError for a stage that has not finished.
        """
        self.check_finished(stage)
        manifest = Manifest(self.folder)
        self._remove_unnamed(manifest)  # before it, or a kill in between would leave an unfinished stage to go on with
        forgotten = manifest.forget(stage)
        self._remove_unnamed(manifest)
        return forgotten

    def _remove_unnamed(self, manifest: Manifest) -> None:
        """Remove the files of data sets and checkpoints that no finished stage names."""
        kept = {name for files in manifest.files().values() for name in files}
        present = {name for name in self.folder.sizes() if name.startswith(("round-", "checkpoints/"))}
        emptied = _folders(present) - _folders(kept)
        for folder in emptied:
            self.folder.clear(folder)
        self.folder.remove(name for name in present - kept if not _folders([name]) & emptied)

    def _remove_progress(self, name: str) -> None:
        if self.folder.has(name):
            self.folder.remove([name])

    def write_file(self, name: str, text: str) -> Files:
        """Write a file of a stage; its record."""
        self.folder.write(name, text)
        return {name: record_of(text.encode())}

    def put(self, source: Path, name: str) -> Files:
        """Put a local directory, from `Folder.staging`, in the place of the folder `name`; its files' records."""
        files = records_of(source)
        self.folder.put(source, name)
        return {f"{name}/{file}": record for file, record in files.items()}

    def trained(self, checkpoint: str, files: Files) -> Files:
        """The records of a checkpoint that a training has put into the run, named relative to the run."""
        result = {RESULT_FILE: record_of(self.folder.read(f"{checkpoint}/{RESULT_FILE}"))}
        return {f"{checkpoint}/{file}": record for file, record in {**files, **result}.items()}

    def copy_checkpoint(self, source: str, target: str) -> Files:
        """Copy a checkpoint of finished stages, by name; the records of the copy's files."""
        self.folder.copy(source, target)
        entries = recorded(self.folder.locate(source))
        return {f"{target}/{file}": entry.record for file, entry in entries.items()}

    def log(self, stage: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Put a stage's lines at the end of metrics.jsonl, in place of those of an earlier attempt."""
        location = self.folder.locate(_METRICS)
        lines = self.folder.read(_METRICS).decode().splitlines() if self.folder.has(_METRICS) else []
        lines = [line for line in lines if json.loads(line)["stage"] != stage]
        lines += [to_json(location, {"stage": stage, **record}) for record in records]
        self.folder.write(_METRICS, "".join(f"{line}\n" for line in lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.folder.write(_SUMMARY, to_json(self.folder.locate(_SUMMARY), summary, indent=1))

    def summary(self) -> dict[str, Any]:
        """Raises FileNotFoundError where no round has ended yet."""
        return json.loads(self.folder.read(_SUMMARY))  # type: ignore[no-any-return]


def checkpoint_name(role: Role, number: int) -> str:
    """The name of a checkpoint's folder in its run."""
    return f"checkpoints/{role}-{number}"


def _folders(names: Iterable[str]) -> set[str]:
    """The data sets and checkpoints that these files belong to."""
    return {"/".join(name.split("/")[:2]) for name in names if name.count("/") > 1}


def trajectory_row(trajectory: Trajectory) -> dict[str, Any]:
    row = _fields(trajectory)
    return {"trajectory_id": row.pop("id"), **row}


def label_row(labelled: LabelledTrajectory) -> dict[str, Any]:
    row = _fields(labelled)
    row.pop("trajectory")
    return {**trajectory_row(labelled.trajectory), **row, "estimates": list(map(_fields, labelled.estimates))}


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    row = _fields(rollout)
    return {"rollout_id": row.pop("id"), **row}


def pair_row(pair: PreferencePair) -> dict[str, Any]:
    return _fields(pair)


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass's fields as they are, not copied deeply as by `asdict`, which is slow."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


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


def pair_of(row: Mapping[str, Any]) -> PreferencePair:
    """The pair of a row of `pairs`."""
    return PreferencePair(**{**row, "chosen": tuple(row["chosen"]), "rejected": _tuple_or_none(row["rejected"])})


def _tuple_or_none(values: Sequence[T] | None) -> tuple[T, ...] | None:
    return None if values is None else tuple(values)
