"""The prefill and decode servicers with a fake engine, mostly over real gRPC connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import (
    AlreadyExistsError,
    BatonError,
    CapacityError,
    DeadlineError,
    UnavailableError,
)
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.status import from_rpc_error
from core.state.registry import MemoryRegistry
from core.types import Pool
from decode_worker.servicer import DecodeServicer, add_decode_service
from engine.fake import FakeEngine, FakeLatency, FakeSize, next_tokens
from engine.protocol import EngineOutput, EngineRequest
from prefill_worker.servicer import PrefillServicer, add_prefill_service
from tests.support.expired_call import Expired
from tests.support.registry_rules import PREFILL
from tests.support.waiting import until
from worker.intake import Intake
from worker.peers import Peers

PROMPT = [5, 6, 7]
HOUR = FakeLatency(decode_step_ms=3_600_000, transfer_ms=3_600_000)
QUICK = FakeLatency(0, 0, 0)


@dataclass
class Worker:
    engine: FakeEngine
    intake: Intake
    prefill: Any  # gRPC stub
    decode: Any  # gRPC stub

    async def until_idle(self) -> None:
        """Wait until no request is in flight and all 64 KV blocks are free."""
        async with asyncio.timeout(10):
            await self.intake.drained()
            while self.engine.load().kv_blocks_free < 64:  # noqa: ASYNC110
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(
    latency: FakeLatency = QUICK, limit: int = 4, engine: FakeEngine | None = None
) -> AsyncIterator[Worker]:
    engine = engine or FakeEngine(Config(), Pool.DECODE, latency=latency, size=FakeSize(64))
    intake = Intake(limit)
    server = grpc.aio.server()
    registry = MemoryRegistry(lease_s=3600)
    await registry.put(PREFILL)
    peers = Peers(registry, Pool.DECODE)
    add_prefill_service(server, engine, intake, peers)
    add_decode_service(server, engine, intake, peers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Worker(
            engine,
            intake,
            worker_pb2_grpc.PrefillWorkerStub(channel),
            worker_pb2_grpc.DecodeWorkerStub(channel),
        )
    await server.stop(0)


def key(name: str = "r") -> worker_pb2.TransferKey:
    return worker_pb2.TransferKey(request_id=name, attempt=1)


def prefill_request(
    name: str = "r", max_tokens: int | None = None, min_tokens: int = 0
) -> worker_pb2.PrefillRequest:
    return worker_pb2.PrefillRequest(
        key=key(name),
        token_ids=PROMPT,
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens),
        transfer=True,
        forwards_first_token=True,
    )


def decode_request(name: str = "r", max_tokens: int = 4) -> worker_pb2.DecodeRequest:
    return worker_pb2.DecodeRequest(
        key=key(name),
        token_ids=PROMPT,
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens),
    )


async def test_prefill_answers_with_the_first_token_and_holds_the_kv() -> None:
    async with serving(HOUR) as worker:
        response = await worker.prefill.Prefill(prefill_request(max_tokens=9, min_tokens=5))
        assert response.token_id == next_tokens(PROMPT, 1)[0]
        assert response.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED
        assert worker.engine.load().kv_blocks_free == 63
        await worker.prefill.Release(worker_pb2.ReleaseRequest(key=key("other")))
        assert worker.engine.load().kv_blocks_free == 63
        await worker.prefill.Release(worker_pb2.ReleaseRequest(key=key()))
        await worker.until_idle()


@pytest.mark.parametrize(
    ("max_tokens", "reason"),
    [
        (1, inference_pb2.FINISH_REASON_LENGTH),
        (2, inference_pb2.FINISH_REASON_UNSPECIFIED),
        (None, inference_pb2.FINISH_REASON_UNSPECIFIED),
    ],
)
async def test_prefill_has_a_finish_reason_only_if_its_token_is_the_last(
    max_tokens: int | None, reason: inference_pb2.FinishReason
) -> None:
    async with serving() as worker:
        response = await worker.prefill.Prefill(prefill_request(max_tokens=max_tokens))
        assert response.finish_reason == reason


async def test_prefill_has_the_finish_reason_stop_if_its_token_stops_the_request() -> None:
    request = prefill_request(max_tokens=9)
    request.sampling.stop_token_ids.append(next_tokens(PROMPT, 1)[0])
    async with serving() as worker:
        response = await worker.prefill.Prefill(request)
        assert response.finish_reason == inference_pb2.FINISH_REASON_STOP


async def test_decode_streams_every_token_with_its_position() -> None:
    request = decode_request()
    async with serving() as worker:
        alone = [response async for response in worker.decode.Decode(request)]
        request.kv_source.incarnation = PREFILL.incarnation
        request.kv_source.forwards_first_token = True
        seeded = [response async for response in worker.decode.Decode(request)]
        await worker.until_idle()
    assert [list(response.token_ids) for response in alone] == [
        [token] for token in next_tokens(PROMPT, 4)
    ]
    assert [response.first_index for response in alone] == [0, 1, 2, 3]
    assert alone[0].kv.outcome == inference_pb2.KV_OUTCOME_LOCAL
    assert alone[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert [response.token_ids for response in seeded] == [r.token_ids for r in alone[1:]]
    assert seeded[0].first_index == 1
    assert seeded[0].kv.outcome == inference_pb2.KV_OUTCOME_TRANSFERRED


async def test_if_the_kv_source_is_unknown_the_prompt_is_computed_here(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as worker:
        for number in range(3):
            request = decode_request()
            request.kv_source.worker_id = f"prefill-{number}"
            request.kv_source.incarnation = "never registered"
            request.kv_source.forwards_first_token = True
            responses = [response async for response in worker.decode.Decode(request)]
            tokens = [token for response in responses for token in response.token_ids]
            assert tokens == list(next_tokens(PROMPT, 4))
            assert responses[0].kv.outcome == inference_pb2.KV_OUTCOME_RECOMPUTED
        await worker.until_idle()
    assert caplog.text.count("KV source is unknown") == 1


async def test_cancelling_a_call_aborts_the_request() -> None:
    async with serving(HOUR) as worker:
        call = worker.decode.Decode(decode_request())
        assert await call.read() is not grpc.aio.EOF
        assert worker.engine.load().running == 1
        call.cancel()
        await worker.until_idle()
        assert worker.engine.load().running == 0


async def test_a_call_whose_deadline_has_passed_never_reaches_the_engine() -> None:
    class Untouched(FakeEngine):
        def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
            raise AssertionError(request.transfer_id)

    peers = Peers(MemoryRegistry(lease_s=3600), Pool.DECODE)
    engine, context = Untouched(Config(), Pool.DECODE), cast(Any, Expired())
    late = {
        Pool.PREFILL: PrefillServicer(engine, Intake(1)).Prefill(prefill_request(), context),
        Pool.DECODE: DecodeServicer(engine, Intake(1), peers).Decode(decode_request(), context),
    }
    for pool, call in late.items():
        with pytest.raises(grpc.aio.AbortError):
            await call
        assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED, pool
        context.code = None


async def test_a_call_that_expires_leaves_the_engines_queue() -> None:
    full = FakeEngine(Config(), Pool.DECODE, latency=HOUR, size=FakeSize(kv_blocks=1))
    async with serving(engine=full) as worker:
        running = worker.decode.Decode(decode_request("a"))
        assert await running.read() is not grpc.aio.EOF
        late = worker.decode.Decode(decode_request("b"), timeout=0.2)
        await until(lambda: worker.engine.load().queue_depth == 1, what="the request is queued")
        assert isinstance(await failure(late), DeadlineError)
        await until(lambda: worker.engine.load().queue_depth == 0, what="the queue is empty")
        assert worker.engine.load().running == 1
        running.cancel()
        await worker.intake.drained()
        assert worker.engine.load().kv_blocks_free == 1


async def responses(call: Any) -> list[Any]:
    """Return all responses of a unary or a streaming call."""
    return [item async for item in call] if hasattr(call, "__aiter__") else [await call]


async def failure(call: object) -> BatonError:
    """Return the error that a router sees for a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await responses(call)
    return from_rpc_error(caught.value, "w")


