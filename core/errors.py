"""The one tree of errors, by whose fault it is.

Every failure that a caller may see is one of these. ``core.rpc.status`` is the
only place that maps them to gRPC status codes; nothing else names a status code.
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of all errors that may reach a caller.

    Args:
        message: one sentence for a person, without internals.
        reason: stable upper-case word for programs (``ErrorDetail.reason``).
        retry_after_s: when trying again may help; ``None`` when it will not.
    """

    default_reason = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s


class InvalidArgumentError(BatonError):
    """The request can never succeed as it is."""

    default_reason = "INVALID_ARGUMENT"


class NotFoundError(BatonError):
    """The request names something that this cluster does not have."""

    default_reason = "NOT_FOUND"


class AlreadyExistsError(BatonError):
    """A request with this id is in flight."""

    default_reason = "DUPLICATE_REQUEST_ID"


class CapacityError(BatonError):
    """A bound was reached; trying later may help."""

    default_reason = "OVERLOADED"


class UnavailableError(BatonError):
    """No worker can take the request now."""

    default_reason = "NO_WORKER"


class WorkerLostError(UnavailableError):
    """The worker that held the request went away."""

    default_reason = "WORKER_LOST"


class WorkerUnreachableError(WorkerLostError):
    """There was no connection to the worker, so it was sent nothing."""


class DeadlineError(BatonError):
    """The request's deadline passed."""

    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(BatonError):
    """The caller went away."""

    default_reason = "CANCELLED"


class InternalError(BatonError):
    """A defect of ours."""


class ConfigError(Exception):
    """The configuration is wrong; the message names the field and what to write."""
