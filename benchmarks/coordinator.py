"""How far one coordinator reaches: the real coordinator and pools, with null engines that answer after a delay.

What a Qwen2.5-0.5B needs on one H100 is simulated: `SEQUENCES` sequences at a time, `TOKEN_SECONDS` for a token of each
(a decoding step of vLLM with CUDA graphs), solutions of `STEPS` steps, T = 8. A null engine writes `chain` solutions,
whose steps have some 8 tokens; a step of GSM8K has some 20, so each of its tokens takes `TOKENS_IN_ONE` times as long.
Delays are log-normal. The simulated workers are slots of `PROCESSES` actor processes, but every request crosses a real
Ray call. Three things are measured, each in a Ray of its own:

- a stage of sampling and labelling at each of `--sizes`: seconds, peak memory, and the exponent by which time grows;
- `workers_fed`: the engine seconds of a trajectory over the seconds it takes a coordinator that has more workers than
  it can feed; and the CPU seconds of its process alone;
- the utilisation of as many workers as reach 95% (256 at most), as one stream, and with a barrier between sampling and
  labelling.

    python benchmarks/coordinator.py [--sizes 10000,100000,1000000] [--workers 32] [--json]
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import ray
from rich.table import Table

from actors.coordinator import Coordinator
from launch.session import ray_session
from launch.tables import table_console
from sapo_ray.config import RayConfig, RunConfig
from sapo_ray.labelers import LabelingConfig
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import EngineConfig, SimulationConfig, VerifierConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY, ChainConfig

PROCESSES = 2  # and one of verifiers; more of them would leave the coordinator less of two cores
SEQUENCES = 64
TOKEN_SECONDS = 0.004
TOKENS_IN_ONE = 2.5
STEPS = 8
SAMPLES = 4
ERROR_RATE = 0.08
SCORE_SECONDS = 0.03
MOST_WORKERS = 256
ENOUGH = 0.95
MODEL = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=256)


class Measured(Coordinator):
    """A coordinator that says which process it is, and that can put a barrier between sampling and labelling."""

    def pid(self) -> int:
        return os.getpid()

    async def sample_then_label(self) -> dict[str, Any]:
        """What `sample_and_label` does, but nothing is labelled before everything is sampled."""
        sampled = await self.sample(self._task.questions("pool"), "round-1")
        cost = self._engines.cost
        items = [(question, trajectory) for question, trajectories in sampled for trajectory in trajectories]
        _, notes = await self.label(items, self._config.labeling, "round-1")
        return {
            "sampled": len(items),
            "generated_tokens": cost.generated_tokens + notes["cost"]["generated_tokens"],
        }

    async def stream_all(self) -> dict[str, Any]:
        """One stream of all questions."""
        notes = await self.sample_and_label(1)
        return {
            "sampled": notes["trajectories"]["sampled"],
            "generated_tokens": notes["cost"]["generated_tokens"],
        }


@dataclass(frozen=True)
class Figures:
    """One stage: seconds by the clock and of engines, the coordinator's CPU seconds, and its peak memory in MiB."""

    trajectories: int
    seconds: float
    engine_seconds: float
    cpu_seconds: float
    peak_mb: float


