"""The errors of the server side: the classes of ``baton.errors``, and those that only servers use.

Every failure of a call is reported as a ``BatonError``. Server code imports all errors from here.
"""

from __future__ import annotations

from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

__all__ = [
    "ROUTER_DRAINING",
    "WORKER_DRAINING",
    "AlreadyExistsError",
    "BatonError",
    "CancelledError",
    "CapacityError",
    "ConfigError",
    "DeadlineError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "UnavailableError",
    "WorkerLostError",
    "WorkerUnreachableError",
    "last_line",
]

# Values of ``BatonError.reason`` after which the caller continues the request on another worker or
# at another router.
WORKER_DRAINING = "WORKER_DRAINING"
ROUTER_DRAINING = "ROUTER_DRAINING"


class WorkerLostError(UnavailableError):
    """The worker that served the request died, hung or lost its connection."""

    default_reason = "WORKER_LOST"


class WorkerUnreachableError(WorkerLostError):
    """No connection to the worker could be made, so nothing was sent to it."""


class ConfigError(Exception):
    """The user can correct the cause, often a configuration field. The message says how."""


def last_line(text: str) -> str:
    """Return the last line of another program's error, which says most, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason is given"
