"""What one training is asked to do and what it reports: configs, the job, its result, the learning-rate schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from sapo_ray.config_loader import changeable, changeable_keys
from sapo_ray.encoding import Prompt
from sapo_ray.files import Folder, relative, split
from sapo_ray.manifest import DamagedError, Files, check_sizes

RESULT_FILE = "training.json"
"""Stands in every exported checkpoint: the fingerprint of the job that made it, and its result."""


@dataclass(kw_only=True)
class LoraConfig:
    rank: int = 16
    """Rank of an adapter: the model's weights W become W + alpha / rank · B · A with a rank of at most this."""
    alpha: int = 32
    """Scale of an adapter, before it is divided by the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training leaves out. Above 0, what is learned depends on `trainer.workers` and
    `micro_batch_tokens`, too."""
    targets: list[str] | None = None
    """Names of the linear layers that get adapters, such as `q_proj`; null: all of the model's but its head."""
    quantize: Literal["nf4"] | None = None
    """`nf4`: hold the frozen weights in four bits (QLoRA, arXiv 2305.14314). It needs GPUs, and bitsandbytes, which is
    not installed with the rest."""

    def __post_init__(self) -> None:
        for key in ("rank", "alpha"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.targets == []:
            raise ValueError("targets is []; name a layer, or all by null")


@dataclass(kw_only=True)
class TrainConfig:
    """One training. Raises ValueError for values that no training could have."""

    epochs: int = 1
    """Passes over the data."""
    max_updates: int | None = None
    """Stop after this many updates, where the epochs hold more. The schedule runs over those that are made."""
    batch_size: int = 32
    """Examples (a pair is one) an update learns from, over all workers."""
    micro_batch_tokens: int = changeable(8192)
    """Most tokens, padding included, of a worker's forward pass. At least 2 * max_tokens, so that a pair fits."""
    max_tokens: int = 512
    """Longest sequence, prompt included."""
    too_long: Literal["fail", "drop"] = "fail"
    """`fail`: a longer example stops the training. `drop`: it is left out and counted."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_ratio: float = 0.05
    """Share of the updates in which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = 0.1
    """Where `cosine` and `linear` end, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only (no biases, no norms)."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    max_grad_norm: float = 1.0
    """Longest gradient, as a 2-norm over all parameters; 0 leaves it alone."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward passes and of the exported weights. bf16 keeps fp32 master weights."""
    gradient_checkpointing: bool = changeable(False)
    """Recompute activations in the backward pass: the forward pass once more, far less memory."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states, 2 gradients as well, 3 weights as well. 0 adds up the
    gradients of an update's micro-batches in `dtype`, the others in fp32."""
    checkpoint_every: int = changeable(0)
    """Updates between mid-training checkpoints, from which an interrupted training goes on; 0: none by count."""
    checkpoint_minutes: float = changeable(10.0)
    """Minutes between mid-training checkpoints; 0: none by time. Where both keys are 0, only Ctrl-C and SIGTERM make
    one. A checkpoint takes the disk space of weights and optimizer states, twice until it has replaced the last one."""
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights and merge them in the end (docs/method.md); null trains all weights."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "max_tokens", "learning_rate"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")
        for key in ("weight_decay", "max_grad_norm", "checkpoint_every", "checkpoint_minutes"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")
        for key in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must lie between 0 and 1")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 0 and below 1")
        if self.max_updates is not None and self.max_updates < 1:
            raise ValueError(f"max_updates is {self.max_updates}; it must be at least 1, or null")
        if self.zero_stage not in range(4):
            raise ValueError(f"zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.zero_stage == 3 and self.lora and self.lora.quantize:
            raise ValueError("zero_stage is 3; it cannot shard the weights that lora.quantize packs: set 2, or less")
        if self.micro_batch_tokens < 2 * self.max_tokens:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens}; it must be at least 2 * max_tokens = "
                f"{2 * self.max_tokens}, so that a pair fits"
            )


