"""What is asked of a reasoner, what comes back, and how the pools of workers that answer are configured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sapo_ray.config_loader import changeable
from sapo_ray.encoding import Encoded
from sapo_ray.sandbox.program import Program


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy; a completion ends before the first of the `stop` strings."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion of one prefix. The same request gives the same completion, so a retry asks for the same thing."""

    id: str
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """`text` holds neither the end-of-sequence token nor the stop string; `token_ids` holds all that was generated.

    `finished` is False where the token limit cut it off. `cached_tokens` of the `prompt_tokens` came out of the prefix
    cache.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    prompt_tokens: int
    cached_tokens: int

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """The scores of one trajectory's steps."""

    id: str
    encoded: Encoded


@dataclass(frozen=True, slots=True)
class ExecuteRequest:
    """The verdict on one program."""

    id: str
    program: Program


@dataclass(kw_only=True)
class PoolConfig:
    workers: int = changeable(1)
    """Workers that are always up, each with a model of its own; may be 0 where `max_workers` is set."""
    max_workers: int | None = changeable(None)
    """Workers that a backlog may grow the pool to (see `scaling`); never more than `workers` if null."""
    cpus_per_worker: float = changeable(1.0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = changeable(0.0)
    """GPUs that Ray reserves for a worker; 0 has it work on the CPU."""
    threads: int = changeable(0)
    """CPU threads of a worker; 0 takes `cpus_per_worker`, rounded down, and at least one."""
    batch_size: int = changeable(16)
    """Most requests in one call of a worker."""
    in_flight: int = changeable(16)
    """Calls a worker has at once; `batch_size * in_flight` well above what it works on at once keeps it busy."""

    @property
    def most_workers(self) -> int:
        return self.workers if self.max_workers is None else self.max_workers

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must not be negative")
        if self.most_workers < max(1, self.workers):
            raise ValueError(f"workers is {self.workers} and max_workers {self.max_workers}; that allows for no worker")
        for key in ("batch_size", "in_flight"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("cpus_per_worker", "gpus_per_worker", "threads"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must not be negative")


@dataclass(kw_only=True)
class SimulationConfig:
    error_rate: float = 0.1
    """Chance that a step of a null reasoner states another value than it should; later steps go on from that."""
    token_seconds: float = changeable(0.0)
    """Mean seconds that a null reasoner takes over a token of a completion; 0 answers at once."""
    score_seconds: float = changeable(0.0)
    """Mean seconds that a null verifier takes over a trajectory; 0 answers at once."""
    sigma: float = changeable(0.5)
    """Standard deviation of the logarithm of what a request takes, which is log-normal."""

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate is {self.error_rate}; it must lie between 0 and 1")
        for key in ("token_seconds", "score_seconds", "sigma"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be a number and not negative")


@dataclass(kw_only=True)
class EngineConfig(PoolConfig):
    kind: Literal["vllm"] | None = "vllm"
    """`vllm`, or null: workers without a model, for tests and benchmarks of all but the engine. They solve the prompt's
    question, with seeded mistakes and delays (see `simulation`); of a checkpoint they read the tokenizer only."""
    tensor_parallel_size: int = changeable(1)
    """GPUs of one node that an engine spreads its weights over, at most `gpus_per_worker`; without GPUs, processes that
    share the worker's CPU threads."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of weights and activations; `auto` takes the checkpoint's."""
    max_model_len: int = 512
    """Longest prompt and completion together, in tokens."""
    max_num_seqs: int = changeable(64)
    """Sequences an engine decodes at once."""
    max_num_batched_tokens: int = changeable(8192)
    """Tokens an engine works on in one step; on a CPU at least `max_model_len`, since prompts are not cut there."""
    kv_cache_gib: float = changeable(1.0)
    """Key-value cache of an engine in GiB; 0 lets vLLM take the share `gpu_memory_utilization` of the device."""
    gpu_memory_utilization: float = changeable(0.9)
    """Share of the device's memory an engine may use, where `kv_cache_gib` is 0."""
    block_size: int = changeable(32)
    """Tokens in a block of the key-value cache: prefixes are shared in whole blocks."""
    prefix_caching: bool = changeable(True)
    """Keep the keys and values of prefixes, so that completions of one prefix compute it once."""
    enforce_eager: bool = changeable(True)
    """Do without compilation, which costs start-up time and pays off on GPUs."""
    sleep: bool = changeable(False)
    """Where `placement` is `colocated`: keep the engine's process and have it give back its memory only (vLLM's sleep
    mode, GPUs only), instead of ending it. `gpus_per_worker` must then be above 0.5, so that no two engines share a
    GPU, and below 1, which leaves the trainer a fraction of it: with `tensor_parallel_size` above 1 none can sleep."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, such as `attention_backend`; they win over the keys above. Not
    `trust_remote_code`: no code that comes with a model is run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "block_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.kv_cache_gib < 0:
            raise ValueError(f"kv_cache_gib is {self.kv_cache_gib}; it must not be negative")
        if 0 < self.gpus_per_worker < self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}; a worker has {self.gpus_per_worker:g} GPUs "
                "(gpus_per_worker), and an engine lives on one node"
            )
        if "trust_remote_code" in self.extra:
            raise ValueError("extra names trust_remote_code; no code that comes with a model is run: leave it out")
        if self.sleep and not 0.5 < self.gpus_per_worker < 1:
            raise ValueError(
                f"sleep is true and gpus_per_worker {self.gpus_per_worker:g}; it must lie above 0.5, or two engines "
                "would share a GPU, and below 1, which leaves the trainer a fraction of it"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must lie above 0 and at most at 1"
            )
        if not self.gpus_per_worker and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; on a CPU it must be at least "
                f"max_model_len = {self.max_model_len}"
            )


@dataclass(kw_only=True)
class VerifierConfig(PoolConfig):
    kind: Literal["model"] | None = "model"
    """`model`, or null: workers without a model, for tests and benchmarks of all but the engine. They score most right
    steps near 0.9 and all others at random, by the request; of a checkpoint they read the tokenizer only."""
    cpus_per_worker: float = changeable(0.5)
    """CPUs that Ray reserves for a worker."""
    batch_size: int = changeable(32)
    """Most trajectories in one call of a worker."""
    in_flight: int = changeable(2)
    """Calls a worker has at once: one that it works on, the others waiting."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations; scores are always fp32."""
    batch_tokens: int = changeable(4096)
    """Most tokens in a forward pass, padding included; a longer trajectory gets a pass of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")


@dataclass(kw_only=True)
class ExecutorConfig(PoolConfig):
    workers: int = changeable(1)
    """Workers that are always up; may be 0 where `max_workers` is set."""
    threads: int = changeable(0)
    """Programs that a worker runs at once; 0 takes `cpus_per_worker`, rounded down, and at least one."""
    cpus_per_worker: float = changeable(0.3)
    """CPUs that Ray reserves for a worker."""
    batch_size: int = changeable(4)
    """Most programs in one call of a worker."""
    in_flight: int = changeable(2)
    """Calls a worker has at once: while one is answered, the programs of the other run."""
    gpus_per_worker: float = changeable(0.0)
    """Always 0: programs see no GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_worker:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}; programs see no GPU: it must be 0")


def cpu_threads(config: PoolConfig) -> int:
    """The CPU threads a worker runs."""
    return config.threads or max(1, int(config.cpus_per_worker))


def thread_environment(config: PoolConfig, processes: int = 1) -> dict[str, str]:
    """Environment variables that give each of a worker's processes its threads. They wait passively: threads that wait
    actively stall each other as soon as they outnumber the free cores."""
    return {"OMP_NUM_THREADS": str(max(1, cpu_threads(config) // processes)), "OMP_WAIT_POLICY": "PASSIVE"}
