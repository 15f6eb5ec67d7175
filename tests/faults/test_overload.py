"""An overloaded cluster still completes requests at about its peak rate.

The tests run in virtual time. ``bench.overload`` measures the same with real processes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import grpc
import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import FakeLatency, next_tokens
from router.admission.policy import AdmissionLimits, ClassLimits
from router.placement.policy import (
    PlacementLimits,
)
from tests.support.simulated_cluster import SimClient, SimCluster, SimProcess
from tests.support.virtual_time import elapse, run_virtually

pytestmark = pytest.mark.timeout(300)

OK = grpc.StatusCode.OK
PROMPT_TOKENS, OUTPUT_TOKENS = 10, 20  # a request needs 8 KV blocks of 4 tokens
LATENCY = FakeLatency(prefill_ms_per_token=2.0, decode_step_ms=5.0, transfer_ms=5.0)
PEAK_S = 20.0  # how long the peak rate is measured
OVERLOAD_FACTOR = 10  # offered rate divided by the peak rate
OVERLOAD_S = 20.0
AFTER_S = 10.0
# Time to recover after the overload. From then on, each TTFT is at most twice the longest one
# before the overload.
RECOVERY_S = 2.0


@dataclass
class Run:
    """One cluster under load, with its clients.

    Args:
        decode_blocks: KV blocks of the decode worker.
    """

    cluster: SimCluster
    decode_blocks: int
    clients: list[SimClient] = field(default_factory=list)
    most_queued: int = 0  # most requests that waited for KV in the decode engine at one time

    def __post_init__(self) -> None:
        self.prefill = self.cluster.add(Pool.PREFILL, LATENCY, limit=256, kv_blocks=4096)
        self.decode = self.cluster.add(Pool.DECODE, LATENCY, 256, self.decode_blocks)

    async def send(self, timeout_s: float, service_class: str = "") -> SimClient:
        """Send one request and wait for its end."""
        rng = self.cluster.rng
        request = inference_pb2.GenerateRequest(service_class=service_class)
        request.token_ids.ids.extend(rng.randrange(3, 200) for _ in range(PROMPT_TOKENS))
        request.sampling.max_tokens = OUTPUT_TOKENS
        client = SimClient(request, self.cluster.clock, self.cluster.living_routers, timeout_s)
        self.clients.append(client)
        await client.call(self.cluster.routers[0])
        return client

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Return the requests per second of clients that each send one request after the other."""
        end_s = self.cluster.clock() + seconds

        async def loop() -> int:
            count = 0
            while self.cluster.clock() < end_s:
                await self.send(1000)
                count += 1
            return count

        return sum(await asyncio.gather(*(loop() for _ in range(clients)))) / seconds

    async def open_loop(
        self, rate: float, seconds: float, timeout_s: float, *, service_class: str = ""
    ) -> list[SimClient]:
        """Send ``rate`` requests per second on average, however many are still running."""
        tasks = []
        end_s = self.cluster.clock() + seconds
        while self.cluster.clock() < end_s:
            await elapse(self.cluster.rng.expovariate(rate))
            tasks.append(asyncio.create_task(self.send(timeout_s, service_class)))
            self.most_queued = max(self.most_queued, self.decode.engine.load().queue_depth)
        return await asyncio.gather(*tasks)


def ended_well(clients: list[SimClient]) -> list[SimClient]:
    return [each for each in clients if each.statuses[0][0] is OK]


def check_each(clients: list[SimClient]) -> None:
    """Check that each request ended once and by its deadline.

    It ended with all its tokens, or it was refused or ran out of time.
    """
    for client in clients:
        ((code, reason),) = client.statuses
        assert client.ended_s <= client.deadline_s + 0.001
        tokens = tuple(token for each in client.responses for token in each.token_ids)
        if code is OK:
            assert tokens == next_tokens(client.request.token_ids.ids, OUTPUT_TOKENS)
        else:
            assert reason in {"QUEUE_FULL", "QUEUE_TIMEOUT", "WOULD_BE_LATE", "DEADLINE_EXCEEDED"}


