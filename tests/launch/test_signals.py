"""Ctrl-C and SIGTERM, sent to real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sapo_ray.store import RunDirectory
from sapo_ray.training import RESULT_FILE

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.yaml"


def outcome(source: str) -> tuple[int, list[str]]:
    """Exit status and lines of a Python process that listens for signals and has them sent to itself."""
    head = "import os, signal, time\nfrom launch import signals\nsignals.listen()\n"
    head += "def send(name): os.kill(os.getpid(), getattr(signal, name))\n"
    result = subprocess.run(
        [sys.executable, "-c", head + source], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout.splitlines() + result.stderr.splitlines()[-1:]


@pytest.mark.parametrize(("name", "line"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_the_first_signal_names_the_end(name: str, line: str) -> None:
    source = f"""
try:
    send({name!r})
except KeyboardInterrupt:
    try:
        send("SIGTERM")
    except KeyboardInterrupt:
        last = signals.last_words()
send("SIGINT")  # nobody hears it
print(last)
"""
    assert outcome(source) == (0, [str((line, 128 + getattr(signal, name)))])


def test_a_postponed_signal_comes_when_the_block_has_ended() -> None:
    source = """
try:
    with signals.postponed():
        send("SIGTERM")
        send("SIGINT")
        print("whole")
    print("never")
except KeyboardInterrupt:
    print(signals.last_words()[0])
"""
    assert outcome(source) == (0, ["whole", "terminated"])


def test_sigterm_counts_where_ray_has_set_its_own_handler() -> None:
    source = """
import sys
try:
    with signals.postponed():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        send("SIGTERM")
    print("never")
except KeyboardInterrupt:
    print(signals.last_words()[0])
"""
    assert outcome(source) == (0, ["terminated"])


def test_a_process_that_hangs_on_its_way_out_is_ended() -> None:
    source = """
signals.GRACE = 1
try:
    send("SIGTERM")
except KeyboardInterrupt:
    print("hangs", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    time.sleep(600)
"""
    assert outcome(source) == (-signal.SIGALRM, ["hangs"])


def test_a_process_that_hangs_while_a_signal_is_postponed_is_ended_as_soon() -> None:
    source = """
signals.GRACE = 1
with signals.postponed():
    send("SIGTERM")
    print("hangs", flush=True)
    while True:
        time.sleep(600)
"""
    assert outcome(source) == (-signal.SIGALRM, ["hangs"])


class Command:
    """A `sapo` process, started as nohup in a script starts it: SIGINT ignored. All it starts carries a mark."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._mark, self._log = uuid.uuid4().hex, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", *arguments],
                cwd=ROOT,
                env={**os.environ, "SAPO_TEST_MARK": self._mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.output()
            time.sleep(0.1)

    def terminate(self, when: Callable[[], bool]) -> None:
        """SIGTERM, which it obeys and leaves nothing behind."""
        self.wait_for(when)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=600) == 128 + signal.SIGTERM
        assert self.output().splitlines()[-1] == "terminated"
        assert list(self.alive()) == []

    def output(self) -> str:
        return self._log.read_text()

    def has(self, title: str) -> bool:
        """Whether a process with this title is at work for the command."""
        return any(title in " ".join(process.cmdline()) for process in self.alive())

    def alive(self) -> Iterator[psutil.Process]:
        """The command's process and all that it has started, whoever their parents are now."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("SAPO_TEST_MARK") == self._mark:
                    yield process
            except psutil.Error:  # it has ended, or is not ours to look into
                continue


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_told_to_stop_stops_and_goes_on(tmp_path: Path) -> None:
    """Before a training and in it by SIGTERM, in a sampling stage by Ctrl-C twice; then the same command runs to its
    end, with the loss curve of a run that nothing has stopped in its training."""
    run, undisturbed = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "undisturbed")
    arguments = ("run", str(TINY), "rounds=0", "sft.epochs=300", "sft.checkpoint_every=100", f"run_dir={run.path}")
    latest = run.path / "checkpoints" / "reasoner-0.partial" / "latest.json"

    command = Command(tmp_path / "log", *arguments)
    command.terminate(lambda: command.has("ray::RayTrainWorker"))
    assert list(run.stages()) == ["round-0/original", "base"]

    Command(tmp_path / "log", *arguments).terminate(latest.exists)
    assert list(run.stages()) == ["round-0/original", "base"]
    saved = json.loads(latest.read_text())["progress"]["updates"]
    assert saved > 100

    command = Command(tmp_path / "log", *arguments)
    command.wait_for(lambda: command.has("ray::RolloutWorker"))
    for _ in range(2):
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert command.process.wait(timeout=600) == 128 + signal.SIGINT
    assert command.output().splitlines()[-1] == "interrupted"
    assert "Traceback" not in command.output()
    assert list(command.alive()) == []
    assert list(run.stages()) == ["round-0/original", "base", "round-0/sft"]

    command = Command(tmp_path / "log", *arguments)
    assert command.process.wait(timeout=600) == 0, command.output()
    assert "round-0/sft" not in command.output()
    assert [entry["round"] for entry in run.summary()["rounds"]] == [0]

    command = Command(tmp_path / "log", *arguments, f"run_dir={undisturbed.path}")
    command.terminate(lambda: "round-0/sft" in undisturbed.stages())
    files = [store.folder.read(f"checkpoints/reasoner-0/{RESULT_FILE}") for store in (run, undisturbed)]
    trained, same = (json.loads(file)["result"] for file in files)
    assert (trained["resumed_from"], same["resumed_from"]) == (saved, 0)
    assert [update["loss"] for update in trained["metrics"]] == pytest.approx(
        [update["loss"] for update in same["metrics"]], abs=1e-5
    )
