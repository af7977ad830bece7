"""Shows a run's stages: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_SECONDS = 30.0


class ConsoleReporter:
    """Reports to standard error, so that figures on standard output stay clean. Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._stage, self._task, self._started, self._last = "", self._bar.add_task("", visible=False), 0.0, 0.0

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, stage: str) -> None:
        self._bar.remove_task(self._task)
        self._stage, self._started = stage, time.monotonic()
        self._last = self._started
        self._task = self._bar.add_task(stage, total=None, rate=0.0, detail="")

    def update(self, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=done, total=total or None, rate=rate, detail=detail)
        if self._bar.disable and now - self._last >= _PLAIN_SECONDS:
            left = f", about {(total - done) / rate:.0f} s left" if done and total else ""
            self._console.print(f"{self._stage}: {done}/{total}, {rate:.1f}/s{left} {detail}")
            self._last = now

    def end(self, stage: str, seconds: float, notes: Mapping[str, Any]) -> None:
        self._bar.update(self._task, visible=False)
        skipped = f" (skipped: {notes['skipped']})" if "skipped" in notes else ""
        self._console.print(f"{stage}: {seconds:.1f} s{skipped}")

    def warn(self, sign: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {sign}")

    def say(self, event: str) -> None:
        self._console.print(event)
