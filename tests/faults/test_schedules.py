"""Thousands of schedules of the router's dispatch, in virtual time.

Each seed is a cluster, a load and a series of faults. Whatever happens, a request that nobody
cancelled and whose deadline is far ends in exactly the tokens of an undisturbed run; the others
end exactly once, in time and with a status. After the faults nothing is held anywhere.

``BATON_SCHEDULE_SEED=n`` runs one seed alone.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
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
# Refused before anything was done for the request: the client may come again, and does.
REFUSALS = {
    *("NO_PREFILL_WORKER", "NO_DECODE_WORKER", "QUEUE_FULL", "QUEUE_TIMEOUT", "OVERLOADED"),
    *(
        REQUEST_IN_FLIGHT,
        "DUPLICATE_REQUEST_ID",
        "REGISTRY_UNAVAILABLE",
    ),  # its router may not know yet that it is gone
}
FAR_S = 200.0
SEEDS = 3000
CHUNK = 150


class Fault(Protocol):
    async def strike(self, cluster: SimCluster) -> None:
        """Happen, and be over when this returns."""


@dataclass(frozen=True)
class Kill:
    """kill -9 of one worker; another one starts in its place."""

    pool: Pool
    start_s: float

    async def strike(self, cluster: SimCluster) -> None:
        if living := cluster.living(self.pool):
            cluster.rng.choice(living).kill()
            await elapse(self.start_s)
            cluster.add(self.pool)


@dataclass(frozen=True)
class Stop:
    """SIGSTOP of one worker, and SIGCONT."""

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
    """One worker stops for good; another one starts in its place."""

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
    """What one worker says and hears takes long."""

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
    """One worker leaves, another one comes before it."""

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
    """Redis starts again and knows nobody."""

    async def strike(self, cluster: SimCluster) -> None:
        for name in cluster.workers:
            if cluster.registry.available:
                await cluster.registry.remove(name)
        cluster.journal.forget()


@dataclass(frozen=True)
class KillRouter:
    """kill -9 of one router; another one starts in its place."""

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
        request.sampling.min_tokens = 1  # the first token comes with the decode stream
    request.service_class = rng.choice(("", "", "second"))
    timeout_s = rng.choice((0.0, 0.03, 0.3)) if rng.random() < 0.15 else FAR_S
    write_s = rng.choice((0.0, 0.0, 0.0, 0.02))
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s, write_s)


async def run_client(cluster: SimCluster, client: SimClient, patience_s: float) -> None:
    """As an application: comes again when it was refused or its router died, and cancels when it
    loses patience."""
    calling: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(patience_s):
            while True:
                if routers := cluster.living_routers():
                    calling = asyncio.create_task(client.call(cluster.rng.choice(routers)))
                    await calling
                    if not comes_again(client):
                        return
                    client.statuses.pop()
                await elapse(0.2)
    except TimeoutError:
        if calling is not None:
            await asyncio.gather(calling, return_exceptions=True)


def comes_again(client: SimClient) -> bool:
    code, reason = client.statuses[-1]
    if code is grpc.StatusCode.UNAVAILABLE and reason == CONNECTION_LOST:
        client.resumes = True
        return True
    if reason == NOT_RESUMABLE and not client.responses:
        client.resumes = False  # its router died before it had written anything
        return True
    return reason in REFUSALS and code is not LATE and reason != WOULD_BE_LATE


def check_ended(client: SimClient, *, gave_up: bool, store_failed: bool) -> None:
    """Exactly once, in time, and with no token but the right ones."""
    expected = next_tokens(client.request.token_ids.ids, client.request.sampling.max_tokens)
    assert [each.sequence for each in client.responses] == list(range(len(client.responses)))
    tokens = tuple(token for each in client.responses for token in each.token_ids)
    assert tokens == expected[: len(tokens)]
    finishes = [each.finish_reason for each in client.responses if each.finish_reason]
    if not client.statuses:
        assert gave_up, "it waits to come again"
        return
    ((code, reason),) = client.statuses
    assert client.ended_s <= client.deadline_s + 0.001
    if code is OK:
        assert tokens == expected
        assert len(finishes) == 1
        assert client.responses[-1].finish_reason
    elif reason == NOT_RESUMABLE:
        assert store_failed, "or the journal would have it"
    elif code is LATE:
        assert client.deadline_s - client.ended_s < 0.001
        assert client.timeout_s < FAR_S, "nothing takes that long"
    elif reason == WOULD_BE_LATE:
        assert not tokens, "it was refused before it began"
        assert client.timeout_s < FAR_S, "nothing takes that long"
    else:
        assert gave_up
        # Lost: its router died just when it gave up.
        assert code is CANCELLED or reason in REFUSALS | {CONNECTION_LOST}, (code, reason)


def check_nothing_left(cluster: SimCluster, tasks_before: set[asyncio.Task[object]]) -> None:
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
    more = asyncio.all_tasks() - tasks_before
    assert not more, more


async def one_run(seed: int) -> None:
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
        standing = asyncio.all_tasks()
        clients = [random_client(cluster, n) for n in range(rng.randint(1, 8))]
        patience_s = [
            rng.choice((0.0, 0.05, 0.5)) if rng.random() < 0.2 else 3 * FAR_S for _ in clients
        ]

        async def load(client: SimClient, patience_s: float) -> None:
            await elapse(rng.choice((0.0, 0.1, 3.0)))
            await run_client(cluster, client, patience_s)

        async def strike(fault: Fault) -> None:
            await elapse(rng.choice((0.0, 0.05, 0.5, 3.0)) * rng.random())
            await fault.strike(cluster)

        faults = [random_fault(rng) for _ in range(rng.randint(0, 5))]
        await asyncio.gather(
            *(strike(fault) for fault in faults),
            *(load(*each) for each in zip(clients, patience_s, strict=True)),
        )
        store_failed = any(
            isinstance(fault, RegistryAway | RegistryEmptied | StoreSlow) for fault in faults
        )
        for client, patient_s in zip(clients, patience_s, strict=True):
            check_ended(client, gave_up=patient_s < FAR_S, store_failed=store_failed)
        for router in cluster.living_routers():
            await router.handler.drained()
        await elapse(SETTLE_S)
        check_nothing_left(cluster, standing | cluster.standing_tasks())


def seeds() -> list[range]:
    if "BATON_SCHEDULE_SEED" in os.environ:
        seed = int(os.environ["BATON_SCHEDULE_SEED"])
        return [range(seed, seed + 1)]
    return [range(first, first + CHUNK) for first in range(0, SEEDS, CHUNK)]


@pytest.mark.parametrize("chunk", seeds(), ids=lambda chunk: f"from-{chunk.start}")
def test_no_schedule_loses_a_request(chunk: range) -> None:
    for seed in chunk:
        try:
            run_virtually(one_run(seed), seed)
        except BaseException as error:
            error.add_note(f"BATON_SCHEDULE_SEED={seed}")
            raise
