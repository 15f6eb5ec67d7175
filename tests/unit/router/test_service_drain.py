"""A router that shuts down lets requests end, refuses new ones and waits for nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
from router.server import SERVICE
from tests.support.fake_workers import FakeDecode, FakePrefill, answer_tokens
from tests.support.router_harness import RouterHarness, token_ids
from tests.unit.router.test_service_failover import decode_hangs, dies_after, error_detail

pytestmark = pytest.mark.asyncio

PROMPT = (1, 2, 3)
GRACE_S = 30.0
SOON_S = 10.0


async def test_running_requests_end_within_the_grace_and_new_ones_are_refused() -> None:
    gate = asyncio.Event()
    # decode-1 pauses after one token. When the gate opens, decode-1 fails and decode-2 continues.
    first = FakeDecode("decode-1", dies_after(1, gate=gate))
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[first, FakeDecode("decode-2")]
    ) as router:
        stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 6}))
        responses = [await anext(stream), await anext(stream)]
        health = health_pb2_grpc.HealthStub(router.channel)
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(router.server.stop(GRACE_S))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(PROMPT, max_tokens=1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_detail(caught.value).reason == "ROUTER_DRAINING"
        assert not stopping.done()
        gate.set()
        responses += [response async for response in stream]
        assert token_ids(responses) == answer_tokens(PROMPT, 6)
        async with asyncio.timeout(SOON_S):
            await stopping


async def test_requests_that_outlast_the_grace_get_router_draining() -> None:
    decode = FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode]) as router:
        calls = [router.call(token_ids={"ids": PROMPT}) for _ in range(40)]
        await decode.until(lambda: len(decode.running) == len(calls))
        await router.server.stop(0)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert error_detail(caught.value).reason == "ROUTER_DRAINING"


async def test_streams_that_are_not_requests_do_not_delay_the_shutdown() -> None:
    """The streams are a health watch and a call on which the client never sends a message."""
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        health = health_pb2_grpc.HealthStub(router.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        silent_call: Any = router.channel.stream_stream(f"/{SERVICE}/Generate")()
        assert (await router.generate(PROMPT, max_tokens=2))[-1].usage.completion_tokens == 2
        async with asyncio.timeout(SOON_S):
            await router.server.stop(GRACE_S)
        assert await silent_call.code() is not grpc.StatusCode.OK


async def test_no_client_gets_cancelled_from_a_router_that_stops() -> None:
    """Applications do not retry a cancelled request: they think that they have cancelled it."""
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        errors: Counter[str] = Counter()
        stopped = asyncio.Event()

        async def call_until_it_has_stopped(client: baton.AsyncClient) -> None:
            while not stopped.is_set():
                try:
                    await client.complete(token_ids=PROMPT, max_tokens=3)
                except baton.BatonError as error:
                    errors[type(error).__name__] += 1

        async with baton.AsyncClient(f"127.0.0.1:{router.port}", timeout_s=30) as client:
            calls = [asyncio.create_task(call_until_it_has_stopped(client)) for _ in range(8)]
            await router.decode[0].until(lambda: len(router.decode[0].requests) > 20)
            await router.server.stop(grace_s=1)
            stopped.set()
            await asyncio.gather(*calls)
    assert set(errors) == {"UnavailableError"}