async def test_requests_beyond_the_limit_and_duplicates_are_refused() -> None:
    async with serving(HOUR, limit=2) as worker:
        calls = [worker.decode.Decode(decode_request(name)) for name in "ab"]
        for call in calls:
            await call.read()
        full = await failure(worker.decode.Decode(decode_request("c")))
        assert isinstance(full, CapacityError)
        assert full.retry_after_s
        twice = await failure(worker.prefill.Prefill(prefill_request("a")))
        assert isinstance(twice, AlreadyExistsError)
        for call in calls:
            call.cancel()
        await worker.until_idle()


async def test_a_draining_worker_refuses_new_requests_and_finishes_the_others() -> None:
    async with serving(FakeLatency(decode_step_ms=20)) as worker:
        call = aiter(worker.decode.Decode(decode_request("a")))
        await anext(call)
        worker.intake.close()
        late = await failure(worker.prefill.Prefill(prefill_request("b")))
        assert isinstance(late, UnavailableError)
        assert late.reason == "WORKER_DRAINING"
        rest = [response async for response in call]
        assert rest[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        await worker.until_idle()


async def test_requests_that_are_moved_out_end_with_worker_draining() -> None:
    async with serving(HOUR) as worker:
        decode = aiter(worker.decode.Decode(decode_request("a")))
        assert (await anext(decode)).token_ids
        unread = worker.decode.Decode(decode_request("b"))
        await until(lambda: worker.engine.load().running == 2, what="both requests run")
        worker.intake.send_away()
        for call in (decode, unread):
            error = await failure(call)
            assert isinstance(error, UnavailableError)
            assert error.reason == "WORKER_DRAINING"
        await worker.until_idle()


async def test_a_request_that_is_moved_out_during_its_first_response_gets_the_error() -> None:
    class MovedOut(FakeEngine):
        async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
            async for output in super().generate(request):
                asyncio.get_running_loop().call_soon(worker.intake.send_away)
                yield output

    async with serving(engine=MovedOut(Config(), Pool.DECODE, size=FakeSize(64))) as worker:
        async with asyncio.timeout(10):
            error = await failure(worker.decode.Decode(decode_request()))
        assert error.reason == "WORKER_DRAINING"
        await worker.until_idle()


async def test_calls_to_a_dead_engine_end_with_worker_lost() -> None:
    async with serving() as worker:
        worker.engine.fail()
        for call in (
            worker.decode.Decode(decode_request("a")),
            worker.prefill.Prefill(prefill_request("b")),
        ):
            error = await failure(call)
            assert isinstance(error, UnavailableError)
            assert error.reason == "WORKER_LOST"


async def test_the_error_after_a_defect_of_the_engine_shows_no_internals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(FakeEngine):
        async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
            if request.transfer_id:
                raise RuntimeError("secret /path")
            yield EngineOutput(
                first_index=0,
                token_ids=(),
                logprobs=(),
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                kv=None,
                cached_tokens=0,
                queue_ms=0,
                prefill_ms=0,
            )

    async with serving(engine=Broken(Config(), Pool.DECODE)) as worker:
        error = await failure(worker.decode.Decode(decode_request()))
    assert "secret" not in str(error)
    assert "secret" in caplog.text
