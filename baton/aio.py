"""The asyncio client. It can be used only in the event loop of its first call."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton._wire import (
    DEFAULT_KEEPALIVE_S,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_RESUME_TIMEOUT_S,
    HEALTH_REQUEST,
    ChannelOptions,
    Metadata,
    OnInterruption,
    Resumption,
    StreamReader,
    build_request,
    channel_options,
    grpc_timeout_s,
)
from baton.errors import BatonError, CancelledError, from_status
from baton.types import Completion, RequestFields, Response
from baton.v1 import inference_pb2, inference_pb2_grpc


class _Call(Protocol):
    """The part of a grpc.aio call that this module uses."""

    async def read(self) -> inference_pb2.GenerateResponse | object: ...
    def cancel(self) -> bool: ...


class AsyncClient:
    """A connection to one router. It takes the arguments of ``baton.Client``.

    It may be created before the event loop runs, because only the first call opens a connection.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        tls: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        options: ChannelOptions = (),
        resume_timeout_s: float = DEFAULT_RESUME_TIMEOUT_S,
        on_interruption: OnInterruption | None = None,
        keepalive_s: float = DEFAULT_KEEPALIVE_S,
        metadata: Metadata = (),
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._on_interruption = on_interruption
        self._metadata = tuple(metadata)
        self._tls = tls
        self._max_message_bytes = max_message_bytes
        self._options = channel_options(max_message_bytes, keepalive_s, options)
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **request: Unpack[RequestFields],
    ) -> AsyncResponseStream:
        """Send a request and return the stream of its responses, for ``async for``.

        Give exactly one input: ``prompt``, ``messages=[ChatMessage(...)]`` or ``token_ids``.
        ``aclose()``, deleting the stream or cancelling the task that reads it cancels the request.
        A loop directly over this call deletes the stream as soon as the loop ends.

        Raises:
            InvalidArgumentError: the request cannot be sent as it is. Every other ``BatonError``
                is raised by the iteration.
        """
        message = build_request(prompt, self._max_message_bytes, **request)
        stub = inference_pb2_grpc.InferenceStub(self._connect())
        timeout_s = self._call_timeout_s(timeout_s)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        return AsyncResponseStream(
            stub.Generate(message, timeout=timeout_s, metadata=self._metadata),
            StreamReader(message.request_id),
            Resumption(self._resume_timeout_s, deadline_s, self._on_interruption),
            functools.partial(stub.Resume, metadata=self._metadata),
            self._address,
        )

    async def complete(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **request: Unpack[RequestFields],
    ) -> Completion:
        """Send a request and wait for the whole answer. Takes the arguments of ``generate``.

        Raises:
            BatonError: the request failed.
        """
        async with self.generate(prompt, timeout_s=timeout_s, **request) as stream:
            return Completion.join([response async for response in stream])

    async def health(self, *, timeout_s: float | None = None) -> bool:
        """Ask the router whether it serves requests.

        Raises:
            BatonError: the router did not answer.
        """
        stub = health_pb2_grpc.HealthStub(self._connect())
        try:
            answer = await stub.Check(
                HEALTH_REQUEST,
                timeout=self._call_timeout_s(timeout_s),
                metadata=self._metadata,
            )
        except grpc.aio.AioRpcError as error:
            raise _error(error, self._address) from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def aclose(self) -> None:
        """Cancel all running requests and disconnect. Idempotent."""
        self._closed = True
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _connect(self) -> grpc.aio.Channel:
        if self._closed:
            raise ValueError("the client is closed")
        if self._channel is None:
            self._channel = (
                grpc.aio.insecure_channel(self._address, self._options)
                if self._tls is None
                else grpc.aio.secure_channel(self._address, self._tls, self._options)
            )
        return self._channel

    def _call_timeout_s(self, timeout_s: float | None) -> float | None:
        return grpc_timeout_s(self._timeout_s if timeout_s is None else timeout_s)


class AsyncResponseStream(AsyncIterator[Response]):
    """The responses of one request. Closing or deleting the stream cancels the request."""

    def __init__(
        self,
        call: _Call,
        reader: StreamReader,
        resumption: Resumption,
        resume: Callable[..., _Call],
        address: str,
    ) -> None:
        self._call = call
        self._reader = reader
        self._resumption = resumption
        self._resume = resume
        self._address = address
        self._closed = False
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        """The request's id. If the router mints it, the value is empty until the first response."""
        return self._reader.request_id

    async def __anext__(self) -> Response:
        try:
            while True:
                try:
                    message = await self._call.read()
                except grpc.aio.AioRpcError as error:
                    await self._reopen(_error(error, self._address, self.request_id))
                else:
                    break
            if isinstance(message, inference_pb2.GenerateResponse):
                response = self._reader.read(message)
                self._resumption.response_arrived()
                return response
            self._reader.end()
        except asyncio.CancelledError:
            self._call.cancel()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio also raises asyncio.CancelledError if the stream or the client was closed.
            raise CancelledError("the stream was closed", request_id=self.request_id) from None
        except BaseException:  # a broken stream
            self._call.cancel()
            raise
        raise StopAsyncIteration

    async def _reopen(self, error: BatonError) -> None:
        """Wait, then ask for the rest of the stream. Raise BatonError if it cannot be resumed."""
        wait_s = self._resumption.wait_s(error, self._reader.resumable, time.monotonic())
        await asyncio.sleep(wait_s)
        if self._closed:
            raise error
        timeout_s = self._resumption.remaining_s(time.monotonic())
        self._call = self._resume(self._reader.resume_request(), timeout=timeout_s)

    async def aclose(self) -> None:
        """Cancel the request if it is still running. Idempotent."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._loop.is_closed():
            self._call.cancel()


def _error(error: grpc.aio.AioRpcError, address: str, request_id: str = "") -> BatonError:
    return from_status(
        error.code(),
        error.details() or "",
        error.trailing_metadata() or (),
        address=address,
        request_id=request_id,
    )
