"""Executor workers: Ray actors that run model-written programs, each in a sandbox of its own, and judge them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from actors.errors import EngineDeadError
from actors.logs import answering
from actors.pool import ElasticPool
from actors.worker import PoolWorker, actor_class
from sapo_ray.errors import told
from sapo_ray.requests import ExecuteRequest, ExecutorConfig, cpu_threads, thread_environment
from sapo_ray.sandbox import Sandbox, SandboxConfig, SandboxError, Verdict
from sapo_ray.scaling import ScalingConfig

logger = logging.getLogger(__name__)


class ExecutorWorker(PoolWorker):
    """Some threads, each with a sandbox that waits for its next program."""

    def __init__(self, config: ExecutorConfig, sandbox: SandboxConfig) -> None:
        self._config, self._sandbox = config, sandbox
        self._own = threading.local()

    async def ready(self) -> None:
        """Raises SandboxError where this node cannot give the sandbox that is wanted."""
        Sandbox(self._sandbox).close()
        self._threads = ThreadPoolExecutor(cpu_threads(self._config), "executor")
        logger.info("programs run in sandboxes of kind %s", self._sandbox.kind)

    async def load(self, checkpoint: str) -> None:
        """There is no model to load."""

    async def execute(self, requests: Sequence[ExecuteRequest]) -> list[Verdict]:
        """The verdicts on the programs of `requests`, in order.

        Raises EngineDeadError where a sandbox does not start or does not come to a verdict: another worker is asked.
        """
        loop = asyncio.get_running_loop()
        with answering("execute", [request.id for request in requests]):
            return await asyncio.gather(*(loop.run_in_executor(self._threads, self._judge, r) for r in requests))

    def _judge(self, request: ExecuteRequest) -> Verdict:
        try:
            if not hasattr(self._own, "sandbox"):
                self._own.sandbox = Sandbox(self._sandbox)
            verdict: Verdict = self._own.sandbox.run(request.program)
        except (SandboxError, OSError) as error:
            raise EngineDeadError(f"program {request.id} was not judged: {told(error)}") from error
        self.progress += 1
        return verdict


def executor_pool(
    config: ExecutorConfig, sandbox: SandboxConfig, scaling: ScalingConfig
) -> ElasticPool[ExecuteRequest, Verdict]:
    """A pool of executor workers."""
    actor = actor_class(ExecutorWorker, config, thread_environment(config))
    return ElasticPool("executor", lambda _: actor.remote(config, sandbox), "execute", config, scaling)
