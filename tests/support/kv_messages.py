"""One example of each control message, for tests that encode, send or damage them."""

from __future__ import annotations

from kv_transfer import wire
from kv_transfer.geometry import LayerBlockRange
from tests.support.kv_stream import GEOMETRY

TO_PREFILL: list[wire.ToPrefill] = [
    wire.Hello(
        version=wire.PROTOCOL_VERSION,
        expected_incarnation="p0",
        incarnation="d",
        geometry=GEOMETRY,
        backend="gloo",
        pair_id="pair",
    ),
    wire.Publish("0/0", b"address"),
    wire.Reserve("r#1", 0, 9),
    wire.Cancel("r#1"),
    wire.Release("r#1"),
    wire.Ping(),
    wire.Bye(),
]
TO_DECODE: list[wire.ToDecode] = [
    wire.Welcome("pair", GEOMETRY),
    wire.Publish("0/1", b"address"),
    wire.Refuse("pair", "because"),
    wire.Header(0, "r#1", LayerBlockRange(0, 2, 0, 3), 64),
    wire.End(
        transfer_id="r#1",
        token_start=0,
        token_end=9,
        messages=3,
        num_bytes=64,
        hidden_bytes=32,
        first_token_id=None,
        tail_ms=1.5,
        stall_ms=0.5,
    ),
    wire.Fail("r#1", "because"),
    wire.Pong(),
]
