"""Training objectives, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sapo_ray.objectives.base import Objective
from sapo_ray.objectives.orpo import ORPO
from sapo_ray.objectives.prm import PRM
from sapo_ray.objectives.sft import SFT

_OBJECTIVES: dict[str, Callable[..., Objective]] = {"sft": SFT, "prm": PRM, "orpo": ORPO}


def make_objective(name: str, params: Mapping[str, float]) -> Objective:
    """Raises ValueError for a name or a parameter that no objective has."""
    if name not in _OBJECTIVES:
        raise ValueError(f"objective is {name!r}; it must be one of {', '.join(_OBJECTIVES)}")
    try:
        return _OBJECTIVES[name](**params)
    except TypeError as error:
        raise ValueError(f"objective {name!r} does not take the parameters {dict(params)}: {error}") from error
