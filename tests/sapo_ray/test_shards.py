"""Stages that are killed and gone on with: what they leave is what an undisturbed one leaves."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_ray import shards
from sapo_ray.data import Rollout, Trajectory
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.lease import LEASE, HeldFolder, LostLeaseError
from sapo_ray.manifest import check_files
from sapo_ray.shards import Kind, StageWriter, read_progress, read_rows
from sapo_ray.store import rollout_row, trajectory_row
from tests.disks import Disk

STAGE, RECORD = "round-1/sample", "round-1/sample.progress.json"
KINDS: tuple[Kind, ...] = ("trajectories", "rollouts")
TRAJECTORY = Trajectory("t", "q", "7+3", ("7+3=0\n",), "0", correct=True)
ROLLOUT = Rollout("r", "t", "q", 0, 0, ("7+3=0\n",), "0", correct=True, truncated=False, kept=True)

Item = tuple[int, int]
"""How many trajectories and rollouts an item makes."""


class KilledError(Exception):
    """Stands for the end of the process: nothing of the stage's own runs afterwards."""


class DyingFolder(Folder):
    """A folder whose process is killed at its `writes`-th write from now: just before it, or just after."""

    def __init__(self, path: Path, writes: int, *, before: bool) -> None:
        super().__init__(path)
        self._left, self._before = writes, before

    def write(self, name: str, data: bytes | str) -> None:
        self._left -= 1
        if self._left < 0 and self._before:
            raise KilledError
        super().write(name, data)
        if self._left < 0:
            raise KilledError


class FailingFolder(Folder):
    """A folder whose store is away for one write, the `writes`-th from now."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path)
        self._left = writes

    def write(self, name: str, data: bytes | str) -> None:
        self._left -= 1
        if self._left == -1:
            raise SapoError(f"{name} cannot be written: the store is away")
        super().write(name, data)


def rows(number: int, item: Item) -> dict[Kind, list[dict[str, Any]]]:
    trajectories = [trajectory_row(replace(TRAJECTORY, id=f"{number}/{k}")) for k in range(item[0])]
    rollouts = [rollout_row(replace(ROLLOUT, id=f"{number}/{k}")) for k in range(item[1])]
    return {"trajectories": trajectories, "rollouts": rollouts}


async def work(folder: Folder, items: Sequence[Item], every: int, stop: int | None = None) -> dict[str, Any]:
    """A stage: writes what the items make and counts it; its notes. Stopped by an engine's end after `stop` items."""
    with StageWriter(folder, STAGE, KINDS, every) as writer:
        total: float = writer.state.get("total", 0.0)
        writer.snapshot = lambda: {"total": total}
        if not writer.resumed:
            writer.extend({"trajectories": [trajectory_row(replace(TRAJECTORY, id="first"))]})
        for number in range(writer.items, len(items)):
            if number == stop:
                raise SapoError("the engine died")
            total += 0.1 * items[number][0]
            await writer.add(rows(number, items[number]))
    return {"total": total, "rows": writer.rows("trajectories"), "files": writer.files}


def contents(folder: Folder) -> dict[str, Any]:
    """The rows of every shard."""
    return {name: pq.read_table(folder.open(name)).to_pylist() for name in folder.sizes() if name.endswith(".parquet")}


ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12)
KILLS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4)


@settings(max_examples=60)
@given(items=ITEMS, every=st.integers(1, 5), kills=KILLS)
def test_a_stage_killed_at_any_write_and_gone_on_with_is_an_undisturbed_one(
    items: list[Item], every: int, kills: list[tuple[int, bool]]
) -> None:
    with tempfile.TemporaryDirectory() as home:
        undisturbed, killed = Folder(Path(home, "undisturbed")), Path(home, "killed")
        expected = asyncio.run(work(undisturbed, items, every))
        for writes, before in kills:
            try:
                asyncio.run(work(DyingFolder(killed, writes, before=before), items, every))
            except KilledError:
                continue
        assert asyncio.run(work(Folder(killed), items, every)) == expected
        assert contents(Folder(killed)) == contents(undisturbed)
        assert Folder(killed).sizes().keys() == {*expected["files"], RECORD}
        check_files(undisturbed, expected["files"])
        assert [row["trajectory_id"] for row in read_rows(killed / "round-1" / "trajectories")] == [
            "first",
            *(f"{number}/{k}" for number, item in enumerate(items) for k in range(item[0])),
        ]


