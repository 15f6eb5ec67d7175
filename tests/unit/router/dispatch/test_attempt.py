"""An attempt buffers few responses. Any error of a call counts as a failure of its worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Generator
from typing import Any, cast

import pytest

from baton.v1 import inference_pb2
from core.errors import InternalError
from core.messages import worker_pb2
from router.dispatch.attempt import Attempt, AttemptFailedError, AttemptPlan
from router.placement.policy import Placement, PlacementState
from router.request import TokenBatch
from router.workers.client import WorkerClient
from tests.support.fake_workers import FakeDecode, FakePrefill, until_cancelled
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio

BUFFER = 4
TOKENS = 50


class PrefillStub:
    """A prefill worker's client whose call ends when the test sets ``answer``."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[worker_pb2.PrefillResponse] = (
            asyncio.get_running_loop().create_future()
        )

    async def connected(self) -> bool:
        return True

    def prefill(self, *_: object) -> PrefillStub:
        return self

    def __await__(self) -> Generator[Any, None, worker_pb2.PrefillResponse]:
        return self.answer.__await__()

    def cancel(self) -> None:
        self.answer.cancel()


class DecodeStub:
    """A decode worker's client that streams positions 1, 2, … as fast as they are read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.read_responses = 0

    async def connected(self) -> bool:
        return True

    def decode(self, *_: object) -> DecodeStub:
        return self

    async def __aiter__(self) -> AsyncIterator[worker_pb2.DecodeResponse]:
        if self.error is not None:
            raise self.error
        for index in range(1, TOKENS):
            self.read_responses += 1
            finish = inference_pb2.FINISH_REASON_LENGTH if index == TOKENS - 1 else None
            yield worker_pb2.DecodeResponse(
                first_index=index, token_ids=[index], finish_reason=finish
            )
        await until_cancelled()

    def cancel(self) -> None: ...


class Setup:
    """An attempt that forwards the prefill worker's token."""

    def __init__(self, decode: DecodeStub | None = None) -> None:
        self.now_s = 0.0
        self.prefill_worker, self.decode_worker = FakePrefill().record, FakeDecode().record
        self.prefill, self.decode = PrefillStub(), decode or DecodeStub()
        self.prefilled: asyncio.Queue[bool] = asyncio.Queue()
        self.tokens: list[int] = []
        self.client_reads = asyncio.Event()
        self.client_reads.set()
        plan = AttemptPlan(
            transfer_key=worker_pb2.TransferKey(request_id="r", attempt=1),
            token_ids=(1, 2, 3),
            tokens_so_far=0,
            sampling=inference_pb2.SamplingParams(max_tokens=TOKENS),
            placement=Placement(self.decode_worker, self.prefill_worker, "", PlacementState()),
            forwards_first_token=True,
            timeout_s=60,
            buffer_responses=BUFFER,
            lost_after_s=3,
        )
        self.attempt = Attempt(plan, lambda: self.now_s, self.prefilled.put_nowait)

    async def run(self) -> None:
        prefill, decode = cast(WorkerClient, self.prefill), cast(WorkerClient, self.decode)
        await self.attempt.run(prefill, decode, self.emit)

    async def emit(self, batch: TokenBatch) -> bool:
        await self.client_reads.wait()
        self.tokens.extend(batch.token_ids)
        return True


async def settled() -> None:
    """Let every other task run until it waits."""
    for _ in range(1000):
        await asyncio.sleep(0)


async def test_until_the_first_token_little_is_read_from_the_decode_worker() -> None:
    setup = Setup()
    running = asyncio.create_task(setup.run())
    await until(lambda: setup.decode.read_responses, what="the decode worker has sent a response")
    await settled()
    assert setup.decode.read_responses == BUFFER + 1, (
        "the held responses, and one that waits for token 0"
    )
    assert setup.tokens == []
    setup.prefill.answer.set_result(worker_pb2.PrefillResponse(token_id=0))
    await running
    assert setup.tokens == list(range(TOKENS))


async def test_while_the_client_reads_nothing_little_is_read_from_the_decode_worker() -> None:
    setup = Setup()
    setup.client_reads.clear()
    running = asyncio.create_task(setup.run())
    setup.prefill.answer.set_result(worker_pb2.PrefillResponse(token_id=0))
    await until(lambda: setup.decode.read_responses, what="the decode worker has sent a response")
    await settled()
    # The buffer is full, and one response waits for room in it. The attempt may hold one more, if
    # it takes a decode response before the prefill answer.
    assert setup.decode.read_responses <= BUFFER + 2
    setup.client_reads.set()
    await running
    assert setup.tokens == list(range(TOKENS))


async def test_a_decode_worker_that_is_held_back_does_not_count_as_silent() -> None:
    setup = Setup()
    running = asyncio.create_task(setup.run())
    await until(lambda: setup.decode.read_responses > BUFFER, what="the decode worker is held back")
    await settled()
    setup.now_s = 100.0
    setup.attempt.worker_lost(setup.decode_worker)
    setup.prefill.answer.set_result(worker_pb2.PrefillResponse(token_id=0))
    await running
    assert setup.tokens == list(range(TOKENS))


async def test_the_end_of_the_prefill_call_is_reported_at_once() -> None:
    setup = Setup()
    running = asyncio.create_task(setup.run())
    await settled()
    assert setup.prefilled.empty()
    setup.prefill.answer.set_exception(ValueError("not even a gRPC error"))
    assert await setup.prefilled.get() is False
    with pytest.raises(AttemptFailedError):
        await running


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_an_error_of_any_kind_ends_the_attempt(
    pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = ValueError("secret")
    setup = Setup(DecodeStub(error if pool == "decode" else None))
    if pool == "prefill":
        setup.prefill.answer.set_exception(error)
    with caplog.at_level(logging.ERROR), pytest.raises(AttemptFailedError) as caught:
        async with asyncio.timeout(10):
            await setup.run()
    assert isinstance(caught.value.error, InternalError)
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text
    failed = setup.prefill_worker if pool == "prefill" else setup.decode_worker
    assert caught.value.failed is failed


@pytest.mark.parametrize("dead", ["prefill", "decode"])
async def test_both_workers_are_connected_at_the_same_time(dead: str) -> None:
    """A dead worker is found while the connection to the other one is still being made."""
    setup = Setup()
    connecting = asyncio.Barrier(2)

    class Slow:
        async def connected(self) -> bool:
            await connecting.wait()
            await until_cancelled()
            return True

    class Dead:
        async def connected(self) -> bool:
            await connecting.wait()
            return False

    prefill, decode = (Dead(), Slow()) if dead == "prefill" else (Slow(), Dead())
    with pytest.raises(AttemptFailedError) as failed:
        async with asyncio.timeout(10):
            await setup.attempt.run(
                cast(WorkerClient, prefill), cast(WorkerClient, decode), setup.emit
            )
    worker = setup.prefill_worker if dead == "prefill" else setup.decode_worker
    assert failed.value.failed is worker
