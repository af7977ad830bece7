"""Files that are not what was written: found, named, and never read as good data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sapo_ray.cache import local_checkpoint
from sapo_ray.data import Trajectory
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.manifest import DamagedError, Files, Manifest, content_of, sealed, unsealed
from sapo_ray.models import Calibration
from sapo_ray.store import RunDirectory, trajectory_row

SHARD = "round-0/original/part-00000.parquet"
WEIGHTS = "checkpoints/reasoner-0/model.safetensors"
ROW = trajectory_row(Trajectory("t", "q", "7+3", ("7+3=0\n",), "0", correct=True))


def flip(folder: Folder, name: str) -> None:
    content = bytearray(folder.read(name))
    place = random.Random(name).randrange(len(content))
    content[place] ^= 1
    folder.write(name, bytes(content))


def truncate(folder: Folder, name: str) -> None:
    folder.write(name, folder.read(name)[:-7])


def empty(folder: Folder, name: str) -> None:
    folder.write(name, b"")


def delete(folder: Folder, name: str) -> None:
    folder.remove([name])


RECORD = {"items": 3, "seconds": 0.1, "state": {"é": [None, 1e-7]}, "files": {}}
NO_RECORDS = [
    ('{"items": 3, "sec', "is damaged: Unterminated string"),
    ("{}", "has no sha256 of itself: it is damaged, or of an earlier version"),
    ("[]", "has no sha256 of itself"),
    (json.dumps(RECORD), "has no sha256 of itself"),
    (sealed("sample", RECORD).replace("3", "2", 1), "is damaged: its sha256 of itself is of another content"),
]

Damage = Callable[[Folder, str], None]
SAYS = {
    flip: r"is damaged: its SHA-256 was [0-9a-f]{64} and is [0-9a-f]{64}",
    truncate: r"is damaged: \d+ bytes were written, \d+ are there",
    empty: r"is damaged: \d+ bytes were written, 0 are there",
    delete: r"is missing; \d+ bytes were written",
}
damages = pytest.mark.parametrize("damage", SAYS, ids=lambda damage: damage.__name__)


@pytest.fixture
def run(location: str) -> RunDirectory:
    """A run whose first two stages, a data set and a checkpoint, have finished."""
    run = RunDirectory(location)
    run.create()
    with closing(run.writer(0, "original")) as writer:
        writer.extend([ROW] * 3)
    run.finish("round-0/original", {"files": writer.files})
    run.finish("round-0/sft", {"loss": 0.5, "files": put(run, "checkpoints/reasoner-0")})
    return run


def put(run: RunDirectory, name: str) -> Files:
    with run.folder.staging(name) as directory:
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
        return run.put(directory, name)


def here(run: RunDirectory, message: str) -> str:
    """An error's text without the place of the run."""
    start, _, parameters = run.location.partition("?")
    return message.replace(start, "RUN").replace(f"?{parameters}", "")


@damages
def test_a_damaged_shard_is_not_read(run: RunDirectory, damage: Damage) -> None:
    damage(run.folder, SHARD)
    with pytest.raises(DamagedError, match=SAYS[damage]) as error:
        list(run.read(0, "original"))
    message = here(run, str(error.value))
    assert message.startswith(f"RUN/{SHARD} is ")
    assert message.endswith(
        "; restore it from a copy, or do round-0/original and all that came after it again: "
        "sapo run … --redo round-0/original"
    )


@damages
@pytest.mark.parametrize("name", [WEIGHTS, "checkpoints/reasoner-0/config.json"])
def test_a_damaged_checkpoint_is_not_loaded(run: RunDirectory, damage: Damage, name: str) -> None:
    damage(run.folder, name)
    for _ in range(2):
        with pytest.raises(DamagedError, match=SAYS[damage]) as error:
            local_checkpoint(run.checkpoint("reasoner", 0))
        assert here(run, str(error.value)).startswith(f"RUN/{name} is ")


def test_damage_is_found_after_a_checkpoint_was_good(run: RunDirectory) -> None:
    """In a store the node's own copy is what was written; on a local path the file itself is loaded."""
    good = Path(local_checkpoint(run.checkpoint("reasoner", 0)), "model.safetensors").read_bytes()
    flip(run.folder, WEIGHTS)
    if run.folder.path is None:
        assert Path(local_checkpoint(run.checkpoint("reasoner", 0)), "model.safetensors").read_bytes() == good
    else:
        with pytest.raises(DamagedError, match=SAYS[flip]):
            local_checkpoint(run.checkpoint("reasoner", 0))


