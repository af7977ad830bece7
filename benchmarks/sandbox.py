"""How many programs a second the sandbox judges.

`--workers` threads have a sandbox each and run the same small program, which passes, `--programs` times in all. Beside
the rate it prints how long a program takes from call to verdict.

    python benchmarks/sandbox.py [--kind bubblewrap] [--programs 400] [--workers 2] [--json]
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles

import click

from sapo_ray.sandbox import Program, Sandbox, SandboxConfig

PROGRAM = Program(
    "import re\n\ndef words(text):\n    return re.findall(r'[a-z]+', text)",
    ("words",),
    ("assert words('one 2 three') == ['one', 'three']", "assert words('') == []", "assert words('4') == []"),
)


@click.command()
@click.option("--kind", type=click.Choice(["bubblewrap", "process"]), default="bubblewrap", show_default=True)
@click.option("--programs", type=click.IntRange(2), default=400, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of a sentence.")
def main(kind: str, programs: int, workers: int, as_json: bool) -> None:
    """Measure how many programs a second the sandbox judges."""
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        shares = [programs // workers + (worker < programs % workers) for worker in range(workers)]
        seconds = [each for share in pool.map(lambda count: _judge(kind, count), shares) for each in share]
    wall = time.monotonic() - start
    figures = {
        "programs_per_second": programs / wall,
        "median_seconds": median(seconds),
        "p95_seconds": quantiles(seconds, n=20)[-1],
    }
    if as_json:
        cores = len(os.sched_getaffinity(0))
        click.echo(json.dumps({"kind": kind, "workers": workers, "cores": cores, **figures}))
    else:
        rate, middle, high = figures.values()
        click.echo(f"{rate:.1f} programs a second; each takes {middle * 1e3:.0f} ms (p95 {high * 1e3:.0f})")


def _judge(kind: str, count: int) -> list[float]:
    """The seconds of each of `count` programs."""
    seconds = []
    with Sandbox(SandboxConfig(kind=kind)) as box:  # type: ignore[arg-type]
        for _ in range(count):
            start = time.monotonic()
            verdict = box.run(PROGRAM)
            seconds.append(time.monotonic() - start)
            if verdict.verdict != "pass":
                raise SystemExit(f"the program has the verdict {verdict.verdict}: {verdict.reason}")
    return seconds


if __name__ == "__main__":
    main()
