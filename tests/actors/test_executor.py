from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest
import ray

from actors.executor import executor_pool
from actors.pool import ElasticPool
from sapo_ray.requests import ExecuteRequest, ExecutorConfig
from sapo_ray.sandbox import Program, SandboxConfig, Verdict
from sapo_ray.scaling import ScalingConfig

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("needs_bubblewrap")]

Pool = ElasticPool[ExecuteRequest, Verdict]
SOLUTIONS = {
    "right": "def f(x):\n    return 2 * x",
    "wrong": "def f(x):\n    return x",
    "broken": "def f(x) return",
    "endless": "def f(x):\n    while True:\n        pass",
    "deaf": "def f(x):\n  while True:\n    try:\n      f(x)\n    except BaseException:\n      pass",
    "greedy": "def f(x):\n    return len(bytearray(2**32))",
    "loud": "def f(x):\n    print('x' * 2**20)",
}
VERDICTS = ["pass", "fail", "error", "timeout", "timeout", "memory", "violation"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def request(name: str, number: int = 0) -> ExecuteRequest:
    return ExecuteRequest(f"{name}-{number}", Program(SOLUTIONS[name], ("f",), ("assert f(2) == 4",)))


def run(test: Callable[[Pool], Awaitable[None]], **config: int) -> None:
    async def main() -> None:
        sandbox = SandboxConfig(cpu_seconds=1, wall_seconds=20)
        pool = executor_pool(ExecutorConfig(cpus_per_worker=0.1, **config), sandbox, ScalingConfig(hang_after=60))
        await pool.start()
        try:
            await asyncio.wait_for(test(pool), 120)
        finally:
            await pool.close()

    asyncio.run(main())


def test_every_program_gets_its_own_verdict() -> None:
    async def test(pool: Pool) -> None:
        asked = [request(name, number) for number in range(2) for name in SOLUTIONS]
        verdicts = await asyncio.gather(*map(pool.submit, asked))
        assert [verdict.verdict for verdict in verdicts] == 2 * VERDICTS
        assert pool.stats().counts == {}
        await pool.start()  # is up
        assert pool.stats().ready == 2

    run(test, workers=2, threads=2)


def test_a_killed_worker_leaves_no_sandbox_and_its_programs_are_run_by_another() -> None:
    async def test(pool: Pool) -> None:
        await pool.submit(request("right"))
        (worker,) = [p for p in psutil.Process().children(recursive=True) if "ExecutorWorker" in " ".join(p.cmdline())]
        sandboxes = worker.children(recursive=True)
        assert sandboxes
        results = asyncio.gather(*(pool.submit(request("endless", n)) for n in range(4)))
        while not pool.stats().in_flight:
            await asyncio.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)
        assert [verdict.verdict for verdict in await results] == ["timeout"] * 4
        assert pool.stats().counts["dead"] == 1
        psutil.wait_procs(sandboxes, timeout=30)
        assert not [process for process in sandboxes if process.is_running()]

    run(test)
