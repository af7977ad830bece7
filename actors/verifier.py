"""Verifier workers: Ray actors that score every step of a trajectory in one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from actors.errors import EngineDeadError
from actors.logs import answering
from actors.pool import ElasticPool
from actors.worker import PoolWorker, actor_class
from sapo_ray.cache import local_checkpoint
from sapo_ray.errors import told
from sapo_ray.requests import ScoreRequest, VerifierConfig, cpu_threads, thread_environment
from sapo_ray.scaling import ScalingConfig
from sapo_ray.scoring import load_verifier, score

logger = logging.getLogger(__name__)


class VerifierWorker(PoolWorker):
    """One verifier. `ready` loads the first checkpoint, `load` any later one."""

    def __init__(self, config: VerifierConfig, attention: str | None, checkpoint: str) -> None:
        self._config, self._attention = config, attention
        self._checkpoint = checkpoint

    def ready(self) -> None:
        torch.set_num_threads(cpu_threads(self._config))
        self.load(self._checkpoint)

    def load(self, checkpoint: str) -> None:
        """Load a …ForTokenClassification with one label. Raises SapoError, naming it, for any other checkpoint."""
        device = "cuda" if self._config.gpus_per_worker else "cpu"
        dtype = getattr(torch, self._config.dtype)
        self._model = load_verifier(local_checkpoint(checkpoint), dtype, device, self._attention)
        used = self._model.config._attn_implementation
        logger.info("%s is loaded, in %s on %s, with %s attention", checkpoint, self._config.dtype, device, used)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """ĉ_j of every step, one list a trajectory."""
        with answering("score", [request.id for request in requests]):
            try:
                scores = score(self._model, [request.encoded for request in requests], self._config.batch_tokens)
            except torch.AcceleratorError as error:  # after which this process can do nothing more on its device
                raise EngineDeadError(f"the device failed: {told(error)}") from error
        self.progress += 1
        return scores


def verifier_pool(
    config: VerifierConfig, attention: str | None, scaling: ScalingConfig
) -> ElasticPool[ScoreRequest, list[float]]:
    """A pool of verifier workers."""
    actor = actor_class(VerifierWorker, config, thread_environment(config))
    return ElasticPool(
        "verifier", lambda checkpoint: actor.remote(config, attention, checkpoint), "score", config, scaling
    )
