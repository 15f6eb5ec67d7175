"""How our errors end a gRPC call, and how a failed call to a worker becomes one of our errors."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NoReturn

import grpc

from baton.errors import ERROR_DETAIL_KEY, class_of, read_detail
from baton.v1 import inference_pb2
from core import errors


def error_detail(error: errors.BatonError) -> inference_pb2.ErrorDetail:
    """The typed part of ``error``; the retry hint is rounded up to a whole millisecond."""
    retry_after_s = error.retry_after_s or 0.0
    return inference_pb2.ErrorDetail(
        reason=error.reason,
        request_id=error.request_id,
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


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.BatonError) -> NoReturn:
    """End a server-side call with ``error``.

    Raises:
        grpc.aio.AbortError: always, for gRPC to end the handler with;
        asyncio.CancelledError: instead, when the caller is gone and there is nobody to tell.
    """
    detail = error_detail(error).SerializeToString()
    try:
        await context.abort(error.code, error.message, ((ERROR_DETAIL_KEY, detail),))
    except grpc.aio.InternalError as err:
        raise asyncio.CancelledError("the caller went away") from err
    raise AssertionError("abort returned")


def from_rpc_error(err: grpc.aio.AioRpcError, worker_id: str) -> errors.BatonError:
    """Our error for a failed call to the worker named ``worker_id``.

    The worker's own reason and retry hint are kept when it sent an ``ErrorDetail``.
    """
    kind = class_of(err.code())
    if kind is errors.BatonError:
        kind = errors.InternalError
    elif kind in (errors.UnavailableError, errors.CancelledError):
        # We did not ask for the cancel, so the worker is stopping.
        kind = errors.WorkerLostError
    detail = read_detail(tuple(err.trailing_metadata() or ()))
    text = err.details() or err.code().name
    if kind is errors.WorkerLostError:
        message = f"worker {worker_id} went away: {text}"
    else:
        message = f"worker {worker_id}: {text}"
    if detail is None:
        return kind(message)
    retry_after_s = detail.retry_after_ms / 1000 if detail.retry_after_ms else None
    return kind(message, reason=detail.reason or None, retry_after_s=retry_after_s)
