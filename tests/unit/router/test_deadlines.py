"""A request whose deadline has passed is dropped before it costs anything."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import grpc
import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import FakeLatency
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.expired_call import Expired
from tests.support.fake_workers import FakeDecode, FakePrefill
from tests.support.router_harness import RouterHarness
from tests.support.simulated_cluster import SimClient, SimCluster
from tests.support.virtual_time import elapse, run_virtually

LATE = grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_router_does_not_tokenise_a_late_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        tokenised: list[str] = []

        async def encode(prompt: str) -> tuple[int, ...]:
            tokenised.append(prompt)
            return (1, 2, 3)

        monkeypatch.setattr(router.codec, "encode_prompt", encode)
        assert router.server.servicer is not None
        context = Expired()
        with pytest.raises(grpc.aio.AbortError):
            await router.server.servicer.Generate(
                inference_pb2.GenerateRequest(prompt="late"), cast(Any, context)
            )
        assert context.code is LATE
        async for _ in router.call(prompt="in time", sampling={"max_tokens": 2}):
            pass
        assert tokenised == ["in time"]
        assert len(router.decode[0].requests) == len(router.prefill[0].requests) == 1


async def test_workers_know_the_deadline() -> None:
    """Workers that know the deadline end late requests even if the router has died or hangs."""
    prefill, decode = FakePrefill(), FakeDecode()
    async with RouterHarness(prefill=[prefill], decode=[decode]) as router:
        call = router.call(token_ids={"ids": (1, 2)}, timeout=20, sampling={"max_tokens": 2})
        async for _ in call:
            pass
        for worker in (prefill, decode):
            (remaining_s,) = worker.remaining_s
            assert 0 < remaining_s < 21  # gRPC rounds the timeout up


async def calls_for_late_turn(seed: int, before_deadline_s: float) -> int:
    """Return how many calls workers get for a request.

    The request leaves the queue ``before_deadline_s`` seconds before its deadline.
    """
    limits = AdmissionLimits(1, {"only": ClassLimits(weight=1, max_queue=1, queue_timeout_s=60)})
    async with SimCluster(random.Random(seed), limits) as cluster:
        latency = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=60_000)
        workers = [cluster.add(pool, latency) for pool in Pool]
        await elapse(1)
        (router,) = cluster.routers
        clients = []
        for name, timeout_s in (("first", 60.0), ("second", 10.0)):
            request = inference_pb2.GenerateRequest(request_id=name)
            request.token_ids.ids.extend((5, 6, 7))
            request.sampling.max_tokens = 2
            clients.append(SimClient(request, cluster.clock, cluster.living_routers, timeout_s))
        first = asyncio.create_task(clients[0].call(router))
        await elapse(1)
        second = asyncio.create_task(clients[1].call(router))
        await elapse(0.1)
        await elapse(clients[1].deadline_s - before_deadline_s - cluster.clock())
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert clients[1].statuses == [(LATE, "DEADLINE_EXCEEDED")]
        await elapse(1)
        return sum(key.startswith("second~") for worker in workers for key in worker.asked)


@pytest.mark.parametrize(("before_deadline_s", "calls"), [(0.5, 2), (0.0, 0)])
def test_a_request_whose_turn_comes_too_late_is_not_sent(
    before_deadline_s: float, calls: int
) -> None:
    for seed in range(20):
        assert run_virtually(calls_for_late_turn(seed, before_deadline_s), seed) == calls
