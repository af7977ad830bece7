"""Which Ray a command works on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from launch import session
from launch.resources import Nodes
from sapo_ray.cache import DRIVER
from sapo_ray.config import RunConfig


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a session asks Ray for, which is not started."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(session, "offered_nodes", lambda: [Nodes("a node", 1, {"CPU": 64.0})])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


@pytest.mark.parametrize(("named", "joined"), [(None, "local"), ("", "local"), ("auto", "auto")])
def test_only_a_cluster_that_the_environment_names_is_joined(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], named: str | None, joined: str
) -> None:
    """Not the one that `ray start` has left on this machine, which is what Ray takes where no address is given."""
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    with session.ray_session(RunConfig()):
        assert asked["address"] == joined


def test_all_processes_of_a_session_and_of_no_other_know_its_driver(asked: dict[str, Any]) -> None:
    drivers: list[str] = []
    for _ in range(2):
        with session.ray_session(RunConfig()):
            drivers.append(asked["runtime_env"]["env_vars"][DRIVER])
            assert os.environ[DRIVER] == drivers[-1]
    assert len(set(drivers)) == 2


def test_all_processes_look_for_hub_data_where_the_driver_does_and_none_shows_its_token(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    for key, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hub", "HF_TOKEN": "secret"}.items():
        monkeypatch.setenv(key, value)
    with session.ray_session(RunConfig()):
        given = asked["runtime_env"]["env_vars"]
        assert (given["HF_HUB_OFFLINE"], given["HF_HOME"]) == ("1", "/shared/hub")
        assert "secret" not in given.values()
