"""More requests than the cluster can serve, in virtual time: what it does is still done in time.

``bench.overload`` measures the same with real processes.
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
from tests.support.simulated_cluster import SimClient, SimCluster, SimWorker
from tests.support.virtual_time import elapse, run_virtually

pytestmark = pytest.mark.timeout(300)

OK = grpc.StatusCode.OK
PROMPT, OUTPUT = 10, 20  # tokens; a request needs 8 of the 4-token blocks
LATENCY = FakeLatency(prefill_ms_per_token=2.0, decode_step_ms=5.0, transfer_ms=5.0)
PEAK_S = 20.0
TIMES = 10
OVER_S = 20.0
AFTER_S = 10.0
RECOVERY_S = 2.0


@dataclass
class Run:
    """One cluster under load, and what became of the requests.

    Args:
        decode_blocks: of KV, in the decode worker.
    """

    cluster: SimCluster
    decode_blocks: int
    clients: list[SimClient] = field(default_factory=list)
    most_queued: int = 0  # requests that waited for KV in the decode engine

    def __post_init__(self) -> None:
        self.prefill = self.cluster.add(Pool.PREFILL, LATENCY, limit=256, kv_blocks=4096)
        self.decode = self.cluster.add(Pool.DECODE, LATENCY, 256, self.decode_blocks)

    async def one(self, deadline_s: float, service_class: str = "") -> SimClient:
        rng = self.cluster.rng
        request = inference_pb2.GenerateRequest(service_class=service_class)
        request.token_ids.ids.extend(rng.randrange(3, 200) for _ in range(PROMPT))
        request.sampling.max_tokens = OUTPUT
        client = SimClient(request, self.cluster.clock, self.cluster.living_routers, deadline_s)
        self.clients.append(client)
        await client.call(self.cluster.routers[0])
        return client

    async def closed(self, clients: int, seconds: float) -> float:
        """Requests per second that so many clients get done, each one after the other."""
        end_s = self.cluster.clock() + seconds

        async def loop() -> int:
            count = 0
            while self.cluster.clock() < end_s:
                await self.one(1000)
                count += 1
            return count

        return sum(await asyncio.gather(*(loop() for _ in range(clients)))) / seconds

    async def open(
        self, rate: float, seconds: float, deadline_s: float, *, service_class: str = ""
    ) -> list[SimClient]:
        """Requests that come by themselves."""
        tasks = []
        end_s = self.cluster.clock() + seconds
        while self.cluster.clock() < end_s:
            await elapse(self.cluster.rng.expovariate(rate))
            tasks.append(asyncio.create_task(self.one(deadline_s, service_class)))
            self.most_queued = max(self.most_queued, self.decode.engine.load().queue_depth)
        return await asyncio.gather(*tasks)


def ended_well(clients: list[SimClient]) -> list[SimClient]:
    return [each for each in clients if each.statuses[0][0] is OK]


def check_each(clients: list[SimClient]) -> None:
    """Each ended once, by its deadline, in all of its tokens or before its first one."""
    for client in clients:
        ((code, reason),) = client.statuses
        assert client.ended_s <= client.deadline_s + 0.001
        tokens = tuple(token for each in client.responses for token in each.token_ids)
        if code is OK:
            assert tokens == next_tokens(client.request.token_ids.ids, OUTPUT)
        else:
            assert reason in {"QUEUE_FULL", "QUEUE_TIMEOUT", "WOULD_BE_LATE", "DEADLINE_EXCEEDED"}


def check_empty(worker: SimWorker) -> None:
    load = worker.engine.load()
    assert (load.kv_blocks_free, load.running, load.queue_depth) == (load.kv_blocks_total, 0, 0)


@pytest.mark.parametrize("decode_blocks", [4096, 64], ids=["prefill-bound", "decode-bound"])
@pytest.mark.parametrize(
    ("deadline_s", "queue_timeout_s"), [(10.0, 1.0), (1.0, 30.0)], ids=["short-queue", "short-time"]
)
def test_overload_costs_no_goodput(
    decode_blocks: int, deadline_s: float, queue_timeout_s: float
) -> None:
    async def run() -> None:
        limits = AdmissionLimits(256, {"only": ClassLimits(1, 256, queue_timeout_s)})
        placement = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
        async with SimCluster(random.Random(1), limits, placement) as cluster:
            run = Run(cluster, decode_blocks)
            await elapse(1)
            peak = await run.closed(16, PEAK_S)
            normal = await run.open(peak / 2, AFTER_S, deadline_s)
            slowest_s = max(first_s(each) for each in normal)
            begin_s = cluster.clock()
            over = asyncio.create_task(run.open(TIMES * peak, OVER_S, deadline_s))
            await elapse(OVER_S + RECOVERY_S)
            after = await run.open(peak / 2, AFTER_S, deadline_s)
            over_clients = await over
            done = [each for each in ended_well(over_clients) if each.ended_s < begin_s + OVER_S]
            reasons = Counter(each.statuses[0] for each in over_clients)
            assert len(done) / OVER_S >= 0.9 * peak, (peak, len(done) / OVER_S, reasons)
            check_each(run.clients)
            assert ended_well(after) == after
            assert max(first_s(each) for each in after) <= 2 * slowest_s
            # Who is let in has its KV blocks, those included that it will grow into.
            assert run.most_queued == 0
        check_empty(run.prefill)
        check_empty(run.decode)

    run_virtually(run(), 1)


def test_what_becomes_slower_is_begun_sooner() -> None:
    """At first deadlines pass while requests run, so that nobody who ends well tells of it."""

    async def run() -> None:
        limits = AdmissionLimits(256, {"only": ClassLimits(1, 256, 30)})
        placement = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
        async with SimCluster(random.Random(1), limits, placement) as cluster:
            run = Run(cluster, 4096)
            await elapse(1)
            peak = await run.closed(16, PEAK_S)
            over = asyncio.create_task(run.open(3 * peak, 20, 1.0))
            await elapse(10)
            run.decode.slowness = 6.0  # an answer takes 0.9 s
            slow_s = cluster.clock() + 3
            clients = await over
            check_each(clients)
            done = [each for each in ended_well(clients) if slow_s < each.ended_s < slow_s + 7]
            assert len(done) / 7 >= 0.9 * peak

    run_virtually(run(), 1)


def first_s(client: SimClient) -> float:
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
                run.open(200, OVER_S, 100), run.open(200, OVER_S, 100, service_class="few")
            )
            check_each(run.clients)
            ratio = len(ended_well(many)) / len(ended_well(few))
            assert ratio == pytest.approx(3, rel=0.2)

    run_virtually(run(), 1)
