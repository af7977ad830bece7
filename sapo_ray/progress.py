"""Where work that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Shows stages. One stage is in progress at a time."""

    def begin(self, stage: str) -> None:
        """A stage has begun."""

    def update(self, done: int, total: int, detail: str) -> None:
        """The stage in progress has done so many of so many items; `total` 0 is not known yet."""

    def end(self, notes: Mapping[str, Any]) -> None:
        """The stage in progress has ended, and this is what it notes about itself: what it left out is warned of."""

    def warn(self, sign: str) -> None:
        """Something the user should know of."""

    def say(self, event: str) -> None:
        """Something that has happened to workers."""
