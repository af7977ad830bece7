"""What a model-written program may use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class SandboxConfig:
    kind: Literal["bubblewrap", "process"] = "bubblewrap"
    """`bubblewrap`: namespaces of its own, no network, a read-only system. `process`: limits, a session of its own and
    an empty environment only, which keeps a program neither from files nor from the network (docs/sandbox.md)."""
    cpu_seconds: int = 5
    """CPU seconds of each of a program's processes."""
    wall_seconds: float = 30.0
    """Seconds that a program and its tests may take together: well above `cpu_seconds`, as a machine may be busy, and
    below `scaling.hang_after`."""
    memory_mib: int = 256
    """Address space of each of a program's processes and of the one that runs its tests, in MiB."""
    processes: int = 4
    """Processes and threads that a program may have at once, its first one included; `process` does not limit them."""
    file_mib: int = 16
    """Largest file in MiB, and with `bubblewrap` all of a program's files together."""
    output_kib: int = 64
    """What a program may print, in KiB."""

    def __post_init__(self) -> None:
        # A process starts with some 40 MiB of address space.
        for key, least in (
            ("cpu_seconds", 1),
            ("memory_mib", 64),
            ("processes", 1),
            ("file_mib", 1),
            ("output_kib", 1),
        ):
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        if not 0 < self.wall_seconds < math.inf:
            raise ValueError(f"wall_seconds is {self.wall_seconds}; it must be a number above 0")
