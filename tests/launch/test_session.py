"""Which Ray a command works on."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from launch import session
from launch.resources import Nodes
from sapo_ray.config import RunConfig


@pytest.mark.parametrize(("named", "joined"), [(None, "local"), ("", "local"), ("auto", "auto")])
def test_only_a_cluster_that_the_environment_names_is_joined(
    monkeypatch: pytest.MonkeyPatch, named: str | None, joined: str
) -> None:
    """Not the one that `ray start` has left on this machine, which is what Ray takes where no address is given."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(session, "offered_nodes", lambda: [Nodes("a node", 1, {"CPU": 64.0})])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    with session.ray_session(RunConfig()):
        assert asked["address"] == joined
