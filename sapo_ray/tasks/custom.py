"""`custom`: a task that another package brings, found by the name under which it registers its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from sapo_ray.errors import SapoError
from sapo_ray.tasks.base import Task

GROUP = "sapo_ray.tasks"
"""Entry points of this group name classes that are tasks."""


@dataclass(kw_only=True)
class CustomConfig:
    """A class of your own."""

    kind: Literal["custom"] = "custom"
    """A class of your own."""
    name: str
    """Name of an entry point of the group `sapo_ray.tasks`, which an installed package registers."""
    programs: bool = False
    """Whether its answers are programs (`Task.program`), for which there are executor workers then."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""


def make_custom(config: CustomConfig) -> Task:
    """The task that a config names. Raises SapoError where there is none, or where it cannot be made."""
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if config.name not in known:
        raise SapoError(
            f"task.name is {config.name}, but the entry points of the group {GROUP} are {', '.join(known) or 'none'}; "
            "install the package that brings it"
        )
    try:
        task: Task = known[config.name].load()(**config.options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SapoError(f"task.name {config.name} cannot be made with task.options: {error}") from error
    return task
