"""What a command knows of the Ray job that it runs in, and what a job asks of its paths."""

from __future__ import annotations

import json
import os
from typing import Any

from sapo_ray.errors import SapoError
from sapo_ray.files import is_uri, refuse_credentials

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name for the variable, in a job's first process only


def job_environment() -> dict[str, Any] | None:
    """The runtime environment of the Ray job that this process was submitted as, or None."""
    return json.loads(os.environ[_JOB_CONFIG])["runtime_env"] if _JOB_CONFIG in os.environ else None


def check_outlives_job(name: str, path: str | None) -> None:
    """Raises SapoError unless `path` is absolute or a URI: Ray removes the directory that a job runs in.

    So it does for a URI with credentials, which Ray would show with the job's command.
    """
    if path is None or not (is_uri(path) or os.path.isabs(path)):
        raise SapoError(
            f"{name} is {path or 'null'}; a job needs an absolute path or a URI, on storage that every node sees"
        )
    if is_uri(path):
        refuse_credentials(path)
