"""Half-open connections: the other host is gone, and no packet says so."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

import pytest

from tests.support.fake_workers import (
    FakeDecode,
    FakePrefill,
    answer_tokens,
    decode_hangs_after_one,
)
from tests.support.router_harness import RouterHarness, token_ids
from tests.support.tcp_faults import End, ends, silence
from tests.support.waiting import until
from tests.unit.router.test_service_failover import dies_after

pytestmark = pytest.mark.asyncio

PROMPT = (1, 2, 3)
# After this many pings, a gRPC server with default options has closed the connection. gRPC sends at
# most one ping a second, so more pings make the test slower.
ENOUGH_PINGS = 5
PING_BYTES = 17  # HTTP/2: a frame header of 9 bytes and a payload of 8
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in the kernel's struct tcp_info


def connections(address: str) -> list[End]:
    return ends(os.getpid(), port=int(address.rpartition(":")[2]))


def received_bytes(end: End) -> int:
    with end.socket() as borrowed:
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("Q", info, _BYTES_RECEIVED)[0])


async def test_a_stream_continues_on_another_worker() -> None:
    first = FakeDecode("decode-1", decode_hangs_after_one)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[first, FakeDecode("decode-2")], silence_s=1
    ) as router:
        stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 6}))
        responses = [await anext(stream), await anext(stream)]
        with silence(connections(first.record.address)):
            responses += [response async for response in stream]
    assert token_ids(responses) == answer_tokens(PROMPT, 6)
    assert responses[-1].phases.attempts == 2


async def test_a_lost_client_leaves_nothing_on_the_workers() -> None:
    prefill, decode = FakePrefill(), FakeDecode(script=decode_hangs_after_one)
    async with RouterHarness(prefill=[prefill], decode=[decode], silence_s=1) as router:
        call = router.call(token_ids={"ids": PROMPT}, timeout=None)
        await anext(aiter(call))
        with silence(connections(f":{router.port}")):
            await decode.until(lambda: not decode.running)
        assert len(decode.cancelled) == 1
        call.cancel()


async def test_pings_do_not_end_the_connection_of_an_idle_stream() -> None:
    """By default, a gRPC server closes a connection after a few pings without data."""
    gate = asyncio.Event()
    first = FakeDecode("decode-1", dies_after(1, gate=gate))
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[first, FakeDecode("decode-2")], silence_s=0.2
    ) as router:
        stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 6}))
        responses = [await anext(stream), await anext(stream)]
        (end, _) = connections(first.record.address)
        enough = received_bytes(end) + ENOUGH_PINGS * PING_BYTES
        await until(lambda: received_bytes(end) >= enough, what="enough pings have arrived")
        assert first.running
        gate.set()
        responses += [response async for response in stream]
    assert token_ids(responses) == answer_tokens(PROMPT, 6)
