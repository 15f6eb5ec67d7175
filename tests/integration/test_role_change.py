"""Two real engines of the embedded model swap their roles, without loading the model again."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest

import baton
from baton.v1 import inference_pb2 as pb
from core.config.schema import Config, load_config
from core.model.resolve import resolve_model
from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerState
from engine.protocol import EngineRequest
from engine.vllm.engine import VllmEngine
from router.server import RouterServer
from tests.support.prompts import random_prompt
from tests.support.two_engines import Engines, two_engines
from tests.support.waiting import until, until_awaited
from tests.support.worker_parts import SERVICES
from worker.replica import WorkerReplica

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

OVERRIDES = {
    "cluster.role_change": True,
    "model.dtype": "float32",  # in bfloat16, tokens of almost equal probability may swap
    "model.max_model_len": 1024,
}
LENGTHS = [1, 127, 128, 129, 700]  # tokens; a KV block has 128


async def make_pairs(engines: Engines) -> None:
    prefill = {engines.receive.incarnation: engines.receive.control_addresses}
    decode = {engines.decode_incarnation: engines.decode_addresses}

    async def are_paired() -> bool:
        return not (
            await engines.decode.pair_up(prefill, Pool.DECODE)
            or await engines.prefill.pair_up(decode, Pool.PREFILL)
        )

    await until_awaited(are_paired, what="both engines are paired in these roles")


async def check_answers(engines: Engines, seed: int) -> None:
    """Check that streamed answers are those of one undivided engine."""
    prompts = [random_prompt(length, seed + length) for length in LENGTHS]
    answers = await asyncio.gather(*(engines.streamed(prompt) for prompt in prompts))
    for prompt, (tokens, report) in zip(prompts, answers, strict=True):
        assert report.outcome == pb.KV_OUTCOME_TRANSFERRED
        assert report.computed_tokens <= 1
        assert tokens == await engines.aggregated(prompt)
    await engines.wait_all_free()


async def test_both_engines_swap_their_roles_and_back() -> None:
    async with two_engines(OVERRIDES, "01") as engines:
        prompt = random_prompt(300, 9)
        whole, _ = await engines.streamed(prompt)
        for seed, current in enumerate((engines, engines.swapped(), engines)):
            await make_pairs(current)
            await check_answers(current, 1000 * seed)
            # Each engine has its KV from another source: computed, received, and both.
            assert (await current.streamed(prompt))[0] == whole
            await current.wait_all_free()


@contextlib.asynccontextmanager
async def running_worker(
    config: Config, pool: Pool, core: str, registry: MemoryRegistry
) -> AsyncIterator[VllmEngine]:
    model = resolve_model(config.model, print)
    incarnation = f"role-change-{os.getpid()}-{core}"
    engine = VllmEngine(
        config=config,
        pool=pool,
        model=model,
        cpu_binding=core,
        kv_secret="secret",
        incarnation=incarnation,
    )
    worker = WorkerReplica(
        config=config,
        pool=pool,
        model=model.served_name,
        engine=engine,
        registry=registry,
        services=SERVICES,
        incarnation=incarnation,
        credentials=None,
    )
    await worker.start()
    try:
        yield engine
    finally:
        await worker.stop(1)


async def test_workers_swap_their_pools_by_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stream runs when both are ordered. It ends on its worker, within the grace."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    config = load_config(
        overrides=OVERRIDES
        | {"router.port": 0, "prefill.shutdown_grace_s": 60, "decode.shutdown_grace_s": 60}
    )
    registry = MemoryRegistry(lease_s=config.redis.lease_s)
    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running_worker(config, pool, core, registry))
            for pool, core in ((Pool.PREFILL, "0"), (Pool.DECODE, "1"))
        ]
        router = RouterServer(config, registry)
        client = baton.AsyncClient(f"127.0.0.1:{await router.start()}")
        stack.push_async_callback(router.stop, 1)
        await stack.enter_async_context(client)

        for seed in range(3):
            await check_answer(client, engines[0], seed)
            before = {each.id: each.pool for each in await registry.list()}
            assert sorted(before.values()) == [Pool.DECODE, Pool.PREFILL]
            running = asyncio.create_task(check_answer(client, engines[0], 50 + seed, 100))
            await until(lambda: any(map(is_busy, engines)), what="the stream runs")
            for worker_id, pool in before.items():
                await registry.ask_to_change_role(worker_id, pool.other)
            await running

            def swapped(before: dict[str, Pool] = before) -> bool:
                assert router.workers is not None
                now = router.workers.snapshot
                return len(now) == 2 and all(
                    each.state is WorkerState.READY and each.pool is not before[each.id]
                    for each in now
                )

            await until(swapped, what="both workers are in their new pools", within_s=60)


def is_busy(engine: VllmEngine) -> bool:
    load = engine.load()
    return load.queued_tokens + load.running > 0


async def check_answer(
    client: baton.AsyncClient, engine: VllmEngine, seed: int, max_tokens: int = 8
) -> None:
    """Check an answer of the cluster, whose KV was streamed, with one engine's own answer."""
    prompt = random_prompt(300, seed)
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    answer = await client.complete(
        token_ids=prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True
    )
    assert answer.phases.attempts == 1
    assert answer.phases.kv is not None
    assert answer.phases.kv.outcome is baton.KvOutcome.TRANSFERRED
    request = EngineRequest(f"alone-{seed}#1", tuple(prompt), sampling, None)
    alone = [token async for output in engine.generate(request) for token in output.token_ids]
    assert list(answer.token_ids) == alone
