"""The router queues or refuses requests that it cannot run immediately."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tests.support.fake_workers import FakeDecode, FakePrefill, decode_hangs_after_one
from tests.support.router_harness import RouterHarness
from tests.support.waiting import until
from tests.unit.router.test_service_refusals import IDS, refusal

pytestmark = pytest.mark.asyncio

CLASSES = {"fast": {"max_queue": 1}, "slow": {"max_queue": 1}, "other": {"max_queue": 1}}


async def first(call: Any) -> Any:
    return await anext(aiter(call))


async def test_a_request_that_waits_for_kv_room_runs_on_a_new_worker() -> None:
    full, empty = (FakeDecode(name, decode_hangs_after_one) for name in ("decode-1", "decode-2"))
    full.record = replace(
        full.record, load=replace(full.record.load, kv_blocks_total=1, kv_blocks_free=1)
    )
    async with RouterHarness(prefill=[FakePrefill()], decode=[full]) as router:
        running = router.call(token_ids=IDS)
        await first(running)
        waiting = router.call(token_ids=IDS)
        answer = asyncio.create_task(first(waiting))
        assert router.server.handler is not None
        admission = router.server.handler.admission
        await until(lambda: admission.waiting == 1, what="the second request waits")
        await empty.start()
        router.decode.append(empty)
        await router.registry.put(empty.record)
        await answer
        assert len(full.requests) == len(empty.requests) == 1
        running.cancel()
        waiting.cancel()
        await full.until(lambda: not full.running)
        await empty.until(lambda: not empty.running)


async def test_a_full_router_tokenises_nothing() -> None:
    decode = FakeDecode(script=decode_hangs_after_one)
    classes = {"only": {"max_queue": 0}}
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[decode], router={"max_concurrent": 1, "classes": classes}
    ) as router:
        running = router.call(token_ids=IDS)
        await first(running)
        router.codec.close()  # from here on, tokenising fails
        _, _, detail = await refusal(router, prompt="the quick brown fox")
        assert detail.reason == "QUEUE_FULL"
        assert detail.retry_after_ms
        running.cancel()
        await decode.until(lambda: not decode.running)


async def test_each_class_has_a_queue_of_its_own() -> None:
    decode = FakeDecode(script=decode_hangs_after_one)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[decode], router={"max_concurrent": 1, "classes": CLASSES}
    ) as router:
        running = router.call(token_ids=IDS)
        await first(running)
        waiting = [router.call(token_ids=IDS, service_class=name) for name in ("", "slow")]
        assert router.server.handler is not None
        admission = router.server.handler.admission
        await until(lambda: admission.waiting == 2, what="one request waits in each class")
        for name in ("fast", "slow"):
            _, message, detail = await refusal(router, token_ids=IDS, service_class=name)
            assert detail.reason == "QUEUE_FULL"
            assert repr(name) in message
        for call in (*waiting, running):
            call.cancel()
        await decode.until(lambda: not decode.running)


async def test_an_unknown_class_is_named() -> None:
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode()], router={"classes": CLASSES}
    ) as router:
        code, message, detail = await refusal(router, token_ids=IDS, service_class="fats")
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert detail.reason == "UNKNOWN_SERVICE_CLASS"
    assert message == "service_class is 'fats'; this cluster knows fast, slow, other"
