"""The errors of the server side: the tree of ``baton.errors``, and what only a server needs.

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

# Reasons that callers act on: the request can continue at another worker, or at another router.
WORKER_DRAINING = "WORKER_DRAINING"
ROUTER_DRAINING = "ROUTER_DRAINING"


class WorkerLostError(UnavailableError):
    """The worker that held the request died, hung or was cut off."""

    default_reason = "WORKER_LOST"


class WorkerUnreachableError(WorkerLostError):
    """There was no connection to the worker, so nothing was sent to it."""


class ConfigError(Exception):
    """The configuration is wrong; the message names the field and what to write."""
