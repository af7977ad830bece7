"""Tokens per second of the rollout pool, of a bare `vllm.LLM`, and of `transformers.generate`, side by side.

The same prompts, engine settings, threads and number of new tokens for all three. They take turns, so that what else
the machine does meets all of them; every figure is a median over the turns.

    python benchmarks/rollout.py
    python benchmarks/rollout.py --hidden-size 192 --layers 3 --heads 3 --intermediate-size 512 --prompts 512
    python benchmarks/rollout.py --model path/to/checkpoint --prompt-tokens 128
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from actors.reasoner import engine_args, environment, reasoner_pool, sampling_params
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import EngineConfig, GenerateRequest, Sampling
from sapo_ray.scaling import ScalingConfig
from sapo_ray.tasks.chain import VOCABULARY


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


def measure(contenders: dict[str, Any], args: argparse.Namespace, vocabulary: int) -> dict[str, list[float]]:
    """Tokens per second of every contender in every turn; the first, unmeasured turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.repetitions + 1):
        requests = draw(args, turn, vocabulary)
        for name, contender in contenders.items():
            tokens, seconds = contender.generate(requests)
            if tokens != args.prompts * args.tokens:
                raise RuntimeError(f"{name} made {tokens} tokens, not {args.prompts} x {args.tokens}")
            if turn:
                rates[name].append(tokens / seconds)
    return rates


def draw(args: argparse.Namespace, turn: int, vocabulary: int) -> list[GenerateRequest]:
    """New prompts for every turn, so that none is in a prefix cache."""
    rng = random.Random(turn)
    sampling = Sampling(temperature=1.0, max_tokens=args.tokens, ignore_eos=True)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
    return [GenerateRequest(f"{turn}-{i}", prompt, i, sampling) for i, prompt in enumerate(prompts)]


def compare(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Measure, print a table, and return the two ratios."""
    config = EngineConfig(
        cpus_per_worker=args.threads,
        gpus_per_worker=args.gpus,
        dtype=args.dtype,
        max_model_len=args.prompt_tokens + args.tokens,
    )
    variables = environment(config)
    vllm_variables = dict(variables)
    if args.default_processes:
        vllm_variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with closing(PoolOfOne(config, model)) as pool:
        contenders = {
            "pool, one worker": pool,
            "vllm.LLM": Remote(BareVLLM, config, model, vllm_variables),
            "transformers": Remote(Transformers, config, model, variables),
        }
        rates = measure(contenders, args, AutoConfig.from_pretrained(model).vocab_size)
    for name, values in rates.items():
        turns = " ".join(f"{value:,.0f}" for value in values)
        print(f"{name:<18} {statistics.median(values):>9,.0f} tokens/s   turns: {turns}")
    return ratios(rates)


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Pool over vLLM, and vLLM over transformers: the medians over the turns of the ratio within a turn."""
    pool, vllm, transformers = rates.values()
    return {
        "pool_over_vllm": round(statistics.median(a / b for a, b in zip(pool, vllm, strict=True)), 3),
        "vllm_over_transformers": round(statistics.median(a / b for a, b in zip(vllm, transformers, strict=True)), 3),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint; without it a random one of the size below is made")
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--intermediate-size", type=int, default=1536)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs per contender; 0 compares on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each contender")
    parser.add_argument("--prompts", type=int, default=128, help="prompts a turn")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a prompt, whatever the model says")
    parser.add_argument("--repetitions", type=int, default=3, help="measured turns")
    parser.add_argument(
        "--default-processes",
        action="store_true",
        help="let vllm.LLM run on the CPU with its default processes; the pool's engine does with one fewer",
    )
    parser.add_argument("--json", action="store_true", help="end with the ratios as one line of JSON")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        shape = ModelConfig(
            hidden_size=args.hidden_size,
            layers=args.layers,
            heads=args.heads,
            intermediate_size=args.intermediate_size,
            max_length=args.prompt_tokens + args.tokens,
        )
        if args.model is None:
            save_random_reasoner(shape, VOCABULARY, 0, Path(folder))
        ratios = compare(args, args.model or folder)
    print(json.dumps(ratios) if args.json else "\n".join(f"{name}: {ratio}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
