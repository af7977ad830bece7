"""What reasoner, verifier and trainings take of a GPU's memory; docs/plan.md derives each formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sapo_ray.config import RunConfig
from sapo_ray.plan.hardware import GIB
from sapo_ray.plan.shape import Shape
from sapo_ray.requests import EngineConfig, VerifierConfig
from sapo_ray.training import TrainConfig

_BYTES = {"fp32": 4, "bf16": 2, "float32": 4, "bfloat16": 2, "float16": 2}
_NF4 = 0.5
"""Bytes of a weight in four bits; what is kept beside it to scale it, under 3% of that, is left out."""
_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way (`reduce_bucket_size`)."""
_GATHERED = 1_000_000_000
"""Most weights that ZeRO 3 keeps whole at a time (`stage3_max_live_parameters`)."""
_LIBRARIES = 0.7 * GIB
"""Of the memory of a process with torch, what is its own before it loads a model; an engine is two such processes."""
_BESIDE = 2.5 * GIB
"""What Ray, coordinator, job board and driver take beside the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that one worker takes, on the one GPU it has or on each that it spreads over."""

    section: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    """The two moments and, but for stage 0 in fp32, the master weights."""
    buffers: float = 0.0
    """Gradients on their way and, in ZeRO 3, gathered weights."""
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    """Of an engine: what `max_num_seqs` sequences of `max_model_len` tokens would fill."""

    @property
    def states(self) -> float:
        """What a training holds whatever it trains on."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.activations + self.logits + self.kv_cache


def memories(config: RunConfig, shape: Shape) -> list[Memory]:
    """What every kind of worker takes that the run has."""
    found = [training_memory(shape, name, getattr(config, name), config.trainer.workers) for name in trainings(config)]
    if config.engine.kind is not None:
        found.append(engine_memory(shape, config.engine))
    if config.verify and config.verifier.kind is not None:
        found.append(verifier_memory(shape, config.verifier))
    return found


def trainings(config: RunConfig) -> list[str]:
    """The sections of the trainings that the run makes."""
    return ["sft", *(["prm"] if config.verify else []), *(["align"] if config.rounds else [])]


def training_memory(shape: Shape, name: str, config: TrainConfig, workers: int) -> Memory:
    """The most that a worker of the training `name` takes, with AdamW and ZeRO over so many workers.

    The arithmetic is that of arXiv 1910.02054, section 5, but gradients are summed in fp32 from stage 1 on. Activations
    and logits are those of the largest forward pass that `micro_batch_tokens` and the batch allow. Frozen weights
    have neither gradients nor optimizer states.
    """
    count, trained = shape.count(name), shape.trained(name, config.lora)
    stage, size, mixed = config.zero_stage, _BYTES[config.dtype], config.dtype == "bf16"
    frozen = _NF4 if config.lora and config.lora.quantize else size
    weights = (frozen * (count - trained) if config.lora else 0) + size * trained
    sums = {0: size, 1: size + 4 if mixed else 4, 2: 4 / workers, 3: 4 / workers}[stage]
    master = 4 if mixed or stage else 0  # ZeRO copies its part of the weights in fp32, too
    optimizer = (master + 8) / (workers if stage else 1)
    buffers = size * (_BUCKET * (stage > 1) + min(count, _GATHERED) * (stage == 3))
    rows = 2 if name == "align" else 1
    tokens = min(config.micro_batch_tokens, math.ceil(config.batch_size / workers) * rows * config.max_tokens)
    return Memory(
        section=name,
        weights=weights / (workers if stage == 3 else 1),
        gradients=sums * trained,
        optimizer=optimizer * trained,
        buffers=buffers,
        activations=tokens * activation_bytes(shape, size, config.gradient_checkpointing),
        logits=0.0 if name == "prm" else tokens * logit_bytes(shape),
    )


def activation_bytes(shape: Shape, size: int, checkpointing: bool) -> float:
    """Bytes a token that autograd keeps of a forward pass, at `size` bytes a number; logits are counted apart.

    With checkpointing: every layer's input, and one layer's activations, which are computed again.
    """
    norms = shape.norms * (4 + 2 * size) * shape.hidden
    attention = 2 * size * shape.head_dim * (shape.heads + shape.kv_heads) + 4 * shape.heads
    feed_forward = 4 * size * shape.intermediate
    everything = norms + shape.layers * (attention + feed_forward)
    return size * shape.layers * shape.hidden + everything / shape.layers if checkpointing else everything


def logit_bytes(shape: Shape) -> float:
    """Bytes a token of the loss over the vocabulary, where it takes the most: three fp32 numbers a word."""
    return 12.0 * shape.vocabulary


def engine_memory(shape: Shape, config: EngineConfig) -> Memory:
    """What an engine takes of each GPU that it spreads over, were its cache to hold all that it may decode at once."""
    size, spread = _size(shape, config), config.tensor_parallel_size
    return Memory(
        section="engine",
        weights=shape.parameters * size / spread,
        activations=_forward(shape, size, config.max_num_batched_tokens) / spread,
        logits=8.0 * config.max_num_seqs * shape.vocabulary,  # in fp32, and their probabilities
        kv_cache=config.max_num_seqs * config.max_model_len * kv_bytes(shape, config),
    )


def kv_bytes(shape: Shape, config: EngineConfig) -> float:
    """Bytes a token of an engine's key-value cache, on each GPU: a key and a value a layer and key-value head."""
    heads = max(1.0, shape.kv_heads / config.tensor_parallel_size)
    return 2 * shape.layers * heads * shape.head_dim * _size(shape, config)


