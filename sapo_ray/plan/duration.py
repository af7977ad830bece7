"""How long a run takes on GPUs of one kind, roughly: docs/plan.md says what each figure stands on."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_ray.config import RunConfig
from sapo_ray.plan.hardware import GPU
from sapo_ray.plan.memory import engine_memory, kv_bytes, kv_room, trainings
from sapo_ray.plan.shape import Shape
from sapo_ray.plan.workload import Lengths, Stage
from sapo_ray.requests import PoolConfig

UTILIZATION = 0.3
"""Share of the peak FLOPs that training, scoring and reading prompts reach."""
BANDWIDTH = 0.6
"""Share of the memory's bandwidth that decoding reaches."""
STEP_SECONDS = 0.003
"""Least time of an engine's step: scheduling and launching kernels."""
REQUEST_SECONDS = 0.00023
"""The coordinator's CPU time for a request: 2.1 ms for nine (docs/scaling.md)."""
START_SECONDS = 60.0
"""Time until engines, or training workers, are up."""


@dataclass(frozen=True, slots=True)
class Duration:
    """A stage's seconds, and who needs them: the slowest of those that work side by side."""

    seconds: float
    bound: str


def unclocked(config: RunConfig) -> list[str]:
    """The keys, with their values, for which a run's time is not told: workers without a GPU, and what is not 16 bits
    wide, since that is the peak that a GPU is known by."""
    pools = ["engine", *(["verifier"] if config.verify else [])]
    values = {f"{name}.gpus_per_worker": getattr(config, name).gpus_per_worker for name in (*pools, "trainer")}
    values |= {f"{name}.dtype": getattr(config, name).dtype for name in (*pools, *trainings(config))}
    return [f"{key} = {value}" for key, value in values.items() if value in (0, "float32", "fp32")]


class Clock:
    """Tells how long the stages of a run take with its workers on GPUs of one kind."""

    def __init__(self, config: RunConfig, shape: Shape, lengths: Lengths, gpu: GPU) -> None:
        self._config, self._shape, self._lengths, self._gpu = config, shape, lengths, gpu
        self._flops = UTILIZATION * gpu.tflops * 1e12

    def duration(self, stage: Stage) -> Duration:
        """Engines, verifiers and the coordinator work side by side; a training has the run to itself."""
        parts = {
            "engine": self._engine(stage),
            "verifier": self._forward(self._shape.verifier_parameters, stage.cost.scored_tokens)
            / self._config.verifier.most_workers,
            "coordinator": stage.requests * REQUEST_SECONDS,
            "trainer": self._train(stage),
        }
        bound = max(parts, key=parts.__getitem__)
        return Duration(parts[bound], bound)

    def _engine(self, stage: Stage) -> float:
        """Prompts are bound by FLOPs; decoding by FLOPs, by reading weights and caches, or by the step's own time."""
        config, shape, cost = self._config.engine, self._shape, stage.cost
        if not cost.generated_tokens:
            return 0.0
        length, spread = self._lengths.sequence, config.tensor_parallel_size
        room = kv_room(shape, config, self._gpu.memory) / (kv_bytes(shape, config) * length)
        at_once = max(1.0, min(config.max_num_seqs, room, stage.requests / config.most_workers))
        read = engine_memory(shape, config).weights + at_once * length * kv_bytes(shape, config)
        step = max(
            STEP_SECONDS,
            read / (BANDWIDTH * self._gpu.gb_per_second * 1e9),
            self._forward(shape.parameters, at_once) / spread,
        )
        prompts = self._forward(shape.parameters, cost.prompt_tokens - cost.cached_tokens) / spread
        return (prompts + cost.generated_tokens / at_once * step) / config.most_workers

    def _train(self, stage: Stage) -> float:
        """With checkpointing the forward pass is made twice."""
        section = stage.name.rpartition("/")[2]
        if not stage.cost.trained_tokens:
            return 0.0
        seconds = stage.cost.flops / self._flops
        if getattr(self._config, section).gradient_checkpointing:
            seconds += self._forward(self._shape.count(section), stage.cost.trained_tokens)
        return seconds / self._config.trainer.workers

    def _forward(self, parameters: int, tokens: float) -> float:
        return 2.0 * parameters * tokens / self._flops


def start_seconds(config: RunConfig, trainings: int) -> float:
    """What starts take: of engines and training workers once, or where they take turns, once a training each."""
    return START_SECONDS * 2 * (trainings if config.placement == "colocated" else 1)


def gpus_held(config: RunConfig) -> float:
    """GPUs that a run has at the same time, at most."""
    trainer = config.trainer.workers * config.trainer.gpus_per_worker
    pools: list[PoolConfig] = [config.engine, *([config.verifier] if config.verify else [])]
    engines = sum(pool.most_workers * pool.gpus_per_worker for pool in pools)
    return max(engines, trainer) if config.placement == "colocated" and not config.engine.sleep else engines + trainer
