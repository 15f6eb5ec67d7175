"""The simulator against the real router, servicers and fake engines, which run in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import FakeLatency, FakeSize
from router.admission.policy import AdmissionLimits, ClassLimits
from router.placement.policy import PlacementLimits
from simulate.cluster import default_settings, run
from simulate.latency import TransferLatency, TransferStart, fake_engine
from simulate.metrics import latencies_of
from simulate.trace import Trace, TraceRequest
from tests.support.simulated_cluster import POLL_S, RENEW_S, SimClient, SimCluster
from tests.support.virtual_time import elapse, run_virtually

LATENCY = FakeLatency(prefill_ms_per_token=5.0, decode_step_ms=10.0)
# The simulated cluster's decode workers look every 10 ms whether the KV is there.
FETCH_S = 0.005
KV_BLOCKS, BLOCK_TOKENS = 512, 4
LIMITS = AdmissionLimits(1000, {"only": ClassLimits(weight=1, max_queue=20, queue_timeout_s=30)})
PLACEMENT = PlacementLimits(dict.fromkeys(Pool, 64), prefill_backlog_s=0.2)
TTFT_S, ITL_S = 0.5, 0.02
WARM_UP_S = 1.0
DEADLINE_S = 600.0


class NoDelays(random.Random):
    """Lets each message arrive at once."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def trace(per_s: float, seed: int) -> Trace:
    rng, at_s, requests = random.Random(seed), 0.0, []
    for _ in range(400):
        at_s += rng.expovariate(per_s)
        requests.append(TraceRequest(at_s, rng.randint(5, 40), rng.randint(2, 20)))
    return Trace("t", tuple(requests))


async def real(requests: Sequence[TraceRequest], workers: int) -> tuple[list[float], list[float]]:
    """Return TTFT and mean ITL of each request; infinite if it was refused."""
    async with SimCluster(NoDelays(1), LIMITS, PLACEMENT) as cluster:
        for pool in Pool:
            for _ in range(workers):
                cluster.add(pool, LATENCY, limit=64, kv_blocks=KV_BLOCKS)
        await elapse(WARM_UP_S)
        (router,) = cluster.routers
        begin_s = cluster.clock()

        async def one(index: int, request: TraceRequest) -> tuple[float, float]:
            message = inference_pb2.GenerateRequest(request_id=f"r{index}")
            message.token_ids.ids.extend(
                5 + (index + each) % 10 for each in range(request.prompt_tokens)
            )
            message.sampling.max_tokens = request.output_tokens
            client = SimClient(message, cluster.clock, cluster.living_routers, DEADLINE_S)
            await elapse(begin_s + request.arrival_s - cluster.clock())
            await client.call(router)
            if client.statuses[-1][0] is not grpc.StatusCode.OK:
                return float("inf"), float("inf")
            gaps = request.output_tokens - 1
            return client.first_s - client.began_s, (client.ended_s - client.first_s) / gaps

        found = await asyncio.gather(*(one(*each) for each in enumerate(requests)))
    return [each[0] for each in found], [each[1] for each in found]


@pytest.mark.parametrize("per_s", [8.0, 14.0, 25.0], ids=["calm", "busy", "overload"])
def test_latencies_and_refusals_are_those_of_the_real_router(per_s: float) -> None:
    replayed = trace(per_s, seed=2)
    ttft_s, itl_s = map(np.array, run_virtually(real(replayed.requests, workers=2), seed=1))
    model = replace(
        fake_engine(LATENCY, FakeSize(KV_BLOCKS, BLOCK_TOKENS)),
        transfer=TransferLatency(FETCH_S, start=TransferStart.AFTER_PREFILL),
    )
    settings = default_settings()
    front = replace(
        settings.front,
        admission=LIMITS,
        placement=PLACEMENT,
        deadline_s=DEADLINE_S,
        report_snapshots=int(RENEW_S / POLL_S),
    )
    settings = replace(settings, front=front, poll_s=POLL_S)
    done = run(replayed, model, dict.fromkeys(Pool, 2), settings=settings)
    found = latencies_of(done)
    real_ok, found_ok = np.isfinite(ttft_s), np.isfinite(found.ttft_s)
    assert found_ok.mean() == pytest.approx(real_ok.mean(), abs=0.05)
    assert (found.ttft_s <= TTFT_S).mean() == pytest.approx((ttft_s <= TTFT_S).mean(), abs=0.05)
    assert (found.itl_s <= ITL_S).mean() == pytest.approx((itl_s <= ITL_S).mean(), abs=0.05)
    for fraction in (0.5, 0.95):
        expected = np.quantile(ttft_s[real_ok], fraction)
        assert np.quantile(found.ttft_s[found_ok], fraction) == pytest.approx(expected, rel=0.05)