def kv_room(shape: Shape, config: EngineConfig, gpu: float) -> float:
    """Bytes that an engine's key-value cache has on a GPU with `gpu` bytes; below 0 where not all the rest fits."""
    if config.kv_cache_gib:
        return config.kv_cache_gib * GIB
    memory = engine_memory(shape, config)
    return config.gpu_memory_utilization * gpu - memory.weights - memory.activations - memory.logits


def verifier_memory(shape: Shape, config: VerifierConfig) -> Memory:
    """What a verifier takes."""
    size = _BYTES[config.dtype]
    return Memory(
        section="verifier",
        weights=shape.verifier_parameters * size,
        activations=_forward(shape, size, config.batch_tokens),
    )


def _forward(shape: Shape, size: int, tokens: int) -> float:
    """Activations of a forward pass that keeps none: those of the widest place, a feed-forward layer."""
    return float(tokens * size * (2 * shape.hidden + 3 * shape.intermediate))


def _size(shape: Shape, config: EngineConfig) -> int:
    return _BYTES[shape.dtype if config.dtype == "auto" else config.dtype]


def misfits(config: RunConfig, shape: Shape, gpu: float, name: str) -> Iterator[str]:
    """What cannot run on a GPU called `name` with `gpu` bytes of memory, a line each: what could is not among it.

    Workers that have no GPU are not looked at.
    """
    needed = {memory.section: memory for memory in memories(config, shape)}
    shared = _on_one_gpu(config.trainer.workers, config.trainer.gpus_per_worker)
    states = {section: shared * needed[section].states for section in trainings(config) if shared}
    if large := [section for section in states if states[section] > gpu]:
        stages = ", ".join(f"{section}.zero_stage = {getattr(config, section).zero_stage}" for section in large)
        yield (
            f"{stages} with trainer.workers = {config.trainer.workers} leave each GPU up to "
            f"{_gib(max(states.values()))} of weights, gradients and optimizer states, but {name} has {_gib(gpu)}; "
            "raise them"
        )
    if config.engine.gpus_per_worker and "engine" in needed:
        yield from _engine_misfits(config.engine, shape, needed["engine"].weights, gpu, name)
    shared = _on_one_gpu(config.verifier.workers, config.verifier.gpus_per_worker)
    if "verifier" in needed and (weights := shared * needed["verifier"].weights) > gpu:
        yield (
            f"verifier.dtype = {config.verifier.dtype} makes {_gib(weights)} of weights, which are on one GPU, but "
            f"{name} has {_gib(gpu)}"
        )


def _on_one_gpu(workers: int, share: float) -> int:
    """How many of a kind of worker Ray may put on the same GPU; 0 where they take none."""
    return 0 if not share else max(1, min(workers, int(1 / share)))


def _engine_misfits(config: EngineConfig, shape: Shape, weights: float, gpu: float, name: str) -> Iterator[str]:
    """vLLM starts where there is room for the weights and the cache, which holds one longest sequence at least."""
    one, fixed = config.max_model_len * kv_bytes(shape, config), config.kv_cache_gib * GIB
    share = gpu if fixed else config.gpu_memory_utilization * gpu
    if fixed and fixed < one:
        yield (
            f"engine.kv_cache_gib is {config.kv_cache_gib:g}, but a sequence of engine.max_model_len = "
            f"{config.max_model_len} tokens takes {_gib(one)}"
        )
    if weights + (fixed or one) > share:
        cache = f"engine.kv_cache_gib = {config.kv_cache_gib:g}" if fixed else f"{_gib(one)} for one longest sequence"
        part = "" if fixed else f" by engine.gpu_memory_utilization = {config.gpu_memory_utilization:g}"
        yield (
            f"engine.tensor_parallel_size = {config.tensor_parallel_size} leaves each GPU {_gib(weights)} of weights; "
            f"with {cache} that is more than the {_gib(share)} of {name} that the engine may use{part}"
        )
    shared, taken = _on_one_gpu(config.most_workers, config.gpus_per_worker), _engine_takes(config, weights, gpu)
    if shared > 1 and shared * taken > gpu:
        yield (
            f"engine.gpus_per_worker = {config.gpus_per_worker:g} puts {shared} engines on a GPU, which take "
            f"{_gib(shared * taken)}, but {name} has {_gib(gpu)}"
        )


