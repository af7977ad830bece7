"""The real coordinator and pools on null engines: what a stage of sampling and labelling takes of time and memory.

The workers answer after a simulated delay, log-normal with a mean of `--token-seconds` for each token of a completion;
they are slots of a few actor processes, but every request crosses a real Ray call. A worker stands for an engine with
64 sequences at once, so its engine seconds are a 64th of its sequences' seconds.

    python benchmarks/coordinator.py --trajectories 10000 --workers 256 --token-seconds 0.005
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))

from actors.coordinator import Coordinator
from launch.session import ray_session
from sapo_ray.config import RayConfig, RunConfig
from sapo_ray.labelers import LabelingConfig
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import EngineConfig, SimulationConfig, VerifierConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY, ChainConfig

PROCESSES = 7
SEQUENCES = 64
STEPS = 8
SAMPLES = 4
SCORE_SECONDS = 0.03
MODEL = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=256)


class Measured(Coordinator):
    """A coordinator that says which process it is."""

    def pid(self) -> int:
        return os.getpid()


@click.command()
@click.option("--trajectories", default=10_000, show_default=True, help="Trajectories to sample and label.")
@click.option("--workers", default=256, show_default=True, help="Simulated workers.")
@click.option("--token-seconds", default=0.0, show_default=True, help="Mean delay of a token; 0 answers at once.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def main(trajectories: int, workers: int, token_seconds: float, as_json: bool) -> None:
    config = simulated(workers, trajectories, token_seconds)
    with ray_session(config), tempfile.TemporaryDirectory() as folder:
        figures = measure(config, Path(folder))
    figures["utilisation"] = figures["workers_fed"] / workers
    click.echo(
        json.dumps(figures) if as_json else "\n".join(f"{name}: {value:,.6g}" for name, value in figures.items())
    )


def simulated(workers: int, trajectories: int, token_seconds: float) -> RunConfig:
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
            error_rate=0.08, token_seconds=token_seconds, score_seconds=SCORE_SECONDS if token_seconds else 0.0
        ),
        ray=RayConfig(num_cpus=2, questions_in_flight=math.ceil(SEQUENCES * share)),
    )


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Seconds, CPU seconds and peak memory of the coordinator's process over one stage."""
    save_random_reasoner(MODEL, VOCABULARY, config.seed, folder / "model")
    store = RunDirectory(folder / "run")
    store.create()
    coordinator: Any = ray.remote(num_cpus=0)(Measured).remote(config, store.location)
    model = str(folder / "model")
    ray.get([coordinator.load_reasoner.remote(model), coordinator.load_verifier.remote(model)])
    process = psutil.Process(ray.get(coordinator.pid.remote()))
    cpu, begun, peak = sum(process.cpu_times()[:2]), time.monotonic(), 0
    stage = coordinator.sample_and_label.remote(1)
    while not ray.wait([stage], timeout=0.2)[0]:
        peak = max(peak, process.memory_info().rss)
    notes, seconds = ray.get(stage), time.monotonic() - begun
    engine_seconds = notes["cost"]["generated_tokens"] * config.simulation.token_seconds / SEQUENCES
    sampled = notes["trajectories"]["sampled"]
    return {
        "trajectories": sampled,
        "rollouts": notes["cost"]["rollouts"],
        "seconds": seconds,
        "cpu_seconds_per_trajectory": (sum(process.cpu_times()[:2]) - cpu) / sampled,
        "peak_mb": peak / 2**20,
        "workers_fed": engine_seconds / seconds,
    }


if __name__ == "__main__":
    main()
