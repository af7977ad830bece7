"""What a stage costs, counted the same way everywhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Cost:
    """A sum of costs. Tokens cached by the engine's prefix cache were not computed and cost no FLOPs.

    FLOPs are counted as 2 · parameters a token for a forward pass and by `training_flops` for training (Kaplan et
    al., arXiv 2001.08361); attention's quadratic part is left out. `program_seconds` sums what sandboxed programs
    took, each by the clock, though several run at once.
    """

    trajectories: int = 0
    checks: int = 0
    rollouts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    programs: int = 0
    program_timeouts: int = 0
    program_seconds: float = 0.0
    flops: float = 0.0

    def __iadd__(self, other: Cost) -> Cost:
        for name in _NAMES:  # several times a request: `fields` would be much of its cost
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def training_flops(parameters: int, trained: int) -> float:
    """FLOPs of a trained token: 2 a parameter each for the forward pass and the gradients of activations, and 2 a
    trained one for those of weights. So 6 a parameter where all are trained."""
    return 4.0 * parameters + 2.0 * trained


_NAMES = tuple(field.name for field in fields(Cost))
