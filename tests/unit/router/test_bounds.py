"""What one client may hold at the router is bounded: calls, connections and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import BatonError
from core.messages import worker_pb2
from core.rpc import request_checks
from core.rpc.status import from_rpc_error
from router.server import SERVICE
from tests.support.fake_workers import FakeDecode, FakePrefill, decode_answer, until_cancelled
from tests.support.router_harness import RouterHarness

pytestmark = pytest.mark.asyncio

IDS = {"ids": [1, 2, 3]}
WITHIN_S = 5.0
METHOD = f"/{SERVICE}/Generate"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS, GOAWAY = 4, 7  # types of frames


async def error_without_requests(router: RouterHarness, *, half_closes: bool) -> BatonError:
    """Start a call that sends no request. Return the error with which it ends."""
    over = asyncio.Event()
    if half_closes:
        over.set()

    async def none() -> AsyncIterator[bytes]:
        await over.wait()
        for request in list[bytes]():
            yield request

    method: Any = router.channel.stream_stream(METHOD)
    call = method(none())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WITHIN_S):
            await anext(aiter(call))
    over.set()
    return from_rpc_error(caught.value, "")


async def test_a_call_without_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RouterHarness() as router:
        with monkeypatch.context() as short:
            short.setattr(request_checks, "ARRIVAL_S", 0.1)
            late = await error_without_requests(router, half_closes=False)
        assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NO_REQUEST")
        empty = await error_without_requests(router, half_closes=True)
        assert empty.code is grpc.StatusCode.INVALID_ARGUMENT
        assert empty.reason == "MALFORMED_REQUEST"


async def decode_hangs(*_: object) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    await until_cancelled()
    yield worker_pb2.DecodeResponse()


async def test_a_deadline_has_a_limit() -> None:
    decode = FakeDecode(script=decode_hangs)
    limits = {"max_deadline_s": 0.2, "default_deadline_s": 0.2}
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode], router=limits) as router:
        call = router.call(token_ids=IDS, timeout=10**6)
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_connections_have_a_limit() -> None:
    async with RouterHarness(router={"max_connections": 2}) as router:
        kept = [await connect(router) for _ in range(2)]
        for reader, _ in kept:
            assert (await read_frame(reader))[0] == SETTINGS
        extra = await asyncio.open_connection("127.0.0.1", router.port)
        async with asyncio.timeout(WITHIN_S):
            assert await extra[0].read() == b"", "the server closes it without a word"
        for _, writer in kept:
            writer.close()
        extra[1].close()


async def test_a_connection_carries_a_limited_number_of_calls() -> None:
    limits: dict[str, Any] = {"max_concurrent": 3, "classes": {"interactive": {"max_queue": 4}}}
    async with RouterHarness(router=limits) as router:
        reader, writer = await connect(router)
        async with asyncio.timeout(WITHIN_S):
            kind, body = await read_frame(reader)
        assert kind == SETTINGS
        settings = {
            int.from_bytes(body[at : at + 2]): int.from_bytes(body[at + 2 : at + 6])
            for at in range(0, len(body), 6)
        }
        assert settings[3] == 2 * (3 + 4) + 100, "SETTINGS_MAX_CONCURRENT_STREAMS"
        writer.close()


async def test_an_old_connection_is_replaced_and_its_calls_go_on() -> None:
    old = asyncio.Event()

    async def decode_waits(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        await old.wait()
        async for response in decode_answer(request):
            yield response

    age_s = 0.2
    decode = FakeDecode(script=decode_waits)
    limits = {"max_connection_age_s": age_s}
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode], router=limits) as router:
        call = router.call(token_ids=IDS)
        began_s = time.monotonic()
        reader, writer = await connect(router)
        ready = grpc.ChannelConnectivity.READY
        async with asyncio.timeout(WITHIN_S):
            while (await read_frame(reader))[0] != GOAWAY:
                pass
            while router.channel.get_state() is ready:
                await router.channel.wait_for_state_change(ready)
        assert time.monotonic() - began_s > age_s / 2
        writer.close()
        old.set()
        assert await read_all(call), "the older call has gone on"
        assert await read_all(router.call(token_ids=IDS))


async def test_a_health_watch_does_not_outlive_its_connection() -> None:
    limits = {"max_connection_age_s": 0.2, "max_deadline_s": 0.2, "default_deadline_s": 0.2}
    async with RouterHarness(router=limits) as router:
        watch = health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def connect(router: RouterHarness) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(HTTP2_PREFACE)
    return reader, writer


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return a frame's type and payload."""
    head = await reader.readexactly(9)
    return head[3], await reader.readexactly(int.from_bytes(head[:3]))


async def read_all(call: Any) -> list[Any]:
    return [response async for response in call]
