"""Defines the tree of errors and maps it to gRPC status codes.

The class of an error says who is at fault. The server raises the same classes; ``core.errors`` adds
classes that only servers use. A client raises the class that matches the status code from the
router. An ``ErrorDetail`` in the trailing metadata carries the reason, the request id and the time
after which to retry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

import grpc
from google.protobuf.message import DecodeError

from baton.v1 import inference_pb2

ERROR_DETAIL_KEY = "baton-error-bin"


class BatonError(Exception):
    """Base of all errors, and the class for a status code that has no class of its own.

    Attributes:
        message: one sentence for a person.
        code: gRPC status of the call. If no call failed, the status that fits the error.
        reason: stable upper-case word for programs, such as ``PROMPT_TOO_LONG``.
        retry_after_s: seconds after which a retry may succeed; ``None`` if the router names no
            time.
        request_id: id of the request that failed; empty if it is not known yet.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = ""  # if empty, the reason is the name of the code

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason or self.default_reason or self.code.name
        self.retry_after_s = retry_after_s
        self.request_id = request_id


class InvalidArgumentError(BatonError):
    """The request can never succeed as it is."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(BatonError):
    """The request names something that the cluster does not have."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(BatonError):
    """Another request with the same id is in flight."""

    default_code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "DUPLICATE_REQUEST_ID"


class CapacityError(BatonError):
    """A bound of the cluster was reached; trying later may help."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class UnavailableError(BatonError):
    """The router cannot be reached, or has no worker for the request now."""

    default_code = grpc.StatusCode.UNAVAILABLE
    default_reason = "NO_WORKER"


class DeadlineError(BatonError):
    """The request's deadline passed."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(BatonError):
    """The call was cancelled, by this client or by the router."""

    default_code = grpc.StatusCode.CANCELLED


class InternalError(BatonError):
    """A defect of the cluster, e.g. a stream with a gap."""

    default_code = grpc.StatusCode.INTERNAL


_CLASSES: tuple[type[BatonError], ...] = (
    InvalidArgumentError,
    NotFoundError,
    AlreadyExistsError,
    CapacityError,
    UnavailableError,
    DeadlineError,
    CancelledError,
    InternalError,
)
_BY_CODE: dict[grpc.StatusCode, type[BatonError]] = {
    **{cls.default_code: cls for cls in _CLASSES},
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


def class_of(code: grpc.StatusCode) -> type[BatonError]:
    """The class of errors with this status code."""
    return _BY_CODE.get(code, BatonError)


# How gRPC says that this process has cancelled the call or closed the channel.
_OWN_CANCELS: Final = ("Locally cancelled by application!", "Channel closed!")


def from_status(
    code: grpc.StatusCode,
    details: str,
    trailing_metadata: Iterable[tuple[str, str | bytes]],
    *,
    address: str,
    request_id: str = "",
) -> BatonError:
    """The error for a call to ``address`` that ended with this status."""
    detail = read_detail(trailing_metadata)
    if detail is None and code is grpc.StatusCode.UNAVAILABLE:
        # Baton's router always sends a detail, so this status comes from the transport.
        message = f"no connection to a Baton router at {address}: {details}"
        return UnavailableError(message, reason="CONNECTION_FAILED", request_id=request_id)
    if detail is None and code is grpc.StatusCode.CANCELLED and details not in _OWN_CANCELS:
        # gRPC cancels the calls that arrive just when a server stops.
        message = f"the router at {address} stops: {details}"
        return UnavailableError(message, reason="CONNECTION_FAILED", request_id=request_id)
    if (
        detail is None
        and code is grpc.StatusCode.RESOURCE_EXHAUSTED
        and "larger than max" in details
    ):
        # gRPC itself refused the message. A later retry does not help.
        return InvalidArgumentError(
            details, code=code, reason="MESSAGE_TOO_LARGE", request_id=request_id
        )
    if detail is None:
        detail = inference_pb2.ErrorDetail()
    return class_of(code)(
        details or f"the call failed with {code.name}",
        code=code,
        reason=detail.reason or code.name,
        retry_after_s=detail.retry_after_ms / 1000 if detail.retry_after_ms else None,
        request_id=detail.request_id or request_id,
    )


def read_detail(
    metadata: Iterable[tuple[str, str | bytes]],
) -> inference_pb2.ErrorDetail | None:
    """The ``ErrorDetail`` in a call's trailing metadata; None if it is missing or unreadable."""
    for key, value in metadata:
        if key == ERROR_DETAIL_KEY and isinstance(value, bytes):
            try:
                return inference_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None  # the status code and the message still say what happened
    return None
