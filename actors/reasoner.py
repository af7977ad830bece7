"""Rollout workers: Ray actors that each keep one vLLM engine up for the whole run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from actors.child_log import ChildLog
from actors.errors import EngineDeadError
from actors.logs import about, answering
from actors.pool import ElasticPool
from actors.vllm_extension import WeightReload
from actors.worker import PoolWorker, actor_class
from sapo_ray.cache import local_checkpoint
from sapo_ray.errors import SapoError
from sapo_ray.requests import Completion, EngineConfig, GenerateRequest, Sampling, thread_environment
from sapo_ray.scaling import ScalingConfig

DYING_SECONDS = 15.0
"""How long an engine of several processes that has lost one may fail commands, before vLLM says that it is dead."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RolloutWorker(PoolWorker):
    """One vLLM engine. `ready` starts it; an engine that cannot start says why in one line."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._config = config
        self._model = model
        self._engine: Any = None

    async def ready(self) -> None:
        """Start the engine. Raises SapoError with the engine's own cause where it cannot start."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        if self._engine is not None:
            return
        worker = self

        class CountSteps(StatLoggerBase):  # the engine's own word that it moves
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(self, *args: Any, **kwargs: Any) -> None:
                worker.progress += 1

            def log_engine_initialized(self) -> None: ...

        arguments = engine_args(self._config, local_checkpoint(self._model))
        log, begun = ChildLog(), time.monotonic()
        logger.info("a vLLM engine starts with %s", arguments)
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[CountSteps])
        except Exception as error:
            raise SapoError(f"vLLM engine for {self._model} did not start: {log.cause(error)}") from None
        logger.info("the engine is up after %.0f s", time.monotonic() - begun)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion | Exception]:
        """The completions of `requests`, in order; in place of a request that the engine refuses, the reason."""
        with answering("generate", [request.id for request in requests]):
            results = await self._command(asyncio.gather(*map(self._complete, requests), return_exceptions=True))
        return [
            _refusal(request, result) if isinstance(result, BaseException) else result
            for request, result in zip(requests, results, strict=True)
        ]

    async def load(self, checkpoint: str) -> None:
        """Put the weights of `checkpoint` in place and forget cached prefixes. Call it while nothing is generated."""
        path = await asyncio.to_thread(local_checkpoint, checkpoint)
        if not Path(path, "config.json").is_file():
            raise SapoError(f"no checkpoint to load at {checkpoint}: config.json is missing")
        await self._command(self._engine.collective_rpc("load_checkpoint", args=(path,)))
        self._model = checkpoint
        await self.reset_prefix_cache()
        logger.info("%s is loaded in place", checkpoint)

    async def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Raises RuntimeError while requests run, whose prefixes vLLM keeps."""
        if not await self._command(self._engine.reset_prefix_cache()):
            raise RuntimeError("the prefix cache cannot be reset while requests are running")

    async def sleep(self) -> None:
        """Give the device's memory back; the weights wait in the node's."""
        await self._command(self._engine.sleep(level=1))
        logger.info("the engine sleeps")

    async def wake(self) -> None:
        """Take the device's memory again."""
        await self._command(self._engine.wake_up())
        logger.info("the engine is awake")

    async def _command(self, command: Awaitable[T]) -> T:
        """What a command to the engine comes to. Raises EngineDeadError where it is dead, or dies meanwhile.

        vLLM leaves a command unanswered whose engine has died, and has one fail whose engine is about to: one that is
        made of several processes has lost one of them, and ends the others before it says that it is dead.
        """
        log, asked = ChildLog(), asyncio.ensure_future(command)
        while not self._engine.errored and not asked.done():
            await asyncio.wait([asked], timeout=1.0)
        if asked.done() and asked.exception() and self._engine.vllm_config.parallel_config.world_size > 1:
            until = time.monotonic() + DYING_SECONDS
            while not self._engine.errored and time.monotonic() < until:
                await asyncio.sleep(0.1)
        if self._engine.errored:
            asked.cancel()
            await asyncio.wait([asked])
            raise EngineDeadError(f"vLLM engine for {self._model} died: {log.cause(self._engine.dead_error)}")
        return asked.result()

    async def _complete(self, request: GenerateRequest) -> Completion:
        from vllm.inputs import tokens_input

        prompt = tokens_input(list(request.prompt_ids))
        async for output in self._engine.generate(prompt, sampling_params(request.sampling, request.seed), request.id):
            final = output
        completion = final.outputs[0]
        return Completion(
            id=request.id,
            text=completion.text,
            token_ids=tuple(completion.token_ids),
            finished=completion.finish_reason == "stop",
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=final.num_cached_tokens or 0,
        )


def _refusal(request: GenerateRequest, reason: BaseException) -> ValueError:
    logger.warning("refused by the engine: %s", reason, extra=about([request.id]))
    return ValueError(f"request {request.id}: {reason}")


def reasoner_pool(config: EngineConfig, scaling: ScalingConfig) -> ElasticPool[GenerateRequest, Completion]:
    """A pool of rollout workers."""
    actor = actor_class(RolloutWorker, config, environment(config))
    return ElasticPool(
        "rollout", lambda model: actor.remote(config, model), "generate", config, scaling, sleeps=config.sleep
    )


def sampling_params(sampling: Sampling, seed: int) -> Any:
    """vLLM's SamplingParams of one request."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def engine_args(config: EngineConfig, model: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs (and LLM), `config.extra` last."""
    args: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30) or None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "block_size": config.block_size,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleep,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": f"{WeightReload.__module__}.{WeightReload.__qualname__}",
    }
    if not config.gpus_per_worker:
        # A seeded request whose prompt is cut into chunks rewinds its generator, which a CPU generator cannot do: it
        # would kill the engine.
        args["enable_chunked_prefill"] = False
    if config.tensor_parallel_size > 1:
        # Processes of this node, on the devices of this actor; within a placement group vLLM would start Ray actors.
        args["distributed_executor_backend"] = "mp"
    return {**args, **config.extra}


def environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a worker's process."""
    variables = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if config.gpus_per_worker:
        return variables
    if config.tensor_parallel_size == 1:
        # The model runs within the engine's process: a worker process of its own would poll for work, even when idle.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        # vLLM would bind each of the engine's processes to all cores of a NUMA node of its own, and refuse to start
        # where there are fewer nodes.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables | thread_environment(config, config.tensor_parallel_size)
