"""The blocking client. Threads may share a ``Client``, but only one thread may read a stream."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
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
from baton.errors import BatonError, from_status
from baton.types import Completion, RequestFields, Response
from baton.v1 import inference_pb2, inference_pb2_grpc


class _Call(Protocol):
    """The part of gRPC's response iterator that this module uses."""

    def __next__(self) -> inference_pb2.GenerateResponse: ...
    def cancel(self) -> object: ...


class Client:
    """A connection to one router. The first call opens it; ``close`` ends it.

    Args:
        address: "host:port" of the router's gRPC server.
        timeout_s: timeout of calls that give none. With ``None`` or ``math.inf``, the router's
            default applies.
        tls: credentials such as ``grpc.ssl_channel_credentials(root_ca)``; ``None`` is plaintext.
        max_message_bytes: largest message in either direction. The router has a limit of its own.
        options: more gRPC channel arguments. They override the client's own.
        resume_timeout_s: how long to try to resume a stream after its router died or shut down.
            The client calls the same address again, and the responses continue where they
            stopped. With 0, the stream ends with ``UnavailableError`` instead.
        on_interruption: called when a stream breaks and is going to be resumed, with the error and
            with the time for which resuming is tried, in seconds.
        keepalive_s: interval of pings while requests run. They find a router whose host is gone.
        metadata: gRPC metadata that is sent with each call, for proxies and tracing.
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
        arguments = channel_options(max_message_bytes, keepalive_s, options)
        self._channel = (
            grpc.insecure_channel(address, arguments)
            if tls is None
            else grpc.secure_channel(address, tls, arguments)
        )
        self._address = address
        self._timeout_s = timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._on_interruption = on_interruption
        self._metadata = tuple(metadata)
        self._max_message_bytes = max_message_bytes
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **request: Unpack[RequestFields],
    ) -> ResponseStream:
        """Send a request and return the stream of its responses.

        Give exactly one input: ``prompt``, ``messages=[ChatMessage(...)]`` or ``token_ids``.
        ``close()`` or deleting the stream cancels the request. A loop directly over this call
        deletes the stream as soon as the loop ends.

        Raises:
            InvalidArgumentError: the request cannot be sent as it is. Every other ``BatonError``
                is raised by the iteration.
        """
        message = build_request(prompt, self._max_message_bytes, **request)
        timeout_s = self._call_timeout_s(timeout_s)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        return ResponseStream(
            self._inference.Generate(message, timeout=timeout_s, metadata=self._metadata),
            StreamReader(message.request_id),
            Resumption(self._resume_timeout_s, deadline_s, self._on_interruption),
            functools.partial(self._inference.Resume, metadata=self._metadata),
            self._address,
        )

    def complete(
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
        with self.generate(prompt, timeout_s=timeout_s, **request) as stream:
            return Completion.join(list(stream))

    def health(self, *, timeout_s: float | None = None) -> bool:
        """Ask the router whether it serves requests.

        Raises:
            BatonError: the router did not answer.
        """
        try:
            answer = self._health.Check(
                HEALTH_REQUEST,
                timeout=self._call_timeout_s(timeout_s),
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise _error(error, self._address) from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Cancel all running requests and disconnect. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call_timeout_s(self, timeout_s: float | None) -> float | None:
        return grpc_timeout_s(self._timeout_s if timeout_s is None else timeout_s)


class ResponseStream(Iterator[Response]):
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
        self._closed = threading.Event()

    @property
    def request_id(self) -> str:
        """The request's id. If the router mints it, the value is empty until the first response."""
        return self._reader.request_id

    def __next__(self) -> Response:
        try:
            while True:
                try:
                    response = self._reader.read(next(self._call))
                except grpc.RpcError as error:
                    self._reopen(_error(error, self._address, self.request_id))
                else:
                    self._resumption.response_arrived()
                    return response
        except StopIteration:
            self._reader.end()
            raise
        except BaseException:  # a broken stream, or an interrupt such as Ctrl-C
            self.close()
            raise

    def _reopen(self, error: BatonError) -> None:
        """Wait, then ask for the rest of the stream. Raise BatonError if it cannot be resumed."""
        wait_s = self._resumption.wait_s(error, self._reader.resumable, time.monotonic())
        if self._closed.wait(wait_s):
            raise error
        timeout_s = self._resumption.remaining_s(time.monotonic())
        self._call = self._resume(self._reader.resume_request(), timeout=timeout_s)
        if self._closed.is_set():  # another thread closed the stream in the meantime
            self._call.cancel()

    def close(self) -> None:
        """Cancel the request if it is still running. Idempotent."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _error(error: grpc.RpcError, address: str, request_id: str = "") -> BatonError:
    return from_status(
        error.code(),
        error.details() or "",
        [(each.key, each.value) for each in error.trailing_metadata() or ()],
        address=address,
        request_id=request_id,
    )
