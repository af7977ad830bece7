"""The coordinator as the driver uses it: calls that show their progress, and models loaded when a call needs them."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.coordinator import Coordinator
from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.progress import Reporter


class CoordinatorClient:
    """Starts the coordinator with the first call. Use as a context manager: it and its pools are gone afterwards.

    Where an error or Ctrl-C ends it, nothing is waited for: Ray ends the pools with the coordinator that owns them.
    """

    def __init__(self, config: RunConfig, run_path: str, reporter: Reporter) -> None:
        self._config, self._run_path, self._reporter = config, run_path, reporter
        self._wanted: dict[str, str] = {}
        self._loaded: dict[str, str] = {}
        self._actor: Any = None

    def __enter__(self) -> CoordinatorClient:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._actor is None:
            return
        if error is None:
            ray.get(self._actor.close.remote())
        ray.kill(self._actor)

    def use(self, *, reasoner: str | None = None, verifier: str | None = None) -> None:
        """The checkpoints that the next call needs. They are loaded when it comes: a skipped stage loads nothing."""
        models = {"reasoner": reasoner, "verifier": verifier}
        self._wanted |= {role: checkpoint for role, checkpoint in models.items() if checkpoint is not None}

    def call(self, method: str, *args: Any) -> Any:
        """Call the coordinator and show its progress until it answers. Raises SapoError with the cause of a failure."""
        try:
            self._load()
            answer = getattr(self._actor, method).remote(*args)
            while not ray.wait([answer], timeout=1.0)[0]:
                progress = ray.get(self._actor.progress.remote())
                self._reporter.update(progress["done"], progress["total"], f"{progress['tokens']:,} tokens")
            return ray.get(answer)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise SapoError(f"{method}: {type(cause).__name__}: {' '.join(str(cause).split())}") from error

    def _load(self) -> None:
        if self._actor is None:
            cpus = self._config.ray.coordinator_cpus
            self._actor = ray.remote(num_cpus=cpus)(Coordinator).remote(self._config, self._run_path)
        for role, checkpoint in self._wanted.items():
            if self._loaded.get(role) != checkpoint:
                ray.get(getattr(self._actor, f"load_{role}").remote(checkpoint))
                self._loaded[role] = checkpoint
