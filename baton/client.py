"""The blocking client. Threads may share one ``Client``; a stream belongs to one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton._wire import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_RESUME_TIMEOUT_S,
    ChannelOptions,
    Resumption,
    StreamReader,
    build_request,
    channel_options,
    deadline_s,
)
from baton.errors import BatonError, from_status
from baton.types import Completion, RequestFields, Response
from baton.v1 import inference_pb2, inference_pb2_grpc


class _Call(Protocol):
    """The part of a grpc response iterator that is used here."""

    def __next__(self) -> inference_pb2.GenerateResponse: ...
    def cancel(self) -> object: ...


class Client:
    """A connection to one router, opened with the first call and kept until ``close``.

    Args:
        address: "host:port" of the router's gRPC server.
        timeout_s: deadline of each call that names none. ``None`` and ``math.inf``: the
            router's default.
        tls: ``None`` is plaintext; else e.g. ``grpc.ssl_channel_credentials(root_ca)``.
        max_message_bytes: bound of one message in either direction; the router has its own.
        options: more gRPC channel arguments; they win over those set here.
        resume_timeout_s: how long a stream whose router died, or left, is tried to be resumed, at
            this address; the responses go on where they stopped. 0: it ends in
            ``UnavailableError`` at once.
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
    ) -> None:
        arguments = channel_options(max_message_bytes, options)
        self._channel = (
            grpc.insecure_channel(address, arguments)
            if tls is None
            else grpc.secure_channel(address, tls, arguments)
        )
        self._address = address
        self._timeout_s = timeout_s
        self._resume_timeout_s = resume_timeout_s
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
        The request ends with the stream: leaving the loop early, an exception in its body
        or ``close()`` cancels it.

        Raises:
            InvalidArgumentError: here, if the request cannot be sent as it is; each other
                ``BatonError`` comes while iterating.
        """
        message = build_request(prompt, self._max_message_bytes, **request)
        timeout_s = self._deadline_s(timeout_s)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        return ResponseStream(
            self._inference.Generate(message, timeout=timeout_s),
            StreamReader(message.request_id),
            Resumption(self._resume_timeout_s, deadline_s),
            self._inference.Resume,
            self._address,
        )

    def complete(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **request: Unpack[RequestFields],
    ) -> Completion:
        """``generate``, waiting for the whole answer.

        Raises:
            BatonError: the request failed.
        """
        with self.generate(prompt, timeout_s=timeout_s, **request) as stream:
            return Completion.join(list(stream))

    def health(self, *, timeout_s: float | None = None) -> bool:
        """Whether the router says that it serves requests.

        Raises:
            BatonError: it gave no answer.
        """
        try:
            answer = self._health.Check(
                health_pb2.HealthCheckRequest(), timeout=self._deadline_s(timeout_s)
            )
        except grpc.RpcError as error:
            raise _error(error, self._address) from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Cancel what runs and disconnect. Idempotent."""
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

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        return deadline_s(self._timeout_s if timeout_s is None else timeout_s)


class ResponseStream(Iterator[Response]):
    """The responses of one request. Closing it, or dropping it, cancels the request."""

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
        """Empty until the first response, if the router mints it."""
        return self._reader.request_id

    def __next__(self) -> Response:
        try:
            while True:
                try:
                    response = self._reader.read(next(self._call))
                except grpc.RpcError as error:
                    self._reopen(_error(error, self._address, self.request_id))
                else:
                    self._resumption.arrived()
                    return response
        except StopIteration:
            self._reader.end()
            raise
        except BaseException:  # an interrupt while waiting, or a broken stream
            self.close()
            raise

    def _reopen(self, error: BatonError) -> None:
        """Wait, and ask for the rest of the stream. Raises BatonError if that is no use."""
        wait_s = self._resumption.wait_s(error, self._reader.received, time.monotonic())
        if self._closed.wait(wait_s):
            raise error
        timeout_s = self._resumption.timeout_s(time.monotonic())
        self._call = self._resume(self._reader.resume_request(), timeout=timeout_s)
        if self._closed.is_set():  # meanwhile
            self._call.cancel()

    def close(self) -> None:
        """Cancel the request if it still runs. Idempotent."""
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
