"""What every pool worker is: an actor that says where it runs and that it still moves."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import logs
from sapo_ray.requests import PoolConfig

TAIL_LINES = 20
TAIL_BYTES = 64 * 2**10
"""How much of a log's end is looked at: a line may be long, and a log of days much longer."""
TAIL_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker's process runs, and the files that its output goes to."""

    node: str
    pid: int
    logs: tuple[str, ...]


class PoolWorker:
    """Base of the workers of an ElasticPool."""

    progress = 0
    """Rises while work gets done."""

    def enter(self, run: str, stage: str) -> None:
        """What is asked from now on is for this stage of this run, and so say the log's lines."""
        logs.enter(run, stage)

    def where(self) -> Place:
        outputs = {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}
        files = tuple(sorted(path for path in outputs if Path(path).is_file()))
        place = Place(ray.get_runtime_context().get_node_id(), os.getpid(), files)
        logger.info("%s is process %d on node %s", type(self).__name__, place.pid, place.node)
        return place

    @ray.method(concurrency_group="health")
    def beat(self) -> int:
        """`progress`, told beside whatever else the worker does."""
        return self.progress


def actor_class(worker: type[PoolWorker], config: PoolConfig, environment: Mapping[str, str]) -> Any:
    """The Ray actor class of a worker, with the resources that its config reserves."""
    options: dict[str, Any] = {
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
        "concurrency_groups": {"health": 1},
        "runtime_env": {"env_vars": dict(environment)},
    }
    return ray.remote(**options)(worker)


def is_placed(actor: Any) -> bool:
    """Whether Ray has found a node for an actor: from then on it has a process, which may still be starting."""
    return bool(ray._private.state.actors(actor._actor_id.hex()).get("Pid"))


async def log_tail(place: Place | None) -> str:
    """The last lines of a dead worker's output; a note instead where they cannot be had."""
    if place is None or not place.logs:
        return "(no log: the worker never said where it was)"
    here = NodeAffinitySchedulingStrategy(place.node, soft=False)
    try:
        return await asyncio.wait_for(_tail.options(scheduling_strategy=here).remote(place.logs), TAIL_SECONDS)
    except Exception as error:  # its node may be gone
        return f"(the log is out of reach: {type(error).__name__})"


def last_lines(logs: Sequence[str]) -> str:
    """The last lines of these files, as far as there are such."""
    lines = [line for log in logs if Path(log).exists() for line in _end(log).splitlines()[-TAIL_LINES:]]
    return "\n".join(lines[-TAIL_LINES:])


_tail = ray.remote(num_cpus=0, max_retries=0)(last_lines)


def _end(log: str) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read(TAIL_BYTES).decode("utf-8", errors="replace")
