"""The log lines of a run's actors: each says which run, stage and requests it is about.

    2026-01-01 12:00:00 INFO run=local stage=round-1/sample request=round-1/q-17/0 generate took 75 s

They go to the process's standard error, which Ray keeps in a file. A process works for one stage at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from sapo_ray.errors import SapoError

SLOW = 60.0
"""Seconds after which a call is worth a line."""

logger = logging.getLogger(__name__)

_place = {"run": "-", "stage": "-"}
_requests: ContextVar[Sequence[str]] = ContextVar("requests", default=())


def enter(run: str, stage: str) -> None:
    """From now on this process works for this stage of this run. The first call sets up its log."""
    _set_up()
    _place.update(run=run, stage=stage)


def about(requests: Iterable[str]) -> dict[str, str]:
    """The `extra` of a line about the requests with these ids."""
    return {"request": ",".join(requests)}


@contextmanager
def answering(method: str, requests: Sequence[str]) -> Iterator[None]:
    """Lines logged within are about the requests with these ids; a failure and a slow call are logged themselves."""
    token, begun = _requests.set(requests), time.monotonic()
    try:
        yield
        if (seconds := time.monotonic() - begun) > SLOW:
            logger.info("%s took %.0f s", method, seconds)
    except SapoError as error:  # says what it has to say
        logger.error("%s failed: %s", method, error)
        raise
    except Exception:
        logger.exception("%s failed", method)
        raise
    finally:
        _requests.reset(token)


@cache
def _set_up() -> None:
    handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s run=%(run)s stage=%(stage)s request=%(request)s %(message)s"
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_complete)
    logging.getLogger().addHandler(handler)
    for package in ("actors", "sapo_ray"):
        logging.getLogger(package).setLevel(logging.INFO)


def _complete(record: logging.LogRecord) -> bool:
    named = getattr(record, "request", None) or ",".join(_requests.get()) or "-"
    vars(record).update(_place, request=named)
    return True