@settings(max_examples=30)
@given(items=ITEMS, every=st.integers(1, 5), stops=st.lists(st.integers(0, 12), max_size=3))
def test_a_stage_that_is_stopped_keeps_every_item_it_has_done(items: list[Item], every: int, stops: list[int]) -> None:
    with tempfile.TemporaryDirectory() as home:
        expected = asyncio.run(work(Folder(Path(home, "undisturbed")), items, every))
        folder, done = Folder(Path(home, "stopped")), 0
        for stop in stops:
            try:
                asyncio.run(work(folder, items, every, stop))
            except SapoError:
                done = max(done, stop)
            else:
                done = len(items)
            assert (json.loads(folder.read(RECORD))["items"] if folder.has(RECORD) else 0) == done
        notes = asyncio.run(work(folder, items, every))
        assert {**notes, "files": None} == {**expected, "files": None}
        for kind in KINDS:
            assert list(read_rows(Path(home, "stopped", "round-1", kind))) == list(
                read_rows(Path(home, "undisturbed", "round-1", kind))
            )


def test_a_stage_of_slow_items_is_written_before_a_shard_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapo_ray.shards.COMMIT_SECONDS", 0)
    items = [(2, 1)] * 4
    with pytest.raises(KilledError):  # at the first shard of its fourth item
        asyncio.run(work(DyingFolder(tmp_path, 3 * (len(KINDS) + 1), before=True), items, every=100))
    assert read_progress(Folder(tmp_path), RECORD)["items"] == 3


@pytest.mark.parametrize("writes", range(12))
def test_a_store_that_is_away_for_a_moment_leaves_no_part_of_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Shards end in the middle of items here."""
    monkeypatch.setattr(shards, "_SHARD_ROWS", 2)
    items = [(3, 2), (1, 0), (3, 3)]
    expected = asyncio.run(work(Folder(tmp_path / "undisturbed"), items, 2))
    with suppress(SapoError):
        asyncio.run(work(FailingFolder(tmp_path / "stopped", writes), items, 2))
    notes = asyncio.run(work(Folder(tmp_path / "stopped"), items, 2))
    assert {**notes, "files": None} == {**expected, "files": None}
    for kind in KINDS:
        one, other = (list(read_rows(tmp_path / name / "round-1" / kind)) for name in ("stopped", "undisturbed"))
        assert one == other


def test_a_stage_goes_on_in_an_object_store(s3: str) -> None:
    items = [(2, 1)] * 5
    folder = Folder(s3.format("stage"))
    with pytest.raises(SapoError, match="the engine died"):
        asyncio.run(work(folder, items, 2, stop=3))
    folder.write("round-1/trajectories/part-00009.parquet", b"left by an attempt that was killed")
    notes = asyncio.run(work(folder, items, 2))
    assert notes["rows"] == 11
    assert folder.sizes().keys() == {*notes["files"], RECORD}
    assert len(list(read_rows(folder.locate("round-1/trajectories")))) == 11
    check_files(folder, notes["files"])


def test_a_stage_whose_run_has_another_driver_by_now_writes_no_more(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    lease = {"driver": "one", "host": "far", "pid": 7, "since": 0.0}
    folder.write(LEASE, json.dumps(lease))

    async def overtaken() -> None:
        with StageWriter(HeldFolder(tmp_path, "one"), STAGE, KINDS, 1) as writer:
            await writer.add(rows(0, (1, 1)))
            folder.write(LEASE, json.dumps({**lease, "driver": "another"}))
            await writer.add(rows(1, (1, 1)))

    with pytest.raises(LostLeaseError, match="taken over by another driver: host far, pid 7"):
        asyncio.run(overtaken())
    assert json.loads(folder.read(RECORD))["items"] == 1
    assert len(contents(folder)) == 2


def test_a_stage_that_meets_a_full_disk_goes_on_once_there_is_space(disk: Disk, tmp_path: Path) -> None:
    items = [(2, 1)] * 6
    expected = asyncio.run(work(Folder(tmp_path / "undisturbed"), items, 2))
    folder = Folder(disk.path / "run")
    with pytest.raises(SapoError, match="the engine died"):
        asyncio.run(work(folder, items, 2, stop=3))
    disk.fill()
    shard = r"round-1/(trajectories|rollouts)/part-0000\d.parquet"
    for _ in range(2):
        with pytest.raises(SapoError, match=f"{disk.path}/run/{shard} cannot be written: No space left on device$"):
            asyncio.run(work(folder, items, 2))
        assert json.loads(folder.read(RECORD))["items"] == 3
        check_files(folder, json.loads(folder.read(RECORD))["files"])
    disk.free()
    notes = asyncio.run(work(folder, items, 2))
    assert {**notes, "files": None} == {**expected, "files": None}
    assert folder.sizes().keys() == {*notes["files"], RECORD}
    for kind in KINDS:
        assert list(read_rows(folder.locate(f"round-1/{kind}"))) == list(
            read_rows(tmp_path / "undisturbed" / "round-1" / kind)
        )


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    asyncio.run(work(Folder(tmp_path), [(1, 0)], 1))
    assert [set(row) for row in read_rows(tmp_path / "round-1" / "trajectories", ["steps"])] == [{"steps"}] * 2