def _engine_takes(config: EngineConfig, weights: float, gpu: float) -> float:
    """What vLLM sets aside of a GPU as it starts."""
    fixed = config.kv_cache_gib * GIB
    return weights + fixed if fixed else config.gpu_memory_utilization * gpu


def doubts(config: RunConfig, shape: Shape, gpu: float, name: str, length: float) -> Iterator[str]:
    """What may not fit, or runs slower for lack of memory, a line each. A sequence has `length` tokens on average."""
    engine, needed = config.engine, {memory.section: memory for memory in memories(config, shape)}
    for section in trainings(config) if config.trainer.gpus_per_worker else []:
        if needed[section].total > gpu:
            yield (
                f"{section}: a full forward pass may need {_gib(needed[section].total)}, and {name} has {_gib(gpu)}; "
                f"lower {section}.micro_batch_tokens or set {section}.gradient_checkpointing"
            )
    if not engine.gpus_per_worker or "engine" not in needed:
        return
    at_once = kv_room(shape, engine, gpu) / (length * kv_bytes(shape, engine))
    if at_once < engine.max_num_seqs:
        yield (
            f"engine: the key-value cache has room for {max(0, int(at_once))} sequences of {length:.0f} tokens, the "
            f"mean; more than that, up to engine.max_num_seqs = {engine.max_num_seqs}, wait"
        )
    both = engine.gpus_per_worker + config.verifier.gpus_per_worker
    if "verifier" in needed and engine.gpus_per_worker < both <= 1:
        taken = _engine_takes(engine, needed["engine"].weights, gpu) + needed["verifier"].total
        if taken > gpu:
            yield (
                f"an engine and a verifier may share a GPU, and then take up to {_gib(taken)}, and {name} has "
                f"{_gib(gpu)}; lower verifier.batch_tokens or what the engine takes"
            )
    if not engine.kv_cache_gib and engine.gpus_per_worker < min(1.0, engine.gpu_memory_utilization):
        yield (
            f"engine.gpu_memory_utilization is {engine.gpu_memory_utilization:g} and engine.gpus_per_worker "
            f"{engine.gpus_per_worker:g}: what shares the GPU may lack memory"
        )


def machine_doubts(config: RunConfig, shape: Shape, machine: float) -> Iterator[str]:
    """What all workers without a GPU may lack, were they on one machine with `machine` bytes of memory."""
    pools, training = _on_cpus(config, shape)
    at_once = max if config.placement == "colocated" else sum
    together = _BESIDE + at_once((sum(pools.values()), sum(training.values())))
    if (parts := pools | training) and together > machine:
        yield (
            f"workers without a GPU may need {_gib(together)} at a time, {_gib(_BESIDE)} of it for what is beside ("
            f"{', '.join(f'{section}: {_gib(amount)}' for section, amount in parts.items())}), and this machine has "
            f"{_gib(machine)}; if no other shares the work, lower micro_batch_tokens or set placement: colocated"
        )


def _on_cpus(config: RunConfig, shape: Shape) -> tuple[dict[str, float], dict[str, float]]:
    """What the workers of each pool, and those of the largest training, may take of their machines' memory."""
    needed = {memory.section: memory for memory in memories(config, shape)}
    pools, training = {}, {}
    if "engine" in needed and not config.engine.gpus_per_worker:
        cache = config.engine.kv_cache_gib * GIB or needed["engine"].kv_cache
        memory = replace(needed["engine"], kv_cache=cache).total
        pools["engine"] = config.engine.most_workers * (memory + 2 * _LIBRARIES)
    if "verifier" in needed and not config.verifier.gpus_per_worker:
        pools["verifier"] = config.verifier.most_workers * (needed["verifier"].total + _LIBRARIES)
    if not config.trainer.gpus_per_worker:
        largest = max(trainings(config), key=lambda section: needed[section].total)
        training[largest] = config.trainer.workers * (needed[largest].total + _LIBRARIES)
    return pools, training


def _gib(amount: float) -> str:
    return f"{amount / GIB:.3g} GiB"
