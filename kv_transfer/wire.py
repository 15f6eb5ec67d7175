"""The control messages between a decode worker's rank and a prefill worker's rank.

ZeroMQ frames with msgpack inside (msgspec: typed, no pickle). D is the client and opens with
HELLO; nothing else is heard from a peer before its HELLO was accepted.

    D ▸ P   HELLO RESERVE CANCEL PING BYE      router's worker ▸ P   RELEASE
    P ▸ D   WELCOME REFUSE HEADER END FAIL PONG

HEADERs and the tensors that they announce travel in the same order, so a receive is only
posted when its send is.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import KvGeometry, Rectangle

T = TypeVar("T")

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 64 * 1024  # every message is small; a longer frame is not one of ours
_SHOWN_CHARS = 120  # of what is wrong with a frame


class Hello(msgspec.Struct, tag="hello", frozen=True):
    version: int
    token: str  # shared secret of the cluster
    expected_incarnation: str  # of the prefill worker that D was told of
    incarnation: str  # of D
    geometry: KvGeometry
    backend: str  # "gloo" or "nccl"
    pair_id: str  # prefix of the pair in D's TCPStore
    store_host: str
    store_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]  # torch takes no other


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    pair_id: str
    geometry: KvGeometry  # of P; each side plans the pair from both


class Refuse(msgspec.Struct, tag="refuse", frozen=True):
    """No pair, or no longer: D must open a new one."""

    pair_id: str
    reason: str


class Reserve(msgspec.Struct, tag="reserve", frozen=True):
    """D holds blocks for tokens ``[token_start, token_end)`` of this attempt's prompt."""

    key: str
    token_start: int
    token_end: int


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    key: str


class Release(msgspec.Struct, tag="release", frozen=True):
    """From P's own front end: nobody will fetch this any more."""

    token: str
    key: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    pass


class Pong(msgspec.Struct, tag="pong", frozen=True):
    pass


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """D gives this pair up; all of its transfers are cancelled."""


class Header(msgspec.Struct, tag="header", frozen=True):
    """The next tensor on the pair is this rectangle of this transfer."""

    sequence: int  # of this pair's tensors; a gap would put one transfer's KV into another's
    key: str
    area: Rectangle
    num_bytes: int


class End(msgspec.Struct, tag="end", frozen=True):
    """All was sent: the manifest that D checks against what it received."""

    key: str
    token_start: int
    token_end: int
    messages: int
    num_bytes: int
    hidden_bytes: int  # of num_bytes, sent before P had computed the last layer
    first_token: int | None
    tail_ms: float = 0.0  # last layer computed -> this message; 0 if that was the engine's wait
    stall_ms: float = 0.0  # messages were ready, and all staging buffers still on their way


class Fail(msgspec.Struct, tag="fail", frozen=True):
    key: str
    reason: str


ToPrefill = Hello | Reserve | Cancel | Release | Ping | Bye
ToDecode = Welcome | Refuse | Header | End | Fail | Pong

_encoder = msgspec.msgpack.Encoder()
_to_prefill: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
_to_decode: msgspec.msgpack.Decoder[ToDecode] = msgspec.msgpack.Decoder(ToDecode)


def encode(message: ToPrefill | ToDecode) -> bytes:
    return _encoder.encode(message)


def decode_to_prefill(frame: bytes) -> ToPrefill:
    """Raises ProtocolError for anything that is not a message to a prefill worker."""
    return _decode(_to_prefill, frame)


def decode_to_decode(frame: bytes) -> ToDecode:
    """Raises ProtocolError for anything that is not a message to a decode worker."""
    return _decode(_to_decode, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"control frame of {len(frame)} bytes, {MAX_FRAME_BYTES} allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        # It quotes what a stranger sent, which may be long, and lines of its own.
        raise ProtocolError(f"not a control message: {str(error)[:_SHOWN_CHARS]!r}") from error
