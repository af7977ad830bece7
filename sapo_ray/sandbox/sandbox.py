"""Runs programs, each in a fresh sandbox, and says what came of them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Literal

from sapo_ray.errors import SapoError
from sapo_ray.sandbox import bubblewrap, harness
from sapo_ray.sandbox.config import SandboxConfig
from sapo_ray.sandbox.program import Program, Verdict

_START_SECONDS = 60.0
_GRACE_SECONDS = 1.0
"""What the judge has beyond a program's time to say that it is over; then it is killed."""
_OUTPUT_LINES = 20
_OUTPUT_CHARACTERS = 2000
_HARNESS = Path(harness.__file__).read_text()

Stop = tuple[Literal["timeout", "violation"], str]
"""Why the judge was not heard to its end: a verdict and its reason."""


class SandboxError(SapoError):
    """There is no sandbox to be had on this machine."""


class Sandbox:
    """A sandbox after the other, the next one started ahead. For one thread; use as a context manager, or `close` it.

    A program leaves nothing behind for the next: when `run` returns, its processes are killed and its files gone.
    Raises SandboxError where this machine cannot give the kind that `config` wants; there is no falling back.
    """

    def __init__(self, config: SandboxConfig) -> None:
        if config.kind == "bubblewrap" and (fault := bubblewrap.fault()):
            raise SandboxError(
                f"sandbox.kind is bubblewrap, which does not work here: {fault[0]}; {fault[1]}, or choose process, "
                "which protects from less"
            )
        self._config = config
        self._next: _Cell | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, program: Program) -> Verdict:
        """Runs a program's tests against its solution. Raises SandboxError where there is no verdict to be had."""
        if self._next and not self._next.waits():
            self.close()
        cell = self._next or _Cell(self._config)
        self._next = _Cell(self._config)
        try:
            return cell.judge(program)
        finally:
            cell.end()

    def close(self) -> None:
        """Ends the sandbox that waits. A later `run` starts another."""
        if self._next:
            self._next.end()
            self._next = None


class _Cell:
    """One sandbox, for one program."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config, self._folder, self._thread = config, None, threading.current_thread()
        limits = asdict(config)
        command = [bubblewrap.interpreter(), "-P", "-s", "-S", "-B", "-u", "-X", "utf8", "-c", _HARNESS]
        if config.kind == "bubblewrap":
            command = [*bubblewrap.command(config.file_mib), *command]
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="sapo-sandbox-", ignore_cleanup_errors=True)
            limits["processes"] = None
        self._process = subprocess.Popen(
            [*command, json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder.name if self._folder else "/",
            env={"PYTHONHASHSEED": "0"},  # so that what depends on a set's order comes out the same each time
            start_new_session=True,
        )

    def waits(self) -> bool:
        """Whether it is still there. It ends with the thread that started it, as it would with the process."""
        return self._thread.is_alive() and self._process.poll() is None

    def judge(self, program: Program) -> Verdict:
        """What comes of the program. Raises SandboxError where the sandbox did not start, or its judge was killed."""
        ears = _Ears(self._process, self._config.output_kib * 1024)
        ears.listen(_START_SECONDS, until=b"\n")
        if not ears.said:
            kind, reason = self._config.kind, ears.output() or "it says nothing"
            raise SandboxError(
                f"a sandbox of kind {kind} did not start: {reason}; `sapo doctor` looks at what it needs"
            )
        ears.said.clear()
        started = time.monotonic()
        assert self._process.stdin
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(asdict(program)).encode())
        stopped = ears.listen(self._config.wall_seconds + _GRACE_SECONDS)
        seconds = time.monotonic() - started
        if stopped is None and self._config.kind == "bubblewrap":
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)  # it ends when all in its namespaces have
        self._kill()
        stopped = ears.drain() if stopped is None else stopped
        if stopped:
            return Verdict(*stopped, ears.output(), seconds)
        if not ears.said:
            reason = f"the judge ended with status {self._process.returncode} and no verdict"
            if self._config.kind == "bubblewrap":  # by nothing that a program can do
                raise SandboxError(reason)
            return Verdict("error", reason, ears.output(), seconds)
        verdict, reason, seconds = json.loads(ears.said)
        return Verdict(verdict, reason, ears.output(), seconds)

    def end(self) -> None:
        """Kills what is left of it and removes its files."""
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe
            pipe.close()
        if self._folder:
            self._folder.cleanup()

    def _kill(self) -> None:
        # Not waited for yet, it keeps its id, even where it has ended and others of its session have not.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class _Ears:
    """What comes out of a sandbox: what its judge says, and what is printed in it."""

    def __init__(self, process: subprocess.Popen[bytes], most: int) -> None:
        assert process.stdout
        assert process.stderr
        self._judge, self._output, self._most = process.stdout, process.stderr, most
        self.said, self.printed = bytearray(), bytearray()

    def listen(self, seconds: float, until: bytes | None = None) -> Stop | None:
        """Reads until the judge has said `until` or has ended. What stopped it before that, if anything did."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._judge, selectors.EVENT_READ, self.said)
            selector.register(self._output, selectors.EVENT_READ, self.printed)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 2**16)
                    key.data.extend(chunk)
                    if not chunk and key.fileobj is self._judge:
                        return None
                    if not chunk:
                        selector.unregister(key.fileobj)
                if len(self.printed) > self._most:
                    return self._too_much()
                if until and until in self.said:
                    return None
        return "timeout", "the tests did not end within wall_seconds"

    def drain(self) -> Stop | None:
        """Reads what is left of a sandbox that has ended or is killed: to the judge's end, then what was printed."""
        while chunk := os.read(self._judge.fileno(), 2**16):
            self.said.extend(chunk)
        os.set_blocking(self._output.fileno(), False)
        with suppress(BlockingIOError):
            while len(self.printed) <= self._most and (chunk := os.read(self._output.fileno(), 2**16)):
                self.printed.extend(chunk)
        return self._too_much() if len(self.printed) > self._most else None

    def output(self) -> str:
        """The first lines printed."""
        text = self.printed[: 4 * _OUTPUT_CHARACTERS].decode(errors="replace")
        return "\n".join(text.splitlines()[:_OUTPUT_LINES])[:_OUTPUT_CHARACTERS]

    def _too_much(self) -> Stop:
        return "violation", f"more than {self._most // 1024} KiB of output (output_kib)"
