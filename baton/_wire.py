"""Translates between public values and protocol messages, and decides when to resume a stream.

Both clients use this module. It reads no clock and does no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, Unpack

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
)
from baton.types import (
    ChatMessage,
    FinishReason,
    KvOutcome,
    KvReport,
    Phases,
    RequestFields,
    Response,
    SamplingParams,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from baton.v1 import inference_pb2 as pb

DEFAULT_MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024  # the router's own default
DEFAULT_RESUME_TIMEOUT_S: Final = 30.0  # a router that died is replaced within seconds

# Three years. gRPC treats a deadline far beyond this as one that has already passed.
_ENDLESS_TIMEOUT_S: Final = 1e8

# A stream whose error has one of these reasons can be resumed: its router died or shuts down.
_RESUMABLE_REASONS: Final = frozenset({"CONNECTION_FAILED", "ROUTER_DRAINING"})
# If Resume fails with one of these, a later Resume may succeed.
_RETRIABLE_ERRORS: Final = (UnavailableError, AlreadyExistsError, CapacityError)
_MIN_RESUME_WAIT_S: Final = 0.2  # avoids a tight loop while the router is down

# Asks a router by the name of its service, because other gRPC servers serve the name "", too.
HEALTH_REQUEST: Final = health_pb2.HealthCheckRequest(
    service=pb.DESCRIPTOR.services_by_name["Inference"].full_name
)

# Proxies end connections with more pings: their usual limit is one in 10 seconds.
DEFAULT_KEEPALIVE_S: Final = 20.0
_PING_TIMEOUT_MS: Final = 10_000  # an answer takes milliseconds, unless the host is gone
Metadata = Sequence[tuple[str, str | bytes]]

OnInterruption = Callable[[BatonError, float], None]
ChannelOptions = Sequence[tuple[str, str | int]]

_FINISH_REASONS: Final[dict[int, FinishReason]] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_KV_OUTCOMES: Final[dict[int, KvOutcome]] = {
    pb.KV_OUTCOME_TRANSFERRED: KvOutcome.TRANSFERRED,
    pb.KV_OUTCOME_RECOMPUTED: KvOutcome.RECOMPUTED,
    pb.KV_OUTCOME_LOCAL: KvOutcome.LOCAL,
}


def channel_options(
    max_message_bytes: int, keepalive_s: float, extra: ChannelOptions
) -> list[tuple[str, str | int]]:
    """Return the gRPC channel arguments of both clients. ``extra`` overrides them."""
    ping_ms = max(1, round(keepalive_s * 1000))
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A web proxy in the environment must not receive calls to the cluster.
        ("grpc.enable_http_proxy", 0),
        # Without this bound, a client that starts before the cluster may connect minutes late.
        ("grpc.max_reconnect_backoff_ms", 2000),
        # If the router's host vanishes, nothing closes the connection. These pings detect the
        # failure, so the client can resume the stream.
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", min(ping_ms, _PING_TIMEOUT_MS)),
        ("grpc.http2.max_pings_without_data", 0),
        *extra,
    ]


def grpc_timeout_s(timeout_s: float | None) -> float | None:
    """Return the timeout to pass to gRPC. ``None`` means that the router sets the deadline.

    Raises:
        InvalidArgumentError: the timeout is NaN or negative.
    """
    if timeout_s is None or timeout_s >= _ENDLESS_TIMEOUT_S:
        return None
    if math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidArgumentError(
            f"timeout_s is {timeout_s}; must be 0 seconds or more", reason="INVALID_TIMEOUT"
        )
    return timeout_s


def build_request(
    prompt: str | None, max_message_bytes: int, **fields: Unpack[RequestFields]
) -> pb.GenerateRequest:
    """Build the message for one request. The router, not this function, checks value ranges.

    Raises:
        InvalidArgumentError: there is not exactly one input, the protocol cannot carry a value,
            or the message is larger than ``max_message_bytes``.
        TypeError: a keyword argument does not exist.
    """
    messages = fields.pop("messages", None)
    token_ids = fields.pop("token_ids", None)
    if sum(value is not None for value in (prompt, messages, token_ids)) != 1:
        raise InvalidArgumentError(
            "give exactly one of prompt, messages and token_ids", reason="INVALID_INPUT"
        )
    parse_special = fields.pop("parse_special_tokens", None)
    if parse_special is not None and messages is None:
        raise InvalidArgumentError(
            "parse_special_tokens is only for messages; a prompt is tokenised unchanged",
            reason="INVALID_INPUT",
        )
    request = pb.GenerateRequest()
    _set_field(request, "request_id", fields.pop("request_id", None))
    _set_field(request, "model", fields.pop("model", None))
    _set_field(request, "service_class", fields.pop("service_class", None))
    _set_field(request, "prompt", prompt)
    if messages is not None:
        request.chat.SetInParent()  # an empty list still selects this input
        _set_field(request.chat, "parse_special_tokens", parse_special)
        for message in messages:
            role, content = _role_and_content(message)
            chat_message = request.chat.messages.add()
            _set_field(chat_message, "role", role)
            _set_field(chat_message, "content", content)
    if token_ids is not None:
        request.token_ids.SetInParent()
        _set_field(request.token_ids, "ids", token_ids)

    sampling = fields.pop("sampling", None) or SamplingParams()
    changes: dict[str, Any] = dict(fields)  # only fields of SamplingParams are left
    sampling = replace(sampling, **changes)
    if isinstance(sampling.stop, str):
        sampling = replace(sampling, stop=(sampling.stop,))
    for name, value in asdict(sampling).items():
        _set_field(request.sampling, name, value)

    if (size_bytes := request.ByteSize()) > max_message_bytes:
        raise InvalidArgumentError(
            f"the request has {size_bytes} bytes, more than max_message_bytes={max_message_bytes}",
            reason="MESSAGE_TOO_LARGE",
        )
    return request


def _role_and_content(message: ChatMessage | Mapping[str, str]) -> tuple[str, str]:
    try:
        if isinstance(message, Mapping):
            role, content = message["role"], message["content"]
            if len(message) > 2:
                raise InvalidArgumentError(
                    f"a message has the keys {', '.join(map(str, message))}; give role and content",
                    reason="INVALID_INPUT",
                )
            return role, content
        return message.role, message.content
    except (AttributeError, KeyError):
        raise InvalidArgumentError(
            f"messages holds a {type(message).__name__} without role and content; give "
            "ChatMessage(role, content) or a dict with these keys",
            reason="INVALID_INPUT",
        ) from None


def _set_field(message: Message, name: str, value: Any) -> None:
    """Set a scalar or repeated scalar field; ``None`` leaves it unset."""
    if value is None:
        return
    try:
        if isinstance(value, str | bytes | int | float):
            setattr(message, name, value)
        else:
            getattr(message, name).extend(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"{name}: {error}") from error


class Resumption:
    """Decides whether and when to resume a broken stream. Pure: callers pass the time.

    Args:
        timeout_s: how long to try after each interruption; 0 disables resuming.
        deadline_s: the request's deadline on the clock of ``now_s``; ``None`` if the router sets
            it.
        on_interruption: called at each interruption, with the error and with the time for which
            resuming is tried, in seconds.
    """

    def __init__(
        self,
        timeout_s: float,
        deadline_s: float | None,
        on_interruption: OnInterruption | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_interruption = on_interruption
        self._deadline_s = math.inf if deadline_s is None else deadline_s
        self._interruption: BatonError | None = None  # the error that broke the stream first
        self._give_up_at_s = 0.0

    def response_arrived(self) -> None:
        """Record that the stream works again: the next error starts a new interruption."""
        self._interruption = None

    def wait_s(self, error: BatonError, received: int, now_s: float) -> float:
        """Return how long to wait before the next ``Resume``, in seconds.

        Args:
            received: number of responses after which the stream can be resumed. A stream without a
                response is not resumed: the caller loses nothing by sending the request again.

        Raises:
            BatonError: the stream cannot be resumed. The error is the one that first broke the
                stream.
        """
        if self._interruption is None:
            if error.reason not in _RESUMABLE_REASONS or not received or self._timeout_s <= 0:
                raise error
            self._interruption = error
            self._give_up_at_s = min(now_s + self._timeout_s, self._deadline_s)
            if self._on_interruption is not None:
                self._on_interruption(error, self._give_up_at_s - now_s)
            return 0.0
        wait_s = max(error.retry_after_s or 0.0, _MIN_RESUME_WAIT_S)
        if not isinstance(error, _RETRIABLE_ERRORS) or now_s + wait_s > self._give_up_at_s:
            raise self._interruption from error
        return wait_s

    def remaining_s(self, now_s: float) -> float | None:
        """Return the time left until the request's deadline; ``None`` if the router sets it."""
        return None if self._deadline_s == math.inf else max(0.0, self._deadline_s - now_s)


