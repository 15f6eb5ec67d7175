"""The one place where our errors become gRPC status codes, and worker failures our errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from baton.v1 import inference_pb2
from core import errors

DETAIL_KEY = "baton-error-bin"  # trailing metadata: a serialised ErrorDetail

# First match wins, so subclasses stand before their bases.
_CODES: tuple[tuple[type[errors.BatonError], grpc.StatusCode], ...] = (
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.CancelledError, grpc.StatusCode.CANCELLED),
)

# A call that a worker cancelled, without us asking, is a worker that is stopping.
_FROM_CODE: dict[grpc.StatusCode, type[errors.BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.CapacityError,
    grpc.StatusCode.UNAVAILABLE: errors.WorkerLostError,
    grpc.StatusCode.CANCELLED: errors.WorkerLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
}


def status_code(error: errors.BatonError) -> grpc.StatusCode:
    """The status code that a caller sees for ``error``."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def error_detail(error: errors.BatonError, request_id: str) -> inference_pb2.ErrorDetail:
    """The typed part of ``error``; the retry hint is rounded up to a whole millisecond."""
    retry_after_s = error.retry_after_s or 0.0
    return inference_pb2.ErrorDetail(
        reason=error.reason,
        request_id=request_id,
        retry_after_ms=math.ceil(retry_after_s * 1000),
    )


async def accept(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Begin to answer a call that may be ended from outside, by a drain or for its slow client.

    Else gRPC sends the initial metadata with the first response, and a call that is ended in the
    middle of that can be told nothing more: ``abort`` fails, and the caller waits for nothing.

    Raises:
        CancelledError: the caller is gone.
    """
    try:
        await context.send_initial_metadata(())
    except grpc.aio.InternalError as err:
        raise errors.CancelledError("the caller went away") from err


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: errors.BatonError, request_id: str
) -> NoReturn:
    """End a server-side call with ``error``.

    Raises:
        grpc.aio.AbortError: always, for gRPC to end the handler with;
        asyncio.CancelledError: instead, when the caller is gone and there is nobody to tell.
    """
    detail = error_detail(error, request_id).SerializeToString()
    try:
        await context.abort(status_code(error), error.message, ((DETAIL_KEY, detail),))
    except grpc.aio.InternalError as err:
        raise asyncio.CancelledError("the caller went away") from err
    raise AssertionError("abort returned")


def from_rpc_error(err: grpc.aio.AioRpcError, worker_id: str) -> errors.BatonError:
    """Our error for a failed call to the worker named ``worker_id``.

    The worker's own reason and retry hint are kept when it sent an ``ErrorDetail``.
    """
    kind = _FROM_CODE.get(err.code(), errors.InternalError)
    detail = _detail_of(err)
    text = err.details() or err.code().name
    if kind is errors.WorkerLostError:
        message = f"worker {worker_id} went away: {text}"
    else:
        message = f"worker {worker_id}: {text}"
    if detail is None:
        return kind(message)
    retry_after_s = detail.retry_after_ms / 1000 if detail.retry_after_ms else None
    return kind(message, reason=detail.reason or None, retry_after_s=retry_after_s)


def _detail_of(err: grpc.aio.AioRpcError) -> inference_pb2.ErrorDetail | None:
    pairs: Sequence[tuple[str, str | bytes]] = tuple(err.trailing_metadata() or ())
    for key, value in pairs:
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return inference_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None  # another version's detail; the status code still tells enough
    return None
