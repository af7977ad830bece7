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


def test_all_processes_of_a_session_and_of_no_other_know_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: drivers.append(options["runtime_env"]["env_vars"][DRIVER]))
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(session, "offered_nodes", lambda: [Nodes("a node", 1, {"CPU": 64.0})])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for _ in range(2):
        with session.ray_session(RunConfig()):
            assert os.environ[DRIVER] == drivers[-1]
    assert len(set(drivers)) == 2


def test_all_processes_look_for_hub_data_where_the_driver_does_and_none_shows_its_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options["runtime_env"]["env_vars"]))
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(session, "offered_nodes", lambda: [Nodes("a node", 1, {"CPU": 64.0})])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for key, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hub", "HF_TOKEN": "secret"}.items():
        monkeypatch.setenv(key, value)
    with session.ray_session(RunConfig()):
        assert (given["HF_HUB_OFFLINE"], given["HF_HOME"]) == ("1", "/shared/hub")
        assert "secret" not in given.values()
