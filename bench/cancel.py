"""Measures how long a cancelled request still holds KV blocks.

A router and two workers with real engines (P: prefill, D: decode) run in one event loop. Each
engine reports every finished step to this loop. The measured times:

freed     the client cancels -> neither engine has the request or one of its blocks
step      length of the engine step during which the client cancels; a step is not interrupted. The
          engine is P in the first two phases below and D in the last two
beyond    the end of that step -> freed; 0 if the request is freed before that end

The phases in which a request is cancelled:

queued       D has reserved blocks for the request; P computes another prompt
prefilling   P has computed the first chunk
handed over  the client has received P's token
decoding     the client has received BEFORE_CANCEL tokens
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import baton
from baton.v1 import inference_pb2
from bench.report import Report, spread
from bench.serving import fresh_prompt
from core.config.schema import load_config
from core.model.resolve import resolve_model
from core.state.registry import MemoryRegistry
from core.types import Pool
from decode_worker.servicer import add_decode_service
from engine.protocol import EngineRequest
from engine.vllm.engine import VllmEngine
from prefill_worker.servicer import add_prefill_service
from router.server import RouterServer
from worker.replica import WorkerReplica

ADD_SERVICE = {Pool.PREFILL: add_prefill_service, Pool.DECODE: add_decode_service}
PHASES = ("queued", "prefilling", "handed over", "decoding")
CHUNK_TOKENS = 256  # tokens per prefill step
PROMPT_TOKENS = 1700  # several chunks
BEFORE_CANCEL = 20  # tokens that the client has received when it cancels a decoding request
WAIT_S = 60.0  # longest wait for an engine to reach a state
GRACE_S = 5.0  # time that running requests get when a server stops
_ONE_TOKEN = inference_pb2.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


class EngineWatch:
    """Records when one engine reports a step, and tells whether the engine holds requests."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.reports_s = [time.perf_counter()]
        self._changed = asyncio.Event()
        record = engine._stats.record

        def record_and_note(scheduler_stats: Any) -> None:
            record(scheduler_stats)
            self.reports_s.append(time.perf_counter())
            self._changed.set()

        engine._stats.record = record_and_note  # type: ignore[method-assign]

    def is_free(self) -> bool:
        load = self.engine.load()
        return load.kv_blocks_free == load.kv_blocks_total and not load.queue_depth

    def has_no_queue(self) -> bool:
        return not self.engine.load().queue_depth

    async def until(self, condition: Callable[[], bool]) -> float:
        """Wait until ``condition`` holds, checking now and after each report. Return the time."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class CancelledRequest:
    """The times of one cancelled request; the module's docstring explains them."""

    freed_ms: float
    step_ms: float
    beyond_ms: float


class CancelBench:
    """Cancels one request at a time. In the phase "queued", another request keeps P busy."""

    def __init__(
        self, client: baton.AsyncClient, prefill: EngineWatch, decode: EngineWatch
    ) -> None:
        self._client = client
        self._prefill = prefill
        self._decode = decode
        self._rng = random.Random(1)

    async def cancel_in(self, phase: str) -> CancelledRequest:
        """Run one request and cancel it in this phase, at a random moment of a step."""
        computing = self._prefill if phase in ("queued", "prefilling") else self._decode
        async with self._busy_prefill() if phase == "queued" else contextlib.nullcontext():
            stream = self._client.generate(
                token_ids=fresh_prompt(PROMPT_TOKENS, self._rng), max_tokens=200, ignore_eos=True
            )
            await self._reach(phase, stream)
            step_s = computing.reports_s[-1] - computing.reports_s[-2]
            await asyncio.sleep(step_s * self._rng.random())
            steps = len(computing.reports_s)
            cancelled_s = time.perf_counter()
            await stream.aclose()
            prefill_released = (
                self._prefill.has_no_queue if phase == "queued" else self._prefill.is_free
            )
            freed_s = max(
                await asyncio.gather(
                    self._prefill.until(prefill_released), self._decode.until(self._decode.is_free)
                )
            )
            await computing.until(lambda: len(computing.reports_s) > steps)
        await self._prefill.until(self._prefill.is_free)
        began_s, ended_s = computing.reports_s[steps - 1 : steps + 1]
        return CancelledRequest(
            freed_ms=1000 * (freed_s - cancelled_s),
            step_ms=1000 * (ended_s - began_s),
            beyond_ms=1000 * max(0.0, freed_s - ended_s),
        )

    async def _reach(self, phase: str, stream: baton.AsyncResponseStream) -> None:
        """Read the stream until the request is in this phase."""
        tokens = {"handed over": 1, "decoding": BEFORE_CANCEL}.get(phase, 0)
        while tokens > 0:
            tokens -= len((await anext(stream)).token_ids)
        await self._decode.until(lambda: not self._decode.is_free())
        if phase == "queued":
            await self._prefill.until(lambda: not self._prefill.has_no_queue())
        elif phase == "prefilling":
            await self._prefill.until(lambda: not self._prefill.is_free())

    @contextlib.asynccontextmanager
    async def _busy_prefill(self) -> AsyncIterator[None]:
        """Let P compute another prompt during the body, and wait until that prompt is done."""

        async def compute() -> None:
            prompt = tuple(fresh_prompt(PROMPT_TOKENS, self._rng))
            request = EngineRequest(f"{uuid4().hex}#1", prompt, _ONE_TOKEN, None)
            async for _ in self._prefill.engine.generate(request):
                pass

        task = asyncio.create_task(compute())
        await self._prefill.until(lambda: not self._prefill.is_free())
        yield
        await task


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[CancelBench]:
    """Start two workers and a router, and yield a bench with a client of the router."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = load_config(
        overrides={
            "router.port": 0,
            "model.max_model_len": 2048,
            "prefill.engine": {"max_num_batched_tokens": CHUNK_TOKENS},
        }
    )
    model = resolve_model(config.model, print)
    registry = MemoryRegistry(lease_s=config.redis.lease_s)
    watches: list[EngineWatch] = []
    async with contextlib.AsyncExitStack() as stack:
        for core, pool in enumerate(Pool):
            incarnation = uuid4().hex
            engine = VllmEngine(
                config,
                pool,
                model,
                cpu_binding=str(core),
                kv_secret="bench",
                incarnation=incarnation,
            )
            watches.append(EngineWatch(engine))
            worker = WorkerReplica(
                config=config,
                pool=pool,
                model=model.served_name,
                engine=engine,
                registry=registry,
                services={pool: ADD_SERVICE[pool]},
                incarnation=incarnation,
                credentials=None,
            )
            await worker.start()
            stack.push_async_callback(worker.stop, GRACE_S)
        router = RouterServer(config, registry)
        port = await router.start()
        stack.push_async_callback(router.stop, GRACE_S)
        client = await stack.enter_async_context(baton.AsyncClient(f"127.0.0.1:{port}"))
        await client.complete(token_ids=[5] * 300, max_tokens=8)  # warm-up
        yield CancelBench(client, *watches)


async def measure(rounds: int, report: Report) -> None:
    async with cluster() as bench:
        for phase in PHASES:
            requests = [await bench.cancel_in(phase) for _ in range(rounds)]
            report.add(
                phase=phase,
                **spread("freed", [each.freed_ms for each in requests]),
                **spread("step", [each.step_ms for each in requests]),
                **spread("beyond", [each.beyond_ms for each in requests]),
                rounds=rounds,
            )
    report.save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cancel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asyncio.run(measure(args.rounds, Report(args.json)))


if __name__ == "__main__":
    main()
