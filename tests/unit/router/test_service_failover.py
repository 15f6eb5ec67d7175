"""When workers fail, no token is lost, repeated or invented, and errors are typed."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace

import grpc
import pytest

from baton.v1 import inference_pb2
from core.errors import (
    WORKER_DRAINING,
    CapacityError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    WorkerLostError,
)
from core.messages import worker_pb2
from tests.support.fake_workers import (
    DecodeScript,
    FakeDecode,
    FakePrefill,
    answer_tokens,
    decode_answer,
    next_token,
    prefill_answer,
    until_cancelled,
)
from tests.support.router_harness import RouterHarness, token_ids

pytestmark = pytest.mark.asyncio

PROMPT = (1, 2, 3)
ERROR_KEY = "baton-error-bin"


def dies_after(
    tokens: int, error: Exception | None = None, gate: asyncio.Event | None = None
) -> DecodeScript:
    """Return a script that sends ``tokens`` responses, waits for ``gate`` if given, and fails."""

    async def script(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        sent = 0
        async for response in decode_answer(request):
            if sent == tokens:
                break
            sent += 1
            yield response
        if gate is not None:
            await gate.wait()
        raise error or WorkerLostError("the engine died")

    return script


async def prefill_drains(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
    raise UnavailableError("shutting down", reason=WORKER_DRAINING)


def decode_drains(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    raise UnavailableError("shutting down", reason=WORKER_DRAINING)


async def prefill_dies(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
    raise WorkerLostError("the engine died")


async def decode_hangs(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    await until_cancelled()
    yield worker_pb2.DecodeResponse()


async def prefill_hangs(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
    await until_cancelled()
    raise AssertionError


async def generate_stepwise(
    router: RouterHarness, responses: int, gate: asyncio.Event, **sampling: int
) -> list[inference_pb2.GenerateResponse]:
    """Generate as ``router.generate`` does. Open ``gate`` after ``responses`` responses."""
    stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling=sampling))
    received = [await anext(stream) for _ in range(responses)]
    gate.set()
    return received + [response async for response in stream]


def error_detail(err: grpc.aio.AioRpcError) -> inference_pb2.ErrorDetail:
    metadata = dict(err.trailing_metadata() or ())
    value = metadata[ERROR_KEY]
    assert isinstance(value, bytes)
    return inference_pb2.ErrorDetail.FromString(value)


@pytest.mark.parametrize("tokens", [0, 1, 3])
async def test_another_decode_worker_continues_for_a_lost_one(tokens: int) -> None:
    gate = asyncio.Event()
    dying = FakeDecode("decode-1", dies_after(tokens, gate=gate))
    healthy = FakeDecode("decode-2")
    async with RouterHarness(prefill=[FakePrefill()], decode=[dying, healthy]) as router:
        responses = await generate_stepwise(router, 1 + tokens, gate, max_tokens=8)
        counters = router.server.counters

    assert token_ids(responses) == answer_tokens(PROMPT, 8)
    assert responses[-1].phases.attempts == 2
    assert responses[-1].phases.decode_worker == "decode-2"
    assert counters.failovers == 1
    (retry,) = healthy.requests
    assert retry.key.attempt == 2
    delivered = 1 + tokens
    assert list(retry.token_ids) == [*PROMPT, *answer_tokens(PROMPT, delivered)]
    assert retry.sampling.max_tokens == 8 - delivered
    assert retry.tokens_so_far == delivered


async def test_min_tokens_shrinks_with_the_tokens_so_far() -> None:
    dying, healthy = FakeDecode("decode-1", dies_after(2)), FakeDecode("decode-2")
    async with RouterHarness(prefill=[FakePrefill()], decode=[dying, healthy]) as router:
        responses = await router.generate(PROMPT, max_tokens=8, min_tokens=5)
    assert token_ids(responses) == answer_tokens(PROMPT, 8)
    assert healthy.requests[0].sampling.min_tokens == 3


async def test_a_stream_without_a_finish_reason_counts_as_lost() -> None:
    async def ends_early(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        yield worker_pb2.DecodeResponse(first_index=1, token_ids=answer_tokens(PROMPT, 2)[1:])

    ending = FakeDecode("decode-1", ends_early)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[ending, FakeDecode("decode-2")]
    ) as router:
        responses = await router.generate(PROMPT, max_tokens=4)
    assert token_ids(responses) == answer_tokens(PROMPT, 4)


async def test_a_lost_finish_reason_after_all_tokens_becomes_length() -> None:
    async def omits_the_finish_reason(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        yield worker_pb2.DecodeResponse(first_index=1, token_ids=answer_tokens(PROMPT, 3)[1:])
        await gate.wait()

    gate = asyncio.Event()
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode(script=omits_the_finish_reason)]
    ) as router:
        responses = await generate_stepwise(router, 2, gate, max_tokens=3)
    assert token_ids(responses) == answer_tokens(PROMPT, 3)
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH


async def test_a_killed_decode_worker_is_replaced_mid_stream() -> None:
    first = FakeDecode("decode-1")

    async def then_hangs(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        async for response in decode_answer(request):
            yield response
            if response.first_index == 2:
                await until_cancelled()

    first.script = then_hangs
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[first, FakeDecode("decode-2")]
    ) as router:
        stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 6}))
        responses = [await anext(stream) for _ in range(3)]
        await first.stop()
        responses += [response async for response in stream]
    assert token_ids(responses) == answer_tokens(PROMPT, 6)


async def test_without_another_decode_worker_the_client_gets_the_first_error() -> None:
    prefill = FakePrefill()
    async with RouterHarness(
        prefill=[prefill], decode=[FakeDecode(script=dies_after(1))]
    ) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(PROMPT, max_tokens=4)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error_detail(caught.value).reason == "WORKER_LOST"
    assert error_detail(caught.value).retry_after_ms > 0


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_draining_workers_cost_no_attempt(pool: str) -> None:
    draining_prefills = [FakePrefill(f"prefill-{i}", prefill_drains) for i in range(3)]
    draining_decodes = [FakeDecode(f"decode-{i}", decode_drains) for i in range(3)]
    async with RouterHarness(
        prefill=[*(draining_prefills if pool == "prefill" else ()), FakePrefill("prefill-9")],
        decode=[*(draining_decodes if pool == "decode" else ()), FakeDecode("decode-9")],
        router={"max_attempts": 1},
    ) as router:
        responses = await router.generate(PROMPT, max_tokens=8)
    assert token_ids(responses) == answer_tokens(PROMPT, 8)
    assert responses[-1].phases.prefill_worker == "prefill-9"
    assert responses[-1].phases.decode_worker == "decode-9"


async def test_if_all_workers_drain_each_is_tried_once() -> None:
    draining = [FakeDecode(f"decode-{i}", decode_drains) for i in range(3)]
    async with RouterHarness(prefill=[FakePrefill()], decode=draining) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(PROMPT, max_tokens=8)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error_detail(caught.value).reason == WORKER_DRAINING
    assert error_detail(caught.value).retry_after_ms > 0
    assert [len(decode.requests) for decode in draining] == [1, 1, 1]


async def test_a_lost_prefill_worker_is_replaced_by_another() -> None:
    healthy, decode = FakePrefill("prefill-2"), FakeDecode()
    async with RouterHarness(
        prefill=[FakePrefill("prefill-1", prefill_dies), healthy], decode=[decode]
    ) as router:
        responses = await router.generate(PROMPT, max_tokens=4)
    assert token_ids(responses) == answer_tokens(PROMPT, 4)
    assert responses[-1].phases.prefill_worker == "prefill-2"
    assert responses[-1].phases.attempts == 2


async def test_the_decode_worker_prefills_when_the_last_prefill_worker_is_lost() -> None:
    decode = FakeDecode()
    async with RouterHarness(prefill=[FakePrefill(script=prefill_dies)], decode=[decode]) as router:
        responses = await router.generate(PROMPT, max_tokens=4)
        counters = router.server.counters
    assert token_ids(responses) == answer_tokens(PROMPT, 4)
    assert responses[-1].phases.prefill_worker == ""
    assert not decode.requests[-1].HasField("kv_source")
    assert counters.local_prefills == 1
    assert counters.placements == {"least_loaded": 1, "local_prefill": 1}


async def test_a_refused_connection_fails_over_at_once() -> None:
    dead = FakePrefill("prefill-1")
    async with RouterHarness(
        prefill=[dead, FakePrefill("prefill-2")], decode=[FakeDecode()]
    ) as router:
        await dead.stop()
        async with asyncio.timeout(1):
            responses = await router.generate(PROMPT, max_tokens=4)
            # The dead worker is a suspect now, so the next request avoids it.
            again = await router.generate(PROMPT, max_tokens=4)
    assert token_ids(responses) == answer_tokens(PROMPT, 4)
    assert again[-1].phases.attempts == 1


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_unreachable_workers_cost_no_attempt_and_other_workers_are_sent_nothing(
    pool: str,
) -> None:
    """Five dead workers still have leases. Each is tried once."""
    dead_prefills = [FakePrefill(f"prefill-{i}") for i in range(5 if pool == "prefill" else 0)]
    dead_decodes = [FakeDecode(f"decode-{i}") for i in range(5 if pool == "decode" else 0)]
    prefill, decode = FakePrefill("prefill-9"), FakeDecode("decode-9")
    async with RouterHarness(
        prefill=[*dead_prefills, prefill],
        decode=[*dead_decodes, decode],
        router={"max_attempts": 1, "failover_timeout_s": 30},
    ) as router:
        for each in (*dead_prefills, *dead_decodes):
            await each.stop()
        responses = await router.generate(PROMPT, max_tokens=4)
        counters = router.server.counters
    assert token_ids(responses) == answer_tokens(PROMPT, 4)
    assert responses[-1].phases.attempts == 6
    assert counters.failovers == 5
    assert [len(worker.requests) for worker in (prefill, decode)] == [1, 1]
    assert not prefill.released, "attempts that were not sent have no KV to release"


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_a_worker_that_dies_with_the_request_costs_an_attempt(pool: str) -> None:
    prefills = [FakePrefill(f"prefill-{index}", prefill_hangs) for index in range(2)]
    decodes = [FakeDecode(f"decode-{index}", decode_hangs) for index in range(2)]
    async with RouterHarness(
        prefill=prefills, decode=decodes, router={"max_attempts": 1}
    ) as router:
        call = router.call(token_ids={"ids": PROMPT})
        await prefills[0].until(lambda: bool(prefills[0].running))
        await decodes[0].until(lambda: bool(decodes[0].running))
        await (prefills if pool == "prefill" else decodes)[0].stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(call))
    assert error_detail(caught.value).reason == "WORKER_LOST"
    assert not prefills[1].requests
    assert not decodes[1].requests


async def test_a_worker_that_accepts_connections_but_is_silent_counts_as_unreachable() -> None:
    """A hung process behaves like this: the kernel accepts the connection, but nothing reads it."""
    decode = FakeDecode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with RouterHarness(
            prefill=[FakePrefill()],
            decode=[decode],
            router={"worker_connect_timeout_s": 0.2, "max_attempts": 1},
        ) as router:
            host, port = listener.getsockname()
            hung = replace(decode.record, id="decode-0", address=f"{host}:{port}")
            await router.registry.put(hung)
            await router.refresh_workers()
            async with asyncio.timeout(5):
                responses = await router.generate(PROMPT, max_tokens=4)
    assert token_ids(responses) == answer_tokens(PROMPT, 4)
    assert responses[-1].phases.attempts == 2


async def test_a_silent_worker_without_a_lease_is_lost() -> None:
    hung = FakeDecode("decode-1", decode_hangs)
    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[hung, FakeDecode("decode-2")],
        router={"worker_lost_after_s": 0.1},
    ) as router:
        stream = aiter(router.call(token_ids={"ids": PROMPT}, sampling={"max_tokens": 4}))
        first = await anext(stream)
        await router.registry.remove(hung.record.id)
        rest = [response async for response in stream]
    assert token_ids([first, *rest]) == answer_tokens(PROMPT, 4)


async def test_a_registry_failure_does_not_disturb_requests() -> None:
    hung = FakeDecode("decode-1", decode_hangs)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[hung], router={"worker_lost_after_s": 0.1}
    ) as router:
        await router.generate(PROMPT, max_tokens=1)
        router.registry.available = False
        hung.script = decode_answer
        for _ in range(3):
            responses = await router.generate(PROMPT, max_tokens=4)
            assert token_ids(responses) == answer_tokens(PROMPT, 4)


async def test_a_recomputed_first_token_that_is_equal_is_dropped() -> None:
    def recomputed(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        return decode_answer(request, first_index=0, outcome=inference_pb2.KV_OUTCOME_RECOMPUTED)

    prefill = FakePrefill()
    async with RouterHarness(prefill=[prefill], decode=[FakeDecode(script=recomputed)]) as router:
        responses = await router.generate(PROMPT, max_tokens=5)
        counters = router.server.counters
        await prefill.until(lambda: len(prefill.released) == 1)
    assert token_ids(responses) == answer_tokens(PROMPT, 5)
    assert responses[-1].phases.kv.outcome == inference_pb2.KV_OUTCOME_RECOMPUTED
    assert responses[-1].phases.attempts == 1
    assert counters.kv_recomputed == 1


async def test_if_the_recomputed_first_token_differs_the_forwarded_one_is_kept() -> None:
    other = next_token(PROMPT) ^ 1

    async def prefill_other(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        return worker_pb2.PrefillResponse(token_id=other)

    async def recomputes(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        await gate.wait()
        async for response in decode_answer(request, first_index=0):
            yield response

    gate = asyncio.Event()
    decode = FakeDecode(script=recomputes)
    async with RouterHarness(
        prefill=[FakePrefill(script=prefill_other)], decode=[decode]
    ) as router:
        responses = await generate_stepwise(router, 1, gate, max_tokens=5)
        counters = router.server.counters

    assert token_ids(responses) == [other, *answer_tokens((*PROMPT, other), 4)]
    assert counters.first_tokens_differed == 1
    assert not decode.requests[-1].HasField("kv_source")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("no"), grpc.StatusCode.INVALID_ARGUMENT),
        (InternalError("a defect"), grpc.StatusCode.INTERNAL),
        (CapacityError("full", retry_after_s=2), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_other_worker_errors_reach_the_client_typed(
    error: Exception, code: grpc.StatusCode
) -> None:
    decode = FakeDecode(script=dies_after(0, error))
    async with RouterHarness(prefill=[FakePrefill()], decode=[decode]) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(PROMPT, max_tokens=4)
    assert caught.value.code() == code


async def test_attempts_are_bounded() -> None:
    decodes = [FakeDecode(f"decode-{i}", dies_after(0)) for i in range(4)]
    async with RouterHarness(
        prefill=[FakePrefill()], decode=decodes, router={"max_attempts": 3}
    ) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(PROMPT, max_tokens=4)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert sum(len(decode.requests) for decode in decodes) == 3


async def test_a_decode_worker_that_breaks_the_protocol_is_replaced() -> None:
    async def leaves_a_gap(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        tokens = answer_tokens(PROMPT, 4)
        yield worker_pb2.DecodeResponse(first_index=1, token_ids=[tokens[1]])
        yield worker_pb2.DecodeResponse(first_index=3, token_ids=[tokens[3]])

    async with RouterHarness(
        prefill=[FakePrefill()],
        decode=[FakeDecode("decode-1", leaves_a_gap), FakeDecode("decode-2")],
    ) as router:
        responses = await router.generate(PROMPT, max_tokens=6)
    assert token_ids(responses) == answer_tokens(PROMPT, 6)


@pytest.mark.parametrize("seed", range(40))
async def test_random_deaths_and_delays_never_change_the_answer(seed: int) -> None:
    """Requests run concurrently on workers that fail at random and answer after random delays."""
    rng = random.Random(seed)
    deaths = 4  # per pool; max_attempts is 9, so a request survives all 8 deaths

    def slow() -> asyncio.Future[None]:
        turns = rng.randrange(4)
        return asyncio.ensure_future(_turns(turns))

    left = {"prefill": deaths, "decode": deaths}

    def dies(pool: str, chance: float) -> bool:
        if left[pool] and rng.random() < chance:
            left[pool] -= 1
            return True
        return False

    async def flaky_prefill(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        await slow()
        if dies("prefill", 0.3):
            raise WorkerLostError("died")
        return await prefill_answer(request)

    async def flaky_decode(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        recomputes = rng.random() < 0.3
        async for response in decode_answer(request, first_index=0 if recomputes else None):
            await slow()
            if dies("decode", 0.1):
                raise WorkerLostError("died")
            yield response

    async with RouterHarness(
        prefill=[FakePrefill(f"prefill-{i}", flaky_prefill) for i in range(9)],
        decode=[FakeDecode(f"decode-{i}", flaky_decode) for i in range(9)],
        router={"max_attempts": 9},
    ) as router:
        prompts = [tuple(rng.randrange(100) for _ in range(3)) for _ in range(6)]
        lengths = [rng.randrange(1, 12) for _ in prompts]
        answers = await asyncio.gather(
            *(
                router.generate(prompt, max_tokens=length, **rng.choice([{}, {"seed": 1}]))
                for prompt, length in zip(prompts, lengths, strict=True)
            )
        )
    for prompt, length, responses in zip(prompts, lengths, answers, strict=True):
        assert token_ids(responses) == answer_tokens(prompt, length), f"seed {seed}"


async def _turns(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn
