from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from launch.cli import COMMANDS, Commands, cli
from launch.doctor import import_check, lock_path, read_pins, version_check
from sapo_ray.errors import SapoError

ROOT = Path(__file__).parents[2]


def test_pins_are_those_without_a_marker(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# made by a tool\na-b==1.0\nc==2.0 ; python_full_version < '3.12'\nd.e==3!1.0.post2\n")
    assert read_pins(lock) == {"a-b": "1.0", "d.e": "3!1.0.post2"}


def test_the_lock_is_the_checkouts() -> None:
    assert lock_path() == ROOT / "requirements.lock"
    assert read_pins(lock_path())["ray"]


def test_a_version_agrees_differs_or_is_missing() -> None:
    assert version_check("click", read_pins(lock_path())["click"]).verdict == "ok"
    other = version_check("click", "0.1")
    assert (other.verdict, other.mend.split()[-1]) == ("differs", "click==0.1")
    assert version_check("no-such-package", "1.0").verdict == "missing"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", "works"),
        ("raise RuntimeError('no such driver')", "RuntimeError: no such driver"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_an_import_is_judged_by_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, found: str
) -> None:
    (tmp_path / "engine_under_test.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = import_check("engine_under_test")
    assert check.found == found
    assert (check.verdict == "ok") == (found == "works")


def test_an_import_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine_under_test.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = import_check("engine_under_test", timeout=0.5)
    assert (check.found, check.verdict) == ("not done after 0.5 s", "missing")


@pytest.mark.engine
def test_doctor_finds_this_environment_fit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    checks = {check["item"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["import vllm.entrypoints.llm"]["found"] == "works"
    assert checks["CPU cores"]["found"] == str(len(os.sched_getaffinity(0)))


def test_doctor_fails_where_something_required_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor.ENGINES", ("no_such_engine",))
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert "No module named 'no_such_engine'" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\s+sapo {command}\b", result.output)


def _group(error: BaseException) -> Commands:
    @click.command(cls=Commands, invoke_without_command=True)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        raise error

    return group


def test_an_error_is_one_line_and_its_traceback_is_for_debug() -> None:
    group = _group(SapoError("run.yaml: lr is -1"))
    plain, debug = CliRunner().invoke(group, []), CliRunner().invoke(group, ["--debug"])
    assert (plain.exit_code, plain.stderr, plain.stdout) == (2, "error: run.yaml: lr is -1\n", "")
    assert debug.exit_code == 2
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith("error: run.yaml: lr is -1\n")


def test_an_interrupt_exits_as_a_shell_expects() -> None:
    result = CliRunner().invoke(_group(KeyboardInterrupt()), [])
    assert (result.exit_code, result.stderr) == (128 + signal.SIGINT, "interrupted\n")
