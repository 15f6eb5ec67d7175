"""Runs thousands of random schedules of the router's dispatch, in virtual time.

Each seed makes a cluster, a load and some faults. Every request ends once, by its deadline and with
a status, unless its client gives up between two calls. A request ends with exactly the tokens of an
undisturbed run if its deadline is far and its client does not cancel it. The exception is a request
that cannot be resumed after a fault of the store. After the faults, no KV block is in use and no
call or task is left.

``BATON_SCHEDULE_SEED=n`` runs one seed alone.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from core.types import Pool
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.schedules import (
    FAR_S,
    Cut,
    Drain,
    Fault,
    Hang,
    Kill,
    KillRouter,
    RegistryAway,
    RegistryEmptied,
    SlowLink,
    Stop,
    StoreSlow,
    check_ended,
    check_nothing_left,
    random_client,
    run_client,
    run_seeds,
    seeds_in_chunks,
)
from tests.support.simulated_cluster import SETTLE_S, SimClient, SimCluster
from tests.support.virtual_time import elapse

SEEDS = 3000
SEEDS_PER_TEST = 150
CHUNKS = seeds_in_chunks(SEEDS, SEEDS_PER_TEST)


def random_fault(rng: random.Random) -> Fault:
    pool = rng.choice((Pool.PREFILL, Pool.DECODE, Pool.DECODE))
    makes: tuple[Callable[[], Fault], ...] = (
        lambda: Kill(pool, rng.choice((0.0, 0.5, 10.0))),
        lambda: Stop(pool, rng.choice((0.1, 5.0, 20.0))),
        lambda: Hang(pool, rng.choice((0.0, 1.0, 15.0))),
        lambda: Cut(pool),
        lambda: SlowLink(pool, rng.choice((0.5, 5.0))),
        lambda: Drain(pool, rng.choice((0.0, 0.3, 30.0))),
        lambda: RegistryAway(rng.choice((0.3, 8.0))),
        RegistryEmptied,
        lambda: StoreSlow(rng.choice((0.3, 8.0))),
        lambda: KillRouter(rng.choice((0.0, 1.0, 8.0))),
        lambda: KillRouter(rng.choice((0.0, 1.0, 8.0))),
    )
    return rng.choice(makes)()


async def run_schedule(seed: int) -> None:
    rng = random.Random(seed)
    limits = AdmissionLimits(
        max_concurrent=rng.choice((2, 16)),
        classes={
            "first": ClassLimits(weight=3, max_queue=rng.choice((0, 4, 64)), queue_timeout_s=30),
            "second": ClassLimits(weight=1, max_queue=64, queue_timeout_s=100),
        },
    )
    async with SimCluster(rng, limits) as cluster:
        for pool in Pool:
            for _ in range(rng.randint(1, 3)):
                cluster.add(pool)
        for _ in range(rng.randrange(2)):
            await cluster.add_router()
        await elapse(1)
        tasks_before = asyncio.all_tasks()
        clients = [random_client(cluster, n) for n in range(rng.randint(1, 8))]
        patience_s = [
            rng.choice((0.0, 0.05, 0.5)) if rng.random() < 0.2 else 3 * FAR_S for _ in clients
        ]

        async def start_client(client: SimClient, patience_s: float) -> None:
            await elapse(rng.choice((0.0, 0.1, 3.0)))
            await run_client(cluster, client, patience_s)

        async def strike(fault: Fault) -> None:
            await elapse(rng.choice((0.0, 0.05, 0.5, 3.0)) * rng.random())
            await fault.strike(cluster)

        faults = [random_fault(rng) for _ in range(rng.randint(0, 5))]
        await asyncio.gather(
            *(strike(fault) for fault in faults),
            *(start_client(*each) for each in zip(clients, patience_s, strict=True)),
        )
        store_failed = any(
            isinstance(fault, RegistryAway | RegistryEmptied | StoreSlow) for fault in faults
        )
        for client, patient_s in zip(clients, patience_s, strict=True):
            check_ended(client, gave_up=patient_s < FAR_S, store_failed=store_failed)
        for router in cluster.living_routers():
            await router.handler.drained()
        await elapse(SETTLE_S)
        check_nothing_left(cluster, tasks_before | cluster.standing_tasks())


@pytest.fixture(scope="module")
def results() -> Iterator[dict[range, Future[None]]]:
    """The chunks' results, computed on all cores."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        yield {chunk: pool.submit(run_seeds, run_schedule, chunk) for chunk in CHUNKS}


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"from-{chunk.start}")
def test_no_schedule_loses_a_request(chunk: range, results: dict[range, Future[None]]) -> None:
    results[chunk].result()
