"""Disks that fill up."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """A file system of its own, of `size` bytes, mounted at `path`."""

    path: Path
    size: int = 2**23

    def fill(self) -> None:
        """Leave no space."""
        with suppress(OSError):
            (self.path / "ballast").write_bytes(bytes(self.size))

    def free(self) -> None:
        """Have the space back."""
        (self.path / "ballast").unlink()
