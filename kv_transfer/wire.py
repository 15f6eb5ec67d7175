"""The control messages between a decode worker's rank (D) and a prefill worker's rank (P).

Each message is a ZeroMQ frame of msgpack, which msgspec checks against the types below. D connects
and sends HELLO first. Until P has accepted D's HELLO, P answers any other message of D with REFUSE.

    D ▸ P   HELLO PUBLISH RESERVE CANCEL PING BYE      P's own front end ▸ P   RELEASE
    P ▸ D   WELCOME PUBLISH REFUSE HEADER END FAIL PONG

P sends HEADERs in the same order as the tensors that they announce. D starts one receive for each
HEADER, so each receive gets the tensor that its HEADER announces.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import KvGeometry, LayerBlockRange

T = TypeVar("T")

PROTOCOL_VERSION = 5
MAX_FRAME_BYTES = 64 * 1024  # every message is small; a longer frame is not one of ours
_SHOWN_CHARS = 120  # characters of the decoder's error message that we quote, at most


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """D asks P for a pair."""

    version: int
    expected_incarnation: str  # of the prefill worker that D wants to reach
    incarnation: str  # of D's worker
    geometry: KvGeometry
    backend: str  # "gloo" or "nccl"
    pair_id: str  # WELCOME and REFUSE repeat it


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """P accepts the pair. Both sides now make the process group."""

    pair_id: str
    geometry: KvGeometry  # of P; each side plans the pair from both geometries


class Publish(msgspec.Struct, tag="publish", frozen=True):
    """A value for the other rank's copy of the pair's store, see ``PairStore``."""

    key: str
    value: bytes


class Refuse(msgspec.Struct, tag="refuse", frozen=True):
    """P does not open the pair, or closes it. Later transfers need a new pair."""

    pair_id: str
    reason: str


class Reserve(msgspec.Struct, tag="reserve", frozen=True):
    """D holds blocks for tokens ``[token_start, token_end)`` and asks P for their KV."""

    transfer_id: str
    token_start: int
    token_end: int


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """D no longer wants this transfer."""

    transfer_id: str


class Release(msgspec.Struct, tag="release", frozen=True):
    """P's own front end says that nobody will fetch this transfer's KV."""

    transfer_id: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """D is alive; P answers with PONG."""


class Pong(msgspec.Struct, tag="pong", frozen=True):
    """P is alive."""


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """D closes this pair; all of its transfers fail."""


class Header(msgspec.Struct, tag="header", frozen=True):
    """The next tensor on the pair is this block range of this transfer."""

    # Position of the tensor in the pair's stream, from 0. Without this number, D does not notice a
    # lost HEADER and writes the KV of one transfer into the blocks of another transfer.
    sequence: int
    transfer_id: str
    block_range: LayerBlockRange
    num_bytes: int


class End(msgspec.Struct, tag="end", frozen=True):
    """P has sent the whole leg. This is the manifest that D checks against what it received."""

    transfer_id: str
    token_start: int
    token_end: int
    messages: int
    num_bytes: int
    hidden_bytes: int  # part of num_bytes, sent before P had computed all layers
    first_token_id: int | None  # None if D samples the first token itself
    # Time from the end of the prefill's last layer to the last sent byte. 0 if no byte was sent
    # after that layer.
    tail_ms: float = 0.0
    # How long P waited for the link because all staging buffers were in flight.
    stall_ms: float = 0.0


class Fail(msgspec.Struct, tag="fail", frozen=True):
    """P will not complete this transfer."""

    transfer_id: str
    reason: str


ToPrefill = Hello | Publish | Reserve | Cancel | Release | Ping | Bye
ToDecode = Welcome | Publish | Refuse | Header | End | Fail | Pong

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
        # The error quotes the frame, which may be long and contain line breaks.
        raise ProtocolError(f"not a control message: {str(error)[:_SHOWN_CHARS]!r}") from error
