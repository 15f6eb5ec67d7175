"""Helpers for the handling of one gRPC call. The servicers of both pools use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc

from core.errors import BatonError, DeadlineError, InternalError, InvalidArgumentError
from core.messages import worker_pb2
from core.rpc.status import abort
from engine.protocol import EngineOutput

_log = logging.getLogger(__name__)

_MAX_ID_CHARS = 256  # the id must fit into the metadata of an error; routers make shorter ids


def transfer_id_of(key: worker_pb2.TransferKey) -> str:
    """Return the transfer id: the engine's id for one attempt of one request.

    Raises InvalidArgumentError if the request id is empty, too long or not printable.
    """
    if not 1 <= len(key.request_id) <= _MAX_ID_CHARS or not key.request_id.isprintable():
        raise InvalidArgumentError(
            f"key.request_id must be 1 to {_MAX_ID_CHARS} printable characters",
            reason="INVALID_REQUEST_ID",
        )
    return f"{key.request_id}#{key.attempt}"


def check_deadline(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Raise DeadlineError if the call's deadline has passed.

    Servicers call this before they admit a request, because gRPC also delivers calls that expired
    while this process was busy.
    """
    # time_remaining() is None for a call without a deadline, although its type excludes None.
    remaining_s = cast("float | None", context.time_remaining())
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineError("the deadline passed before the worker began the request")


@asynccontextmanager
async def errors_to_status(
    context: grpc.aio.ServicerContext[Any, Any], request_id: str
) -> AsyncIterator[None]:
    """End the call with a gRPC status if the block raises.

    Cancellation and gRPC's own AbortError pass through, because the call has ended already.
    """
    # ``transfer_id_of`` refuses a longer id. The metadata of its error carries the shortened id.
    request_id = request_id[:_MAX_ID_CHARS]
    try:
        yield
    except BatonError as error:
        error.request_id = request_id
        await abort(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:  # noqa: BLE001 - the caller gets a typed error for every defect
        _log.exception("request %s failed", request_id)
        failure = InternalError(
            "the worker failed on this request because of an internal error", request_id=request_id
        )
        await abort(context, failure)


@asynccontextmanager
async def closing(
    outputs: AsyncIterator[EngineOutput],
) -> AsyncIterator[AsyncIterator[EngineOutput]]:
    """Close the engine's stream when the block ends. Closing aborts a request that still runs."""
    try:
        yield outputs
    finally:
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()
