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
import gc
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import grpc
import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import next_tokens
from router.admission.policy import LATE as WOULD_BE_LATE
from router.admission.policy import AdmissionLimits, ClassLimits
from router.resume.journal import NOT_RESUMABLE, REQUEST_IN_FLIGHT
from tests.support.simulated_cluster import CONNECTION_LOST, SETTLE_S, SimClient, SimCluster
from tests.support.virtual_time import elapse, run_virtually

OK, CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Refusals before the router does anything for the request. The client sends the request again.
REFUSALS = {
    *("NO_PREFILL_WORKER", "NO_DECODE_WORKER", "QUEUE_FULL", "QUEUE_TIMEOUT", "OVERLOADED"),
    # The request may still count as running at its former router, or the store is unavailable.
    *(REQUEST_IN_FLIGHT, "DUPLICATE_REQUEST_ID", "REGISTRY_UNAVAILABLE"),
}
FAR_S = 200.0  # a deadline that no schedule reaches
SEEDS = 3000
SEEDS_PER_TEST = 150


class Fault(Protocol):
    async def strike(self, cluster: SimCluster) -> None:
        """Cause the fault. Return when it is over."""


@dataclass(frozen=True)
class Kill:
    """One worker is killed with kill -9. Another one replaces it."""

    pool: Pool
    start_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            cluster.rng.choice(living).kill()
            await elapse(self.start_s)
            cluster.add(self.pool)


@dataclass(frozen=True)
class Stop:
    """One worker gets SIGSTOP, and later SIGCONT."""

    pool: Pool
    for_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            worker = cluster.rng.choice(living)
            worker.stop()
            await elapse(self.for_s)
            worker.resume()


@dataclass(frozen=True)
class Hang:
    """One worker hangs for good. Another one replaces it."""

    pool: Pool
    start_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            worker = cluster.rng.choice(living)
            worker.stop()
            await elapse(self.start_s)
            cluster.add(self.pool)
            await elapse(2 * FAR_S)
            worker.kill()


@dataclass(frozen=True)
class Cut:
    """All connections of one worker break."""

    pool: Pool

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            cluster.rng.choice(living).cut()


@dataclass(frozen=True)
class SlowLink:
    """Messages to and from one worker take long."""

    pool: Pool
    for_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            worker = cluster.rng.choice(living)
            worker.slow = True
            await elapse(self.for_s)
            worker.slow = False


@dataclass(frozen=True)
class Drain:
    """Another worker joins. Then one worker drains."""

    pool: Pool
    grace_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            cluster.add(self.pool)
            await cluster.rng.choice(living).drain(self.grace_s)


@dataclass(frozen=True)
class RegistryAway:
    """Redis does not answer."""

    for_s: float

    async def strike(self, cluster: SimCluster) -> None:
        cluster.registry.available = cluster.journal.available = False
        await elapse(self.for_s)
        cluster.registry.available = cluster.journal.available = True


@dataclass(frozen=True)
class StoreSlow:
    """Redis answers the journal late."""

    for_s: float

    async def strike(self, cluster: SimCluster) -> None:
        cluster.store_slow = True
        await elapse(self.for_s)
        cluster.store_slow = False


@dataclass(frozen=True)
class RegistryEmptied:
    """Redis restarts and has lost all leases and the journal."""

    async def strike(self, cluster: SimCluster) -> None:
        for name in cluster.workers:
            if cluster.registry.available:
                await cluster.registry.remove(name)
        cluster.journal.forget()


@dataclass(frozen=True)
class KillRouter:
    """One router is killed with kill -9. Another one replaces it."""

    start_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living_routers():
            await cluster.rng.choice(living).kill()
            await elapse(self.start_s)
            await cluster.add_router()


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


def random_client(cluster: SimCluster, number: int) -> SimClient:
    rng = cluster.rng
    request = inference_pb2.GenerateRequest(request_id=f"r{number}")
    request.token_ids.ids.extend(rng.randrange(3, 200) for _ in range(rng.randint(1, 20)))
    request.sampling.max_tokens = rng.randint(1, 30)
    if rng.random() < 0.2:
        request.sampling.min_tokens = 1  # the decode worker samples the first token
    request.service_class = rng.choice(("", "", "second"))
    timeout_s = rng.choice((0.0, 0.03, 0.3)) if rng.random() < 0.15 else FAR_S
    read_s = rng.choice((0.0, 0.0, 0.0, 0.02))
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s, read_s)