@click.command()
@click.option("--sizes", default="10000,100000,1000000", show_default=True, help="Trajectories of each stage.")
@click.option("--workers", default=32, show_default=True, help="Simulated workers, more than can be fed.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def main(sizes: str, workers: int, as_json: bool) -> None:
    counts = [int(size) for size in sizes.split(",")]
    click.echo(
        f"an engine: {SEQUENCES} sequences, {1e3 * TOKEN_SECONDS:g} ms a token, {TOKENS_IN_ONE:g} tokens for one of "
        f"chain's; T = {LabelingConfig().rollouts}, {STEPS} steps, batches of {EngineConfig().batch_size}",
        err=True,
    )
    stages = [stage(count, workers, "stream_all") for count in counts]
    longest = stages[-1]  # whose beginning and end weigh least
    fed = longest.engine_seconds / longest.seconds
    busy, stream = busy_workers(counts[0], fed)
    barriers = stage(counts[0], busy, "sample_then_label")
    result = {
        "sizes": [
            {"trajectories": s.trajectories, "seconds": s.seconds, "peak_mb": s.peak_mb, "cpu_seconds": s.cpu_seconds}
            for s in stages
        ],
        "time_exponent": exponent(stages),
        "memory_growth": stages[-1].peak_mb / stages[0].peak_mb,
        "cpu_seconds_per_trajectory": longest.cpu_seconds / longest.trajectories,
        "engine_seconds_per_trajectory": longest.engine_seconds / longest.trajectories,
        "workers_fed": fed,
        "workers": busy,
        "utilisation": utilisation(stream, busy),
        "utilisation_barriers": utilisation(barriers, busy),
    }
    show(result)
    if as_json:
        click.echo(json.dumps(result))


def busy_workers(trajectories: int, fed: float) -> tuple[int, Figures]:
    """The most workers, from what can be fed downwards, that are busy `ENOUGH` of the time; or the fewest tried."""
    tries = {max(1, min(MOST_WORKERS, int(share * fed))) for share in (1.0, 0.8, 0.6, 0.4, 0.25, 0.15, 0.1)}
    for workers in sorted(tries, reverse=True):
        figures = stage(trajectories, workers, "stream_all")
        if utilisation(figures, workers) >= ENOUGH:
            break
    return workers, figures


def utilisation(figures: Figures, workers: int) -> float:
    """The share of their time that `workers` engines worked, if all their sequences count alike."""
    return figures.engine_seconds / (figures.seconds * workers)


def exponent(stages: Sequence[Figures]) -> float | None:
    """The slope of log seconds over log trajectories, by least squares; None for a single size."""
    if len(stages) < 2:
        return None
    slope, _ = np.polyfit(np.log([s.trajectories for s in stages]), np.log([s.seconds for s in stages]), 1)
    return float(slope)


def stage(trajectories: int, workers: int, method: str) -> Figures:
    """One stage with so many simulated workers, in a Ray of its own."""
    config = simulated(workers, trajectories)
    with running(config) as coordinator:
        process = psutil.Process(ray.get(coordinator.pid.remote()))
        cpu, begun, peak = sum(process.cpu_times()[:2]), time.monotonic(), 0
        answer = getattr(coordinator, method).remote()
        while not ray.wait([answer], timeout=0.2)[0]:
            peak = max(peak, process.memory_info().rss)
        done, seconds = ray.get(answer), time.monotonic() - begun
        click.echo(f"{method}, {workers} workers: {done['sampled']:,} trajectories in {seconds:.0f} s", err=True)
        return Figures(
            trajectories=done["sampled"],
            seconds=seconds,
            engine_seconds=done["generated_tokens"] * config.simulation.token_seconds / SEQUENCES,
            cpu_seconds=sum(process.cpu_times()[:2]) - cpu,
            peak_mb=peak / 2**20,
        )


@contextmanager
def running(config: RunConfig) -> Iterator[Any]:
    """A coordinator with its pools, models loaded."""
    with ray_session(config), tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_random_reasoner(MODEL, VOCABULARY, config.seed, model)
        store = RunDirectory(Path(folder, "run"))
        store.create()
        coordinator: Any = ray.remote(num_cpus=0)(Measured).remote(config, store.location)
        ray.get([coordinator.load_reasoner.remote(str(model)), coordinator.load_verifier.remote(str(model))])
        yield coordinator


def simulated(workers: int, trajectories: int) -> RunConfig:
    """A config whose few processes have the slots of `workers` engines."""
    share = workers / PROCESSES
    return RunConfig(
        task=ChainConfig(
            modulus=97,
            max_operand=5,
            min_steps=STEPS,
            max_steps=STEPS,
            ood_min_steps=STEPS + 1,
            ood_max_steps=STEPS + 1,
            worked=1,
            pool=trajectories // SAMPLES,
            validation=0,
            test=0,
            ood=0,
        ),
        sampling=SamplingConfig(samples=SAMPLES, max_samples=SAMPLES, max_tokens=96),
        labeling=LabelingConfig(start_score="1"),
        engine=EngineConfig(
            kind=None,
            workers=PROCESSES,
            cpus_per_worker=0,
            in_flight=math.ceil(16 * share),
            max_num_seqs=math.ceil(SEQUENCES * share),
        ),
        verifier=VerifierConfig(kind=None, cpus_per_worker=0, in_flight=64),
        simulation=SimulationConfig(
            error_rate=ERROR_RATE, token_seconds=TOKEN_SECONDS * TOKENS_IN_ONE, score_seconds=SCORE_SECONDS
        ),
        ray=RayConfig(num_cpus=2, questions_in_flight=math.ceil(SEQUENCES * share)),
    )


def show(result: dict[str, Any]) -> None:
    table = Table("trajectories", "seconds", "peak MiB")
    for size in result["sizes"]:
        table.add_row(f"{size['trajectories']:,}", f"{size['seconds']:.1f}", f"{size['peak_mb']:.0f}")
    console = table_console()
    console.print(table)
    for name, value in result.items():
        if name != "sizes" and value is not None:
            console.print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
