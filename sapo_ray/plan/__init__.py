"""What a run would come to, seen before it is started: its data, prompts, memory, tokens, FLOPs, hours and price.

docs/plan.md explains each figure. Nothing here needs a GPU, reads a weight or starts anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.encoding import encode_prompt
from sapo_ray.errors import SapoError
from sapo_ray.limits import check_run_lengths
from sapo_ray.machine import machine_memory
from sapo_ray.models import base_tokenizer
from sapo_ray.plan.duration import Clock, Duration, gpus_held, start_seconds, unclocked
from sapo_ray.plan.hardware import GPU, GPUS, MOST_GIB
from sapo_ray.plan.memory import Memory, doubts, machine_doubts, memories, misfits, trainings
from sapo_ray.plan.shape import Shape, model_shape
from sapo_ray.plan.workload import Lengths, Stage, Workload, mean_lengths
from sapo_ray.tasks import make_task
from sapo_ray.tasks.base import SPLITS, Split
from sapo_ray.training import deepspeed_config

__all__ = ["GPU", "GPUS", "MOST_GIB", "Memory", "Plan", "Shape", "make_plan", "misfits", "model_shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that can be said of a run beforehand. Without a GPU there is neither `durations` nor what follows from it."""

    questions: dict[Split, int]
    remarks: list[str]
    """What to know of the data, and of what fits a GPU and this machine."""
    prompt: str
    """The first question of the pool, as the reasoner sees it."""
    lengths: Lengths
    shape: Shape
    deepspeed: dict[str, dict[str, Any]]
    """DeepSpeed's config by training."""
    memories: list[Memory]
    stages: list[Stage]
    durations: list[Duration]
    start_seconds: float
    gpus: float
    """GPUs that the run has at the same time."""
    misfits: list[str]
    """Why it cannot run on this GPU."""

    @property
    def cost(self) -> Cost:
        """Of all stages."""
        total = Cost()
        for stage in self.stages:
            total += stage.cost
        return total

    @property
    def hours(self) -> float | None:
        """From the first start to the last stage's end."""
        if not self.durations:
            return None
        return (math.fsum(d.seconds for d in self.durations) + self.start_seconds) / 3600


def make_plan(config: RunConfig, gpu: GPU | None, wrong: float) -> Plan:
    """The plan of a run in which the share `wrong` of the samples misses the answer.

    Raises SapoError for what `sapo run` would refuse of the data, the templates, the model and the lengths.
    """
    task = make_task(config.task)
    tokenizer = base_tokenizer(config.model, task.alphabet)
    questions: dict[Split, int] = {split: len(task.questions(split)) for split in SPLITS}
    for split in ("worked", "pool"):
        if not questions[split]:
            raise SapoError(f"the task's split {split} has no questions; there would be nothing to learn from")
    check_run_lengths(config, task, tokenizer)
    shape, lengths = model_shape(config.model, tokenizer), mean_lengths(task, tokenizer)
    stages = Workload(config, questions, lengths, shape, wrong).stages()
    remarks, durations, refused = list(task.remarks()), list[Duration](), list[str]()
    remarks += machine_doubts(config, shape, machine_memory())
    if gpu is not None:
        refused = list(misfits(config, shape, gpu.memory, gpu.name))
        remarks += doubts(config, shape, gpu.memory, gpu.name, lengths.sequence)
        if keys := unclocked(config):
            remarks.append(f"no hours are told, since they are those of workers on GPUs in 16 bits: {', '.join(keys)}")
        elif not refused:
            clock = Clock(config, shape, lengths, gpu)
            durations = [clock.duration(stage) for stage in stages]
    return Plan(
        questions=questions,
        remarks=remarks,
        prompt=str(tokenizer.decode(encode_prompt(tokenizer, task.prompt(task.questions("pool")[0].text)))),
        lengths=lengths,
        shape=shape,
        deepspeed={name: deepspeed_config(getattr(config, name)) for name in trainings(config)},
        memories=memories(config, shape),
        stages=stages,
        durations=durations,
        start_seconds=start_seconds(config, sum(stage.cost.trained_tokens > 0 for stage in stages)),
        gpus=gpus_held(config),
        misfits=refused,
    )