@damages
def test_the_last_stage_is_done_again_where_its_file_is_damaged(run: RunDirectory, damage: Damage) -> None:
    run.folder.write("checkpoints/reasoner-0/notes.txt", "left by something else")
    run.folder.write("checkpoints/verifier-0.partial/update-3/state.pt", "begun from what is damaged")
    damage(run.folder, WEIGHTS)
    (what,) = run.check()
    assert here(run, what).startswith(f"RUN/{WEIGHTS} is ")
    assert what.endswith("; round-0/sft is done again")
    assert list(run.stages()) == ["round-0/original"]
    assert run.folder.sizes().keys() == {SHARD, "manifest.json"}
    assert not (run.folder.path and Path(run.checkpoint("reasoner", 0)).exists())
    assert run.check() == []


@pytest.mark.parametrize("damage", [truncate, empty, delete], ids=lambda damage: damage.__name__)
def test_the_run_stops_where_a_later_stage_may_have_used_a_damaged_file(run: RunDirectory, damage: Damage) -> None:
    damage(run.folder, SHARD)
    before = run.folder.sizes()
    with pytest.raises(DamagedError, match=SAYS[damage]) as error:
        run.check()
    assert here(run, str(error.value)).startswith(f"RUN/{SHARD} is ")
    assert str(error.value).endswith("--redo round-0/original")
    assert run.folder.sizes() == before


def test_a_stage_without_files_counts_as_later(run: RunDirectory) -> None:
    run.finish("round-0/evaluate", {"test": 1})
    truncate(run.folder, WEIGHTS)
    with pytest.raises(DamagedError, match="--redo round-0/sft"):
        run.check()


def test_a_stage_that_is_done_again_takes_what_came_after_it_along(run: RunDirectory) -> None:
    run.finish("round-0/calibrate", {"files": run.write_file("checkpoints/reasoner-0/calibration.json", "{}")})
    with closing(run.writer(0, "labels")) as writer:
        writer.extend([])
    run.folder.write("round-0/sample.progress.json", "{}")
    run.folder.write("notes.txt", "the user's own")
    assert run.forget("round-0/calibrate") == ["round-0/calibrate"]
    kept = {"manifest.json", "notes.txt", SHARD, WEIGHTS, "checkpoints/reasoner-0/config.json"}
    assert run.folder.sizes().keys() == kept
    assert run.forget("round-0/original") == ["round-0/original", "round-0/sft"]
    assert run.folder.sizes().keys() == {"manifest.json", "notes.txt"}
    with pytest.raises(SapoError, match=r"round-0/sft is no finished stage; finished are none"):
        run.forget("round-0/sft")


def test_a_kill_while_stages_are_forgotten_leaves_no_unfinished_one_to_go_on_with(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.folder.write("round-1/sample.progress.json", "{}")
    run.folder.write("checkpoints/reasoner-1.partial/latest.json", "{}")
    forget = Manifest.forget

    def killed(self: Manifest, first: str) -> list[str]:
        forget(self, first)
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "forget", killed)
    with pytest.raises(KeyboardInterrupt):
        run.forget("round-0/sft")
    assert list(run.stages()) == ["round-0/original"]
    assert run.folder.sizes().keys() == {"manifest.json", SHARD, WEIGHTS, "checkpoints/reasoner-0/config.json"}


@damages
def test_the_progress_of_a_stage_is_given_up_where_its_shard_is_damaged(run: RunDirectory, damage: Damage) -> None:
    name = "round-1/trajectories/part-00000.parquet"
    record = {"items": 3, "seconds": 0.0, "state": {}, "files": run.write_file(name, "some rows of it")}
    run.folder.write("round-1/sample.progress.json", sealed("sample", record))
    assert run.check() == []
    damage(run.folder, name)
    (what,) = run.check()
    assert here(run, what).startswith(f"RUN/{name} is ")
    assert what.endswith("; round-1/sample begins anew")
    with run.stage_writer("round-1/sample", ["trajectories"], 1) as writer:
        assert (writer.items, writer.resumed) == (0, False)


