from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapo_ray import tracking
from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.store import RunDirectory
from sapo_ray.tracking import Tracking, check_installed
from tests.disks import Disk

KEY = "0123456789abcdef0123456789abcdef01234567"
NOTES = {"test": {"n": 20, "greedy_accuracy": 0.5, "ci95": [0.3, 0.7]}, "verifier": None, "loss": 1.0, "seconds": 9.0}


@pytest.fixture
def store(tmp_path: Path) -> RunDirectory:
    store = RunDirectory(tmp_path / "run")
    store.create()
    return store


def updates(first: int, last: int, loss: float = 0.0) -> list[dict[str, float]]:
    return [{"update": n, "loss": loss or 1 / n, "lr": 0.1} for n in range(first, last + 1)]


def tracked(store: RunDirectory, kind: Any, *, first: int = 1, last: int = 3, loss: float = 0.0) -> None:
    """What one driver tells of a run: a training, then an evaluation if the training got to its end."""
    warnings: list[str] = []
    tracker = Tracking(RunConfig(tracking=kind), store, warnings.append)
    tracker.open()
    tracker.updates("round-1/align", updates(first, last, loss))
    if last == 3:
        tracker.stage("round-1/evaluate", NOTES)
    tracker.close(finished=last == 3)
    assert warnings == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_updates_by_stage_and_notes_by_round(store: RunDirectory) -> None:
    tracked(store, "tensorboard")
    assert scalars(store.path / "tensorboard" / "round-1" / "align") == {
        "align/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "align/lr": [(1, 0.1), (2, 0.1), (3, 0.1)],
    }
    assert scalars(store.path / "tensorboard" / "evaluate") == {
        "evaluate/test/n": [(1, 20.0)],
        "evaluate/test/greedy_accuracy": [(1, 0.5)],
        "evaluate/seconds": [(1, 9.0)],
    }


@pytest.mark.parametrize(("first", "kept"), [(1, []), (2, [(1, 1.0)])])
def test_a_training_that_is_done_again_shows_every_update_once(
    store: RunDirectory, first: int, kept: list[tuple[int, float]]
) -> None:
    """From its start, or from a mid-training checkpoint."""
    tracked(store, "tensorboard", last=2)
    tracked(store, "tensorboard", first=first, loss=7.0)
    found = scalars(store.path / "tensorboard" / "round-1" / "align")["align/loss"]
    assert found == [*kept, *((step, 7.0) for step in range(first, 4))]


def test_tensorboard_on_a_full_disk_is_let_go_with_one_warning(disk: Disk, capfd: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    store = RunDirectory(disk.path / "run")
    store.create()
    tracker = Tracking(RunConfig(tracking="tensorboard"), store, warnings.append)
    tracker.open()
    tracker.updates("round-1/align", updates(1, 3))
    disk.fill()
    tracker.updates("round-1/align", updates(4, 400))
    tracker.stage("round-1/evaluate", NOTES)
    tracker.close(finished=True)
    (warning,) = warnings
    assert warning.startswith("tracking by tensorboard ends here: [Errno 28] No space left on device; metrics.jsonl")
    assert "Traceback" not in capfd.readouterr().err


def test_in_an_object_store_the_files_are_there_once_a_stage_has_ended(s3: str, tmp_path: Path) -> None:
    store = RunDirectory(s3.format("tracked"))
    tracked(store, "tensorboard")
    files = store.folder.sizes("tensorboard")
    assert {file.rpartition("/")[0] for file in files} == {"tensorboard/round-1/align", "tensorboard/evaluate"}
    store.folder.fetch(files, tmp_path)
    assert scalars(tmp_path / "tensorboard" / "evaluate")["evaluate/seconds"] == [(1, 9.0)]


def test_nothing_is_written_where_nothing_is_wanted(store: RunDirectory) -> None:
    before = sorted(store.path.rglob("*"))
    tracked(store, "none")
    assert sorted(store.path.rglob("*")) == before


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(SapoError) as caught:
        check_installed(RunConfig(tracking=package))
    assert str(caught.value) == f"tracking is {package}, which is not installed: pip install {package}"
    check_installed(RunConfig(tracking="none"))


def test_a_tracker_that_cannot_begin_stops_the_run_and_one_that_fails_later_does_not(
    store: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable:
        calls = 0

        def log(self, *_: Any) -> None:
            Unreachable.calls += 1
            raise ConnectionError("no route\nto host")

        def flush(self) -> None: ...

        def close(self, finished: bool) -> None:
            raise AssertionError("it was let go")

    warnings: list[str] = []
    monkeypatch.setattr(tracking, "open_tracker", lambda *_: Unreachable())
    tracker = Tracking(RunConfig(), store, warnings.append)
    tracker.open()
    tracker.updates("round-1/align", updates(1, 3))
    tracker.close(finished=True)
    assert Unreachable.calls == 1
    assert warnings == [
        "tracking by tensorboard ends here: no route to host; metrics.jsonl goes on and has every figure"
    ]

    monkeypatch.setattr(tracking, "open_tracker", lambda *_: 1 / 0)
    with pytest.raises(SapoError, match="tracking by tensorboard cannot begin: division by zero"):
        Tracking(RunConfig(), store, warnings.append).open()


def histories(file: Path) -> Iterator[dict[str, str]]:
    """What was logged to a .wandb file: protocol buffers in LevelDB's log format, here all in its first block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at = file.read_bytes(), 7
    assert len(data) < 32 * 1024
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record.FromString(data[at + 7 : at + 7 + length])
        if record.HasField("history"):
            yield {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        at += 7 + length


def test_weights_and_biases_offline_is_one_run_that_goes_on_and_keeps_no_key(
    store: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracked(store, "wandb", last=2)
    tracked(store, "wandb", first=2)
    files = sorted(store.path.rglob("*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # the run's id
    found = [history for file in files for history in histories(file)]
    align = [r for r in found if "round-1/align/loss" in r]
    losses = [(int(r["round-1/align/step"]), float(r["round-1/align/loss"])) for r in align]
    assert losses == [(1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [float(r["evaluate/test/greedy_accuracy"]) for r in found if "evaluate/step" in r] == [0.5]
    assert not [file for file in store.path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_mlflow_keeps_one_run_that_goes_on_with_its_parameters(
    store: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    tracked(store, "mlflow", last=2)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(tracking.PROJECT).experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]
    tracked(store, "mlflow", first=2)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["align.beta"] == "0.1"
    losses = client.get_metric_history(run.info.run_id, "round-1/align/loss")
    assert sorted((m.step, m.value) for m in losses) == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["evaluate/test/greedy_accuracy"] == 0.5
