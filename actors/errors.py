"""What goes wrong with the workers of a pool."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

from sapo_ray.errors import SapoError

KILLED = (RayActorError, OutOfMemoryError, WorkerCrashedError)
"""What Ray says of a call whose actor is dead; the second where its memory monitor has killed it."""


class WorkerError(SapoError):
    """A worker could not do what it was asked. One line: the pool, the worker, what it did, and the cause."""


class EngineDeadError(SapoError):
    """What a worker raises when its engine is beyond use: the pool replaces the worker and asks others."""


class HungError(EngineDeadError):
    """A worker gives no sign of life."""


class AnswerLostError(EngineDeadError):
    """A worker's answer went away with the node that it lay on."""


class QuarantinedError(SapoError):
    """A request that is not tried again, because workers died over it."""

    def __init__(self, request_id: str, kills: int, cause: str, log_tail: str) -> None:
        super().__init__(f"request {request_id} is set aside: {kills} workers died over it; the last: {cause}")
        self.request_id, self.cause, self.log_tail = request_id, cause, log_tail


DEATHS = (*KILLED, EngineDeadError)
"""What a pool takes for the death of a worker."""
