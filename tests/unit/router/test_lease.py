"""What routers publish under load, and what requests do while a pool has no worker. In virtual
time, with Baton's own router and worker code."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import pytest

from baton.v1 import inference_pb2
from core.types import Need, Pool, PoolPlan, RouterRecord
from engine.fake import FakeLatency, next_tokens
from router.admission.policy import AdmissionLimits, ClassLimits
from router.placement.policy import PlacementLimits
from tests.support.simulated_cluster import (
    FAILOVER_S,
    LEASE_S,
    POLL_S,
    RENEW_S,
    SimClient,
    SimCluster,
)
from tests.support.virtual_time import elapse, run_virtually

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
LATENCY = FakeLatency(prefill_ms_per_token=2.0, decode_step_ms=5.0, transfer_ms=5.0)
PLACEMENT = PlacementLimits(dict.fromkeys(Pool, 256), prefill_backlog_s=0.2)
COLD_S, QUEUE_S = 90.0, 5.0
PROMPT, OUTPUT_TOKENS = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14), 20
DECODE_PLAN = (PoolPlan(Pool.PREFILL, max_workers=4), PoolPlan(Pool.DECODE, max_workers=4))

Scenario = Callable[[SimCluster], Awaitable[None]]


def simulate(scenario: Scenario, *, queue_s: float = QUEUE_S, max_concurrent: int = 256) -> None:
    limits = AdmissionLimits(
        max_concurrent, {"only": ClassLimits(1, 1000, queue_s)}, cold_start_timeout_s=COLD_S
    )

    async def run() -> None:
        async with SimCluster(random.Random(1), limits, PLACEMENT) as cluster:
            await scenario(cluster)

    run_virtually(run(), 0)


def client_of(cluster: SimCluster, timeout_s: float = 1000.0) -> SimClient:
    request = inference_pb2.GenerateRequest()
    request.token_ids.ids.extend(PROMPT)
    request.sampling.max_tokens = OUTPUT_TOKENS
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s)


def add_workers(cluster: SimCluster, prefill: int, decode: int, decode_blocks: int = 4096) -> None:
    for _ in range(prefill):
        cluster.add(Pool.PREFILL, LATENCY, limit=256, kv_blocks=4096)
    for _ in range(decode):
        cluster.add(Pool.DECODE, LATENCY, limit=256, kv_blocks=decode_blocks)


def records(cluster: SimCluster) -> list[RouterRecord]:
    """What each living router would publish now."""
    return [router.lease.record() for router in cluster.living_routers()]


def waiting(record: RouterRecord) -> int:
    return sum(each.requests for each in record.queues)


def running(record: RouterRecord, pool: Pool) -> int:
    return sum(each.requests for each in record.shares if each.pool is pool)


@pytest.mark.parametrize(
    ("prefill", "decode_blocks", "need"),
    [(1, 4096, Need.PREFILL), (8, 64, Need.DECODE)],
)
def test_the_need_of_an_overloaded_cluster(prefill: int, decode_blocks: int, need: Need) -> None:
    """One prefill worker computes 50 prompts per second. 64 blocks hold 8 requests, and each of
    them takes 0.1 s on the decode worker."""

    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill, decode=1, decode_blocks=decode_blocks)
        await elapse(1)
        seen: Counter[Need] = Counter()
        tasks = []
        for number in range(150):
            tasks.append(asyncio.create_task(client_of(cluster).call(cluster.routers[0])))
            await elapse(0.005)
            for record in records(cluster) if number % 5 == 0 else ():
                seen.update({each.need: each.requests for each in record.queues})
        assert seen.total() > 500, "requests had to wait"
        assert seen[need] > 0.6 * seen.total(), seen
        await asyncio.gather(*tasks)
        assert all(waiting(record) == 0 for record in records(cluster))

    simulate(scenario, queue_s=1000)


def test_requests_that_need_both_pools() -> None:
    async def scenario(cluster: SimCluster) -> None:
        # Two prompts keep a prefill worker busy, and 16 blocks hold two requests.
        add_workers(cluster, prefill=1, decode=1, decode_blocks=16)
        await elapse(1)
        for worker in cluster.living():
            worker.stop()
        tasks = [asyncio.create_task(client_of(cluster).call(cluster.routers[0])) for _ in range(5)]
        await elapse(POLL_S)
        (record,) = records(cluster)
        assert [(each.need, each.requests) for each in record.queues] == [(Need.BOTH, 3)]
        assert {share.pool: share.requests for share in record.shares} == dict.fromkeys(Pool, 2)
        for worker in cluster.living():
            worker.resume()
        await asyncio.gather(*tasks)

    simulate(scenario)


def test_the_numbers_of_two_routers_add_up() -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=1, decode_blocks=64)
        await cluster.add_router()
        await elapse(1.0)
        open_calls: set[int] = set()
        ended = []

        async def live(number: int) -> None:
            client = client_of(cluster)
            open_calls.add(number)
            await client.call(cluster.routers[number % 2])
            open_calls.discard(number)
            ended.append(client)

        tasks = []
        begin_s = cluster.clock()
        for number in range(100):
            tasks.append(asyncio.create_task(live(number)))
            await elapse(0.0123456)
            both = records(cluster)
            # A request that runs stays on its decode worker until it ends. At its end it may have
            # left the worker and still send its status to the client.
            on_decode = sum(running(record, Pool.DECODE) for record in both)
            assert sum(waiting(record) for record in both) + on_decode == len(open_calls)
            for router, record in zip(cluster.routers, both, strict=True):
                assert waiting(record) == router.admission.waiting
                assert running(record, Pool.DECODE) == router.admission.running
                assert running(record, Pool.PREFILL) <= router.admission.running
        arrived_s = cluster.clock() - begin_s
        both = records(cluster)
        assert sum(record.arrived_requests for record in both) == 100
        assert sum(record.arrived_prompt_tokens for record in both) == 100 * len(PROMPT)
        assert all(record.window_s >= arrived_s for record in both)
        await asyncio.gather(*tasks)
        assert all(client.statuses[0][0] is OK for client in ended)
        total = sum((record.ttft_s.total for record in records(cluster)), 0)
        assert total == 100, "one TTFT for each request"
        assert sum(record.itl_s.total for record in records(cluster)) == 100 * (OUTPUT_TOKENS - 1)

    simulate(scenario, queue_s=1000)


def test_measured_rates() -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=1)
        await elapse(1.0)
        for _ in range(10):
            await client_of(cluster).call(cluster.routers[0])
            await elapse(3.0)  # idle time lowers no rate
        (record,) = records(cluster)
        rates = {share.pool: share.tokens_per_s for share in record.shares}
        # 2 ms per prompt token and 5 ms per output token, and the links take some time.
        assert 200 < rates[Pool.PREFILL] <= 500
        assert 60 < rates[Pool.DECODE] <= 200
        assert all(share.requests == share.tokens == 0 for share in record.shares)
        await elapse(40.0)
        (record,) = records(cluster)
        assert (record.arrived_requests, record.output_tokens) == (0, 0)
        assert record.ttft_s.total == record.itl_s.total == 0, "old latencies are gone"

    simulate(scenario)


def test_a_dead_routers_numbers_end_with_its_lease() -> None:
    async def scenario(cluster: SimCluster) -> None:
        await cluster.add_router()
        await elapse(RENEW_S)
        first, second = cluster.routers
        assert len(await cluster.registry.list_routers()) == 2
        await first.kill()
        await elapse(LEASE_S)
        (left,) = await cluster.registry.list_routers()
        assert left.id == second.lease.record().id
        await second.stop()
        second.alive = False
        assert await cluster.registry.list_routers() == (), "a router that stops is gone at once"

    simulate(scenario)


def test_the_age_of_a_record_is_known_and_a_store_that_is_away_changes_nothing_else() -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=1)
        await elapse(1.5)
        (before,) = await cluster.registry.list_routers()
        await elapse(RENEW_S)
        (after,) = await cluster.registry.list_routers()
        assert after.renewals == before.renewals + 1
        cluster.registry.available = False
        await elapse(LEASE_S)
        client = client_of(cluster)
        await client.call(cluster.routers[0])
        assert client.statuses == [(OK, "")]
        cluster.registry.available = True
        assert await cluster.registry.list_routers() == (), "too old"
        await elapse(RENEW_S)
        assert len(await cluster.registry.list_routers()) == 1

    simulate(scenario)


async def keep_plans(cluster: SimCluster, plans: tuple[PoolPlan, ...] = DECODE_PLAN) -> None:
    """Write the plans as the autoscaler does, until cancelled."""
    while True:
        await cluster.registry.put_plans(plans)
        await elapse(1.0)


async def ask_without_decode_worker(
    cluster: SimCluster, meanwhile: Callable[[SimClient], Awaitable[None]]
) -> None:
    """Run ``meanwhile`` while a request waits in a cluster without a decode worker."""
    add_workers(cluster, prefill=1, decode=0)
    async with AsyncExitStack() as stack:
        plans = asyncio.create_task(keep_plans(cluster))
        stack.callback(plans.cancel)
        await elapse(1.0)
        client = client_of(cluster)
        call = asyncio.create_task(client.call(cluster.routers[0]))
        await elapse(1.0)
        (record,) = records(cluster)
        assert [(each.need, each.requests) for each in record.queues] == [(Need.DECODE, 1)]
        await meanwhile(client)
        await call


def test_a_request_waits_for_the_first_worker_of_a_pool() -> None:
    async def scenario(cluster: SimCluster) -> None:
        async def a_worker_comes(client: SimClient) -> None:
            await elapse(QUEUE_S + 30.0)
            assert not client.statuses
            add_workers(cluster, prefill=0, decode=1)
            await elapse(POLL_S + 5.0)
            assert client.statuses == [(OK, "")]
            tokens = tuple(token for each in client.responses for token in each.token_ids)
            assert tokens == next_tokens(PROMPT, OUTPUT_TOKENS)

        await ask_without_decode_worker(cluster, a_worker_comes)

    simulate(scenario)


def test_that_wait_is_bounded() -> None:
    async def scenario(cluster: SimCluster) -> None:
        async def none_comes(client: SimClient) -> None:
            await elapse(COLD_S - 1.5)
            assert not client.statuses
            await elapse(1.0)
            assert client.statuses == [(UNAVAILABLE, "NO_DECODE_WORKER")]
            assert client.ended_s - client.began_s == pytest.approx(COLD_S)

        await ask_without_decode_worker(cluster, none_comes)

    simulate(scenario)


def test_when_the_autoscaler_is_gone_requests_stop_waiting() -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=0)
        await cluster.registry.put_plans(DECODE_PLAN)
        await elapse(1.0)
        client = client_of(cluster)
        await client.call(cluster.routers[0])
        assert client.statuses == [(UNAVAILABLE, "NO_DECODE_WORKER")]
        assert client.ended_s < COLD_S, "the plan has expired"

    simulate(scenario)


@pytest.mark.parametrize(
    "plans", [(), (PoolPlan(Pool.DECODE, max_workers=0),), (PoolPlan(Pool.PREFILL, max_workers=4),)]
)
def test_a_request_does_not_wait_if_no_worker_will_come(plans: tuple[PoolPlan, ...]) -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=0)
        await cluster.registry.put_plans(plans)
        await elapse(1.0)
        client = client_of(cluster)
        await client.call(cluster.routers[0])
        assert client.statuses == [(UNAVAILABLE, "NO_DECODE_WORKER")]
        assert client.ended_s == client.began_s
        (record,) = records(cluster)
        assert record.arrived_requests == 1, "it counts as demand"

    simulate(scenario)


async def resume_without_workers(
    cluster: SimCluster, meanwhile: Callable[[SimClient, asyncio.Task[None]], Awaitable[None]]
) -> None:
    """Run ``meanwhile`` while a resumed request waits for the first workers of both pools.

    It also gets the task that writes the plans.
    """
    add_workers(cluster, prefill=1, decode=1)
    async with AsyncExitStack() as stack:
        plans = asyncio.create_task(keep_plans(cluster))
        stack.callback(plans.cancel)
        await elapse(1.0)
        client = client_of(cluster)
        client.request.request_id = "r"
        call = asyncio.create_task(client.call(cluster.routers[0]))
        while not client.responses:
            await elapse(0.001)
        await cluster.routers[0].kill()
        await call
        for worker in cluster.living():
            worker.kill()
        await elapse(2 * LEASE_S)
        await cluster.add_router()
        await elapse(1.0)
        client.statuses.clear()
        client.resumes = True
        call = asyncio.create_task(client.call(cluster.routers[1]))
        await elapse(FAILOVER_S + 5.0)
        assert not client.statuses
        (record,) = records(cluster)
        assert [(each.need, each.requests) for each in record.queues] == [(Need.DECODE, 1)]
        await meanwhile(client, plans)
        await call


def test_a_resumed_request_waits_for_first_workers_as_long_as_a_new_one() -> None:
    async def scenario(cluster: SimCluster) -> None:
        async def a_worker_comes(client: SimClient, _plans: asyncio.Task[None]) -> None:
            add_workers(cluster, prefill=0, decode=1)
            await elapse(POLL_S + 5.0)
            assert client.statuses == [(OK, "")]
            tokens = tuple(token for each in client.responses for token in each.token_ids)
            assert tokens == next_tokens(PROMPT, OUTPUT_TOKENS)

        await resume_without_workers(cluster, a_worker_comes)

    simulate(scenario)


def test_a_resumed_request_waits_no_longer_than_a_new_one() -> None:
    async def scenario(cluster: SimCluster) -> None:
        async def none_comes(client: SimClient, _plans: asyncio.Task[None]) -> None:
            await elapse(COLD_S - FAILOVER_S)
            assert client.statuses == [(UNAVAILABLE, "NO_PREFILL_WORKER")]
            assert client.ended_s - client.began_s == pytest.approx(COLD_S, abs=1.0)

        await resume_without_workers(cluster, none_comes)

    simulate(scenario)


def test_when_no_worker_will_come_any_more_a_resumed_request_stops_waiting() -> None:
    async def scenario(cluster: SimCluster) -> None:
        async def pools_are_closed(client: SimClient, plans: asyncio.Task[None]) -> None:
            plans.cancel()
            await cluster.registry.put_plans(tuple(PoolPlan(pool, max_workers=0) for pool in Pool))
            await elapse(POLL_S + 5.0)
            assert client.statuses == [(UNAVAILABLE, "NO_DECODE_WORKER")]

        await resume_without_workers(cluster, pools_are_closed)

    simulate(scenario)


def test_a_request_that_has_lost_its_last_worker_counts_as_waiting() -> None:
    async def scenario(cluster: SimCluster) -> None:
        add_workers(cluster, prefill=1, decode=1)
        await elapse(1.0)
        client = client_of(cluster)
        call = asyncio.create_task(client.call(cluster.routers[0]))
        while not client.responses:
            await elapse(0.001)
        for worker in cluster.living(Pool.DECODE):
            worker.kill()
        await elapse(2 * LEASE_S)
        (record,) = records(cluster)
        (load,) = record.queues
        assert (load.service_class, load.need, load.requests) == ("only", Need.DECODE, 1)
        assert load.prompt_tokens >= len(PROMPT) + 1
        assert load.oldest_wait_s > LEASE_S
        assert sum(share.requests for share in record.shares) == 0
        add_workers(cluster, prefill=0, decode=1)
        await call
        assert client.statuses == [(OK, "")]
        (record,) = records(cluster)
        assert record.queues == ()
        assert record.ttft_s.total == 1

    simulate(scenario)


def test_a_worker_that_changes_its_role_begins_a_new_share() -> None:
    async def scenario(cluster: SimCluster) -> None:
        ledger = cluster.routers[0].ledger
        add_workers(cluster, prefill=1, decode=0)
        (record,) = [each.record for each in cluster.workers.values()]
        prefill = ledger.add(record, 100)
        decode = ledger.add(replace(record, pool=Pool.DECODE), 30)
        ledger.remove(prefill, 100, done=True)
        (share,) = ledger.shares()
        assert (share.pool, share.requests, share.tokens) == (Pool.DECODE, 1, 30)
        ledger.remove(decode, 30, done=False)
        assert ledger.own_load(record.key).requests == 0

    simulate(scenario)
