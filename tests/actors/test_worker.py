"""What is shown of a dead worker's output."""

from __future__ import annotations

from pathlib import Path

from actors.worker import TAIL_BYTES, TAIL_LINES, last_lines


def test_the_last_lines_of_a_short_log_are_whole(tmp_path: Path) -> None:
    out, err = tmp_path / "worker.out", tmp_path / "worker.err"
    out.write_text("".join(f"out {number}\n" for number in range(TAIL_LINES)))
    err.write_bytes(b"err 1\nerr \xff\n")
    lines = last_lines([str(out), str(tmp_path / "gone"), str(err)]).split("\n")
    assert lines == [*(f"out {number}" for number in range(2, TAIL_LINES)), "err 1", "err \ufffd"]


def test_a_long_log_is_read_from_its_end_only(tmp_path: Path) -> None:
    """Also where it is one line, all of which would else go into the run's error."""
    log = tmp_path / "worker.err"
    log.write_text("x" * 20 * TAIL_BYTES + "é" * TAIL_BYTES + "\nlast word\n")
    first, last = last_lines([str(log)]).split("\n")
    assert last == "last word"
    assert len(first.encode()) <= TAIL_BYTES
    assert set(first) == {"\ufffd", "é"}  # the cut is within a letter
