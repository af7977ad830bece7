from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from actors.engines import Engines
from actors.errors import WorkerError
from actors.executor import executor_pool
from actors.pool import ElasticPool
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.data import Question
from sapo_ray.requests import ExecuteRequest, ExecutorConfig
from sapo_ray.sandbox import Program, SandboxConfig, Verdict
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks import CodeConfig, make_task
from sapo_ray.tasks.code import CodeSource

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


def test_what_programs_cost_is_counted_and_their_pool_pauses_with_the_others(tmp_path: Path) -> None:
    code = CodeConfig(train_data=CodeSource(path=str(tmp_path / "none.jsonl")), test=1)
    sandbox = SandboxConfig(cpu_seconds=1, wall_seconds=20)
    config = RunConfig(task=code, sandbox=sandbox, executor=ExecutorConfig(cpus_per_worker=0.1))
    names = ["right", "endless", "wrong"]
    questions = [Question(name, "?", "") for name in names]

    async def test() -> tuple[list[bool], Cost]:
        engines = Engines(config, make_task(code), "test")
        await engines._executors.start()
        await engines.pause()
        assert [pool.stats().ready for pool in engines._pools] == [0, 0, 0]
        await engines.resume()
        engines.begin(3)
        stream = engines.stream(questions, lambda question: engines.execute(request(question.id)))
        passed = [verdict.passed async for _, verdict in stream]
        await engines.close()
        return passed, engines.cost

    passed, cost = asyncio.run(test())
    assert passed == [True, False, False]
    assert (cost.programs, cost.program_timeouts) == (3, 1)
    assert cost.program_seconds > 1


def test_a_killed_worker_leaves_no_sandbox_and_its_programs_are_run_by_another() -> None:
    async def test(pool: Pool) -> None:
        await pool.submit(request("right"))
        (worker,) = [p for p in psutil.Process().children(recursive=True) if "ExecutorWorker" in " ".join(p.cmdline())]
        waiting = set(worker.children(recursive=True))
        results = asyncio.gather(*(pool.submit(request("endless", n)) for n in range(4)))
        while not (running := set(worker.children(recursive=True)) - waiting):
            await asyncio.sleep(0.01)
        sandboxes = waiting | running
        os.kill(worker.pid, signal.SIGKILL)
        assert [verdict.verdict for verdict in await results] == ["timeout"] * 4
        assert pool.stats().counts["dead"] == 1
        psutil.wait_procs(sandboxes, timeout=30)
        assert not [process for process in sandboxes if process.is_running()]

    run(test)


@pytest.fixture
def visible() -> Iterator[Path]:
    """A folder that bubblewrap does not hide, as it does /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_sandbox_that_fails_costs_a_worker_and_no_program(visible: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts of bwrap fail: that of the sandbox which waits, that of the one in its place, and another."""
    faults, bwrap = [visible / f"fault-{number}" for number in range(3)], visible / "bwrap"
    bwrap.write_text(
        f"#!{shutil.which('bash')}\n"
        f"for fault in {visible}/fault-*; do if rm $fault 2>/dev/null; then exit 1; fi; done\n"
        f'exec {shutil.which("bwrap")} "$@"\n'
    )
    bwrap.chmod(0o755)
    path = {"PATH": f"{visible}:{os.environ['PATH']}"}
    monkeypatch.setattr("actors.executor.thread_environment", lambda _: path)

    async def test(pool: Pool) -> None:
        assert (await pool.submit(request("right"))).verdict == "pass"
        for fault in faults:
            fault.touch()
        assert (await pool.submit(request("right", 1))).verdict == "pass"  # its sandbox is there already
        await asyncio.sleep(2)
        assert (await pool.submit(request("right", 2))).verdict == "pass"
        assert (pool.stats().counts["dead"], pool.stats().counts["retries"]) == (1, 1)

    run(test)


def test_a_node_without_the_sandbox_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bash", "sh"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setattr("actors.executor.thread_environment", lambda _: {"PATH": str(tmp_path)})
    with pytest.raises(WorkerError, match=r"executor worker 0: start failed: .*which does not work here: none;"):
        run(lambda pool: asyncio.sleep(0))
