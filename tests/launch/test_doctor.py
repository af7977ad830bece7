from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from launch.cli import COMMANDS, Commands, cli
from launch.doctor import _version, import_check, lock_path, read_pins, sandbox_check, version_check, version_checks
from sapo_ray.errors import SapoError
from sapo_ray.sandbox import bubblewrap

ROOT = Path(__file__).parents[2]


def test_pins_are_those_of_this_environment(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    elsewhere, here = "c==2.0 ; python_full_version < '3'", "c==2.1 ; python_full_version >= '3'"
    lock.write_text(f"# made by a tool\na-b==1.0\n    # via a==0\n\n{elsewhere}\n{here}\nd.e==3!1.0.post2\n")
    assert read_pins(lock) == {"a-b": "1.0", "c": "2.1", "d.e": "3!1.0.post2"}


def test_the_lock_is_the_checkouts() -> None:
    assert lock_path() == ROOT / "requirements.lock"
    assert read_pins(lock_path())["ray"]


def test_a_version_agrees_differs_or_is_missing() -> None:
    assert version_check("click", read_pins(lock_path())["click"]).verdict == "ok"
    other = version_check("click", "0.1")
    assert (other.verdict, other.mend.split()[-1]) == ("differs", "click==0.1")
    assert version_check("no-such-package", "1.0").verdict == "missing"


REQUIRED = ["torch", "pyarrow", "safetensors", "scipy", "scikit-learn", "numpy", "pyyaml", "rich", "click"]


@pytest.mark.parametrize("package", REQUIRED)
def test_any_missing_requirement_is_found_with_what_mends_it(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """numpy and scipy are pinned at one version for each of several Pythons; the command names this one's."""
    monkeypatch.setattr("launch.doctor._version", lambda name: None if name == package else _version(name))
    checks = list(version_checks(read_pins(lock_path())))
    [check] = [check for check in checks if check.verdict == "missing"]
    assert check.mend.split()[-1] == f"{package}=={metadata.version(package).partition('+')[0]}"
    assert ("--no-deps" in check.mend) == (package != "torch")


def test_a_checkout_that_is_not_installed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(package: str) -> list[str]:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "requires", not_installed)
    [check] = [check for check in version_checks(read_pins(lock_path())) if check.verdict == "missing"]
    assert (check.item, check.mend.split()[-2:]) == ("sapo_ray", ["-e", str(ROOT)])


def test_doctor_runs_where_the_packages_that_it_looks_for_are_missing() -> None:
    """Of all that sapo_ray asks for it needs click, which is the command line, and packaging, which reads the lock."""
    script = (
        "import sys\n"
        "for name in 'torch transformers ray numpy scipy sklearn pyarrow yaml omegaconf rich'.split():\n"
        "    sys.modules[name] = None\n"
        "import launch.doctor as d\n"
        "d.engine_checks = lambda: []\n"
        "d.doctor.main(['--json'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert {"rich", "pyarrow", "CPU cores"} <= {check["item"] for check in json.loads(done.stdout)["checks"]}


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


def test_help_and_a_mistake_in_a_config_wait_for_no_engine() -> None:
    """Importing these costs seconds, on a busy machine half a minute."""
    script = (
        "import sys\n"
        "from launch.cli import COMMANDS, cli\n"
        "for command in COMMANDS:\n"
        "    cli.main([command, '--help'], standalone_mode=False)\n"
        "try:\n"
        "    cli.main(['run', 'configs/local.yaml', 'rounds=many'], standalone_mode=False)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print({'torch', 'transformers', 'ray', 'scipy', 'sklearn', 'vllm', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["command line: rounds is 'many'; it must be int", "set()"], done.stderr


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


def test_a_missing_bubblewrap_is_no_fault_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "fault", lambda: None)
    assert sandbox_check().verdict == "ok"
    monkeypatch.setattr(bubblewrap, "fault", lambda: ("none", "apt-get install -y bubblewrap"))
    check = sandbox_check()
    assert (check.verdict, check.mend, check.required) == ("missing", "apt-get install -y bubblewrap", False)
