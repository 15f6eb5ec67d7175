"""Real engines stop computing what nobody wants any more; the embedded model, whose steps are so
long that an abort always comes while one runs.

How far a prefill came is the prefix cache's to say: it has each block of a step that was scheduled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from baton.v1 import inference_pb2 as pb
from engine.protocol import KvSend
from engine.vllm.engine import VllmEngine
from tests.support.prompts import random_prompt
from tests.support.two_engines import Engines, two_engines
from tests.support.waiting import until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]

CHUNK_TOKENS = 128  # a step of the prefill engine, and a block
CHUNKS = 14
LONG = CHUNKS * CHUNK_TOKENS + 1
MANY_TOKENS = pb.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
ONE_TOKEN = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Engines]:
    arguments = {"max_num_batched_tokens": CHUNK_TOKENS, "block_size": CHUNK_TOKENS}
    overrides = {
        "model.max_model_len": 2048,
        "prefill.engine": arguments,
        "decode.engine": {"block_size": CHUNK_TOKENS},
    }
    async with two_engines(overrides, "01") as engines:
        await engines.streamed(random_prompt(10, 0))  # makes the pair
        yield engines


class Request:
    """One that both engines work on, until it is cancelled."""

    def __init__(self, engines: Engines, prompt: list[int]) -> None:
        self._engines = engines
        self._key = f"{uuid4().hex}#1"
        read, key, receive = engines.read, self._key, engines.receive
        self._tasks = [
            asyncio.create_task(read(engines.prefill, key, prompt, KvSend(True))),
            asyncio.create_task(read(engines.decode, key, prompt, receive, MANY_TOKENS)),
        ]

    async def cancel(self) -> None:
        """As a router does."""
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engines.prefill.release(self._key)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def stepped(engine: VllmEngine) -> None:
    """Return after the engine's next step that leaves it with KV blocks in use."""
    stats = engine._stats
    record, done = stats.record, asyncio.Event()

    def note(scheduler_stats: Any) -> None:
        record(scheduler_stats)
        if stats.blocks_free < stats.blocks_total:
            done.set()

    stats.record = note  # type: ignore[method-assign]
    try:
        async with asyncio.timeout(30):
            await done.wait()
    finally:
        stats.record = record  # type: ignore[method-assign]


async def cached_tokens(engines: Engines, prompt: list[int]) -> int:
    """How much of ``prompt`` the prefill engine has computed; it is all computed now."""
    (output,) = await engines.read(engines.prefill, f"{uuid4().hex}#1", prompt, None, ONE_TOKEN)
    return output.cached_tokens


async def test_an_abandoned_prefill_stops_at_the_next_chunk(engines: Engines) -> None:
    prompt = random_prompt(LONG, 1)
    request = Request(engines, prompt)
    await stepped(engines.prefill)
    await request.cancel()
    await engines.all_free()
    computed = await cached_tokens(engines, prompt)
    # One chunk was done, and one was under way.
    assert CHUNK_TOKENS <= computed <= 2 * CHUNK_TOKENS
    assert await cached_tokens(engines, prompt) == CHUNKS * CHUNK_TOKENS, "or this could not fail"
    await engines.all_free()


async def test_a_prompt_abandoned_in_the_queue_is_never_begun(engines: Engines) -> None:
    before, abandoned = random_prompt(LONG, 2), random_prompt(LONG, 3)
    running = Request(engines, before)
    await stepped(engines.prefill)
    queued = Request(engines, abandoned)
    await until(lambda: engines.prefill.load().queue_depth == 1, what="it is queued")
    await queued.cancel()
    # For longer than it takes an abort.
    await stepped(engines.prefill)
    await running.cancel()
    await engines.all_free()
    assert await cached_tokens(engines, abandoned) == 0
    await engines.all_free()