class StreamReader:
    """Turns the messages of one stream into responses and checks that none is missing.

    ``read`` and ``end`` raise InternalError if the stream breaks the protocol.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.received = 0  # number of responses
        self._resume_token = ""
        self._finished = False

    def read(self, message: pb.GenerateResponse) -> Response:
        self.request_id = message.request_id or self.request_id
        self._resume_token = message.resume_token or self._resume_token
        if message.sequence != self.received:
            raise self._protocol_error(
                f"response {message.sequence} arrived where {self.received} was due",
                "SEQUENCE_GAP",
            )
        if self._finished:
            raise self._protocol_error(
                "a response arrived after the last one", "RESPONSE_AFTER_END"
            )
        self.received += 1
        self._finished = message.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        return _response(message)

    @property
    def resumable(self) -> int:
        """Number of responses after which the stream can be resumed; 0 if it cannot."""
        return self.received if self._resume_token else 0

    def resume_request(self) -> pb.ResumeRequest:
        """Return the message that asks for the responses after the last one received."""
        return pb.ResumeRequest(
            request_id=self.request_id,
            last_sequence=self.received - 1,
            resume_token=self._resume_token,
        )

    def end(self) -> None:
        """Check that a stream that ended with status OK is complete."""
        if not self._finished:
            raise self._protocol_error(
                "the stream ended without a finish reason", "TRUNCATED_STREAM"
            )

    def _protocol_error(self, message: str, reason: str) -> InternalError:
        return InternalError(message, reason=reason, request_id=self.request_id)


def _response(message: pb.GenerateResponse) -> Response:
    last = message.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    return Response(
        request_id=message.request_id,
        sequence=message.sequence,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprobs(each) for each in message.logprobs),
        finish_reason=(
            _FINISH_REASONS.get(message.finish_reason, FinishReason.UNKNOWN) if last else None
        ),
        usage=_usage(message.usage) if last else None,
        phases=_phases(message.phases) if last else None,
    )


def _logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple(TopLogprob(each.token_id, each.logprob) for each in message.top)
    return TokenLogprobs(message.logprob, top)


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
    )


def _phases(message: pb.Phases) -> Phases:
    return Phases(
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        ttft_ms=message.ttft_ms,
        handoff_ms=message.handoff_ms,
        decode_ms=message.decode_ms,
        tokens_per_s=message.tokens_per_s,
        kv=_kv_report(message.kv) if message.HasField("kv") else None,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        attempts=message.attempts,
    )


def _kv_report(message: pb.KvReport) -> KvReport:
    return KvReport(
        outcome=_KV_OUTCOMES.get(message.outcome, KvOutcome.UNKNOWN),
        backend=message.backend,
        bytes=message.bytes,
        messages=message.messages,
        tokens=message.tokens,
        transfer_ms=message.transfer_ms,
        cached_tokens=message.cached_tokens,
        computed_tokens=message.computed_tokens,
        hidden_bytes=message.hidden_bytes,
        tail_ms=message.tail_ms,
        stall_ms=message.stall_ms,
        retries=message.retries,
    )
