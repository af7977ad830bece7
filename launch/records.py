"""Records that a user hands to a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sapo_ray.errors import SapoError
from sapo_ray.shards import read_rows

Record = TypeVar("Record")


def read_records(path: str, parse: Callable[[Mapping[str, Any]], Record], what: str) -> list[Record]:
    """A Parquet file's or directory's rows, parsed. Raises SapoError for the first that is no `what`, or for none.

    What `parse` raises as SapoError is told with the record's place before it.
    """
    records = []
    for number, row in enumerate(read_rows(path)):
        try:
            records.append(parse(row))
        except (KeyError, TypeError) as error:
            raise SapoError(f"{path}, record {number}: no {what}, {error} is missing or of the wrong type") from error
        except SapoError as error:
            raise SapoError(f"{path}, record {number}: {error}") from error
    if not records:
        raise SapoError(f"{path} holds no {what}")
    return records
