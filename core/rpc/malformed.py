"""Bytes that are no message of the method that was called, at a gRPC server."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from core.errors import InvalidArgumentError
from core.rpc.status import abort

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # the class behind grpc.RpcMethodHandler, a named tuple


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Ends such calls with INVALID_ARGUMENT; every server of ours has it.

    gRPC itself ends them with UNKNOWN and a traceback in the log, with which anybody could fill it.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """See ``grpc.aio.ServerInterceptor``."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        kinds = ("unary", "stream")
        name = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
        checked = _checked(getattr(handler, name), _each if handler.request_streaming else _one)
        parse = _parser(handler.request_deserializer)
        return handler._replace(request_deserializer=parse, **{name: checked})


class _Malformed:
    """Stands where the request would."""


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return parse


def _checked(behaviour: Any, check: Callable[[Any, _Context], Awaitable[Any]]) -> Any:
    """``behaviour`` for requests that passed the check; of the same kind, for gRPC looks."""
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: _Context) -> AsyncIterator[Any]:
            responses = behaviour(await check(request, context), context)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response

        return generate

    async def call(request: Any, context: _Context) -> Any:
        return await behaviour(await check(request, context), context)

    return call


async def _one(request: Any, context: _Context) -> Any:
    if isinstance(request, _Malformed):
        error = InvalidArgumentError(
            "the request is not a message of this method", reason="MALFORMED_REQUEST"
        )
        await abort(context, error)
    return request


async def _each(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    async def checked() -> AsyncIterator[Any]:
        async for request in requests:
            yield await _one(request, context)

    return checked()