def check_empty(worker: SimProcess) -> None:
    load = worker.engine.load()
    assert (load.kv_blocks_free, load.running, load.queue_depth) == (load.kv_blocks_total, 0, 0)


@pytest.mark.parametrize("decode_blocks", [4096, 64], ids=["prefill-bound", "decode-bound"])
@pytest.mark.parametrize(
    ("timeout_s", "queue_timeout_s"), [(10.0, 1.0), (1.0, 30.0)], ids=["short-queue", "short-time"]
)
def test_overload_costs_no_goodput(
    decode_blocks: int, timeout_s: float, queue_timeout_s: float
) -> None:
    async def run() -> None:
        limits = AdmissionLimits(256, {"only": ClassLimits(1, 256, queue_timeout_s)})
        placement = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
        async with SimCluster(random.Random(1), limits, placement) as cluster:
            run = Run(cluster, decode_blocks)
            await elapse(1)
            peak = await run.closed_loop(16, PEAK_S)
            normal = await run.open_loop(peak / 2, AFTER_S, timeout_s)
            slowest_s = max(ttft_s(each) for each in normal)
            begin_s = cluster.clock()
            over = asyncio.create_task(run.open_loop(OVERLOAD_FACTOR * peak, OVERLOAD_S, timeout_s))
            await elapse(OVERLOAD_S + RECOVERY_S)
            after = await run.open_loop(peak / 2, AFTER_S, timeout_s)
            over_clients = await over
            done = [
                each for each in ended_well(over_clients) if each.ended_s < begin_s + OVERLOAD_S
            ]
            reasons = Counter(each.statuses[0] for each in over_clients)
            assert len(done) / OVERLOAD_S >= 0.9 * peak, (peak, len(done) / OVERLOAD_S, reasons)
            check_each(run.clients)
            assert ended_well(after) == after
            assert max(ttft_s(each) for each in after) <= 2 * slowest_s
            # Placement counts the KV blocks that a request will need, so no request waits for
            # blocks in the decode engine.
            assert run.most_queued == 0
        check_empty(run.prefill)
        check_empty(run.decode)

    run_virtually(run(), 1)


def test_a_slower_worker_still_serves_its_peak_rate_in_time() -> None:
    """At first every request is late. The router must still learn the slower worker's speed."""

    async def run() -> None:
        limits = AdmissionLimits(256, {"only": ClassLimits(1, 256, 30)})
        placement = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
        async with SimCluster(random.Random(1), limits, placement) as cluster:
            run = Run(cluster, 4096)
            await elapse(1)
            peak = await run.closed_loop(16, PEAK_S)
            over = asyncio.create_task(run.open_loop(3 * peak, 20, 1.0))
            await elapse(10)
            run.decode.slowness = 6.0  # an answer now takes about six times as long
            adapted_s = cluster.clock() + 3
            clients = await over
            check_each(clients)
            done = [
                each for each in ended_well(clients) if adapted_s < each.ended_s < adapted_s + 7
            ]
            assert len(done) / 7 >= 0.9 * peak

    run_virtually(run(), 1)


def ttft_s(client: SimClient) -> float:
    return client.first_s - client.began_s


def test_classes_share_an_overloaded_cluster_by_weight() -> None:
    async def run() -> None:
        classes = {"many": ClassLimits(3, 64, 5), "few": ClassLimits(1, 64, 5)}
        placement = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
        async with SimCluster(
            random.Random(1), AdmissionLimits(256, classes), placement
        ) as cluster:
            run = Run(cluster, 4096)
            await elapse(1)
            many, few = await asyncio.gather(
                run.open_loop(200, OVERLOAD_S, 100),
                run.open_loop(200, OVERLOAD_S, 100, service_class="few"),
            )
            check_each(run.clients)
            ratio = len(ended_well(many)) / len(ended_well(few))
            assert ratio == pytest.approx(3, rel=0.2)

    run_virtually(run(), 1)
