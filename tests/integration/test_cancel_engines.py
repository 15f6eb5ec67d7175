"""Real engines stop computing cancelled requests.

The tests use the embedded model. Its steps take so long that an abort always comes during a step.
The prefix cache shows how far a prefill came: it contains all blocks of each scheduled step.
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

CHUNK_TOKENS = 128  # per step of the prefill engine, and per KV block
CHUNKS = 14
LONG_TOKENS = CHUNKS * CHUNK_TOKENS + 1
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
        await engines.streamed(random_prompt(10, 0))  # connects the engines
        yield engines


class RunningRequest:
    """A request that runs on both engines until it is cancelled."""

    def __init__(self, engines: Engines, prompt: list[int]) -> None:
        self._engines = engines
        self._key = f"{uuid4().hex}#1"
        generate, key, receive = engines.generate, self._key, engines.receive
        self._tasks = [
            asyncio.create_task(generate(engines.prefill, key, prompt, KvSend(True))),
            asyncio.create_task(generate(engines.decode, key, prompt, receive, MANY_TOKENS)),
        ]

    async def cancel(self) -> None:
        """Cancel the request on both engines, as a router does."""
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engines.prefill.release(self._key)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def wait_for_step(engine: VllmEngine) -> None:
    """Wait for the engine's next step after which KV blocks are in use."""
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
    """Return how many tokens of ``prompt`` the prefill engine has cached, and compute the rest."""
    (output,) = await engines.generate(engines.prefill, f"{uuid4().hex}#1", prompt, None, ONE_TOKEN)
    return output.cached_tokens


async def test_a_cancelled_prefill_stops_at_the_next_chunk(engines: Engines) -> None:
    prompt = random_prompt(LONG_TOKENS, 1)
    request = RunningRequest(engines, prompt)
    await wait_for_step(engines.prefill)
    await request.cancel()
    await engines.wait_all_free()
    computed = await cached_tokens(engines, prompt)
    # One chunk was done, and one was running.
    assert CHUNK_TOKENS <= computed <= 2 * CHUNK_TOKENS
    assert await cached_tokens(engines, prompt) == CHUNKS * CHUNK_TOKENS, "the cache is too small"
    await engines.wait_all_free()


async def test_a_prompt_cancelled_in_the_queue_is_never_computed(engines: Engines) -> None:
    running_prompt, queued_prompt = random_prompt(LONG_TOKENS, 2), random_prompt(LONG_TOKENS, 3)
    running = RunningRequest(engines, running_prompt)
    await wait_for_step(engines.prefill)
    queued = RunningRequest(engines, queued_prompt)
    await until(lambda: engines.prefill.load().queue_depth == 1, what="the request is queued")
    await queued.cancel()
    # An abort takes less than a step, so it has taken effect when the next step ends.
    await wait_for_step(engines.prefill)
    await running.cancel()
    await engines.wait_all_free()
    assert await cached_tokens(engines, queued_prompt) == 0
    await engines.wait_all_free()
