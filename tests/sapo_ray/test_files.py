"""Folders: the same behaviour on a local disk and in an object store, which is a real S3 server."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, absolute, joined, relative, split
from sapo_ray.models import character_tokenizer
from tests.disks import Disk

URI = "s3://bucket/runs/a?endpoint_override=127.0.0.1:9000&scheme=http"


def test_what_is_written_is_read_listed_and_removed(location: str) -> None:
    folder = Folder(location)
    assert folder.sizes() == {}
    assert not folder.has("a/b.txt")
    folder.write("a/b.txt", "three")
    folder.write("a/b.txt", "two")
    folder.write("c.bin", b"\x00\xff")
    assert folder.read("a/b.txt") == b"two"
    assert folder.sizes() == {"a/b.txt": 3, "c.bin": 2}
    assert folder.sizes("a") == {"a/b.txt": 3}
    assert (folder.has("a/b.txt"), folder.has("a")) == (True, False)
    assert Folder(folder.locate("a")).read("b.txt") == b"two"
    folder.remove(["c.bin"])
    folder.clear("a")
    folder.clear("never")
    assert folder.sizes() == {}
    for action in (folder.read, folder.open):
        with pytest.raises(FileNotFoundError):
            action("a/b.txt")


def test_a_directory_is_put_copied_and_fetched(location: str, tmp_path: Path) -> None:
    folder = Folder(location)
    with folder.staging("models/one") as interrupted:
        interrupted.rmdir()
        leftover = interrupted / "half"
    leftover.mkdir(parents=True)
    for content in ("old", "new"):
        with folder.staging("models/one") as directory:
            (directory / "sub").mkdir()
            (directory / "sub" / "weights").write_text(content)
            (directory / f"{content}.json").write_text("{}")
            folder.put(directory, "models/one", last="new.json")
        assert not directory.exists()
    assert folder.sizes() == {"models/one/new.json": 2, "models/one/sub/weights": 3}
    folder.copy("models/one", "models/two")
    Folder(folder.locate("models/two")).fetch(["sub/weights"], tmp_path / "here")
    assert (tmp_path / "here" / "sub" / "weights").read_text() == "new"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "part").write_text("x")
    folder.add(tmp_path / "more", ["part"], "models/one")
    assert folder.sizes("models/one").keys() == {"models/one/new.json", "models/one/sub/weights", "models/one/part"}
    with pytest.raises(FileNotFoundError):
        folder.fetch(["models/none"], tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:c2VjcmV0@bucket/run",
        "s3://AKIAEXAMPLE:c2Vj/cmV0@bucket/run",
        "s3://AKIAEXAMPLE@bucket/run",
        "s3://bucket/run?access_key=AKIAEXAMPLE&secret_key=c2VjcmV0",
        "s3://bucket/run?scheme=http&session_token=c2VjcmV0",
        "gs://bucket/run?sas=c2VjcmV0",
    ],
)
def test_a_uri_with_credentials_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(SapoError, match="URI holds credentials; leave them out") as error:
        Folder(uri)
    assert "AKIA" not in str(error.value)
    assert "c2V" not in str(error.value)


@pytest.mark.parametrize("uri", ["ftp://host/run", "s3://bucket/run?endpoint_overide=x", "s3://"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(SapoError, match="cannot be opened: ") as error:
        Folder(uri)
    assert str(error.value).startswith(uri)


def test_what_cannot_be_written_is_named(s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SapoError, match=f"{tmp_path}/file/x cannot be written: (Not a directory|File exists)"):
        Folder(tmp_path / "file").write("x", "y")
    absent = s3.format("run").replace("bucket", "no-such-bucket")
    with pytest.raises(SapoError, match=r"s3://no-such-bucket/run/x\?.* cannot be written: .*bucket") as error:
        Folder(absent).write("x", "y")
    assert "\n" not in str(error.value)


def test_locations_are_joined_split_and_seen_from_each_other() -> None:
    assert joined("/runs/a", "x/y") == "/runs/a/x/y"
    assert joined(URI, "x/y") == URI.replace("runs/a", "runs/a/x/y")
    assert joined("s3://bucket", "x") == "s3://bucket/x"
    assert split(URI) == (URI.replace("runs/a", "runs"), "a")
    assert split("/runs/a") == ("/runs", "a")
    assert relative(joined(URI, "data/x"), joined(URI, "models")) == "../data/x"
    assert relative("/runs/a/data", "/runs/a/models") == "../data"
    for elsewhere in ("/runs/a", "a-model-on-a-hub", "s3://other/runs/a"):
        assert relative(elsewhere, URI) == elsewhere


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    assert absolute(f"file://{tmp_path}/run") == f"{tmp_path}/run"
    folder = Folder(f"file://{tmp_path}/run")
    folder.write("a", "b")
    assert (tmp_path / "run" / "a").read_text() == "b"
    assert folder.path == tmp_path / "run"


def test_a_kill_while_a_folder_is_cleared_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    folder = Folder(tmp_path / "run")
    folder.write("model/config.json", "{}")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.clear("model")
    assert not folder.sizes("model")
    folder.write("model/config.json", "[]")
    folder.clear("model")
    assert folder.sizes() == {}


def test_a_full_disk_leaves_what_was_there_and_no_half_file(disk: Disk) -> None:
    folder = Folder(disk.path / "run")
    folder.write("manifest.json", "{}")
    for name in ("manifest.json", "round-0/labels/part-00000.parquet"):
        with pytest.raises(SapoError, match=f"{folder.locate(name)} cannot be written: No space left on device"):
            folder.write(name, bytes(disk.size))
    assert folder.sizes() == {"manifest.json": 2}
    assert folder.read("manifest.json") == b"{}"


def test_a_full_disk_is_named_whatever_library_meets_it(disk: Disk) -> None:
    """Those in Rust raise errors of their own, none of which names a file."""
    folder, tokenizer = Folder(disk.path / "run"), character_tokenizer("0123456789", 64)

    def weights(directory: Path) -> None:
        save_file({"weight": torch.zeros(disk.size // 4)}, directory / "model.safetensors")

    def vocabulary(directory: Path) -> None:
        disk.fill()
        tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))

    def text(directory: Path) -> None:
        (directory / "config.json").write_text("{}")

    for prepare in (weights, vocabulary, text):
        with (
            pytest.raises(SapoError, match=f"{disk.path}/run/model.tmp cannot be written: No space left on device$"),
            folder.staging("model") as directory,
        ):
            prepare(directory)
        assert folder.sizes() == {}
    disk.free()
    with folder.staging("model") as directory:
        (directory / "config.json").write_text("{}")
        folder.put(directory, "model")
    assert folder.sizes() == {"model/config.json": 2}


def test_an_error_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such layer"), Folder(tmp_path).staging("model"):
        raise ValueError("no such layer")


def test_ctrl_c_while_an_object_is_written_leaves_the_old_one_or_the_new_one(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the object's stream is open and nothing is in it yet."""
    folder = Folder(s3.format("interrupted"))
    folder.write("a", "old")
    opened = fs.FileSystem.open_output_stream

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(files, name)

        def open_output_stream(self, place: str) -> pa.NativeFile:
            stream = opened(files, place)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.3)
            return stream

    files = folder._files
    monkeypatch.setattr(folder, "_files", Slow())
    with pytest.raises(KeyboardInterrupt):
        folder.write("a", "a text that is longer")
    assert Folder(folder.location).read("a") in (b"old", b"a text that is longer")


def test_an_object_that_is_replaced_before_it_is_read_comes_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = Folder(s3.format("replaced")), list[str]()
    folder.write("a", "short")

    def open_late(name: str) -> pa.NativeFile:
        file = Folder(folder.location).open(name)
        if not opened:
            folder.write(name, "a text that is longer")
        opened.append(name)
        return file

    monkeypatch.setattr(folder, "open", open_late)
    assert folder.read("a") == b"a text that is longer"
    assert opened == ["a", "a"]
