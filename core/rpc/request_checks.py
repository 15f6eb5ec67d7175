"""Makes a gRPC server refuse requests that are malformed or never arrive."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from core.errors import DeadlineError, InvalidArgumentError
from core.rpc.status import abort

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # a grpc.RpcMethodHandler, in fact a named tuple with ``_replace``

ARRIVAL_S: Final = 30.0  # longest time from the start of a call to its request


class CheckRequests(grpc.aio.ServerInterceptor):
    """Ends calls whose request is malformed or does not arrive. All Baton servers use this.

    Without this class, gRPC ends a call with a malformed request with UNKNOWN and logs a traceback,
    so any client could fill the log. And it keeps a call whose request never comes. Methods with a
    stream of requests have no bound on its arrival.
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
        responses = kinds[handler.response_streaming]
        name = f"{kinds[handler.request_streaming]}_{responses}"
        check = _check_stream if handler.request_streaming else _only_request
        checked = _with_check(getattr(handler, name), check)
        # Every method becomes one with a stream of requests. Otherwise gRPC would wait for the
        # request by itself, and without a bound. Both kinds look the same on the wire.
        return handler._replace(
            request_streaming=True,
            request_deserializer=_marking_malformed(handler.request_deserializer),
            **{name: None, f"stream_{responses}": checked},
        )


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


async def _only_request(requests: AsyncIterator[Any], context: _Context) -> Any:
    try:
        async with asyncio.timeout(ARRIVAL_S):
            request = await anext(aiter(requests))
    except TimeoutError:
        late = DeadlineError(
            f"the request did not arrive within {ARRIVAL_S:g} s", reason="NO_REQUEST"
        )
        await abort(context, late)
    except StopAsyncIteration:
        await abort(context, _malformed("the call has no request"))
    return await _check_request(request, context)


async def _check_request(request: Any, context: _Context) -> Any:
    if isinstance(request, _Malformed):
        await abort(context, _malformed("the request is not a message of this method"))
    return request


def _malformed(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="MALFORMED_REQUEST")


async def _check_stream(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    async def checked() -> AsyncIterator[Any]:
        async for request in requests:
            yield await _check_request(request, context)

    return checked()
