"""The run directory: what is written comes back, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapo_ray.data import LABELS, Estimate, LabelledTrajectory, PreferencePair, Rollout, Trajectory
from sapo_ray.errors import SapoError
from sapo_ray.lease import LEASE, LostLeaseError
from sapo_ray.shards import SCHEMAS, Kind, read_rows
from sapo_ray.store import (
    RunDirectory,
    label_row,
    labelled_of,
    pair_row,
    rollout_of,
    rollout_row,
    trajectory_of,
    trajectory_row,
)

TRAJECTORY = Trajectory("t", "q", "7+3", ("7+3=0\n",), "0", correct=True)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    store = RunDirectory(tmp_path / "run")
    store.create()
    return store


def write(store: RunDirectory, number: int, kind: Kind, rows: list[dict[str, Any]]) -> None:
    with closing(store.writer(number, kind)) as writer:
        writer.extend(rows)
    assert writer.rows == len(rows)


TEXT = st.text(max_size=6)
STEPS = st.lists(TEXT, max_size=3).map(tuple)
ANSWER = st.none() | TEXT
FLOATS = st.floats(0, 1, width=32)
COUNT = st.integers(0, 2**31 - 1)
TRAJECTORIES = st.builds(
    Trajectory,
    id=TEXT,
    question_id=TEXT,
    question=TEXT,
    steps=STEPS,
    answer=ANSWER,
    correct=st.booleans(),
    source=st.sampled_from(["sampled", "expanded", "original"]),
    truncated=st.booleans(),
)
ESTIMATES = st.builds(
    Estimate, step=st.integers(-1, 9), value=st.integers(0, 1), successes=COUNT, tried=COUNT, rollout_ids=STEPS
)
LABELLED = st.builds(
    LabelledTrajectory,
    trajectory=TRAJECTORIES,
    labeler=TEXT,
    step_labels=st.lists(st.sampled_from([1, 0, -1]), max_size=3).map(tuple),
    scores=st.none() | st.lists(FLOATS, max_size=3).map(tuple),
    predicted_first_error=st.none() | COUNT,
    estimates=st.lists(ESTIMATES, max_size=2).map(tuple),
    case=st.none() | st.sampled_from(["correct", "a", "b", "c", "d"]),
    parent_id=ANSWER,
    branch_step=st.none() | st.integers(-1, 9),
    rollout_id=ANSWER,
)
ROLLOUTS = st.builds(
    Rollout,
    id=TEXT,
    trajectory_id=TEXT,
    question_id=TEXT,
    branch_step=st.integers(-1, 9),
    sample=COUNT,
    steps=STEPS,
    answer=ANSWER,
    correct=st.booleans(),
    truncated=st.booleans(),
    kept=st.booleans(),
)
PAIRS = st.builds(
    PreferencePair,
    question_id=TEXT,
    question=TEXT,
    chosen_id=TEXT,
    chosen=STEPS,
    chosen_score=st.none() | FLOATS,
    rejected_id=ANSWER,
    rejected=st.none() | STEPS,
    rejected_score=st.none() | FLOATS,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trajectories=st.lists(TRAJECTORIES, max_size=3),
    labelled=st.lists(LABELLED, max_size=3),
    rollouts=st.lists(ROLLOUTS, max_size=3),
    pairs=st.lists(PAIRS, max_size=3),
)
def test_every_record_comes_back(
    run: RunDirectory,
    trajectories: list[Trajectory],
    labelled: list[LabelledTrajectory],
    rollouts: list[Rollout],
    pairs: list[PreferencePair],
) -> None:
    write(run, 1, "trajectories", [trajectory_row(t) for t in trajectories])
    write(run, 1, "labels", [label_row(row) for row in labelled])
    write(run, 1, "rollouts", [rollout_row(r) for r in rollouts])
    write(run, 1, "pairs", [pair_row(p) for p in pairs])
    assert [trajectory_of(row) for row in run.read(1, "trajectories")] == trajectories
    assert [labelled_of(row) for row in run.read(1, "labels")] == labelled
    assert [trajectory_of(row) for row in run.read(1, "labels")] == [row.trajectory for row in labelled]
    assert [rollout_of(row) for row in run.read(1, "rollouts")] == rollouts
    read = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in run.read(1, "pairs")]
    assert read == [asdict(pair) for pair in pairs]


def test_labels_have_the_columns_that_are_promised(run: RunDirectory) -> None:
    promised = (
        "trajectory_id question_id question steps answer correct source labeler scores predicted_first_error estimates "
        "case step_labels parent_id branch_step rollout_id"
    )
    assert set(promised.split()) <= set(LABELS.names)
    write(run, 0, "labels", [label_row(LabelledTrajectory(TRAJECTORY, "omega", (1,)))])
    (row,) = run.read(0, "labels")
    assert list(row) == LABELS.names
    assert {key for key, value in row.items() if value is None} == {
        *("scores", "predicted_first_error", "case", "parent_id", "branch_step", "rollout_id")
    }


@pytest.mark.parametrize(
    ("count", "shards"), [(0, [0]), (4096, [4096]), (4097, [4096, 1]), (10000, [4096, 4096, 1808])]
)
def test_rows_are_written_in_shards_and_read_in_their_order(run: RunDirectory, count: int, shards: list[int]) -> None:
    write(run, 0, "original", [trajectory_row(replace(TRAJECTORY, id=str(i))) for i in range(count)])
    files = sorted(Path(run.dataset(0, "original")).iterdir())
    assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(len(shards))]
    assert [pq.read_metadata(file).num_rows for file in files] == shards
    assert all(pq.read_schema(file).equals(SCHEMAS["original"]) for file in files)
    assert [row["trajectory_id"] for row in run.read(0, "original")] == [str(i) for i in range(count)]


def test_a_stage_that_broke_off_is_not_done_and_starts_anew(run: RunDirectory) -> None:
    rows = [trajectory_row(replace(TRAJECTORY, id=str(i))) for i in range(5000)]
    writer = run.writer(1, "trajectories")
    writer.extend(rows[:4096])
    writer.flush()
    writer.extend(rows[4096:])  # and never closed: the process died
    (Path(run.dataset(1, "trajectories")) / "part-00001.parquet.0.tmp").write_bytes(b"half a shard")
    assert run.done("round-1/sample") is None
    assert len(list(run.read(1, "trajectories"))) == 4096

    write(run, 1, "trajectories", rows[:3])
    run.finish("round-1/sample", {"labels": 3})
    assert [row["trajectory_id"] for row in run.read(1, "trajectories")] == ["0", "1", "2"]
    assert [file.name for file in Path(run.dataset(1, "trajectories")).iterdir()] == ["part-00000.parquet"]


def test_a_row_that_does_not_fit_leaves_no_half_shard(run: RunDirectory) -> None:
    folder = Path(run.dataset(0, "original"))
    writer = run.writer(0, "original")
    writer.extend([trajectory_row(TRAJECTORY), {**trajectory_row(TRAJECTORY), "steps": 7}])
    with pytest.raises(pa.ArrowException):
        writer.close()
    assert list(folder.glob("*.parquet")) == []


def test_absent_data_sets_have_no_rows_but_absent_files_are_errors(run: RunDirectory, tmp_path: Path) -> None:
    assert list(run.read(7, "pairs")) == []
    assert list(read_rows(tmp_path / "nothing")) == []
    with pytest.raises(SapoError, match=r"gone\.parquet cannot be read: no such file"):
        list(read_rows(tmp_path / "gone.parquet"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"trajectory_id": "t"}\n')
    with pytest.raises(SapoError, match=f"{name} cannot be read: ") as error:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_single_shard_and_a_directory_named_like_one_can_be_read(run: RunDirectory, tmp_path: Path) -> None:
    write(run, 0, "original", [trajectory_row(TRAJECTORY)])
    shard = Path(run.dataset(0, "original")) / "part-00000.parquet"
    assert [trajectory_of(row) for row in read_rows(shard)] == [TRAJECTORY]
    (tmp_path / "set.parquet").mkdir()
    shard.rename(tmp_path / "set.parquet" / "part-0.parquet")
    assert [trajectory_of(row) for row in read_rows(tmp_path / "set.parquet")] == [TRAJECTORY]


def test_the_manifest_keeps_every_stage(run: RunDirectory) -> None:
    assert run.done("round-0/sft") is None
    run.finish("round-0/sft", {"loss": 0.5})
    run.finish("round-0/sample", {"labels": 3, "files": {"x": {"size": 1, "sha256": "0"}}})
    again = RunDirectory(run.path)
    assert again.done("round-0/sft") == {"loss": 0.5}
    assert again.stages() == {"round-0/sft": {"loss": 0.5}, "round-0/sample": {"labels": 3}}
    assert not list(run.path.glob("*.tmp"))


def test_a_figure_that_is_no_number_is_refused_and_nothing_is_written(run: RunDirectory) -> None:
    run.finish("a", {"loss": 1.0})
    with pytest.raises(SapoError, match=r"manifest\.json: a figure is not a number"):
        run.finish("b", {"loss": float("nan")})
    with pytest.raises(SapoError, match=r"summary\.json: a figure is not a number"):
        run.write_summary({"rounds": [float("inf")]})
    with pytest.raises(SapoError, match=r"metrics\.jsonl: a figure is not a number"):
        run.log("b", [{"loss": float("nan")}])
    assert run.stages() == {"a": {"loss": 1.0}}
    assert {file.name for file in run.path.iterdir()} == {"checkpoints", "manifest.json"}


def test_metrics_are_appended_once_a_stage_and_the_summary_replaced(run: RunDirectory) -> None:
    with pytest.raises(FileNotFoundError):
        run.summary()
    run.log("a", [{"update": 1, "loss": 1.0}, {"seconds": 2.0}])
    for loss in (0.5, 0.25):  # the first attempt broke off before it was entered
        run.log("b", [{"loss": loss}])
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "a", "update": 1, "loss": 1.0},
        {"stage": "a", "seconds": 2.0},
        {"stage": "b", "loss": 0.25},
    ]
    run.write_summary({"rounds": []})
    run.write_summary({"rounds": [{"round": 0}]})
    assert run.summary() == {"rounds": [{"round": 0}]}


def test_all_data_until_a_round_without_repeats(run: RunDirectory) -> None:
    def row(name: str, steps: str, question: str = "q") -> dict[str, Any]:
        return trajectory_row(replace(TRAJECTORY, id=name, steps=tuple(steps), question_id=question))

    write(run, 0, "original", [row("o", "ab")])
    write(run, 0, "trajectories", [row("0/a", "ab"), row("0/b", "cd"), row("0/c", "ab", "p")])
    write(run, 1, "trajectories", [row("1/a", "cd"), row("1/b", "ef")])
    write(run, 2, "trajectories", [row("2/a", "gh")])
    assert [t.id for t in run.trajectories_until(0)] == ["o", "0/b", "0/c"]
    assert [t.id for t in run.trajectories_until(1)] == ["o", "0/b", "0/c", "1/b"]
    assert [t.id for t in run.trajectories_until(9)] == ["o", "0/b", "0/c", "1/b", "2/a"]


WRITES: dict[str, Callable[[RunDirectory], object]] = {
    "finish": lambda run: run.finish("b", {}),
    "log": lambda run: run.log("b", [{"loss": 1.0}]),
    "summary": lambda run: run.write_summary({"rounds": []}),
    "forget": lambda run: run.forget("a"),
    "rows": lambda run: write(run, 0, "original", [trajectory_row(TRAJECTORY)]),
    "file": lambda run: run.write_file("checkpoints/verifier-0/calibration.json", "{}"),
    "copy": lambda run: run.copy_checkpoint("checkpoints/verifier-0", "checkpoints/verifier-1"),
    "staging": lambda run: ExitStack().enter_context(run.folder.staging("checkpoints/verifier-1")),
    "add": lambda run: run.folder.add(run.path, ["manifest.json"], "tensorboard"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_driver_writes_while_it_has_the_lease(run: RunDirectory, kind: str) -> None:
    lease = {"driver": "mine", "host": "far", "pid": 7, "since": 0.0}
    run.folder.write(LEASE, json.dumps(lease))
    held = RunDirectory(run.path, "mine")
    held.finish("a", {"files": held.write_file("checkpoints/verifier-0/config.json", "{}")})
    for now, why in (
        ({**lease, "driver": "other"}, "taken over by another driver: host far, pid 7"),
        (None, "is gone"),
    ):
        if now:
            run.folder.write(LEASE, json.dumps(now))
        else:
            run.folder.remove([LEASE])
        before = {name: run.folder.read(name) for name in run.folder.sizes()}
        with pytest.raises(LostLeaseError, match=f"{why}.*; this one stops"):
            WRITES[kind](held)
        assert {name: run.folder.read(name) for name in run.folder.sizes()} == before
    run.folder.write(LEASE, json.dumps(lease))
    WRITES[kind](held)


def test_opening_a_run_touches_nothing(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "new")
    assert store.stages() == {}
    assert store.trajectories_until(3) == []
    assert not store.path.exists()
