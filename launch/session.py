"""Joins the Ray cluster that the environment names, or starts one on this machine."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from launch.job import job_environment
from launch.resources import Nodes, check_fits, offered_nodes
from launch.signals import postponed
from sapo_ray.cache import DRIVER
from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError

_PROJECT = Path(__file__).parents[1]


@contextmanager
def ray_session(config: RunConfig, *, trains: bool = True) -> Iterator[None]:
    """A connection to Ray. Raises SapoError where the cluster is away, or too small for what the config reserves.

    What does not train needs no room for training workers.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    if not address and config.ray.num_cpus is not None:
        check_fits(config, [Nodes("this machine", 1, {"CPU": config.ray.num_cpus, "GPU": math.inf})], trains=trains)
    environment = _environment()
    # Ray's workers are nice by default, so that anything else on the machine would hold them up.
    os.environ.update({"RAY_worker_niceness": "0", **environment})
    try:
        with postponed():  # what hits Ray while it starts or ends makes the process crash, or leaves others behind
            ray.init(
                address=address or "local",  # without it Ray joins whatever cluster was last started on this machine
                num_cpus=None if address else config.ray.num_cpus,
                runtime_env={"env_vars": environment},
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        check_fits(config, offered_nodes(), trains=trains)
        yield
    finally:
        with postponed():
            ray.shutdown(wait_for_processes=True)


def _check_answers(address: str) -> None:
    """Whether something listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "//" in host:  # `auto`, `local`, or a Ray client's URL
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise SapoError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there: {error}") from error


def _environment() -> dict[str, str]:
    """Variables of all processes of a run, but for those that the Ray job it runs in sets itself."""
    variables = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # as in `thread_environment`: training's workers, too, share the cores
        DRIVER: uuid4().hex,
        # Whether and where to look for hub data; not the token, which Ray's dashboard would show
        **{key: value for key, value in os.environ.items() if key.startswith("HF_") and "TOKEN" not in key},
    }
    job = job_environment() or {}
    if "working_dir" not in job:  # Ray has every node find a job's packages, each at a path of its own
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
    return {key: value for key, value in variables.items() if key not in (job.get("env_vars") or {})}
