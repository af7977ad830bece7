from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sapo_ray.sandbox import Sandbox, SandboxConfig

# A fraction of a second that no other test process uses: by it the processes of this one's sandboxes are known.
WALL_SECONDS = 30 + os.getpid() * 1e-7


@pytest.fixture(scope="session")
def wall_seconds() -> float:
    return WALL_SECONDS


@pytest.fixture(scope="module", params=["bubblewrap", "process"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of sandbox in turn; bubblewrap where it works."""
    if request.param == "bubblewrap":
        request.getfixturevalue("needs_bubblewrap")
    return request.param


@pytest.fixture(scope="module")
def box(kind: str) -> Iterator[Sandbox]:
    config = SandboxConfig(kind=kind, cpu_seconds=1, wall_seconds=WALL_SECONDS)  # type: ignore[arg-type]
    with Sandbox(config) as made:
        yield made
