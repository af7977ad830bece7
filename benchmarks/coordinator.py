"""draft"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
import ray

from actors.coordinator import Coordinator
from launch.session import ray_session
from sapo_ray.config import RayConfig, RunConfig
from sapo_ray.labelers import LabelingConfig
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import EngineConfig, SimulationConfig, VerifierConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.scaling import ScalingConfig
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY, ChainConfig

REASONERS = 7

class Measured(Coordinator):
    def pid(self, mode="") -> int:
        import os, gc
        if "f" in mode: gc.collect(); gc.freeze()
        if "t" in mode: gc.set_threshold(20_000, 20, 50)
        if "d" in mode: gc.disable()
        return os.getpid()


def config(workers: int, trajectories: int, delay: float) -> RunConfig:
    share = workers / REASONERS
    return RunConfig(
        task=ChainConfig(modulus=97, max_operand=5, min_steps=8, max_steps=8, ood_min_steps=9, ood_max_steps=9,
            worked=1, pool=trajectories // 4, validation=0, test=0, ood=0),
        sampling=SamplingConfig(max_tokens=96),
        labeling=LabelingConfig(start_score="1"),
        engine=EngineConfig(kind=None, workers=REASONERS, cpus_per_worker=0, in_flight=math.ceil(16 * share), max_num_seqs=math.ceil(64 * share)),
        verifier=VerifierConfig(kind=None, cpus_per_worker=0, in_flight=64),
        simulation=SimulationConfig(error_rate=0.08, token_seconds=delay, score_seconds=delay and 0.03),
        ray=RayConfig(num_cpus=2, questions_in_flight=math.ceil(64 * share)),
    )

def main() -> None:
    workers, trajectories, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    c = config(workers, trajectories, delay)
    with ray_session(c), tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_random_reasoner(ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=256), VOCABULARY, 0, model)
        run = RunDirectory(Path(folder, "run"))
        run.create()
        actor = ray.remote(num_cpus=0)(Measured).remote(c, str(run.path))
        ray.get([actor.load_reasoner.remote(str(model)), actor.load_verifier.remote(str(model))])
        process = psutil.Process(ray.get(actor.pid.remote(sys.argv[4] if len(sys.argv) > 4 else '')))
        print("pid", process.pid, "rss", process.memory_info().rss / 2**20)
        print("PID", process.pid, file=open("/tmp/null/pid", "w"))
        before, start, peak = process.cpu_times(), time.monotonic(), 0
        answer = actor.sample_and_label.remote(1)
        while not ray.wait([answer], timeout=0.2)[0]:
            peak = max(peak, process.memory_info().rss)
        notes = ray.get(answer)
        wall = time.monotonic() - start
        after = process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        requests = trajectories + notes["cost"]["rollouts"]
        others = [(p.name(), round(sum(p.cpu_times()[:2]), 1)) for p in process.parent().children(recursive=True)]
        print(notes)
        print(f"{wall:.1f} s wall, {cpu:.1f} s cpu, {peak / 2**20:.0f} MB, {requests} completions, {1e3*wall/trajectories:.2f} ms/traj, {1e3*cpu/trajectories:.2f} cpu ms/traj, {1e3*cpu/requests:.3f} cpu ms/completion")
        engine = notes["cost"]["generated_tokens"] * delay / 64
        print("engine s", engine, "fed", engine / wall, "util", engine / wall / workers)
        print(others)

if __name__ == "__main__":
    main()
