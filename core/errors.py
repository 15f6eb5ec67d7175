"""The errors of the server side: the classes of ``baton.errors``, and those that only servers use.

Every failure that a caller may see is a ``BatonError``. Server code imports all errors from here.
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

# Reasons that callers act on. The request can continue on another worker, or on another router.
WORKER_DRAINING = "WORKER_DRAINING"
ROUTER_DRAINING = "ROUTER_DRAINING"


class WorkerLostError(UnavailableError):
    """The worker that held the request died, hung or was cut off."""

    default_reason = "WORKER_LOST"


class WorkerUnreachableError(WorkerLostError):
    """The worker could not be connected to, so nothing was sent to it."""


class ConfigError(Exception):
    """The configuration is wrong. The message names the field and what to write instead."""
