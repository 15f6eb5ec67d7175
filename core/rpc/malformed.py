"""Makes a gRPC server refuse requests whose bytes are not a message of the called method."""

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
_Handler = Any  # a grpc.RpcMethodHandler, in fact a named tuple with ``_replace``


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """If a request is malformed, the call ends with INVALID_ARGUMENT. All Baton servers use this.

    Without this class, gRPC ends such a call with UNKNOWN and logs a traceback. Any client could
    then fill the log.
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
        check = _check_stream if handler.request_streaming else _check_request
        checked = _with_check(getattr(handler, name), check)
        parse = _marking_malformed(handler.request_deserializer)
        return handler._replace(request_deserializer=parse, **{name: checked})


class _Malformed:
    """Replaces a request that could not be parsed."""


def _marking_malformed(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return parse


def _with_check(behaviour: Any, check: Callable[[Any, _Context], Awaitable[Any]]) -> Any:
    """Return a function that passes its request through ``check`` and then calls ``behaviour``.

    The function is an async generator function if ``behaviour`` is one, and otherwise a coroutine
    function. gRPC calls the two kinds differently.
    """
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


async def _check_request(request: Any, context: _Context) -> Any:
    if isinstance(request, _Malformed):
        error = InvalidArgumentError(
            "the request is not a message of this method", reason="MALFORMED_REQUEST"
        )
        await abort(context, error)
    return request


async def _check_stream(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    async def checked() -> AsyncIterator[Any]:
        async for request in requests:
            yield await _check_request(request, context)

    return checked()