@pytest.mark.parametrize(("content", "fault"), NO_RECORDS)
def test_a_damaged_progress_record_is_named_and_given_up(run: RunDirectory, content: str, fault: str) -> None:
    name = "round-1/sample.progress.json"
    run.folder.write(name, content)
    with pytest.raises(DamagedError, match=fault) as error:
        run.stage_writer("round-1/sample", ["trajectories"], 1)
    assert here(run, str(error.value)).startswith(f"RUN/{name} ")
    assert str(error.value).endswith("; remove it to begin round-1/sample anew")
    (what,) = run.check()
    assert here(run, what).startswith(f"RUN/{name} ")
    assert what.endswith("; round-1/sample begins anew")
    assert run.check() == []


def test_a_record_is_read_as_it_was_written() -> None:
    assert unsealed("sample", sealed("sample", RECORD).encode()) == RECORD


def test_a_record_that_a_kill_left_beside_its_finished_stage_goes(run: RunDirectory) -> None:
    before = run.folder.sizes()
    run.folder.write("round-0/original.progress.json", '{"items": 3, "sec')
    assert run.check() == []
    assert run.folder.sizes() == before


def test_a_damaged_manifest_is_named(run: RunDirectory) -> None:
    truncate(run.folder, "manifest.json")
    with pytest.raises(SapoError, match=r"is damaged: .*; restore it from a copy") as error:
        run.stages()
    assert here(run, str(error.value)).startswith("RUN/manifest.json is damaged: ")


@pytest.mark.parametrize("content", ["{", '{"threshold": 0.5, "other": 1}', "[]"])
def test_a_file_that_is_no_calibration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(SapoError, match=f"{tmp_path}/calibration.json is no calibration: "):
        Calibration.load(str(tmp_path))


def test_a_calibration_is_held_against_the_manifest(run: RunDirectory) -> None:
    name, calibration = "checkpoints/reasoner-0/calibration.json", Calibration(0.5, 0.25)
    assert Calibration.load(run.checkpoint("reasoner", 0)) is None
    run.finish("round-0/calibrate", {"files": run.write_file(name, calibration.text())})
    assert Calibration.load(run.checkpoint("reasoner", 0)) == calibration
    run.folder.write(name, calibration.text().replace("5", "6"))
    with pytest.raises(DamagedError, match=r"calibration\.json.* is damaged: its SHA-256 .*--redo round-0/calibrate"):
        Calibration.load(run.checkpoint("reasoner", 0))


def test_a_copied_checkpoint_has_the_records_of_its_source(run: RunDirectory) -> None:
    files = run.copy_checkpoint("checkpoints/reasoner-0", "checkpoints/reasoner-1")
    run.finish("round-1/align", {"files": files})
    assert run.check() == []
    copy = Path(local_checkpoint(run.checkpoint("reasoner", 1)))
    assert (copy / "model.safetensors").read_bytes() == run.folder.read(WEIGHTS)


def test_shards_beside_those_recorded_are_not_read(run: RunDirectory) -> None:
    run.folder.write("round-0/original/part-00001.parquet", run.folder.read(SHARD))
    assert [row["trajectory_id"] for row in run.read(0, "original")] == ["t"] * 3


def test_content_is_known_by_its_files_and_not_by_their_place(run: RunDirectory, tmp_path: Path) -> None:
    before = content_of(run.dataset(0, "original"))
    assert before != content_of(run.checkpoint("reasoner", 0)) is not None
    run.finish("round-1/align", {"files": run.copy_checkpoint("checkpoints/reasoner-0", "checkpoints/reasoner-1")})
    assert content_of(run.checkpoint("reasoner", 1)) == content_of(run.checkpoint("reasoner", 0))
    with closing(run.writer(0, "original")) as writer:
        writer.extend([{**ROW, "answer": "1"}] * 3)
    run.finish("round-0/original", {"files": writer.files})
    assert content_of(run.dataset(0, "original")) not in (before, None)
    assert content_of(run.dataset(0, "labels")) is None
    assert content_of(str(tmp_path / "of" / "my" / "own")) is content_of("organisation/model") is None
