"""Tokens per second of the rollout pool, of a bare `vllm.LLM`, and of `transformers.generate`, side by side.

The same prompts, engine settings, threads and number of new tokens for all three. They take turns, so that what else
the machine does meets all of them; every figure is a median over the turns.

    python benchmarks/rollout.py
    python benchmarks/rollout.py --hidden-size 192 --layers 3 --heads 3 --intermediate-size 512 --prompts 512
    python benchmarks/rollout.py --model path/to/checkpoint --prompt-tokens 128
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import click
import ray
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from actors.reasoner import engine_args, environment, reasoner_pool, sampling_params
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import EngineConfig, GenerateRequest, Sampling
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks.chain import VOCABULARY

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Load:
    """What every contender is asked for, turn by turn."""

    prompts: int
    """Prompts in a turn."""
    prompt_tokens: int
    """Tokens of each prompt."""
    tokens: int
    """New tokens of each prompt."""
    repetitions: int
    """Measured turns."""


class BareVLLM:
    """`vllm.LLM` with the pool's engine settings."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        from vllm import LLM

        self._llm = LLM(**engine_args(config, model))

    def generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        """Tokens made, and the seconds they took."""
        from vllm.inputs import tokens_input

        start = time.perf_counter()
        prompts: list[Any] = [tokens_input(list(request.prompt_ids)) for request in requests]
        outputs = self._llm.generate(
            prompts,
            [sampling_params(request.sampling, request.seed) for request in requests],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs), time.perf_counter() - start


class Transformers:
    """`transformers.generate`, with as many sequences in a batch as the engine decodes at once."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._batch_size = config.max_num_seqs
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        self._model: Any = nn.Module.to(loaded, "cuda" if config.gpus_per_worker else "cpu")

    def generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        """Tokens made, and the seconds they took."""
        start, made = time.perf_counter(), 0
        for first in range(0, len(requests), self._batch_size):
            made += self._batch(requests[first : first + self._batch_size])
        return made, time.perf_counter() - start

    @torch.inference_mode()
    def _batch(self, requests: list[GenerateRequest]) -> int:
        prompts = torch.tensor([request.prompt_ids for request in requests], device=self._model.device)
        tokens = requests[0].sampling.max_tokens
        output = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return int((output.shape[1] - prompts.shape[1]) * output.shape[0])


class PoolOfOne:
    """The rollout pool with one worker, in a loop of its own."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._pool = reasoner_pool(config, ScalingConfig())
        self._loop.run_until_complete(self._pool.load(model))

    def generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        """Tokens made, and the seconds they took."""
        return self._loop.run_until_complete(self._generate(requests))

    def close(self) -> None:
        self._loop.run_until_complete(self._pool.close())

    async def _generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        start = time.perf_counter()
        completions = await asyncio.gather(*map(self._pool.submit, requests))
        return sum(completion.generated_tokens for completion in completions), time.perf_counter() - start


class Remote:
    """A contender in a process of its own, with the environment of a rollout worker."""

    def __init__(self, kind: type, config: EngineConfig, model: str, variables: dict[str, str]) -> None:
        place = ray.remote(num_cpus=0, num_gpus=config.gpus_per_worker, runtime_env={"env_vars": variables})
        actor: Any = place(kind)
        self._actor = actor.remote(config, model)

    def generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        made: tuple[int, float] = ray.get(self._actor.generate.remote(requests))
        return made


def measure(contenders: dict[str, Any], load: Load, vocabulary: int) -> dict[str, list[float]]:
    """Tokens per second of every contender in every turn; the first, unmeasured turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(load.repetitions + 1):
        requests = draw(load, turn, vocabulary)
        for name, contender in contenders.items():
            tokens, seconds = contender.generate(requests)
            if tokens != load.prompts * load.tokens:
                raise RuntimeError(f"{name} made {tokens} tokens, not {load.prompts} x {load.tokens}")
            if turn:
                rates[name].append(tokens / seconds)
    return rates


def draw(load: Load, turn: int, vocabulary: int) -> list[GenerateRequest]:
    """New prompts for every turn, so that none is in a prefix cache."""
    rng = random.Random(turn)
    sampling = Sampling(temperature=1.0, max_tokens=load.tokens, ignore_eos=True)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(load.prompt_tokens)] for _ in range(load.prompts)]
    return [GenerateRequest(f"{turn}-{i}", prompt, i, sampling) for i, prompt in enumerate(prompts)]


def compare(config: EngineConfig, model: str, load: Load, default_processes: bool) -> dict[str, float]:
    """Measure, print a line each, and return the two ratios."""
    variables = environment(config)
    vllm_variables = dict(variables)
    if default_processes:
        vllm_variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with closing(PoolOfOne(config, model)) as pool:
        contenders = {
            "pool, one worker": pool,
            "vllm.LLM": Remote(BareVLLM, config, model, vllm_variables),
            "transformers": Remote(Transformers, config, model, variables),
        }
        rates = measure(contenders, load, AutoConfig.from_pretrained(model).vocab_size)
    for name, values in rates.items():
        turns = " ".join(f"{value:,.0f}" for value in values)
        click.echo(f"{name:<18} {statistics.median(values):>9,.0f} tokens/s   turns: {turns}")
    return ratios(rates)


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Pool over vLLM, and vLLM over transformers: the medians over the turns of the ratio within a turn."""
    pool, vllm, transformers = rates.values()
    return {
        "pool_over_vllm": round(statistics.median(a / b for a, b in zip(pool, vllm, strict=True)), 3),
        "vllm_over_transformers": round(statistics.median(a / b for a, b in zip(vllm, transformers, strict=True)), 3),
    }


@click.command()
@click.option("--model", help="Checkpoint; without it a random one of the size below is made.")
@click.option("--hidden-size", type=click.IntRange(1), default=576, show_default=True)
@click.option("--layers", type=click.IntRange(1), default=12, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=9, show_default=True)
@click.option("--intermediate-size", type=click.IntRange(1), default=1536, show_default=True)
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="float32", show_default=True)
@click.option(
    "--gpus",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="GPUs of each of the three contenders, which are up at once (0.3 on a single GPU); 0 compares on the CPU.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each contender.")
@click.option("--prompts", type=click.IntRange(1), default=128, show_default=True, help="Prompts a turn.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=48, show_default=True, help="New tokens of each prompt.")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Measured turns.")
@click.option(
    "--default-processes",
    is_flag=True,
    help="Let vllm.LLM run on the CPU with its default processes; the pool's engine does with one fewer.",
)
@click.option("--json", "as_json", is_flag=True, help="End with the ratios as one line of JSON.")
def main(
    model: str | None,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    dtype: Dtype,
    gpus: float,
    threads: int,
    prompts: int,
    prompt_tokens: int,
    tokens: int,
    repetitions: int,
    default_processes: bool,
    as_json: bool,
) -> None:
    """Compare the pool's tokens per second with vLLM's and transformers'."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    load = Load(prompts, prompt_tokens, tokens, repetitions)
    length = prompt_tokens + tokens
    config = EngineConfig(cpus_per_worker=threads, gpus_per_worker=gpus, dtype=dtype, max_model_len=length)
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            shape = ModelConfig(
                hidden_size=hidden_size,
                layers=layers,
                heads=heads,
                intermediate_size=intermediate_size,
                max_length=length,
            )
            save_random_reasoner(shape, VOCABULARY, 0, Path(folder))
        found = compare(config, model or folder, load, default_processes)
    click.echo(json.dumps(found) if as_json else "\n".join(f"{name}: {ratio}" for name, ratio in found.items()))


if __name__ == "__main__":
    main()
