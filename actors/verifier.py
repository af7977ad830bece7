"""Verifier workers: Ray actors that score every step of a trajectory in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import ray
import torch

from actors.pool import Pool
from sapo_ray.cache import local_checkpoint
from sapo_ray.encoding import Encoded
from sapo_ray.requests import VerifierConfig, cpu_threads, thread_environment
from sapo_ray.scoring import load_verifier, score


class VerifierWorker:
    """One verifier. `ready` loads the first checkpoint, `load` any later one."""

    def __init__(self, config: VerifierConfig, checkpoint: str) -> None:
        self._config = config
        self._checkpoint = checkpoint

    def ready(self) -> None:
        torch.set_num_threads(cpu_threads(self._config))
        self.load(self._checkpoint)

    def load(self, checkpoint: str) -> None:
        """Load a …ForTokenClassification with one label. Raises SapoError, naming it, for any other checkpoint."""
        device = "cuda" if self._config.gpus_per_worker else "cpu"
        self._model = load_verifier(local_checkpoint(checkpoint), getattr(torch, self._config.dtype), device)

    def score(self, encoded: Sequence[Encoded]) -> list[list[float]]:
        """ĉ_j of every step, one list a trajectory."""
        return score(self._model, encoded, self._config.batch_tokens)


def verifier_pool(config: VerifierConfig, checkpoint: str) -> Pool[Encoded, list[float]]:
    """A pool of verifier workers that start from `checkpoint`."""
    actor = ray.remote(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        runtime_env={"env_vars": thread_environment(config)},
    )(VerifierWorker)
    return Pool(
        "verifier",
        lambda: actor.remote(config, checkpoint),
        "score",
        workers=config.workers,
        batch_size=config.batch_size,
        in_flight=config.in_flight,
    )
