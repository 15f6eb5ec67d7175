"""Requests succeed through a real router with fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.v1 import inference_pb2
from core.messages import worker_pb2
from tests.support.fake_workers import (
    FakeDecode,
    FakePrefill,
    answer_tokens,
    decode_answer,
    decode_hangs_after_one,
    prefill_answer,
)
from tests.support.router_harness import RouterHarness, make_tokenizer, token_ids

pytestmark = pytest.mark.asyncio

PROMPT = (1, 2, 3)


async def test_tokens_come_in_order_with_usage_and_phases() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        responses = await router.generate(PROMPT, max_tokens=6)

    assert token_ids(responses) == answer_tokens(PROMPT, 6)
    assert [len(response.token_ids) for response in responses] == [1] * 6
    text = "".join(response.text for response in responses)
    assert text == make_tokenizer().decode(answer_tokens(PROMPT, 6))
    last = responses[-1]
    assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert last.usage == inference_pb2.Usage(
        prompt_tokens=3, completion_tokens=6, cached_prompt_tokens=1
    )
    assert last.phases.prefill_worker == "prefill-1"
    assert last.phases.decode_worker == "decode-1"
    assert last.phases.attempts == 1
    assert last.phases.kv.outcome == inference_pb2.KV_OUTCOME_TRANSFERRED
    assert last.phases.ttft_ms > 0
    assert not any(response.HasField("usage") for response in responses[:-1])


async def test_workers_get_the_same_key_and_the_transfer_source() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        call = router.call(request_id="mine", prompt="the fox", sampling={"stop": ["@@"]})
        await call.read()
        call.cancel()
        await decode.until(lambda: not decode.running)

    (prefill_request,), (decode_request,) = prefill.requests, decode.requests
    assert prefill_request.key == decode_request.key
    assert prefill_request.key.request_id.startswith("mine~")
    assert prefill_request.key.attempt == 1
    assert prefill_request.token_ids == decode_request.token_ids
    assert prefill_request.token_ids == make_tokenizer().encode("the fox").ids
    assert prefill_request.transfer
    assert prefill_request.forwards_first_token
    assert not prefill_request.sampling.stop, "only the router matches stop strings"
    assert decode_request.kv_source == worker_pb2.KvSource(
        worker_id="prefill-1",
        incarnation=prefill.record.incarnation,
        forwards_first_token=True,
    )


async def test_unknown_fields_of_a_request_are_not_passed_on() -> None:
    """They may be long, and would take memory of the journal and of each worker."""
    prefill, decode = FakePrefill(), FakeDecode()
    unknown = bytes([0xA2, 0x06, 3]) + b"abc"  # field 100
    sampling = inference_pb2.SamplingParams.FromString(unknown)
    assert sampling.SerializeToString() == unknown
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        async for _ in router.call(token_ids={"ids": PROMPT}, sampling=sampling):
            pass
    for request in (*prefill.requests, *decode.requests):
        assert b"abc" not in request.SerializeToString()


async def test_the_first_token_does_not_wait_for_the_decode_worker() -> None:
    may_decode = asyncio.Event()

    async def decode_later(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        await may_decode.wait()
        async for response in decode_answer(request):
            yield response

    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode(script=decode_later)]
    ) as router:
        call = router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 3})
        stream = aiter(call)
        first = await anext(stream)
        assert list(first.token_ids) == answer_tokens(PROMPT, 1)
        may_decode.set()
        rest = [response async for response in stream]
    assert token_ids([first, *rest]) == answer_tokens(PROMPT, 3)


async def test_decode_may_be_faster_than_the_prefill_answer() -> None:
    decode = FakeDecode()

    async def answer_last(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        await decode.until(lambda: bool(decode.requests) and not decode.running)
        return await prefill_answer(request)

    async with RouterHarness(prefill=[FakePrefill(script=answer_last)], decode=[decode]) as router:
        responses = await router.generate(PROMPT, max_tokens=4)
    assert token_ids(responses) == answer_tokens(PROMPT, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"min_tokens": 2},
        {"logprobs": 0},
    ],
)
async def test_sampling_that_depends_on_output_takes_no_first_token_from_prefill(
    sampling: dict[str, float],
) -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        responses = await router.generate(PROMPT, max_tokens=3, **sampling)
    assert not prefill.requests[0].forwards_first_token
    assert not decode.requests[0].kv_source.forwards_first_token
    assert token_ids(responses) == answer_tokens(PROMPT, 3)


async def test_one_token_needs_no_decode_worker() -> None:
    prefill = FakePrefill()
    async with RouterHarness(prefill=[prefill]) as router:
        (only,) = await router.generate(PROMPT, max_tokens=1, seed=3)
    assert list(only.token_ids) == answer_tokens(PROMPT, 1)
    assert only.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert only.phases.decode_worker == ""
    assert not prefill.requests[0].transfer
    assert not prefill.released


async def test_a_first_token_that_ends_the_request_cancels_decode_and_releases() -> None:
    async def end_at_once(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        await decode.until(lambda: bool(decode.running))
        return worker_pb2.PrefillResponse(
            token_id=0, finish_reason=inference_pb2.FINISH_REASON_STOP
        )

    async def never(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        await asyncio.get_running_loop().create_future()
        yield worker_pb2.DecodeResponse()

    prefill, decode = FakePrefill(script=end_at_once), FakeDecode(script=never)
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        (only,) = await router.generate(PROMPT, max_tokens=5)
        await decode.until(lambda: len(decode.cancelled) == 1)
        await prefill.until(lambda: len(prefill.released) == 1)
    assert only.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert list(only.token_ids) == [0]
    assert only.text == ""


async def test_a_stop_string_ends_the_request_and_cancels_decode() -> None:
    words = make_tokenizer().encode("the quick brown fox jumps").ids
    stopped = asyncio.Event()

    async def prefill_words(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        return worker_pb2.PrefillResponse(token_id=words[0])

    async def decode_words(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        try:
            for index, word in enumerate(words[1:], 1):
                yield worker_pb2.DecodeResponse(first_index=index, token_ids=[word])
            await asyncio.get_running_loop().create_future()
        finally:
            stopped.set()

    async with RouterHarness(
        prefill=[FakePrefill(script=prefill_words)], decode=[FakeDecode(script=decode_words)]
    ) as router:
        responses = await router.generate(PROMPT, stop=["wn f"])
        await stopped.wait()
    assert "".join(response.text for response in responses) == "the quick bro"
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert responses[-1].usage.completion_tokens == len(token_ids(responses))


async def test_chat_is_rendered_with_the_template() -> None:
    prefill = FakePrefill()
    async with RouterHarness(prefill=[prefill], decode=[FakeDecode()]) as router:
        call = router.call(
            chat={"messages": [{"role": "user", "content": "the fox"}]},
            sampling={"max_tokens": 2},
        )
        assert len([response async for response in call]) == 2
    rendered = make_tokenizer().encode("<|user|>user: the fox")
    assert list(prefill.requests[0].token_ids) == rendered.ids
    assert rendered.ids[0] == 1, "the tokeniser knows the special token"


async def test_max_tokens_fills_the_context() -> None:
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode()], context_tokens=10
    ) as router:
        responses = await router.generate(PROMPT)
    assert len(token_ids(responses)) == 7


async def test_two_workers_of_each_pool_take_turns() -> None:
    prefills = [FakePrefill(f"prefill-{i}") for i in (1, 2)]
    decodes = [FakeDecode(f"decode-{i}") for i in (1, 2)]
    async with RouterHarness(prefill=prefills, decode=decodes) as router:
        for _ in range(4):
            await router.generate(PROMPT, max_tokens=2)
    assert [len(worker.requests) for worker in (*prefills, *decodes)] == [2, 2, 2, 2]


async def test_a_prefill_worker_is_free_while_the_answer_is_decoded() -> None:
    prefills = [FakePrefill(f"prefill-{i}") for i in (1, 2)]
    decode = FakeDecode(script=decode_hangs_after_one)
    async with RouterHarness(prefill=prefills, decode=[decode]) as router:
        call = router.call(token_ids={"ids": range(40)})
        stream = aiter(call)
        await anext(stream)
        await anext(stream)
        for _ in range(4):
            await router.generate(PROMPT, max_tokens=1)  # needs no decode worker
        assert sorted(len(worker.requests) for worker in prefills) == [2, 3]
        call.cancel()
        await decode.until(lambda: not decode.running)


async def test_health_and_reflection_answer() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    decode = FakeDecode()
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode]) as router:
        health = health_pb2_grpc.HealthStub(router.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
        statuses = aiter(watch)
        while (await anext(statuses)).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        await router.registry.remove(decode.record.id)
        while (await anext(statuses)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        watch.cancel()

        info = reflection_pb2_grpc.ServerReflectionStub(router.channel).ServerReflectionInfo()
        await info.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await info.read()
        await info.done_writing()
        names = {service.name for service in answer.list_services_response.service}
        info.cancel()
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names
