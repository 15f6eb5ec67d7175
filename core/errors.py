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
