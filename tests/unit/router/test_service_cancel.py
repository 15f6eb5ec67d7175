"""At any stage, a cancel or deadline ends the request on the router and workers. Nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import grpc
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc
from core.messages import worker_pb2
from tests.support.fake_workers import (
    FakeDecode,
    FakePrefill,
    answer_tokens,
    decode_answer,
    decode_hangs_after_one,
    until_cancelled,
)
from tests.support.router_harness import RouterHarness, token_ids
from tests.unit.router.test_service_failover import error_detail

pytestmark = pytest.mark.asyncio

PROMPT = {"ids": (1, 2, 3)}


async def prefill_hangs(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
    await until_cancelled()
    raise AssertionError


async def decode_hangs(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    await until_cancelled()
    yield worker_pb2.DecodeResponse()


async def test_cancel_while_prefill_computes() -> None:
    prefill, decode = FakePrefill(script=prefill_hangs), FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        call = router.call(token_ids=PROMPT)
        await prefill.until(lambda: bool(prefill.running))
        await decode.until(lambda: bool(decode.running))
        call.cancel()
        await prefill.until(lambda: len(prefill.cancelled) == 1)
        await decode.until(lambda: len(decode.cancelled) == 1)
        await prefill.until(lambda: len(prefill.released) == 1)


async def test_cancel_between_first_and_second_token_releases_the_kv() -> None:
    prefill, decode = FakePrefill(), FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        call = router.call(token_ids=PROMPT)
        await anext(aiter(call))
        call.cancel()
        await decode.until(lambda: len(decode.cancelled) == 1)
        await prefill.until(lambda: len(prefill.released) == 1)
        (key,) = prefill.released
    assert key == (decode.requests[0].key.request_id, 1)


async def test_cancel_while_decoding() -> None:
    prefill, decode = FakePrefill(), FakeDecode(script=decode_hangs_after_one)
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        call = router.call(token_ids=PROMPT)
        stream = aiter(call)
        await anext(stream)
        await anext(stream)
        call.cancel()
        await decode.until(lambda: len(decode.cancelled) == 1)
    assert not prefill.released, "the KV was transferred already"


async def test_cancel_while_queued_leaves_the_queue() -> None:
    prefill, decode = FakePrefill(), FakeDecode(script=decode_hangs)
    async with RouterHarness(
        prefill=[prefill],
        decode=[decode],
        router={"max_concurrent": 1, "classes": {"only": {"max_queue": 1}}},
    ) as router:
        running = router.call(token_ids=PROMPT)
        await anext(aiter(running))
        waiting = router.call(token_ids=PROMPT, request_id="waiting")
        await _until_refused(router, "waiting", "DUPLICATE_REQUEST_ID")
        waiting.cancel()
        decode.script = decode_answer
        running.cancel()
        await decode.until(lambda: not decode.running)
        assert len(await router.generate(max_tokens=3)) == 3
    assert len(decode.requests) == 2, "the cancelled request is never dispatched"


async def test_the_deadline_ends_the_request_and_both_workers() -> None:
    prefill, decode = FakePrefill(script=prefill_hangs), FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in router.call(token_ids=PROMPT, timeout=0.2):
                pass
        await prefill.until(lambda: not prefill.running)
        await decode.until(lambda: not decode.running)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_default_deadline_is_a_typed_error_from_the_router() -> None:
    prefill, decode = FakePrefill(), FakeDecode(script=decode_hangs)
    async with RouterHarness(
        prefill=[prefill], decode=[decode], router={"default_deadline_s": 0.1}
    ) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in router.call(token_ids=PROMPT, timeout=None):
                pass
        await decode.until(lambda: not decode.running)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "baton-error-bin" in dict(caught.value.trailing_metadata() or ())


async def test_a_slow_client_holds_back_the_decode_worker() -> None:
    """Buffers are bounded, so the worker stops sending while the client does not read."""
    produced = 0

    async def fast(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        nonlocal produced
        wide = inference_pb2.TokenLogprobs(
            top=[inference_pb2.TopLogprob(token_id=i, logprob=-i) for i in range(400)]
        )
        for index in range(request.sampling.max_tokens):
            yield worker_pb2.DecodeResponse(first_index=index, token_ids=[5], logprobs=[wide])
            produced += 1
            decode.note()
        await until_cancelled()

    decode = FakeDecode(script=fast)
    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[decode],
        router={"stream_buffer_responses": 4},
        context_tokens=20_000,
    ) as router:
        call = router.call(token_ids=PROMPT, sampling={"logprobs": 20})
        await anext(aiter(call))
        before = -1
        while produced != before:  # until nothing is produced for 2,000 turns of the event loop
            before = produced
            for _ in range(2000):
                await _turn()
        assert 0 < produced < 10_000
        call.cancel()
        await decode.until(lambda: not decode.running)


async def test_a_cancel_at_any_turn_of_the_loop_leaves_no_request_behind() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        for turns in range(50):
            call = router.call(token_ids=PROMPT, request_id="same")
            for _ in range(turns):
                await _turn()
            call.cancel()
            await decode.until(lambda: not decode.running)
            await prefill.until(lambda: not prefill.running)
        responses = await router.generate(max_tokens=4)
    assert [t for r in responses for t in r.token_ids] == answer_tokens((1, 2, 3), 4)


async def test_a_write_to_a_client_that_is_gone_counts_as_a_cancel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A write can fail after the client cancels and before gRPC cancels the router's task."""

    class GoneContext:
        def time_remaining(self) -> float | None:
            return None

        async def send_initial_metadata(self, metadata: object) -> None:
            """Succeed: only writes and aborts fail."""

        async def write(self, response: inference_pb2.GenerateResponse) -> None:
            raise grpc.aio.InternalError("the call has ended")

        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("the call has ended")

    decode = FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode]) as router:
        assert router.server.servicer is not None
        request = inference_pb2.GenerateRequest(token_ids=PROMPT)
        with pytest.raises(asyncio.CancelledError):
            await router.server.servicer.Generate(request, cast(Any, GoneContext()))
        await decode.until(lambda: not decode.running)
    assert "failed" not in caplog.text


