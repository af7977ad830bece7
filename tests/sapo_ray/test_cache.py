"""Checkpoints in an object store, as directories of a node."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapo_ray import cache as module
from sapo_ray.cache import local_checkpoint
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.manifest import DamagedError
from sapo_ray.models import ModelConfig, base_tokenizer, parameter_count, save_random_reasoner
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32)
ASK = "import sys; from sapo_ray.cache import local_checkpoint; print(local_checkpoint(sys.argv[1]))"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with an empty cache."""
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(s3: str, tmp_path: Path) -> RunDirectory:
    run = RunDirectory(s3.format(tmp_path.name))
    for number in range(2):
        with run.folder.staging(f"checkpoints/reasoner-{number}") as directory:
            save_random_reasoner(MODEL, VOCABULARY, number, directory)
            run.finish(f"round-{number}/align", {"files": run.put(directory, f"checkpoints/reasoner-{number}")})
    return run


def test_processes_that_ask_at_once_get_one_whole_copy(run: RunDirectory, node: Path) -> None:
    command = [sys.executable, "-c", ASK, run.checkpoint("reasoner", 0)]
    asking = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in asking}
    assert [process.returncode for process in asking] == [0, 0, 0]
    (copy,) = (Path(answer.strip()) for answer in answers)
    files = {str(file.relative_to(copy)) for file in copy.rglob("*")}
    assert {f"checkpoints/reasoner-0/{file}" for file in files} == run.folder.sizes("checkpoints/reasoner-0").keys()
    assert [entry.name for entry in (node / "copies").iterdir() if entry.is_dir()] == [copy.name]


def test_what_was_copied_is_not_copied_again_and_what_changed_is(run: RunDirectory, node: Path) -> None:
    first = local_checkpoint(run.checkpoint("reasoner", 0))
    before = Path(first, "model.safetensors").stat()
    run.finish("round-0/calibrate", {"files": run.write_file("checkpoints/reasoner-0/calibration.json", "{}")})
    assert local_checkpoint(run.checkpoint("reasoner", 0)) == first
    assert Path(first, "model.safetensors").stat() == before
    run.finish("round-0/align", {"files": run.copy_checkpoint("checkpoints/reasoner-1", "checkpoints/reasoner-0")})
    again = local_checkpoint(run.checkpoint("reasoner", 0))
    assert again != first
    assert Path(again, "model.safetensors").read_bytes() == run.folder.read("checkpoints/reasoner-1/model.safetensors")


def test_a_copy_that_broke_off_is_begun_anew(run: RunDirectory, node: Path) -> None:
    whole = Path(local_checkpoint(run.checkpoint("reasoner", 0)))
    whole.rename(whole.with_suffix(".tmp"))
    (whole.with_suffix(".tmp") / "model.safetensors").write_bytes(b"half")
    assert Path(local_checkpoint(run.checkpoint("reasoner", 0)), "model.safetensors").stat().st_size > 4
    assert not whole.with_suffix(".tmp").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_copy_that_lacks_something_is_fetched_anew(
    run: RunDirectory, node: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    weights = Path(local_checkpoint(run.checkpoint("reasoner", 0)), "model.safetensors")
    if damage == "truncated":
        os.truncate(weights, 100)
    else:
        weights.unlink()
    assert Path(local_checkpoint(run.checkpoint("reasoner", 0)), "model.safetensors") == weights
    assert weights.read_bytes() == run.folder.read("checkpoints/reasoner-0/model.safetensors")
    (message,) = caplog.messages
    assert message.startswith(f"{weights} is ")
    assert message.endswith("; it is fetched anew")


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    run: RunDirectory, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power failure could leave the name without the content."""
    flushed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename_flushed(source: Path, place: Path) -> None:
        assert {str(source), *map(str, source.iterdir())} <= set(flushed)
        rename(source, place)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", rename_flushed)
    copy = local_checkpoint(run.checkpoint("reasoner", 0))
    assert flushed[-1] == str(Path(copy).parent)


def test_a_tokenizer_and_a_count_need_no_weights(run: RunDirectory, node: Path, tmp_path: Path) -> None:
    save_random_reasoner(MODEL, VOCABULARY, 0, tmp_path / "model")
    assert parameter_count(run.checkpoint("reasoner", 0)) == parameter_count(str(tmp_path / "model"))
    tokenizer = base_tokenizer(ModelConfig(path=run.checkpoint("reasoner", 0)), VOCABULARY)
    assert tokenizer("1+1")["input_ids"] == base_tokenizer(MODEL, VOCABULARY)("1+1")["input_ids"]
    assert not list(node.rglob("*.safetensors"))


def test_old_copies_make_room_and_those_in_use_stay(
    run: RunDirectory, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(total=100, free=5)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    first = local_checkpoint(run.checkpoint("reasoner", 0))
    local_checkpoint(run.checkpoint("reasoner", 1))
    assert Path(first).exists()
    os.utime(first, (time.time() - 2 * 3600,) * 2)
    local_checkpoint(run.checkpoint("reasoner", 1), weights=False)
    assert not Path(first).exists()
    assert Path(local_checkpoint(run.checkpoint("reasoner", 1))).exists()


def test_a_local_checkpoint_is_used_where_it_lies(node: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.folder.staging("checkpoints/base") as directory:
        save_random_reasoner(MODEL, VOCABULARY, 0, directory)
        run.finish("base", {"files": run.put(directory, "checkpoints/base")})
    assert local_checkpoint(run.folder.locate("checkpoints/base")) == str(tmp_path / "run/checkpoints/base")
    assert not (node / "copies").exists()
    save_random_reasoner(MODEL, VOCABULARY, 0, tmp_path / "own")
    assert local_checkpoint(str(tmp_path / "own")) == str(tmp_path / "own")
    assert local_checkpoint("a-model-on-a-hub") == "a-model-on-a-hub"


def test_what_one_driver_has_checked_the_next_checks_again(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that flips on the disk leaves size and time. A driver's processes do not all read the file for it."""
    run = RunDirectory(tmp_path / "run")
    with run.folder.staging("checkpoints/base") as directory:
        save_random_reasoner(MODEL, VOCABULARY, 0, directory)
        run.finish("base", {"files": run.put(directory, "checkpoints/base")})
    weights = tmp_path / "run" / "checkpoints" / "base" / "model.safetensors"
    for driver in ("one", "another"):
        monkeypatch.setenv(module.DRIVER, driver)
        local_checkpoint(str(weights.parent))
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert local_checkpoint(str(weights.parent)) == str(weights.parent)
    for driver in ("next", "one"):
        monkeypatch.setenv(module.DRIVER, driver)
        with pytest.raises(DamagedError, match=f"{weights} is damaged: its SHA-256 was .*--redo base"):
            local_checkpoint(str(weights.parent))


def test_a_uri_of_which_no_manifest_tells_is_refused(s3: str, node: Path) -> None:
    Folder(s3.format("models/mine")).write("config.json", "{}")
    with pytest.raises(SapoError, match=r"models/mine\?.* is no checkpoint of a run: no manifest\.json tells of it"):
        local_checkpoint(s3.format("models/mine"))


def test_a_cache_that_cannot_be_written_is_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SapoError, match=rf"{tmp_path}/file/cache/copies \(SAPO_CACHE\) cannot be written: Not a dir"):
        local_checkpoint(run.checkpoint("reasoner", 0))
