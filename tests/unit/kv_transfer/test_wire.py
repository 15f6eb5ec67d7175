"""Control messages survive encoding and decoding, and malformed frames are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import wire
from kv_transfer.errors import ProtocolError
from tests.support.kv_messages import TO_DECODE, TO_PREFILL


def test_messages_survive_the_wire() -> None:
    for to_prefill in TO_PREFILL:
        assert wire.decode_to_prefill(wire.encode(to_prefill)) == to_prefill
    for to_decode in TO_DECODE:
        assert wire.decode_to_decode(wire.encode(to_decode)) == to_decode


def test_a_message_of_the_other_direction_is_refused() -> None:
    for to_prefill in TO_PREFILL:
        if not isinstance(to_prefill, wire.Publish):  # goes both ways
            with pytest.raises(ProtocolError):
                wire.decode_to_decode(wire.encode(to_prefill))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_to_prefill(frame)


@given(data=st.data())
def test_a_damaged_frame_is_refused_or_a_valid_message(data: st.DataObject) -> None:
    frame = bytearray(wire.encode(data.draw(st.sampled_from(TO_PREFILL))))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = wire.decode_to_prefill(bytes(frame))
    except ProtocolError:
        return
    assert isinstance(message, wire.ToPrefill)


def test_an_oversized_frame_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="allowed"):
        wire.decode_to_prefill(bytes(wire.MAX_FRAME_BYTES + 1))


def test_deep_nesting_is_a_malformed_frame() -> None:
    nested = b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 60_000 + b"\xc0"
    with pytest.raises(ProtocolError, match="not a control message"):
        wire.decode_to_prefill(nested)
