"""Folders on any file system that pyarrow reaches: local paths, `file://`, `s3://`, `gs://`.

A location is a local path or a URI. What is written appears whole or not at all: a local file is renamed into place, an
object of a store appears when it is closed. Credentials come from the environment, as pyarrow takes them.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import SplitResult, urlsplit, urlunsplit
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from sapo_ray.errors import SapoError

_CHUNK = 16 * 2**20
_TRANSFERS = 8
_SECRET = re.compile(r"key|secret|token|password|credential|signature|^sas$|^sig$", re.IGNORECASE)
_LOCAL = fs.LocalFileSystem()
_IN_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which are written in Rust, tell of what Python has as an OSError."""


class Folder:
    """One folder; what is in it goes by its path relative to it, such as `round-0/labels/part-00000.parquet`."""

    def __init__(self, location: str | Path) -> None:
        """Creates nothing. Raises SapoError for a URI that pyarrow cannot open, or that holds credentials."""
        self.location = absolute(location)
        if is_uri(self.location):
            self._files, self._root = _open(self.location)
            self.path: Path | None = None
        else:
            self._files, self._root, self.path = _LOCAL, self.location, Path(self.location)

    def locate(self, name: str) -> str:
        """The location of a file or folder in it."""
        return joined(self.location, name)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError."""
        while True:
            with self.open(name) as file:
                data: bytes = file.readall()
            # A store is asked for a file's size before its bytes: if it is replaced between the two, part of it comes.
            if self.path is not None or self._files.get_file_info(self._at(name)).size == len(data):
                return data

    def open(self, name: str) -> pa.NativeFile:
        """A file, to be read at any offset. Raises FileNotFoundError."""
        return self._files.open_input_file(self._at(name))

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._files.get_file_info(self._at(name)).is_file)

    def sizes(self, name: str = "") -> dict[str, int]:
        """Every file below the folder `name` with its size in bytes, in the order of their names; none without it."""
        selector = fs.FileSelector(self._at(name), allow_not_found=True, recursive=True)
        found = self._files.get_file_info(selector)
        start = len(self._root) + 1
        return dict(sorted((info.path[start:], info.size) for info in found if info.is_file))

    def write(self, name: str, data: bytes | str) -> None:
        """Write or replace a file in one step. Raises SapoError, naming it, where that cannot be done."""
        content = data.encode() if isinstance(data, str) else data
        with _writing(self.locate(name)):
            if self.path is not None:
                _replace(self.path / name, content)
            else:
                # In a thread, which no KeyboardInterrupt reaches: it would close the stream before its end, and what is
                # written by then would take the object's place.
                _all(lambda place: self._put_object(place, content), [self._at(name)])

    def _put_object(self, place: str, content: bytes) -> None:
        with self._files.open_output_stream(place) as file:
            file.write(content)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files. Raises FileNotFoundError for one that is not there."""
        _all(lambda name: self._files.delete_file(self._at(name)), names)

    def clear(self, name: str) -> None:
        """Remove a folder and all that is in it, if it is there."""
        if self._files.get_file_info(self._at(name)).type != fs.FileType.Directory:
            return
        if self.path is None:
            self._files.delete_dir(self._at(name))
            return
        # It goes in one step: a kill leaves no part of it in its place.
        doomed = self.path / f"{name}.cleared.tmp"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(self.path / name, doomed)
        shutil.rmtree(doomed)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A new local directory to prepare what `put` then puts in its place; gone afterwards.

        It lies beside that place, or where that is no local path in the cache (see `cache_folder`). Raises SapoError,
        naming it, where what is to be prepared cannot be written.
        """
        key = hashlib.sha256(self.locate(name).encode()).hexdigest()[:16]
        directory = cache_folder() / "staging" / key if self.path is None else self.path / f"{name}.tmp"
        shutil.rmtree(directory, ignore_errors=True)
        try:
            with _writing(str(directory)):
                directory.mkdir(parents=True)
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, source: Path, name: str, last: str | None = None) -> None:
        """Put a local directory in the place of the folder `name`, from `staging`.

        A local one takes its place in one step. In an object store its files appear one by one, `last` after the rest.
        """
        self.clear(name)
        with _writing(self.locate(name)):
            if self.path is not None:
                into_place(source, self.path / name)
                return
            files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
            self.add(source, [file for file in files if file != last], name)
            self.add(source, [file for file in files if file == last], name)

    def add(self, source: Path, names: Iterable[str], name: str) -> None:
        """Put files of a local directory into the folder `name`, beside what is there."""

        def one(file: str) -> None:
            if self.path is not None:
                (self.path / name / file).parent.mkdir(parents=True, exist_ok=True)
                _flush(str(source / file))
                os.replace(source / file, self.path / name / file)
            else:
                _copy(str(source / file), self._at(f"{name}/{file}"), _LOCAL, self._files)

        with _writing(self.locate(name)):
            _all(one, names)

    def fetch(self, names: Iterable[str], target: Path) -> None:
        """Copy files of it into a local directory. Raises FileNotFoundError for one that is not there."""

        def one(name: str) -> None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(self._at(name), str(target / name), self._files, _LOCAL)

        _all(one, names)

    def copy(self, name: str, target: str) -> None:
        """Copy a folder in it to another place in it, which is cleared before."""

        def one(file: str) -> None:
            place = self._at(target + file.removeprefix(name))
            self._files.create_dir(posixpath.dirname(place))
            self._files.copy_file(self._at(file), place)

        self.clear(target)
        with _writing(self.locate(target)):
            _all(one, self.sizes(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI, not a local path."""
    return isinstance(location, str) and "://" in location


def absolute(location: str | Path) -> str:
    """A location that means the same in any working directory. A `file://` URI becomes a path."""
    if not is_uri(location):
        return str(Path(location).absolute())
    uri = str(location)
    refuse_credentials(uri)
    files, root = _open(uri)
    return root if isinstance(files, fs.LocalFileSystem) else uri


def joined(location: str, name: str) -> str:
    """The location of `name` in the folder `location`; `..` goes up."""
    if not is_uri(location):
        return posixpath.normpath(posixpath.join(location, name))
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=posixpath.normpath(posixpath.join(parts.path or "/", name))))


def split(location: str) -> tuple[str, str]:
    """The location of the folder that a location lies in, and its name there."""
    path = urlsplit(location).path if is_uri(location) else location
    return joined(location, ".."), posixpath.basename(path.rstrip("/"))


def relative(location: str, home: str) -> str:
    """A location as seen from the folder `home`; itself where it lies on another file system or is no absolute path."""
    one, other = _system(location), _system(home)
    if one != other or not (is_uri(location) or os.path.isabs(location)):
        return location
    return posixpath.relpath(*(urlsplit(place).path if is_uri(place) else place for place in (location, home)))


def reason(error: OSError) -> str:
    """Why an operation failed, in one line."""
    return error.strerror.partition("\n")[0] if error.strerror else str(error).partition("\n")[0]


def into_place(source: Path, place: Path) -> None:
    """Rename a local directory, all of which the disk holds before. Raises OSError."""
    _all(_flush, [str(source), *map(str, source.rglob("*"))])
    os.rename(source, place)
    _flush(str(place.parent))


def cache_folder() -> Path:
    """Where this node keeps copies of what lies in object stores: `SAPO_CACHE`, by default ~/.cache/sapo."""
    return Path(os.environ.get("SAPO_CACHE") or "~/.cache/sapo").expanduser()


@contextmanager
def _writing(location: str) -> Iterator[None]:
    """Raises SapoError, naming the location, for what the operating system or an object store says against it."""
    try:
        yield
    except OSError as error:
        raise SapoError(f"{location} cannot be written: {reason(error)}") from error
    except Exception as error:
        if (code := _IN_RUST.search(str(error))) is None or isinstance(error, SapoError):
            raise
        raise SapoError(f"{location} cannot be written: {os.strerror(int(code[1]))}") from error


@cache
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        files, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise SapoError(f"{uri} cannot be opened: {str(error).partition(chr(10))[0]}") from error
    if not root.strip("/"):
        raise SapoError(f"{uri} cannot be opened: it names no folder")
    return files, root.rstrip("/")


def refuse_credentials(uri: str) -> None:
    """Raises SapoError, which does not repeat the URI, where it holds user information or a parameter like a key.

    An unescaped slash in a secret ends what a URI's parser takes for the host; it then looks like a port.
    """
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    names = [pair.partition("=")[0] for pair in parts.query.split("&")]
    if (at and user != "anonymous") or not re.fullmatch(r"[^:]*(:\d+)?", host) or any(map(_SECRET.search, names)):
        raise SapoError(
            f"this {parts.scheme}:// URI holds credentials; leave them out and let the environment hold them, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or an instance's role"
        )


def _system(location: str) -> SplitResult | None:
    return urlsplit(location)._replace(path="") if is_uri(location) else None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(content)
        _flush(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: str) -> None:
    """Have the disk hold a file or directory: a power failure could leave one that has its name and not its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: str, target: str, source_files: fs.FileSystem, target_files: fs.FileSystem) -> None:
    fs.copy_files(
        source, target, source_filesystem=source_files, destination_filesystem=target_files, chunk_size=_CHUNK
    )


def _all(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as threads:
        list(threads.map(work, names))