async def _until_refused(router: RouterHarness, request_id: str, reason: str) -> None:
    """Wait until the router refuses calls with ``request_id`` for ``reason``."""
    async with asyncio.timeout(10):
        while True:
            probe = router.call(request_id=request_id, model="unknown")
            try:
                await anext(aiter(probe))
            except grpc.aio.AioRpcError as err:
                value = dict(err.trailing_metadata() or ())["baton-error-bin"]
                assert isinstance(value, bytes)
                if inference_pb2.ErrorDetail.FromString(value).reason == reason:
                    return


async def _turn() -> None:
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    loop.call_soon(turn.set_result, None)
    await turn


async def test_a_client_that_does_not_read_is_ended_and_delays_no_other_client() -> None:
    """The router ends the call. The client can then still read the responses that the router wrote
    before, and after them gets the error."""
    decode = FakeDecode()
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535))
    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[decode],
        router={"client_stall_s": 0.3},
        context_tokens=20_000,
    ) as router:
        address = f"127.0.0.1:{router.port}"
        async with grpc.aio.insecure_channel(address, small_window) as channel:
            request = inference_pb2.GenerateRequest(
                token_ids=PROMPT, sampling={"max_tokens": 10_000}
            )
            unread = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            await decode.until(lambda: bool(decode.running))
            others = await router.generate((4, 5), max_tokens=50)
            assert token_ids(others) == answer_tokens((4, 5), 50)
            await decode.until(lambda: not decode.running)
            count = 0
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012
                async for response in unread:
                    assert response.sequence == count
                    count += 1
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read nothing" in (caught.value.details() or "")
        assert error_detail(caught.value).reason == "CLIENT_TOO_SLOW"
        assert 0 < count < 10_000
