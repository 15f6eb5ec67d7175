"""Runs hundreds of random schedules in which the pools change, in virtual time.

Workers start, drain and change their pools, alone and together, and whole pools go to zero and come
back, while requests run and some of the faults of ``test_schedules`` strike. The routers and the
workers' lifecycle are real. Every request ends as in ``test_schedules``. Without a fault, no
request is even refused.

``BATON_SCHEDULE_SEED=n`` runs one seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from core.errors import UnavailableError
from core.types import Pool
from engine.fake import FakeLatency
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.scaled_cluster import ScaledCluster, scaled_config, seeded_ids
from tests.support.schedules import (
    FAR_S,
    Cut,
    Kill,
    KillRouter,
    RegistryAway,
    RegistryEmptied,
    SlowLink,
    Stop,
    StoreSlow,
    cancel_running,
    check_ended,
    check_nothing_left,
    random_client,
    run_client,
    run_seeds,
    seeds_in_chunks,
)
from tests.support.simulated_cluster import LEASE_S, SimClient
from tests.support.simulated_replica import HOLD_S, SimReplica
from tests.support.virtual_time import elapse

SEEDS = 200
SEEDS_PER_TEST = 50
LONG_S = 30.0  # a grace that no request outlasts


@dataclass(frozen=True)
class Add:
    """Some workers start at once."""

    pool: Pool
    workers: int
    load_s: float

    async def strike(self, cluster: ScaledCluster) -> None:
        for _ in range(self.workers):
            cluster.add(self.pool, load_s=self.load_s)


@dataclass(frozen=True)
class Remove:
    """Some workers of a pool leave at once. None: of both pools."""

    pool: Pool | None
    workers: int
    grace_s: float

    async def strike(self, cluster: ScaledCluster) -> None:
        found = cluster.replicas(self.pool)
        leaving = cluster.rng.sample(found, min(self.workers, len(found)))
        await asyncio.gather(*(each.leave(self.grace_s) for each in leaving))


@dataclass(frozen=True)
class ChangeRole:
    """Some workers of a pool are ordered to join the other, and perhaps to come back."""

    pool: Pool
    workers: int
    back_s: tuple[float, ...]  # times between further orders, each to the pool before

    async def strike(self, cluster: ScaledCluster) -> None:
        found = cluster.ready(self.pool)
        changing = cluster.rng.sample(found, min(self.workers, len(found)))
        pool = self.pool.other
        await order(cluster, changing, pool)
        for wait_s in self.back_s:
            await elapse(wait_s)
            pool = pool.other
            await order(cluster, changing, pool)


@dataclass(frozen=True)
class ChangeAndLeave:
    """A worker is ordered to change its pool and to leave, one soon after the other."""

    pool: Pool
    between_s: float
    grace_s: float

    async def strike(self, cluster: ScaledCluster) -> None:
        if found := cluster.ready(self.pool):
            worker = cluster.rng.choice(found)
            if self.between_s < 0:
                leaving = asyncio.create_task(worker.leave(self.grace_s))
                await elapse(-self.between_s)
                await order(cluster, [worker], self.pool.other)
                await leaving
            else:
                await order(cluster, [worker], self.pool.other)
                await elapse(self.between_s)
                await worker.leave(self.grace_s)


@dataclass(frozen=True)
class OrderDrain:
    """A worker is asked in the registry to drain."""

    pool: Pool

    async def strike(self, cluster: ScaledCluster) -> None:
        if found := cluster.ready(self.pool):
            with contextlib.suppress(UnavailableError):
                await cluster.registry.ask_to_drain(cluster.rng.choice(found).id)


@dataclass(frozen=True)
class LoseAll:
    """All routers die. Nobody tells the autoscaler of requests, so all workers leave. Then a router
    comes back, and clients resume their requests at it."""

    start_s: float

    async def strike(self, cluster: ScaledCluster) -> None:
        for router in cluster.living_routers():
            await router.kill()
        await asyncio.gather(*(worker.leave(0.0) for worker in cluster.replicas()))
        await elapse(self.start_s)
        await cluster.add_router()


async def order(cluster: ScaledCluster, workers: list[SimReplica], pool: Pool) -> None:
    for worker in workers:
        with contextlib.suppress(UnavailableError):
            await cluster.registry.ask_to_change_role(worker.id, pool)


Event = Add | Remove | ChangeRole | ChangeAndLeave | OrderDrain


def random_event(rng: random.Random, graces_s: tuple[float, ...]) -> Event:
    pool = rng.choice(tuple(Pool))
    grace_s = rng.choice(graces_s)
    makes: tuple[Callable[[], Event], ...] = (
        lambda: Add(pool, rng.randint(1, 3), rng.choice((0.0, 1.0, 10.0))),
        lambda: Remove(pool, rng.randint(1, 2), grace_s),
        lambda: Remove(pool, 100, grace_s),
        lambda: Remove(None, 100, grace_s),
        lambda: ChangeRole(pool, 1, ()),
        lambda: ChangeRole(pool, rng.randint(1, 3), ()),
        lambda: ChangeRole(pool, 1, tuple(rng.choices((0.0, 0.3, 2.0), k=rng.randint(1, 3)))),
        lambda: ChangeAndLeave(pool, rng.choice((-1.0, -0.3, 0.0, 0.3, 1.0)), grace_s),
        lambda: OrderDrain(pool),
    )
    return rng.choice(makes)()


Fault = (
    Kill | Stop | Cut | SlowLink | RegistryAway | RegistryEmptied | StoreSlow | KillRouter | LoseAll
)


def random_fault(rng: random.Random) -> Fault:
    pool = rng.choice(tuple(Pool))
    makes: tuple[Callable[[], Fault], ...] = (
        lambda: Kill(pool, rng.choice((0.0, 0.5, 10.0))),
        lambda: Stop(pool, rng.choice((0.1, 5.0, 20.0))),
        lambda: Cut(pool),
        lambda: SlowLink(pool, rng.choice((0.5, 5.0))),
        lambda: RegistryAway(rng.choice((0.3, 8.0))),
        RegistryEmptied,
        lambda: StoreSlow(rng.choice((0.3, 8.0))),
        lambda: KillRouter(rng.choice((0.0, 1.0, 8.0))),
        lambda: KillRouter(rng.choice((0.0, 1.0, 8.0))),
    )
    return rng.choice(makes)()


def random_limits(rng: random.Random) -> AdmissionLimits:
    return AdmissionLimits(
        max_concurrent=rng.choice((4, 64)),
        classes={
            "first": ClassLimits(weight=3, max_queue=256, queue_timeout_s=150),
            "second": ClassLimits(weight=1, max_queue=256, queue_timeout_s=150),
        },
    )


async def run_schedule(seed: int) -> None:
    rng = random.Random(seed)
    is_calm = rng.random() < 0.3  # no fault, and workers have time to end their requests
    graces_s = (LONG_S,) if is_calm else (0.0, 0.3, 1.0, LONG_S)
    config = scaled_config(grace_s=rng.choice(graces_s) or 0.1)
    with seeded_ids(seed):
        async with ScaledCluster(rng, random_limits(rng), config) as cluster:
            cluster.latency = rng.choice((None, FakeLatency(2.0, 200.0)))
            cluster.transfer_s = rng.choice((0.0, 0.05, 1.0))
            for pool in Pool:
                for _ in range(rng.randint(1, 3)):
                    cluster.add(pool)
            for _ in range(rng.randrange(2)):
                await cluster.add_router()
            await elapse(2)
            keeper = asyncio.create_task(cluster.keep_up(rng.choice((0.0, 1.0, 10.0))))
            await elapse(1)
            tasks_before = asyncio.all_tasks()
            clients = [random_client(cluster, n) for n in range(rng.choice((1, 3, 12)))]
            patience_s = [
                rng.choice((0.0, 0.05, 0.5)) if rng.random() < 0.15 else 3 * FAR_S for _ in clients
            ]

            async def start_client(client: SimClient, patience_s: float) -> None:
                await elapse(rng.choice((0.0, 0.1, 3.0, 8.0)))
                await run_client(cluster, client, patience_s)

            async def strike(fault: Event | Fault) -> None:
                await elapse(rng.choice((0.0, 0.05, 0.5, 3.0, 8.0)) * rng.random())
                await fault.strike(cluster)

            events = [random_event(rng, graces_s) for _ in range(rng.randint(1, 6))]
            faults: list[Fault] = [
                random_fault(rng) for _ in range(0 if is_calm else rng.choice((0, 1, 3)))
            ]
            if not is_calm and rng.random() < 0.3:
                events, faults = [], [LoseAll(rng.choice((1.0, 8.0)))]
            await asyncio.gather(
                *(strike(each) for each in (*events, *faults)),
                *(start_client(*each) for each in zip(clients, patience_s, strict=True)),
            )
            store_failed = any(
                isinstance(fault, RegistryAway | RegistryEmptied | StoreSlow) for fault in faults
            )
            for client, patient_s in zip(clients, patience_s, strict=True):
                check_ended(client, gave_up=patient_s < FAR_S, store_failed=store_failed)
                if not faults:
                    assert not client.refusals, client.refusals
            if is_calm:
                check_nothing_was_cut_short(cluster)
            await settle(cluster)
            check_nothing_left(cluster, tasks_before | cluster.standing_tasks())
            cancel_running(keeper)


def check_nothing_was_cut_short(cluster: ScaledCluster) -> None:
    """Check that workers left their pools only when their requests had ended and their KV was
    fetched."""
    for worker in cluster.workers.values():
        assert isinstance(worker, SimReplica)
        assert worker.cut_short == 0, worker.id
    for router in cluster.routers:
        assert router.dispatcher.counters.kv_recomputed == 0


async def settle(cluster: ScaledCluster) -> None:
    """Wait until workers that leave are gone, and all that was held has timed out."""
    for router in cluster.living_routers():
        await router.handler.drained()
    await elapse(HOLD_S + 2 * LEASE_S)


CHUNKS = seeds_in_chunks(SEEDS, SEEDS_PER_TEST)


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"from-{chunk.start}")
def test_no_change_of_the_pools_loses_a_request(chunk: range) -> None:
    run_seeds(run_schedule, chunk)
