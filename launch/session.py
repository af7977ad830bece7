"""Joins the Ray cluster that the environment names, or starts one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError

_PROJECT = Path(__file__).parents[1]


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A connection to Ray, refused where the cluster is too small for what the config reserves."""
    environment = {"RAY_TRAIN_V2_ENABLED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path()}
    os.environ.update({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment})
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        num_cpus=None if os.environ.get("RAY_ADDRESS") else config.ray.num_cpus,
        runtime_env={"env_vars": environment},
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    try:
        _check_resources(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _check_resources(config: RunConfig, offered: dict[str, float]) -> None:
    """Everything that is up at the same time must fit, or the run would wait for ever."""
    groups = {"engine": config.engine, "verifier": config.verifier, "trainer": config.trainer}
    for kind, attribute, extra in (
        ("CPU", "cpus_per_worker", config.ray.coordinator_cpus),
        ("GPU", "gpus_per_worker", 0.0),
    ):
        parts = {
            f"{name}.workers * {name}.{attribute}": g.workers * getattr(g, attribute) for name, g in groups.items()
        }
        needed = sum(parts.values()) + extra
        if needed > offered.get(kind, 0.0) + 1e-9:
            terms = " + ".join(f"{value:g} ({key})" for key, value in parts.items() if value)
            raise SapoError(
                f"the run reserves {needed:g} {kind}s = {terms} + {extra:g}, but Ray offers {offered.get(kind, 0):g}"
            )


def _python_path() -> str:
    """The path on which workers find this package when it runs from a checkout that is not installed."""
    return os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
