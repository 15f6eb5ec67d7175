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
from cluster.types import Pool
from engine.fake import next_tokens
from router.admission import AdmissionLimits
from tests.support.simulated_cluster import SETTLE_S, SimClient, SimCluster
from tests.support.virtual_time import elapse, run_virtually

OK, CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Refused before anything was done for the request: the client may come again, and does.
REFUSALS = {"NO_PREFILL_WORKER", "NO_DECODE_WORKER", "QUEUE_FULL", "QUEUE_TIMEOUT", "OVERLOADED"}
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
        cluster.registry.available = False
        await elapse(self.for_s)
        cluster.registry.available = True


@dataclass(frozen=True)
class RegistryEmptied:
    """Redis starts again and knows nobody."""

    async def strike(self, cluster: SimCluster) -> None:
        for name in cluster.workers:
            if cluster.registry.available:
                await cluster.registry.remove(name)


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
    )
    return rng.choice(makes)()


def random_client(rng: random.Random, number: int, clock: Callable[[], float]) -> SimClient:
    request = inference_pb2.GenerateRequest(request_id=f"r{number}")
    request.token_ids.ids.extend(rng.randrange(3, 200) for _ in range(rng.randint(1, 20)))
    request.sampling.max_tokens = rng.randint(1, 30)
    if rng.random() < 0.2:
        request.sampling.min_tokens = 1  # the first token comes with the decode stream
    timeout_s = rng.choice((0.0, 0.03, 0.3)) if rng.random() < 0.15 else FAR_S
    return SimClient(request, clock, timeout_s, write_s=rng.choice((0.0, 0.0, 0.0, 0.02)))


async def run_client(cluster: SimCluster, client: SimClient, patience_s: float) -> None:
    """As an application: comes again when it was refused, cancels when it loses patience."""
    calling: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(patience_s):
            while True:
                calling = asyncio.create_task(client.call(cluster.servicer))
                await calling
                code, reason = client.statuses[-1]
                if code in (OK, LATE) or reason not in REFUSALS or client.responses:
                    return
                client.statuses.pop()
                await elapse(0.2)
    except TimeoutError:
        assert calling is not None
        await asyncio.gather(calling, return_exceptions=True)


def check_ended(client: SimClient, *, gave_up: bool) -> None:
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
    elif code is LATE:
        assert client.deadline_s - client.ended_s < 0.001
        assert client.timeout_s < FAR_S, "nothing takes that long"
    else:
        assert gave_up
        assert code is CANCELLED or reason in REFUSALS, (code, reason)


def check_nothing_left(cluster: SimCluster, tasks_before: set[asyncio.Task[object]]) -> None:
    for worker in cluster.workers.values():
        assert not worker.calls, worker.record.id
        if worker.alive:
            load = worker.engine.load()
            assert load.kv_blocks_free == load.kv_blocks_total, worker.record.id
            assert load.running == load.queue_depth == load.queued_tokens == 0
        key = worker.record.id, worker.record.incarnation
        assert cluster.book.own_load(key).requests == 0
    more = asyncio.all_tasks() - tasks_before
    assert not more, more


async def one_run(seed: int) -> None:
    rng = random.Random(seed)
    limits = AdmissionLimits(
        max_concurrent=rng.choice((2, 16)), max_queue=rng.choice((0, 4, 64)), queue_timeout_s=30
    )
    async with SimCluster(rng, limits) as cluster:
        for pool in Pool:
            for _ in range(rng.randint(1, 3)):
                cluster.add(pool)
        await elapse(1)
        standing = asyncio.all_tasks()
        clients = [random_client(rng, n, cluster.clock) for n in range(rng.randint(1, 8))]
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
        for client, patient_s in zip(clients, patience_s, strict=True):
            check_ended(client, gave_up=patient_s < FAR_S)
        await cluster.servicer.drained()
        await elapse(SETTLE_S)
        leases = {worker._lease for worker in cluster.workers.values()}
        check_nothing_left(cluster, standing | leases)


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
