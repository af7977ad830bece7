"""Why a child process died, read from the log that it shares with its parent."""

from __future__ import annotations

import os
import re
from pathlib import Path


class ChildLog:
    """What this process and its children write to stdout and stderr from now on, where Ray sends both to files."""

    def __init__(self) -> None:
        paths = {Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in (1, 2)}
        self._starts = {path: path.stat().st_size for path in paths if path.is_file()}

    def cause(self, error: BaseException) -> str:
        """The last error in the log, in one line; `error` itself where the log has none."""
        found = re.findall(r"\b((?!EngineDeadError)\w+(?:Error|Exception): \S.*)", self._text())
        return found[-1] if found else " ".join(f"{type(error).__name__}: {error}".split())

    def _text(self) -> str:
        return "".join(path.read_bytes()[start:].decode(errors="replace") for path, start in self._starts.items())
