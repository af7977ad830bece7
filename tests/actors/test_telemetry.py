"""Every metric, as the endpoint of a real Ray exports it."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray.util.metrics import Counter

from actors.engines import Engines, spend
from actors.errors import QuarantinedError
from actors.pool import ElasticPool
from actors.telemetry import METRICS, Telemetry
from actors.worker import PoolWorker, actor_class
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.requests import PoolConfig
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks import Chain

pytestmark = pytest.mark.engine

TRAINING = {"sapo_trained_tokens", "sapo_loss"}
"""What a training tells: see test_trainer.py."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Ask:
    id: str


class Echo(PoolWorker):
    """Answers with the request's id, unless that is the word to die or to hang."""

    def __init__(self, checkpoint: str) -> None: ...

    async def ready(self) -> None: ...

    async def load(self, checkpoint: str) -> None: ...

    async def echo(self, batch: list[Ask]) -> list[str]:
        if any(ask.id == "die" for ask in batch):
            os._exit(1)
        if any(ask.id == "hang" for ask in batch):
            await asyncio.sleep(1000)
        self.progress += 1
        return [ask.id for ask in batch]


async def spent(cost: Cost) -> Cost:
    spend(cost)
    return cost


@ray.remote(num_cpus=0)
class Process:
    """A coordinator of nothing: the engines' metrics, and those of a pool that loses, sets aside, grows and shrinks."""

    async def live(self) -> None:
        config = PoolConfig(cpus_per_worker=0, workers=0, max_workers=1)
        actor = actor_class(Echo, config, {})
        self.pool: ElasticPool[Ask, str] = ElasticPool(
            "test", actor.remote, "echo", config, ScalingConfig(max_kills=2, shrink_after=1)
        )
        hanging = PoolConfig(cpus_per_worker=0)
        self.hanging: ElasticPool[Ask, str] = ElasticPool(
            "hanging", actor.remote, "echo", hanging, ScalingConfig(max_kills=2, hang_after=2)
        )
        self.publishing = asyncio.create_task(self.publish())
        await self.hanging.load("any")
        with pytest.raises(QuarantinedError):
            await self.hanging.submit(Ask("hang"))
        await self.pool.load("any")
        with pytest.raises(QuarantinedError):
            await self.pool.submit(Ask("die"))
        assert await self.pool.submit(Ask("answer")) == "answer"
        while not self.pool.stats().counts.get("shrunk"):
            await asyncio.sleep(0.1)
        self.engines = Engines(RunConfig(), Chain(RunConfig().task), "local")
        self.engines.enter("round-1/sample")
        self.engines.begin(2, Cost(generated_tokens=1000))  # by another process, which has counted them
        costs = [
            Cost(trajectories=1, rollouts=2, prompt_tokens=3, cached_tokens=4, generated_tokens=5),
            Cost(generated_tokens=6),
        ]
        assert [item async for item, _ in self.engines.attempts(costs, spent)] == costs

    async def publish(self) -> None:
        telemetry = Telemetry("local")
        while True:
            telemetry.pools([self.pool, self.hanging])
            await asyncio.sleep(1)


def exported(name: str) -> str:
    return f"ray_{name}_total" if METRICS[name].kind is Counter else f"ray_{name}"


def test_every_metric_is_exported_under_its_name_with_its_tags(scrape: Callable[[Iterable[str]], list[Any]]) -> None:
    process = Process.remote()
    ray.get(process.live.remote())
    names = {exported(name): METRICS[name] for name in METRICS.keys() - TRAINING}

    def value(name: str, **labels: str) -> float:
        return sum(s.value for s in samples if s.name == exported(name) and labels.items() <= s.labels.items())

    samples = scrape(names)
    while value("sapo_generated_tokens") < 11 or not value("sapo_scaling_decisions", direction="down"):
        samples = scrape(names)
    tags = defaultdict(set)
    for sample in samples:
        assert sample.labels["run"] == "local"
        tags[sample.name] |= sample.labels.keys()
    assert tags.keys() == names.keys()
    for name, metric in names.items():
        assert set(metric.tags) <= tags[name]
    assert (value("sapo_labels"), value("sapo_rollouts")) == (1, 2)
    assert (value("sapo_prompt_tokens"), value("sapo_cached_tokens"), value("sapo_generated_tokens")) == (3, 4, 11)
    assert (value("sapo_retries", pool="test"), value("sapo_quarantined", pool="test")) == (1, 1)
    assert value("sapo_lost_workers", pool="test", reason="died") == 2
    assert value("sapo_lost_workers", pool="hanging", reason="hung") == 2
    assert value("sapo_scaling_decisions", pool="test", direction="up") >= 1
    assert value("sapo_scaling_decisions", pool="test", direction="down") == 1
    assert {s.labels["state"] for s in samples if s.name == "ray_sapo_workers"} == {"ready", "starting"}
