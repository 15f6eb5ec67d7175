"""What the servicers of both pools do alike around one call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc

from baton.v1 import worker_pb2
from core.errors import BatonError, DeadlineError, InternalError, InvalidArgumentError
from core.rpc.status import abort
from engine.protocol import EngineOutput

_log = logging.getLogger(__name__)

_MAX_ID_CHARS = 256  # the router's are shorter


def engine_key(key: worker_pb2.TransferKey) -> str:
    """The engine's name for one attempt of one request.

    Raises InvalidArgumentError for an id that is no router's.
    """
    if not 1 <= len(key.request_id) <= _MAX_ID_CHARS or not key.request_id.isprintable():
        raise InvalidArgumentError(
            f"key.request_id must be 1 to {_MAX_ID_CHARS} printable characters",
            reason="INVALID_REQUEST_ID",
        )
    return f"{key.request_id}#{key.attempt}"


def check_deadline(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Before a call costs anything: gRPC hands one over that expired while this process was busy.

    Raises DeadlineError if the call's deadline has passed.
    """
    # None without a deadline, although the stubs say otherwise.
    remaining_s = cast("float | None", context.time_remaining())
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineError("the deadline passed before the worker began")


@asynccontextmanager
async def errors_to_status(
    context: grpc.aio.ServicerContext[Any, Any], request_id: str
) -> AsyncIterator[None]:
    """End the call with a status when the body raises.

    A cancelled call passes through: gRPC has told the caller, or was told by it.
    """
    # One that is refused for its length would not fit into the metadata that says so.
    request_id = request_id[:_MAX_ID_CHARS]
    try:
        yield
    except BatonError as error:
        error.request_id = request_id
        await abort(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the caller gets a typed end
        _log.exception("request %s failed", request_id)
        failure = InternalError("the worker failed on this request", request_id=request_id)
        await abort(context, failure)


@asynccontextmanager
async def closing(
    outputs: AsyncIterator[EngineOutput],
) -> AsyncIterator[AsyncIterator[EngineOutput]]:
    """Close an engine's stream with the block, which aborts the request if it still runs."""
    try:
        yield outputs
    finally:
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()
