"""What a stage shows of itself: on a terminal a bar, in a pipe plain lines."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from launch.progress import ConsoleReporter
from launch.show import print_summary

ROOT = Path(__file__).parents[2]
MARKUP = ["OSError: [/usr/lib/x] gone", "[/x]", "a tensor[red] of :warning: [bold]3[/bold]", "ends in a backslash\\"]


class Clock:
    now = 50_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("launch.progress.time", clock)
    return clock


def test_a_pipe_gets_a_line_every_half_minute_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ConsoleReporter() as reporter:
        reporter.begin("label")
        for seconds, done in ((10, 1), (40, 5), (41, 6), (100, 10)):
            clock.now = 50_000.0 + seconds
            reporter.update(done, 100, f"{done * 1000:,} tokens")
        reporter.end({})
        reporter.begin("evaluate")
        clock.now += 30
        reporter.update(0, 0, "0 tokens")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "label: 5/100, 0.12/s, about 760 s left 5,000 tokens",
        "label: 10/100, 0.10/s, about 900 s left 10,000 tokens",
        "label: 100.0 s",
        "evaluate: 0/0, 0.00/s 0 tokens",
    ]


def test_what_a_stage_skipped_and_left_out_is_said_at_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = {"question_id": "pool-7", "request_id": "label/pool-7/0", "cause": "3 workers died", "log_tail": ""}
    with ConsoleReporter() as reporter:
        reporter.begin("round-1/prm")
        reporter.end({"skipped": "no trajectory was labelled", "quarantined": [left_out]})
    assert capsys.readouterr().err.splitlines() == [
        "round-1/prm: 0.0 s (skipped: no trajectory was labelled)",
        "warning: round-1/prm: question pool-7 is left out: 3 workers died",
    ]


@pytest.mark.parametrize("text", MARKUP)
def test_brackets_are_printed_as_they_are(clock: Clock, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with ConsoleReporter() as reporter:
        reporter.warn(text)
        reporter.say(text)
        reporter.begin(text)
        clock.now += 30
        reporter.update(1, 2, text)
        reporter.end({"skipped": text})
    shown = f"{text}: 1/2, 0.03/s, about 30 s left {text}"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {text}",
        text,
        shown,
        f"{text}: 30.0 s (skipped: {text})",
    ]
    print_summary({"rounds": [{"round": 1, "warnings": [text]}]})
    assert capsys.readouterr().out.endswith(f"warning: round 1: {text}\n")


SCRIPT = """
from launch.progress import ConsoleReporter
with ConsoleReporter() as reporter:
    reporter.begin({stage!r})
    reporter.update(5, 100, "7 tokens of " + {stage!r})
    reporter._bar.refresh()
    reporter.end({{}})
    reporter.warn({stage!r})
"""


@pytest.mark.parametrize("stage", ["label", *MARKUP])
def test_a_terminal_shows_a_bar_with_counts_while_a_stage_lasts(stage: str) -> None:
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", _on_a_terminal(SCRIPT.format(stage=stage)))
    assert re.search(rf"{re.escape(stage)} \S+ +5/100 .*/s .* 7 tokens of {re.escape(stage)}", shown), shown
    assert re.search(rf"{re.escape(stage)}: \d+\.\d s", shown)
    assert f"warning: {stage}" in shown


def _on_a_terminal(script: str) -> str:
    """What a Python process writes to its standard error where that is a terminal of 200 columns."""
    far, near = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=near) as process:
        os.close(near)
        written = b""
        with suppress(OSError):  # the terminal's last user is gone
            while True:
                written += os.read(far, 65536)
    os.close(far)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_tables_are_as_wide_in_a_pipe_wherever_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_summary({"rounds": [{"round": 1, "warnings": []}]})
    assert "self-verification error %" in capsys.readouterr().out
