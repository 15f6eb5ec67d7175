"""Converts Baton's errors to gRPC status, and failed calls to a worker to Baton's errors."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NoReturn

import grpc

from baton.errors import ERROR_DETAIL_KEY, class_of, read_detail
from baton.v1 import inference_pb2
from core import errors


def error_detail(error: errors.BatonError) -> inference_pb2.ErrorDetail:
    """Return the typed detail of ``error``. Its retry hint is rounded up to whole milliseconds."""
    retry_after_s = error.retry_after_s or 0.0
    return inference_pb2.ErrorDetail(
        reason=error.reason,
        request_id=error.request_id,
        retry_after_ms=math.ceil(retry_after_s * 1000),
    )


async def accept(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Send the initial metadata of a call that a drain or a slow client may cancel.

    Without this function, gRPC sends the initial metadata with the first response. If the call is
    cancelled during that send, ``abort`` fails afterwards and the caller never gets a status.

    Raises:
        errors.CancelledError: the caller has gone away.
    """
    try:
        await context.send_initial_metadata(())
    except grpc.aio.InternalError as err:
        raise errors.CancelledError("the caller went away") from err


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.BatonError) -> NoReturn:
    """End a server-side call with ``error``. Never returns.

    Raises:
        grpc.aio.AbortError: the status was sent. The handler must not catch this error.
        asyncio.CancelledError: the caller has gone away, so no status could be sent.
    """
    detail = error_detail(error).SerializeToString()
    try:
        await context.abort(error.code, error.message, ((ERROR_DETAIL_KEY, detail),))
    except grpc.aio.InternalError as err:
        raise asyncio.CancelledError("the caller went away") from err
    raise AssertionError("abort returned")


def from_rpc_error(err: grpc.aio.AioRpcError, worker_id: str) -> errors.BatonError:
    """Return the error for a failed call to the worker ``worker_id``.

    If the worker sent an ``ErrorDetail``, its reason and retry hint are kept.
    """
    kind = class_of(err.code())
    if kind is errors.BatonError or err.code() is grpc.StatusCode.OUT_OF_RANGE:
        kind = errors.InternalError
    elif kind in (errors.UnavailableError, errors.CancelledError):
        # This side did not cancel the call, so CANCELLED means that the worker is stopping.
        kind = errors.WorkerLostError
    detail = read_detail(tuple(err.trailing_metadata() or ()))
    text = err.details() or err.code().name
    if kind is errors.WorkerLostError:
        message = f"worker {worker_id} was lost: {text}"
    else:
        message = f"worker {worker_id}: {text}"
    if detail is None:
        return kind(message)
    retry_after_s = detail.retry_after_ms / 1000 if detail.retry_after_ms else None
    return kind(message, reason=detail.reason or None, retry_after_s=retry_after_s)