async def run_client(cluster: SimCluster, client: SimClient, patience_s: float) -> None:
    """Call a router as an application does.

    Call again after a refusal or the router's death. Cancel after ``patience_s``.
    """
    calling: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(patience_s):
            while True:
                if routers := cluster.living_routers():
                    calling = asyncio.create_task(client.call(cluster.rng.choice(routers)))
                    await calling
                    if not should_call_again(client):
                        return
                    client.statuses.pop()
                await elapse(0.2)
    except TimeoutError:
        if calling is not None:
            await asyncio.gather(calling, return_exceptions=True)


def should_call_again(client: SimClient) -> bool:
    """Whether an application calls again after the last status. Sets ``resumes`` for that call."""
    code, reason = client.statuses[-1]
    if code is grpc.StatusCode.UNAVAILABLE and reason == CONNECTION_LOST:
        client.resumes = True
        return True
    if reason == NOT_RESUMABLE and not client.responses:
        client.resumes = False  # the journal does not have the request
        return True
    return reason in REFUSALS and code is not LATE and reason != WOULD_BE_LATE


def check_ended(client: SimClient, *, gave_up: bool, store_failed: bool) -> None:
    """Check that the request ended exactly once, in time, and that no token is wrong."""
    expected = next_tokens(client.request.token_ids.ids, client.request.sampling.max_tokens)
    assert [each.sequence for each in client.responses] == list(range(len(client.responses)))
    tokens = tuple(token for each in client.responses for token in each.token_ids)
    assert tokens == expected[: len(tokens)]
    finishes = [each.finish_reason for each in client.responses if each.finish_reason]
    if not client.statuses:
        assert gave_up, "the request has no status"
        return
    ((code, reason),) = client.statuses
    assert client.ended_s <= client.deadline_s + 0.001
    if code is OK:
        assert tokens == expected
        assert len(finishes) == 1
        assert client.responses[-1].finish_reason
    elif reason == NOT_RESUMABLE:
        assert store_failed, "the journal lost the request"
    elif code is LATE:
        assert client.deadline_s - client.ended_s < 0.001
        assert client.timeout_s < FAR_S, "a far deadline was missed"
    elif reason == WOULD_BE_LATE:
        assert not tokens, "a request with tokens was refused"
        assert client.timeout_s < FAR_S, "a far deadline was missed"
    else:
        assert gave_up, (code, reason, tokens, expected, client.timeout_s)
        # CONNECTION_LOST: the router died just when the client gave up.
        assert code is CANCELLED or reason in REFUSALS | {CONNECTION_LOST}, (code, reason)


def check_nothing_left(cluster: SimCluster, tasks_before: set[asyncio.Task[object]]) -> None:
    """Check that all KV blocks are free, and no worker, router or task works on a request."""
    for worker in cluster.workers.values():
        assert not worker.calls, worker.record.id
        if worker.alive:
            load = worker.engine.load()
            assert load.kv_blocks_free == load.kv_blocks_total, worker.record.id
            assert load.running == load.queue_depth == load.queued_tokens == 0
        key = worker.record.id, worker.record.incarnation
        for router in cluster.routers:
            assert router.ledger.own_load(key).requests == 0
    for router in cluster.routers:
        assert router.admission.running == router.admission.waiting == 0
    left = asyncio.all_tasks() - tasks_before
    assert not left, left


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


def seeds() -> list[range]:
    if "BATON_SCHEDULE_SEED" in os.environ:
        seed = int(os.environ["BATON_SCHEDULE_SEED"])
        return [range(seed, seed + 1)]
    return [range(first, first + SEEDS_PER_TEST) for first in range(0, SEEDS, SEEDS_PER_TEST)]


def run_seeds(chunk: range) -> None:
    """Run the schedules of ``chunk``. An exception in a destructor is a failure, too."""
    unraisable: list[str] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda failure: unraisable.append(repr(failure))
    try:
        with warnings.catch_warnings(action="error"):
            for seed in chunk:
                try:
                    run_virtually(run_schedule(seed), seed)
                except BaseException as error:
                    error.add_note(f"BATON_SCHEDULE_SEED={seed}")
                    raise
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not unraisable, unraisable


@pytest.fixture(scope="module")
def results() -> Iterator[dict[range, Future[None]]]:
    """The chunks' results, computed on all cores."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        yield {chunk: pool.submit(run_seeds, chunk) for chunk in seeds()}


@pytest.mark.parametrize("chunk", seeds(), ids=lambda chunk: f"from-{chunk.start}")
def test_no_schedule_loses_a_request(chunk: range, results: dict[range, Future[None]]) -> None:
    results[chunk].result()
