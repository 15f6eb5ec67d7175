"""The fake engine. The tests of the router and of the cluster rely on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import InvalidArgumentError, WorkerLostError
from core.types import Pool
from engine.fake import FakeEngine, FakeLatency, FakeSize, next_tokens
from engine.protocol import EngineOutput, EngineRequest, KvReceive, KvSend

PROMPT = (5, 6, 7)
STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
RECEIVE = KvReceive("i1", ("tcp://127.0.0.1:1",), forwards_first_token=True)


class VirtualTime:
    """Time that only passes in ``sleep``."""

    now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


def make(
    time: VirtualTime | None = None,
    *,
    size: FakeSize | None = None,
    latency: FakeLatency | None = None,
) -> FakeEngine:
    time = time or VirtualTime()
    return FakeEngine(
        Config(), Pool.DECODE, sleep=time.sleep, clock=time.clock, size=size, latency=latency
    )


def request(
    key: str = "r#0",
    kv: KvSend | KvReceive | None = None,
    *,
    prompt: tuple[int, ...] = PROMPT,
    max_tokens: int = 4,
    stop_token_ids: tuple[int, ...] = (),
    logprobs: int | None = None,
) -> EngineRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    if logprobs is not None:
        sampling.logprobs = logprobs
    return EngineRequest(key, prompt, sampling, kv)


def stream(engine: FakeEngine, what: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
    outputs = engine.generate(what)
    assert isinstance(outputs, AsyncGenerator)
    return outputs


async def read(engine: FakeEngine, what: EngineRequest) -> list[EngineOutput]:
    return [output async for output in engine.generate(what)]


def tokens(outputs: list[EngineOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


async def test_a_token_depends_only_on_all_tokens_before_it() -> None:
    outputs = await read(make(), request(max_tokens=6))
    assert tokens(outputs) == next_tokens(PROMPT, 6)
    assert tokens(await read(make(), request(prompt=(5, 6, 8), max_tokens=6))) != tokens(outputs)
    assert [output.first_index for output in outputs] == list(range(6))
    assert [output.finish_reason for output in outputs] == [0] * 5 + [LENGTH]
    assert outputs[0].kv is not None
    assert outputs[0].kv.outcome == inference_pb2.KV_OUTCOME_LOCAL
    assert all(output.kv is None for output in outputs[1:])


async def test_another_engine_continues_a_request() -> None:
    whole = next_tokens(PROMPT, 8)
    rest = await read(make(), request(prompt=PROMPT + whole[:3], max_tokens=5))
    assert tokens(rest) == whole[3:]


async def test_a_first_token_that_came_with_the_kv_is_not_repeated() -> None:
    outputs = await read(make(), request(kv=RECEIVE))
    assert tokens(outputs) == next_tokens(PROMPT, 4)[1:]
    assert outputs[0].first_index == 1
    report = outputs[0].kv
    assert report is not None
    assert (report.outcome, report.tokens, report.computed_tokens) == (
        inference_pb2.KV_OUTCOME_TRANSFERRED,
        len(PROMPT),
        1,
    )


async def test_a_stop_token_ends_the_stream() -> None:
    third = next_tokens(PROMPT, 3)[2]
    outputs = await read(make(), request(max_tokens=9, stop_token_ids=(third,)))
    assert tokens(outputs) == next_tokens(PROMPT, 3)
    assert outputs[-1].finish_reason == STOP


async def test_outputs_have_logprobs_only_if_requested() -> None:
    (output,) = await read(make(), request(max_tokens=1, logprobs=2))
    assert output.logprobs[0].top[0].token_id == output.token_ids[0]
    assert len(output.logprobs[0].top) == 2
    (output,) = await read(make(), request(max_tokens=1))
    assert output.logprobs == ()


async def test_time_passes_according_to_the_latency_model() -> None:
    time = VirtualTime()
    latency = FakeLatency(prefill_ms_per_token=10, decode_step_ms=100, transfer_ms=1000)
    outputs = await read(make(time, latency=latency), request(max_tokens=3))
    assert time.now_s == pytest.approx(0.03 + 0.2)
    assert outputs[0].queue_ms == 0.0
    assert outputs[0].prefill_ms == pytest.approx(30)
    assert (outputs[1].queue_ms, outputs[1].prefill_ms) == (0.0, 0.0)


async def test_prefill_blocks_are_held_until_the_transfer_ends_or_they_are_released() -> None:
    hour = FakeLatency(transfer_ms=3_600_000)
    engine = FakeEngine(Config(), Pool.PREFILL, latency=hour)
    total = engine.load().kv_blocks_total
    await read(engine, request(kv=KvSend(forwards_first_token=True), max_tokens=1))
    assert engine.load().kv_blocks_free == total - 1
    assert engine.load().running == 0
    await engine.release("another#0")
    assert engine.load().kv_blocks_free == total - 1
    await engine.release("r#0")
    assert engine.load().kv_blocks_free == total

    quick = make()
    await read(quick, request(kv=KvSend(forwards_first_token=True), max_tokens=1))
    async with asyncio.timeout(5):
        while quick.load().kv_blocks_free < total:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_closing_the_stream_frees_everything() -> None:
    engine = make()
    idle = engine.load()
    for kv in (None, RECEIVE, KvSend(forwards_first_token=True)):
        outputs = stream(engine, request(kv=kv, max_tokens=50))
        await anext(outputs)
        assert engine.load().kv_blocks_free < idle.kv_blocks_free
        await outputs.aclose()
        assert engine.load() == idle


async def test_requests_that_wait_for_blocks_are_counted_as_queued() -> None:
    engine = make(size=FakeSize(kv_blocks=1, kv_block_tokens=8))
    first = stream(engine, request("a#0"))
    await anext(first)
    second = asyncio.create_task(read(engine, request("b#0")))
    await asyncio.sleep(0)
    load = engine.load()
    assert (load.queue_depth, load.running, load.queued_tokens, load.kv_blocks_free) == (1, 1, 3, 0)
    await first.aclose()
    assert tokens(await second) == next_tokens(PROMPT, 4)
    assert engine.load().queue_depth == 0


async def test_a_cancelled_request_leaves_the_queue() -> None:
    engine = make(size=FakeSize(kv_blocks=1, kv_block_tokens=8))
    first = stream(engine, request("a#0"))
    await anext(first)
    waiting = asyncio.create_task(read(engine, request("b#0")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert engine.load().queue_depth == 0
    await first.aclose()
    assert tokens(await read(engine, request("c#0"))) == next_tokens(PROMPT, 4)


async def test_a_dead_engine_ends_all_requests() -> None:
    engine = make(size=FakeSize(kv_blocks=1, kv_block_tokens=8))
    running = stream(engine, request("a#0"))
    await anext(running)
    waiting = asyncio.create_task(read(engine, request("b#0")))
    await asyncio.sleep(0)
    await engine.check_health()
    engine.fail()
    for failing in (anext(running), waiting, read(engine, request("c#0")), engine.check_health()):
        with pytest.raises(WorkerLostError):
            await failing
    assert engine.load().kv_blocks_free == engine.load().kv_blocks_total


@pytest.mark.parametrize("prompt", [(), tuple(range(8192))])
async def test_a_prompt_that_does_not_fit_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        await read(make(), request(prompt=prompt))
