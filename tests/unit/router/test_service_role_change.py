"""Streams continue while workers change their pools. Router and workers are real, engines fake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from core.config.schema import Config
from core.types import Pool, WorkerState
from engine.fake import FakeEngine, FakeLatency, next_tokens
from tests.support.fake_workers import MODEL
from tests.support.router_harness import RouterHarness, token_ids
from tests.support.waiting import until_awaited
from tests.support.worker_parts import SERVICES, NoMetrics
from worker.replica import WorkerReplica

pytestmark = pytest.mark.asyncio

CLIENTS = 6
TOKENS = 150  # 0.15 s, much longer than a drain that waits for no stream


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.replica.MetricsServer", NoMetrics)


class Cluster:
    """A router and workers. ``async with`` starts it."""

    def __init__(self, grace_s: float) -> None:
        pool = {"shutdown_grace_s": grace_s}
        self.config = Config.model_validate(
            {
                "cluster": {"role_change": True},
                "router": {"registry_poll_s": 0.01},
                "redis": {"renew_s": 0.01},
                "prefill": pool,
                "decode": pool,
            }
        )
        # An attempt that is lost, and not refused, would be one too many.
        self.router = RouterHarness(
            router={"max_attempts": 1, "failover_timeout_s": 30}, context_tokens=512
        )
        self.answers = 0
        self.continued = 0  # answers that a second worker has continued

    @contextlib.asynccontextmanager
    async def worker(self, pool: Pool) -> AsyncIterator[str]:
        """Run a worker that joins ``pool`` first. Yields its id."""
        engine = FakeEngine(self.config, pool, latency=FakeLatency(0.01, 1.0, 1.0))
        replica = WorkerReplica(
            config=self.config,
            pool=pool,
            model=MODEL,
            engine=engine,
            registry=self.router.registry,
            services=SERVICES,
            incarnation=f"i{len(await self.router.registry.list())}",
            credentials=None,
        )
        record = await replica.start()
        yield record.id
        await replica.stop(1)
        load = engine.load()
        assert load.kv_blocks_free == load.kv_blocks_total, "KV blocks leaked"

    async def change(self, worker_id: str, pool: Pool) -> None:
        """Change a worker's pool. Return when the router has seen the end of the change."""
        await self.router.registry.ask_to_change_role(worker_id, pool)

        async def seen() -> bool:
            assert self.router.server.workers is not None
            return (worker_id, pool, WorkerState.READY) in [
                (each.id, each.pool, each.state) for each in self.router.server.workers.snapshot
            ]

        await until_awaited(seen, what=f"{worker_id} is ready in {pool}")

    async def keep_asking(self, client: int) -> None:
        """Send one request after the other, until cancelled. Check each answer."""
        for number in range(10**6):
            prompt = [client + 1, number % 250, 3]
            responses = await self.router.generate(prompt, max_tokens=TOKENS)
            assert token_ids(responses) == list(next_tokens(prompt, TOKENS))
            self.answers += 1
            self.continued += responses[-1].phases.attempts > 1


@pytest.mark.parametrize("grace_s", [10.0, 0.001], ids=["streams end", "streams move"])
async def test_streams_through_every_change_are_exact(grace_s: float) -> None:
    cluster = Cluster(grace_s)
    async with cluster.router, contextlib.AsyncExitStack() as stack:
        a, b, _ = [
            await stack.enter_async_context(cluster.worker(pool))
            for pool in (Pool.PREFILL, Pool.DECODE, Pool.DECODE)
        ]
        await cluster.router.refresh_workers()
        clients = [asyncio.create_task(cluster.keep_asking(n)) for n in range(CLIENTS)]
        for _ in range(2):
            await cluster.change(b, Pool.PREFILL)  # each pool always has another worker
            await cluster.change(a, Pool.DECODE)
            await cluster.change(a, Pool.PREFILL)
            await cluster.change(b, Pool.DECODE)
        answers = cluster.answers

        async def goes_on() -> bool:
            return cluster.answers > answers + CLIENTS

        await until_awaited(goes_on, what="all clients get answers after the changes")
        for each in clients:
            assert not each.done(), each.exception()
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if grace_s < 1:
        assert cluster.continued, "no stream had to move"
    assert cluster.router.server.counters.first_tokens_differed == 0
