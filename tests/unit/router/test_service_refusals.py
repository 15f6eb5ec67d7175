"""Requests that the router refuses get a clear, typed error and disturb no other request."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import ConfigError
from core.messages import worker_pb2
from core.state.registry import MemoryRegistry
from router.server import RouterServer
from tests.support.fake_workers import FakeDecode, FakePrefill, until_cancelled
from tests.support.router_harness import RouterHarness, make_codec, make_tokenizer

pytestmark = pytest.mark.asyncio

IDS = {"ids": [1, 2, 3]}
VOCAB_SIZE = make_tokenizer().get_vocab_size()


async def decode_hangs(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    await until_cancelled()
    yield worker_pb2.DecodeResponse()


async def refusal(
    router: RouterHarness, **fields: Any
) -> tuple[grpc.StatusCode, str, inference_pb2.ErrorDetail]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in router.call(**fields):
            pass
    metadata = dict(caught.value.trailing_metadata() or ())
    detail = inference_pb2.ErrorDetail()
    value = metadata.get("baton-error-bin", b"")
    assert isinstance(value, bytes)
    detail.ParseFromString(value)
    return caught.value.code(), caught.value.details() or "", detail


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"token_ids": IDS, "model": "gpt-9"}, "UNKNOWN_MODEL", "gpt-9"),
        ({}, "NO_INPUT", "prompt, chat or token_ids"),
        ({"prompt": ""}, "EMPTY_PROMPT", "prompt"),
        ({"chat": {}}, "EMPTY_PROMPT", "chat"),
        ({"token_ids": {}}, "EMPTY_PROMPT", "token_ids"),
        ({"prompt": "x y " * 100}, "PROMPT_TOO_LONG", "at most 63"),
        ({"token_ids": {"ids": [1] * 64}}, "PROMPT_TOO_LONG", "64 tokens"),
        ({"token_ids": {"ids": [10**6] * 64}}, "PROMPT_TOO_LONG", "64 tokens"),
        ({"token_ids": {"ids": [0, VOCAB_SIZE]}}, "TOKEN_ID_OUT_OF_RANGE", "token_ids[1]"),
        ({"token_ids": IDS, "request_id": "no spaces"}, "INVALID_REQUEST_ID", "no spaces"),
        ({"token_ids": IDS, "sampling": {"temperature": math.nan}}, "INVALID_SAMPLING", "nan"),
        ({"token_ids": IDS, "sampling": {"top_p": -1}}, "INVALID_SAMPLING", "(0, 1]"),
        (
            {"chat": {"messages": [{"role": "robot", "content": "x"}]}},
            "INVALID_ROLE",
            "chat.messages[0].role is 'robot'",
        ),
    ],
)
async def test_bad_input(fields: dict[str, Any], reason: str, words: str) -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        code, message, detail = await refusal(router, **fields)
    expected = (
        grpc.StatusCode.NOT_FOUND if reason == "UNKNOWN_MODEL" else grpc.StatusCode.INVALID_ARGUMENT
    )
    assert code == expected
    assert detail.reason == reason
    assert words in message
    assert detail.retry_after_ms == 0
    assert detail.request_id == fields.get("request_id", detail.request_id) != ""
    assert not prefill.requests
    assert not decode.requests


async def test_an_overlong_request_id_is_shortened_in_the_error() -> None:
    async with RouterHarness() as router:
        code, message, detail = await refusal(router, token_ids=IDS, request_id="x" * 20_000)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert detail.reason == "INVALID_REQUEST_ID"
    assert detail.request_id == "x" * 128
    assert len(message) < 200


async def test_a_message_over_the_limit() -> None:
    async with RouterHarness(router={"max_message_bytes": 1000}) as router:
        code, _, _ = await refusal(router, prompt="x" * 2000)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_id_in_flight_is_refused_and_free_afterwards() -> None:
    decode = FakeDecode(script=decode_hangs)
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode]) as router:
        first = router.call(token_ids=IDS, request_id="mine")
        await anext(aiter(first))
        code, message, detail = await refusal(router, token_ids=IDS, request_id="mine")
        assert code == grpc.StatusCode.ALREADY_EXISTS
        assert detail.reason == "DUPLICATE_REQUEST_ID"
        assert detail.retry_after_ms > 0  # a request that was just cancelled ends soon
        assert "'mine'" in message
        first.cancel()
        await decode.until(lambda: not decode.running)
        again = router.call(token_ids=IDS, request_id="mine")
        assert (await anext(aiter(again))).request_id == "mine"
        again.cancel()
        await decode.until(lambda: not decode.running)
    assert len({request.key.request_id for request in decode.requests}) == 2


async def test_a_full_router_refuses_at_once_with_a_retry_hint() -> None:
    decode = FakeDecode(script=decode_hangs)
    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[decode],
        router={"max_concurrent": 2, "classes": {"only": {"max_queue": 3}}},
    ) as router:
        calls = [router.call(token_ids=IDS) for _ in range(20)]
        tasks = [asyncio.create_task(_code_when_refused(call)) for call in calls]
        refused = 0
        for done in asyncio.as_completed(tasks):
            refused += await done is grpc.StatusCode.RESOURCE_EXHAUSTED
            if refused == 15:
                break
        await decode.until(lambda: len(decode.running) == 2)
        _, message, detail = await refusal(router, token_ids=IDS)
        assert detail.reason == "QUEUE_FULL"
        assert detail.retry_after_ms >= 100
        assert "full" in message
        assert len(decode.requests) == 2  # must precede the cancels, which let queued requests run
        for call in calls:
            call.cancel()
        codes = await asyncio.gather(*tasks, return_exceptions=True)
        await decode.until(lambda: not decode.running)
    assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 15


async def test_waiting_is_bounded() -> None:
    decode = FakeDecode(script=decode_hangs)
    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[decode],
        router={"max_concurrent": 1, "classes": {"only": {"queue_timeout_s": 0.05}}},
    ) as router:
        first = router.call(token_ids=IDS)
        await anext(aiter(first))
        code, _, detail = await refusal(router, token_ids=IDS)
        first.cancel()
        await decode.until(lambda: not decode.running)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail.reason == "QUEUE_TIMEOUT"


async def test_no_prefill_worker_is_unavailable_with_a_hint() -> None:
    async with RouterHarness(decode=[FakeDecode()]) as router:
        code, message, detail = await refusal(router, token_ids=IDS)
    assert code == grpc.StatusCode.UNAVAILABLE
    assert detail.reason == "NO_PREFILL_WORKER"
    assert detail.retry_after_ms > 0
    assert "prefill" in message


async def test_no_prefill_worker_with_local_prefill_allowed() -> None:
    decode = FakeDecode()
    async with RouterHarness(decode=[decode], router={"local_prefill": "fallback"}) as router:
        responses = await router.generate(max_tokens=3)
        assert router.server.counters.local_prefills == 1
    assert len(responses) == 3
    assert responses[-1].phases.prefill_worker == ""
    assert responses[-1].phases.kv.outcome == inference_pb2.KV_OUTCOME_LOCAL


async def test_no_decode_worker_is_unavailable() -> None:
    async with RouterHarness(prefill=[FakePrefill()]) as router:
        code, _, detail = await refusal(router, token_ids=IDS)
    assert code == grpc.StatusCode.UNAVAILABLE
    assert detail.reason == "NO_DECODE_WORKER"


async def test_a_defect_does_not_show_internals_to_the_client() -> None:
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        router.codec.close()  # tokenising then fails: "cannot schedule new futures after shutdown"
        code, message, detail = await refusal(router, prompt="the fox")
    assert code == grpc.StatusCode.INTERNAL
    assert detail.reason == "INTERNAL"
    assert "shutdown" not in message


async def test_a_port_in_use_is_a_config_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = Config.model_validate({"router": {"port": port}})
        server = RouterServer(config, MemoryRegistry(lease_s=1), make_codec())
        with pytest.raises(ConfigError, match=f"router.port: .* {port} "):
            await server.start()


async def test_two_routers_never_share_a_port() -> None:
    async with RouterHarness() as router:
        config = Config.model_validate({"router": {"port": router.port}})
        other = RouterServer(config, router.registry, make_codec())
        with pytest.raises(ConfigError, match=str(router.port)):
            await other.start()


async def _code_when_refused(call: Any) -> grpc.StatusCode:
    try:
        await anext(aiter(call))
    except grpc.aio.AioRpcError as err:
        return err.code()
    return grpc.StatusCode.OK