@dataclass(kw_only=True)
class TrainerConfig:
    """The group of training workers. One group serves every training of a run."""

    workers: int = changeable(1)
    """Data-parallel workers."""
    cpus_per_worker: float = changeable(1.0)
    """CPUs that Ray sets aside for each; may be a fraction."""
    gpus_per_worker: float = changeable(0.0)
    """GPUs that Ray sets aside for each. Above 0: NCCL on CUDA; 0: gloo on CPUs."""
    placement: Literal["pack", "spread"] = changeable("pack")
    """Strategy of the workers' placement group: `pack` puts them on as few nodes as it can, `spread` on as many."""
    threads_per_worker: int = changeable(1)
    """Torch's threads in each."""
    keep_workers: bool = changeable(True)
    """Keep the group between trainings (a start costs some 25 s of imports). False frees its CPUs, GPUs and memory."""
    max_failures: int = changeable(3)
    """Worker crashes that a group survives; the training goes on from its last mid-training checkpoint."""

    def __post_init__(self) -> None:
        for key in ("workers", "threads_per_worker"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("cpus_per_worker", "gpus_per_worker", "max_failures"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")


class Prompts(Protocol):
    """The part of a task that training needs."""

    def prompt(self, question: str) -> Prompt:
        """What the reasoner goes on from."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train the checkpoint `init` on the Parquet files and directories `data`, and export to the directory `out`.

    All of them are paths or URIs.
    """

    objective: str
    """Name of the objective: sft, prm or orpo."""
    init: str
    data: tuple[str, ...]
    out: str
    task: Prompts
    config: TrainConfig
    seed: int
    params: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the objective, such as ORPO's beta."""
    content: tuple[str | None, ...] = ()
    """What `init` and `data` hold (see `content_of`): they may be made anew, at the same paths."""
    run: str = "-"
    """Name of the run that it belongs to, in logs and metrics."""
    stage: str = "-"
    """Name of the run's stage, there too."""
    driver: str | None = None
    """The id of the driver that must have the lease of the run two levels above `out` at every write; None where there
    is no lease to look at."""
    attention: str | None = None
    """What `model.attention` asks for. As it changes rounding alone, a training goes on with another."""

    @property
    def partial(self) -> str:
        """The name of the directory beside `out` that holds its mid-training checkpoints, while there are any."""
        return f"{split(self.out)[1]}.partial"

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a training to go on or to count as done. Paths are relative to `out`'s parent,
        so that a run directory can be moved."""
        home, _ = split(self.out)
        init, *data = (relative(location, home) for location in (self.init, *self.data))
        safe = changeable_keys(type(self.config))
        return {
            **{key: value for key, value in asdict(self.config).items() if key not in safe},
            "objective": self.objective,
            "params": dict(self.params),
            "init": init,
            "data": data,
            "content": list(self.content),
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished training."""

    checkpoint: str
    """Directory of the exported checkpoint."""
    updates: int
    examples: int
    """Examples that were trained on."""
    too_long: int
    """Examples left out by `too_long: drop`."""
    empty: int
    """Rows left out because they hold nothing to learn from (no unmasked step)."""
    tokens: int
    """Tokens that went through the model, padding not counted."""
    flops: float
    """(4 * parameters + 2 * trained parameters) * tokens: 6 * parameters * tokens without LoRA."""
    seconds: float
    """Wall-clock time in the workers, from loading the checkpoint to the export."""
    resumed_from: int
    """Update whose mid-training checkpoint the last attempt started from; 0 for a fresh start."""
    metrics: list[dict[str, float]]
    """For each update: `update` (from 1), `loss`, its terms by name, `lr`, `grad_norm` (before clipping), `tokens`."""
    files: Files
    """The checkpoint's files, but for the one that holds this result."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's config. Batch sizes are placeholders: the batch plan is ours, and so is the scale of the loss."""
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if bare_optimizer(config) else config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.dtype == "bf16"},
    }
    if config.zero_stage > 0:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def bare_optimizer(config: TrainConfig) -> bool:
    """Whether DeepSpeed leaves the optimizer unwrapped, and with it clipping and the gradient's norm to us."""
    return config.zero_stage == 0 and config.dtype == "fp32"


def finished(job: TrainJob) -> TrainResult | None:
    """The result stored in `job.out`, or None where nothing is there, or what was made from other content.

    Raises FileExistsError where something else is there, ValueError where another job's checkpoint is, DamagedError
    where one of its files has another size.
    """
    out = Folder(job.out)
    try:
        stored = json.loads(out.read(RESULT_FILE))
    except FileNotFoundError:
        if out.path is None or not out.path.exists():  # an object store may hold a part of what was being put there
            return None
        raise FileExistsError(
            f"{job.out} exists and is no finished training; remove it or name another directory"
        ) from None
    if not is_same_job(stored["job"], job.fingerprint(), out.locate(RESULT_FILE)):
        return None
    result = TrainResult(**{**stored["result"], "checkpoint": job.out})
    try:
        check_sizes(out, result.files, out.sizes())
    except DamagedError as error:
        raise DamagedError(f"{error}; remove {job.out} to train it again") from error
    return result


def is_same_job(stored: Mapping[str, Any], asked: Mapping[str, Any], path: str) -> bool:
    """Whether the job of the fingerprint stored at `path` was on the content that is there now.

    What was made from other content is trained anew: its stage was to be done again, and a kill came before its files
    were removed. Raises ValueError that names the first other key in which the fingerprints differ.
    """
    for key, value in asked.items():
        if key != "content" and stored.get(key) != value:
            raise ValueError(
                f"{path}: {key} was {stored.get(key)!r} and is now {value!r}; restore it or remove {split(path)[0]}"
            )
    return bool(stored.get("content") == asked["content"])


def learning_rate(config: TrainConfig, update: int, updates: int) -> float:
    """The learning rate of an update (from 0) among `updates`: a linear warm-up, then the schedule."""
    warmup = round(config.warmup_ratio * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / (warmup + 1)
    left = 1 - (update - warmup) / max(1, updates - warmup)
    share = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * share)
