"""Faults that strike a cluster in virtual time, its clients, and what must hold after them."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import next_tokens
from router.admission.policy import LATE as WOULD_BE_LATE
from router.resume.journal import NOT_RESUMABLE, REQUEST_IN_FLIGHT
from tests.support.simulated_cluster import CONNECTION_LOST, SimClient, SimCluster, SimWorker
from tests.support.virtual_time import elapse, run_virtually

OK, CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Refusals before the router does anything for the request. The client sends the request again.
REFUSALS = {
    *("NO_PREFILL_WORKER", "NO_DECODE_WORKER", "QUEUE_FULL", "QUEUE_TIMEOUT", "OVERLOADED"),
    # The request may still count as running at its former router, or the store is unavailable.
    *(REQUEST_IN_FLIGHT, "DUPLICATE_REQUEST_ID", "REGISTRY_UNAVAILABLE"),
}
SEED = "BATON_SCHEDULE_SEED"  # environment variable: run this seed alone
FAR_S = 200.0  # a deadline that no schedule reaches


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
            worker = cluster.rng.choice(living)
            assert isinstance(worker, SimWorker), "others leave by themselves"
            await worker.drain(self.grace_s)


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
                    _, reason = client.statuses.pop()
                    client.refusals.append((cluster.clock(), reason))
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
    """Check that all KV blocks are free, no worker, router or task works on a request, routers have
    forgotten the workers that are gone, and no worker has failed to start, change or stop."""
    for worker in cluster.workers.values():
        worker.check_tasks()
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
        assert not router.dispatcher.stranded_loads()
        assert not router.journal._entries
    processes = {worker.record.key for worker in cluster.workers.values() if worker.alive}
    for router in cluster.living_routers():
        assert {share.worker_id for share in router.ledger.shares()} <= {
            key[0] for key in processes
        }
        assert router.workers.open_channels <= len(processes)
    left = asyncio.all_tasks() - tasks_before
    assert not left, left


def cancel_running(task: asyncio.Task[None]) -> None:
    """Cancel a task that should still run. If it has failed, raise its exception."""
    if task.done():
        task.result()
    task.cancel()


def seeds_in_chunks(seeds: int, per_chunk: int) -> list[range]:
    """Return the seeds from 0 on, or only the one that ``BATON_SCHEDULE_SEED`` names."""
    if SEED in os.environ:
        seed = int(os.environ[SEED])
        return [range(seed, seed + 1)]
    return [range(first, first + per_chunk) for first in range(0, seeds, per_chunk)]


def run_seeds(run_schedule: Callable[[int], Coroutine[Any, Any, None]], chunk: range) -> None:
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
                    error.add_note(f"{SEED}={seed}")
                    raise
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not unraisable, unraisable
