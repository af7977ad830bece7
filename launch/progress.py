"""Shows a run's stages: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_PLAIN_SECONDS = 30.0


class ConsoleReporter:
    """Reports to standard error, so that figures on standard output stay clean. Use as a context manager."""

    def __init__(self) -> None:
        # What is reported may hold brackets, as paths and causes of errors do: no text is read as markup.
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
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
            self._console.print(f"{self._stage}: {done}/{total}, {rate:.2f}/s{left} {detail}")
            self._last = now

    def end(self, notes: Mapping[str, Any]) -> None:
        self._bar.update(self._task, visible=False)
        skipped = f" (skipped: {notes['skipped']})" if "skipped" in notes else ""
        self._console.print(f"{self._stage}: {time.monotonic() - self._started:.1f} s{skipped}")
        for item in notes.get("quarantined", ()):
            self.warn(f"{self._stage}: question {item['question_id']} is left out: {item['cause']}")

    def warn(self, sign: str) -> None:
        self._console.print(Text.assemble(("warning:", "yellow"), " ", sign))

    def say(self, event: str) -> None:
        self._console.print(event)
