"""What Ray's metrics endpoints tell Prometheus of a run.

Ray exports a counter such as `sapo_labels` as `ray_sapo_labels_total`, a gauge such as `sapo_loss` as `ray_sapo_loss`.
A gauge that is not set again goes away after some 20 s, a counter stays as long as its node. Nothing here is called for
a single request: totals are published about once a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

from actors.pool import ElasticPool
from sapo_ray.cost import Cost

PUBLISH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, what it says, and its tags beside `run`."""

    kind: type[Counter] | type[Gauge]
    meaning: str
    tags: tuple[str, ...] = ()


METRICS = {
    "sapo_generated_tokens": Metric(Counter, "Tokens that rollout workers have generated"),
    "sapo_prompt_tokens": Metric(Counter, "Tokens of the prompts they were given"),
    "sapo_cached_tokens": Metric(Counter, "Prompt tokens that their prefix caches held"),
    "sapo_rollouts": Metric(Counter, "Rollouts from prefixes of labelled trajectories"),
    "sapo_labels": Metric(Counter, "Trajectories labelled"),
    "sapo_trained_tokens": Metric(Counter, "Tokens trained on, padding not counted"),
    "sapo_retries": Metric(Counter, "Requests asked again after a worker died", ("pool",)),
    "sapo_quarantined": Metric(Counter, "Requests set aside because workers died over them", ("pool",)),
    "sapo_lost_workers": Metric(Counter, "Workers that died, or hung and were ended", ("pool", "reason")),
    "sapo_scaling_decisions": Metric(Counter, "Decisions to add workers or to end one", ("pool", "direction")),
    "sapo_queue_depth": Metric(Gauge, "Requests that wait for a worker", ("pool",)),
    "sapo_in_flight": Metric(Gauge, "Requests that workers have at hand", ("pool",)),
    "sapo_workers": Metric(Gauge, "Workers that are ready, or starting", ("pool", "state")),
    "sapo_loss": Metric(Gauge, "Loss of the last update of the training under way", ("stage",)),
}
_COSTS = {
    "generated_tokens": "sapo_generated_tokens",
    "prompt_tokens": "sapo_prompt_tokens",
    "cached_tokens": "sapo_cached_tokens",
    "rollouts": "sapo_rollouts",
    "trajectories": "sapo_labels",
}


class Telemetry:
    """The metrics of one process of a run."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def count(self, name: str, more: float, **tags: str) -> None:
        """Add to a counter."""
        if more > 0:
            self._metric(name).inc(more, {"run": self._run, **tags})

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._metric(name).set(value, {"run": self._run, **tags})

    def spent(self, now: Cost, before: Cost) -> None:
        """Count what has been spent since `before`."""
        for field, name in _COSTS.items():
            self.count(name, getattr(now, field) - getattr(before, field))

    def pools(self, pools: Iterable[ElasticPool[Any, Any]]) -> None:
        """Count what has happened in pools since the last call, and tell how they stand."""
        for pool in pools:
            stats = pool.stats()
            self._total("sapo_retries", stats.counts.get("retries", 0), pool=pool.name)
            self._total("sapo_quarantined", stats.counts.get("quarantined", 0), pool=pool.name)
            dead, hung = stats.counts.get("dead", 0), stats.counts.get("hung", 0)
            self._total("sapo_lost_workers", dead - hung, pool=pool.name, reason="died")
            self._total("sapo_lost_workers", hung, pool=pool.name, reason="hung")
            self._total("sapo_scaling_decisions", stats.counts.get("growths", 0), pool=pool.name, direction="up")
            self._total("sapo_scaling_decisions", stats.counts.get("shrunk", 0), pool=pool.name, direction="down")
            self.set("sapo_queue_depth", stats.queued, pool=pool.name)
            self.set("sapo_in_flight", stats.in_flight, pool=pool.name)
            self.set("sapo_workers", stats.ready, pool=pool.name, state="ready")
            self.set("sapo_workers", stats.starting, pool=pool.name, state="starting")

    def _total(self, name: str, total: float, **tags: str) -> None:
        key = (name, *tags.values())
        self.count(name, total - self._totals.get(key, 0.0), **tags)
        self._totals[key] = total

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            metric = METRICS[name]
            self._metrics[name] = metric.kind(name, metric.meaning, ("run", *metric.tags))
        return self._metrics[name]
