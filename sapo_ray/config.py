"""The schema of a run's configuration: every key, with its meaning under it.

Every command reads it, so the modules it takes the keys from import torch, transformers and scipy where they work with
them, as `launch` does with ray: `--help` and a mistake in a config are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sapo_ray.config_loader import changeable
from sapo_ray.evaluator import EvaluationConfig
from sapo_ray.labelers import LabelingConfig
from sapo_ray.models import ModelConfig
from sapo_ray.pairs import PairsConfig
from sapo_ray.requests import EngineConfig, ExecutorConfig, SimulationConfig, VerifierConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.sandbox.config import SandboxConfig
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks import ChainConfig, CodeConfig, CustomConfig, MathConfig
from sapo_ray.training import TrainConfig, TrainerConfig


@dataclass(kw_only=True)
class AlignConfig(TrainConfig):
    init: Literal["base", "sft", "previous"] = "sft"
    """What alignment starts from in every round: the base model (the paper), M_0, or the last round's reasoner."""
    beta: float = 0.1
    """Weight β of ORPO's odds-ratio term (arXiv 2403.07691, eq. 6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; it must not be negative")


@dataclass(kw_only=True)
class RayConfig:
    num_cpus: int | None = changeable(None)
    """CPUs of the one-machine Ray that a run starts when it joins no cluster; all of the machine's if null."""
    coordinator_cpus: float = changeable(0.1)
    """CPUs that Ray sets aside for the coordinator; may be a fraction."""
    questions_in_flight: int = changeable(64)
    """Questions begun and not yet written: bounds memory and holds back the source."""
    questions_per_shard: int = changeable(256)
    """Most questions between two writes of a sampling stage, which come once a minute or sooner: what has been done
    since the last is done again after a kill."""

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"num_cpus is {self.num_cpus}; it must be at least 1, or null")
        if not self.coordinator_cpus >= 0:
            raise ValueError(f"coordinator_cpus is {self.coordinator_cpus}; it must not be negative")
        if self.questions_in_flight < 1:
            raise ValueError(f"questions_in_flight is {self.questions_in_flight}; it must be at least 1")
        if self.questions_per_shard < 1:
            raise ValueError(f"questions_per_shard is {self.questions_per_shard}; it must be at least 1")


@dataclass(kw_only=True)
class RunConfig:
    run_dir: str | None = changeable(None)
    """Where the run's files go, a path or a URI such as `s3://bucket/run`; `runs/<name of the config file>` if null."""
    seed: int = 0
    """Seed of the random start, of every sample and of the order of training data."""
    rounds: int = 2
    """Rounds of self-evolution after round 0 (I)."""
    verify: bool = True
    """Train and use a verifier. Without one (the paper's "w/o RM") nothing is labelled and pairs go by result alone."""
    placement: Literal["separate", "colocated"] = changeable("separate")
    """`separate`: engines and training workers are up at the same time. `colocated`: they take turns on the same
    devices; whoever is not at work gives its place back, and `trainer.keep_workers` does nothing."""
    tracking: Literal["tensorboard", "wandb", "mlflow", "none"] = changeable("tensorboard")
    """Where figures go beside metrics.jsonl: to TensorBoard's files in RUN/tensorboard, Weights & Biases, MLflow, or
    nowhere. The environment says the rest, such as WANDB_API_KEY and MLFLOW_TRACKING_URI."""
    initial_labeler: Literal["omega", "shepherd", "outcome"] = "omega"
    """Who labels round 0, when there is no verifier yet."""
    task: ChainConfig | MathConfig | CodeConfig | CustomConfig = field(default_factory=ChainConfig)
    """The problems. `task.kind` says which, and so which keys there are."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model M: a checkpoint, or, of a task that brings its own alphabet, a Qwen2 with random weights."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the reasoner samples solutions."""
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    """How steps are labelled."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Which solutions are preferred to which."""
    sft: TrainConfig = field(default_factory=TrainConfig)
    """Supervised fine-tuning, which makes M_0."""
    prm: TrainConfig = field(default_factory=TrainConfig)
    """The training of the verifiers V_i."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """The training of the reasoners M_i, i ≥ 1, by ORPO."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured after every round."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The rollout workers."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    """The scoring workers."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The workers that run programs; there are some only where the task's answers are programs."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What programs run in."""
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    """What workers of kind null do: how often they err and how long they take."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """How pools of workers grow, shrink and mend themselves."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The training workers: Ray Train and DeepSpeed."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster and the coordinator."""

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds}; it must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        for split in ("worked", "pool"):
            if getattr(self.task, split, None) == 0:
                raise ValueError(f"task.{split} is 0; there would be nothing to learn from")
        for pool in ("engine", "verifier"):
            if getattr(self, pool).kind is None and not isinstance(self.task, ChainConfig):
                raise ValueError(f"{pool}.kind is null; workers without a model solve the task chain alone")
        if self.runs_programs and self.sandbox.wall_seconds >= self.scaling.hang_after:
            raise ValueError(
                f"sandbox.wall_seconds is {self.sandbox.wall_seconds:g}; it must lie below scaling.hang_after = "
                f"{self.scaling.hang_after:g}, or a slow program's worker is taken for hung"
            )
        for stage, training in (("sft", self.sft), ("prm", self.prm), ("align", self.align)):
            if training.lora and training.lora.quantize and not self.trainer.gpus_per_worker:
                raise ValueError(
                    f"{stage}.lora.quantize is {training.lora.quantize}; it needs GPUs: set trainer.gpus_per_worker"
                )
        if not (self.verify or self.pairs.require_outcome):
            raise ValueError("pairs.require_outcome is false; without `verify` there is nothing else to pair by")

    @property
    def runs_programs(self) -> bool:
        """Whether answers are programs, which are judged by running them."""
        return isinstance(self.task, CodeConfig) or (isinstance(self.task, CustomConfig) and self.task.programs)
