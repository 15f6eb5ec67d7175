"""Resume continues a stream with its next response, at the same router or at another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2
from core.errors import WorkerLostError
from core.messages import worker_pb2
from core.state.journal import MemoryJournal
from core.types import Need, Pool, PoolPlan
from router.admission.policy import AdmissionRequest
from tests.support.fake_workers import (
    FakeDecode,
    FakePrefill,
    answer_tokens,
    decode_answer,
    until_cancelled,
)
from tests.support.router_harness import RouterHarness, token_ids
from tests.support.waiting import until_awaited
from tests.unit.router.test_service_failover import dies_after, error_detail

pytestmark = pytest.mark.asyncio

PROMPT = (1, 2, 3)
LENGTH = 12


async def stalls_on_first_attempt(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    """Stall after one token, unless the request carries tokens of an earlier attempt."""
    async for response in decode_answer(request):
        yield response
        if not request.tokens_so_far:
            await until_cancelled()


def cluster() -> RouterHarness:
    return RouterHarness(
        prefill=[FakePrefill()],
        decode=[FakeDecode(script=stalls_on_first_attempt)],
        journal=MemoryJournal(lease_s=3600),
    )


def resume(stub: Any, last: int | None, token: str, request_id: str = "r") -> Any:
    request = inference_pb2.ResumeRequest(
        request_id=request_id, last_sequence=last, resume_token=token
    )
    return stub.Resume(request, timeout=30)


async def read_two(router: RouterHarness) -> tuple[Any, list[Any]]:
    """Start request "r". Read its first response (from prefill) and its second (from decode)."""
    call = router.call(request_id="r", token_ids={"ids": PROMPT}, sampling={"max_tokens": LENGTH})
    stream = aiter(call)
    return call, [await anext(stream), await anext(stream)]


def token_of(router: RouterHarness) -> str:
    """The resume token of request "r"."""
    assert isinstance(router.journal, MemoryJournal)
    return router.journal.entries["r"].token


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), error_detail(caught.value).reason


@pytest.mark.parametrize("received", [0, 1, 2])
async def test_streams_of_a_stopped_router_resume_at_another(received: int) -> None:
    async with cluster() as router, router.another_router() as other:
        call, responses = await read_two(router)
        await router.server.stop(grace_s=0)
        assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, "ROUTER_DRAINING")

        responses = responses[:received]
        last = responses[-1].sequence if responses else None
        responses += [response async for response in resume(other, last, token_of(router))]
        assert token_ids(responses) == answer_tokens(PROMPT, LENGTH)
        assert responses[-1].usage.completion_tokens == LENGTH
        # A client may resume again, to get an end that it missed or to start from the beginning.
        again = [response async for response in resume(other, LENGTH - 2, token_of(router))]
        assert [each.sequence for each in again] == [LENGTH - 1]
        assert token_ids(
            [each async for each in resume(other, None, token_of(router))]
        ) == token_ids(responses)


async def test_text_continues_inside_a_character_or_a_stop_string() -> None:
    journal = MemoryJournal(lease_s=3600)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode()], journal=journal
    ) as router:
        for first in range(1, 12):
            call = router.call(
                request_id="r",
                token_ids={"ids": [first]},
                sampling={"max_tokens": LENGTH, "stop": ["the q", "!"]},
            )
            whole = [response async for response in call]
            for last in range(len(whole) - 1):
                rest = [response async for response in resume(router.stub, last, token_of(router))]
                assert [(each.sequence, each.text) for each in rest] == [
                    (each.sequence, each.text) for each in whole[last + 1 :]
                ]


async def test_one_router_at_a_time_serves_a_request() -> None:
    async with cluster() as router, router.another_router() as other:
        _call, responses = await read_two(router)
        last = responses[-1].sequence
        busy = (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_IN_FLIGHT")
        assert await refusal(resume(other, last, token_of(router))) == busy
        request = inference_pb2.GenerateRequest(request_id="r", token_ids={"ids": PROMPT})
        assert await refusal(other.Generate(request)) == busy
        here = await refusal(resume(router.stub, last, token_of(router)))
        assert here == busy


async def test_a_client_that_cancelled_can_resume() -> None:
    async with cluster() as router:
        call, responses = await read_two(router)
        call.cancel()
        assert router.server.handler is not None
        await router.decode[0].until(lambda: not router.decode[0].running)
        await router.server.handler.drained()
        responses += [
            each async for each in resume(router.stub, responses[-1].sequence, token_of(router))
        ]
        assert token_ids(responses) == answer_tokens(PROMPT, LENGTH)


async def leave_alone(router: RouterHarness) -> list[Any]:
    """Start request "r", cancel it, and remove all workers. Return its first two responses."""
    call, responses = await read_two(router)
    call.cancel()
    assert router.server.handler is not None
    await router.server.handler.drained()
    for worker in (*router.prefill, *router.decode):
        await router.registry.remove(worker.record.id)
    return responses


async def test_a_resumed_request_wakes_empty_pools() -> None:
    """If it were refused, nothing would tell the autoscaler to start a worker for it."""
    router = RouterHarness(
        prefill=[FakePrefill()],
        decode=[FakeDecode(script=stalls_on_first_attempt)],
        journal=MemoryJournal(lease_s=3600),
        router={"failover_timeout_s": 30},
    )
    async with router:
        responses = await leave_alone(router)
        plans = tuple(PoolPlan(pool, max_workers=1) for pool in Pool)
        await router.registry.put_plans(plans)
        async with router.another_router() as other:

            async def read() -> None:
                stream = resume(other, responses[-1].sequence, token_of(router))
                responses.extend([each async for each in stream])

            async def is_published() -> bool:
                routers = await router.registry.list_routers()
                return [q.need for each in routers for q in each.queues] == [Need.DECODE]

            reading = asyncio.create_task(read())
            await until_awaited(is_published, what="the autoscaler sees the request")
            await router.registry.put(router.decode[0].record)
            await reading
        assert token_ids(responses) == answer_tokens(PROMPT, LENGTH)


async def test_a_resumed_request_is_refused_if_no_worker_will_come() -> None:
    async with cluster() as router:
        responses = await leave_alone(router)
        async with router.another_router() as other:
            call = resume(other, responses[-1].sequence, token_of(router))
            assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, "NO_PREFILL_WORKER")


async def test_a_resumed_request_keeps_its_service_class(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster() as router:
        assert router.server.handler is not None
        gate, admitted = router.server.handler.admission, []
        admit = gate.admit

        def record(request: AdmissionRequest, *args: Any, **kwargs: Any) -> Any:
            admitted.append(request)
            return admit(request, *args, **kwargs)

        monkeypatch.setattr(gate, "admit", record)
        call = router.call(
            request_id="r",
            token_ids={"ids": PROMPT},
            sampling={"max_tokens": LENGTH},
            service_class="batch",
        )
        await anext(aiter(call))
        call.cancel()
        await router.server.handler.drained()
        assert [each async for each in resume(router.stub, 0, token_of(router))]
        assert [each.service_class for each in admitted] == ["batch", "batch"]
        assert admitted[0].cost == admitted[1].cost == len(PROMPT)


async def test_workers_lost_before_a_resume_count_as_attempts() -> None:
    """Otherwise a request that kills workers would kill ``max_attempts`` more after each resume."""
    lost = 0

    async def dies_twice_then_stalls(
        request: worker_pb2.DecodeRequest,
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        nonlocal lost
        stream = decode_answer(request)
        yield await anext(stream)
        if lost == 2:
            await until_cancelled()
        lost += 1
        raise WorkerLostError("the engine died")

    decode = [FakeDecode(f"decode-{number}", dies_twice_then_stalls) for number in range(3)]
    harness = RouterHarness(
        prefill=[FakePrefill()],
        decode=decode,
        router={"max_attempts": 3},
        journal=MemoryJournal(lease_s=3600),
    )
    async with harness as router:
        call = router.call(
            request_id="r", token_ids={"ids": PROMPT}, sampling={"max_tokens": LENGTH}
        )
        stream = aiter(call)
        while sum(len(each.requests) for each in decode) < 3:
            await anext(stream)
        call.cancel()
        assert router.server.handler is not None
        await router.server.handler.drained()
        for each in decode:
            each.script = dies_after(1)
        before = sum(len(each.requests) for each in decode)
        assert await refusal(resume(router.stub, None, token_of(router))) == (
            grpc.StatusCode.UNAVAILABLE,
            "WORKER_LOST",
        )
        assert sum(len(each.requests) for each in decode) == before + 1
        assert await refusal(resume(router.stub, None, token_of(router))) == (
            grpc.StatusCode.UNAVAILABLE,
            "TOO_MANY_ATTEMPTS",
        )
        assert sum(len(each.requests) for each in decode) == before + 1


async def test_a_request_that_ended_at_a_stop_string_is_complete() -> None:
    """Complete entries make room first. The worker has not finished this request."""
    journal = MemoryJournal(lease_s=3600)
    async with RouterHarness(
        prefill=[FakePrefill()], decode=[FakeDecode()], journal=journal
    ) as router:
        call = router.call(
            request_id="r",
            token_ids={"ids": [3]},
            sampling={"max_tokens": LENGTH, "stop": ["e", "a", "o", "t"]},
        )
        responses = [response async for response in call]
        assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
        assert router.server.handler is not None
        await router.server.handler.drained()
    assert journal.entries["r"].is_complete


async def test_only_the_client_of_a_request_can_resume_it() -> None:
    """Request ids are chosen by clients, so they can be guessed."""
    unknown = (grpc.StatusCode.NOT_FOUND, "NOT_RESUMABLE")
    async with cluster() as router:
        call, responses = await read_two(router)
        assert responses[0].resume_token == token_of(router)
        assert not responses[1].resume_token
        call.cancel()
        assert router.server.handler is not None
        await router.server.handler.drained()
        for token in ("", "0" * 32, token_of(router)[:-1]):
            assert await refusal(resume(router.stub, 0, token)) == unknown
        rest = [each async for each in resume(router.stub, 0, token_of(router))]
        assert rest[0].resume_token == token_of(router)
        assert not any(each.resume_token for each in rest[1:])


async def test_requests_that_are_not_in_the_journal_cannot_be_resumed() -> None:
    unknown = (grpc.StatusCode.NOT_FOUND, "NOT_RESUMABLE")
    async with cluster() as router:
        assert await refusal(resume(router.stub, 0, "x" * 32, "never-heard-of")) == unknown
        call = router.call(request_id="r", token_ids={"ids": PROMPT}, sampling={"max_tokens": 1})
        assert [each.sequence async for each in call] == [0]
        assert await refusal(resume(router.stub, 1, token_of(router))) == unknown
        bad = await refusal(resume(router.stub, 0, "x" * 32, "no spaces"))
        assert bad[0] is grpc.StatusCode.INVALID_ARGUMENT
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        assert await refusal(resume(router.stub, 0, "x" * 32)) == unknown
