"""Where records come from: files, directories and object stores, or the Hugging Face hub and its cache."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, absolute, reason, split

_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


@dataclass(kw_only=True)
class SourceConfig:
    """One data set, and what is read of its records."""

    path: str | None = None
    """A file (.jsonl, .json, either with .gz, or .parquet), a directory of such files, or the URI of either. Where it
    is given, `hub` is not looked at."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, such as `openai/gsm8k`. With HF_HUB_OFFLINE=1 it is taken from the
    cache of the `datasets` library."""
    subset: str | None = None
    """Name of the hub data set's configuration, such as `main`."""
    split: str = "train"
    """Split of the hub's data set."""
    question: str = "question"
    """The question: a column's name, or a Jinja template over the columns such as `{{ Body }} {{ Question }}`."""
    answer: str = "answer"
    """The gold answer, likewise. Where, of the kind math, the text states an answer by the task's `convention`, as
    GSM8K's and MATH's solutions do, that is the gold answer; else all of it is."""
    solution: str | None = None
    """The worked solution, likewise; null where there is none."""
    strip: str | None = None
    """A regular expression of what to remove from worked solutions, such as GSM8K's `<<[^<>]*>>`."""
    where: str | None = None
    """A Jinja template over the columns that comes to `True` for the records to use and to `False` for all others, such
    as `{{ answer.count('\\n') <= 3 }}`: GSM8K's questions with at most three steps. Null uses all."""


class Record(NamedTuple):
    """A record, or in its place what is wrong with it; and where it stands."""

    place: str
    value: Mapping[str, Any] | str


def read_source(source: SourceConfig) -> Iterator[Record]:
    """All records of a source, in the order of its files. Raises SapoError where it cannot be read."""
    return _from_hub(source) if source.path is None else _from_files(source.path)


def _from_files(location: str) -> Iterator[Record]:
    folder, name = split(absolute(location))
    files = [name] if name.partition("?")[0].endswith(_SUFFIXES) else []
    home = Folder(folder if files else location)
    with suppress(NotADirectoryError):  # a file of another kind
        files = files or [file for file in home.sizes() if file.endswith(_SUFFIXES)]
    if not files:
        raise SapoError(f"{location}: no such file or directory, or none in it that ends in {', '.join(_SUFFIXES)}")
    for file in files:
        yield from _from_file(home, file)


def _from_file(folder: Folder, name: str) -> Iterator[Record]:
    place = folder.locate(name)
    try:
        data = folder.read(name)
        if name.endswith(".gz"):
            data = gzip.decompress(data)
        if name.endswith(".parquet"):
            yield from _from_parquet(place, data)
        elif ".jsonl" in name:
            yield from _from_lines(place, data)
        else:
            yield from _from_list(place, json.loads(data))
    except FileNotFoundError as error:
        raise SapoError(f"{place}: no such file") from error
    except OSError as error:
        raise SapoError(f"{place}: cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise SapoError(f"{place}: not what its name says: {str(error).partition(chr(10))[0]}") from error


def _from_lines(place: str, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            value = f"no JSON: {error}"
        yield _record(f"{place}, line {number}", value)


def _from_list(place: str, values: Any) -> Iterator[Record]:
    if not isinstance(values, list):
        raise SapoError(f"{place}: holds no list of records; one record a line is a .jsonl file")
    yield from (_record(f"{place}, record {number}", value) for number, value in enumerate(values, 1))


def _from_parquet(place: str, data: bytes) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(pa.BufferReader(data)) as file:
        rows: Iterable[Any] = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from (_record(f"{place}, record {number}", row) for number, row in enumerate(rows, 1))


def _from_hub(source: SourceConfig) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    name = " ".join(filter(None, (source.hub, source.subset)))
    try:
        rows = load_dataset(source.hub, source.subset, split=source.split)
    except Exception as error:  # of the library, of what it reads, and of the network
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SapoError(
            f"the data set {name} cannot be loaded, neither from the hub nor from the cache: {what}; its files may "
            "also be given as `path`"
        ) from error
    yield from (_record(f"{name}/{source.split}, record {number}", row) for number, row in enumerate(rows, 1))


def _record(place: str, value: Any) -> Record:
    return Record(place, value if isinstance(value, Mapping | str) else f"it is {type(value).__name__}, no object")
