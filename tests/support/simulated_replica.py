"""A worker process in virtual time that runs the real ``worker.replica.WorkerReplica``.

Only its sockets and its engine are replaced. A prefill worker holds KV until a decode worker has
fetched it, a router has released it, or ``HOLD_S`` has passed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from typing import Any

import grpc

from core.config.schema import Config
from core.errors import UnavailableError
from core.types import Pool, WorkerRecord, WorkerState
from decode_worker.servicer import DecodeServicer
from engine.fake import FakeEngine, FakeLatency, FakeSize
from prefill_worker.servicer import PrefillServicer
from tests.support.simulated_cluster import KV_BLOCKS, SimCluster, SimProcess
from tests.support.virtual_time import elapse
from worker.replica import WorkerReplica

HOLD_S = 15.0


class SlowStore:
    """A part of the store, as one process uses it: each call waits for ``link`` first.

    Args:
        link: waits for the transit of one call. Raises UnavailableError if the store is not
            reachable.
    """

    def __init__(self, store: Any, link: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._link = link

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, name)

        async def call(*arguments: Any) -> Any:
            if name != "close":
                await self._link()
            return await method(*arguments)

        return call


class _Engine(FakeEngine):
    """Its pairs with the other pool take a random time."""

    def __init__(self, rng: random.Random, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._rng = rng

    async def pair_up(self, others: Mapping[str, tuple[str, ...]], pool: Pool) -> Set[str]:
        await elapse(self._rng.choice((0.0, 0.0, 0.02)))
        return {other for other in others if self._rng.random() < 0.2}


class _Server:
    """Takes the place of the worker's gRPC server."""

    def __init__(self, process: SimReplica) -> None:
        self._process = process

    async def stop(self, grace_s: float) -> None:
        """Refuse calls, and break those that outlast the grace."""
        self._process.is_serving = False
        self._process.cut_short += self._process.requests
        if running := [call.server for call in self._process.calls]:
            await asyncio.wait(running, timeout=grace_s)
        for call in list(self._process.calls):
            call.break_(grpc.StatusCode.CANCELLED, "server shut down")


class _Replica(WorkerReplica):
    process: SimReplica

    async def _send_away(self, grace_s: float) -> None:
        self.process.cut_short += self.process.requests
        await super()._send_away(grace_s)

    async def _serve(self) -> str:
        server: Any = _Server(self.process)
        self._server = server
        self._add_services(server)
        self.process.is_serving = True
        return self._id

    def _serve_metrics(self) -> str:
        return ""


class SimReplica(SimProcess):
    """One worker process. It starts in the background: it loads its model, then joins ``pool``.

    Args:
        load_s: how long the model takes to load.

    Attributes:
        cut_short: how many requests the worker has ended itself, because it left its pool.
    """

    def __init__(
        self,
        pool: Pool,
        cluster: SimCluster,
        config: Config,
        latency: FakeLatency,
        *,
        load_s: float,
        application: str = "",
        kv_blocks: int = KV_BLOCKS,
    ) -> None:
        number = cluster.next_number()
        super().__init__(f"incarnation-{number}", cluster)
        self.is_serving = False
        self.cut_short = 0
        self.load_s = load_s
        self.application = application
        self.engine = _Engine(
            cluster.rng,
            config,
            pool,
            latency=FakeLatency(
                latency.prefill_ms_per_token, latency.decode_step_ms, 1000 * HOLD_S
            ),
            size=FakeSize(kv_blocks=kv_blocks, kv_block_tokens=4),
            sleep=self._sleep,
            clock=cluster.clock,
            fetch=self._fetch,
        )
        registry: Any = SlowStore(cluster.registry, self._reach_store)
        self.replica = _Replica(
            config,
            pool,
            cluster.model,
            self.engine,
            registry,
            {Pool.PREFILL: self._add_prefill, Pool.DECODE: self._add_decode},
            incarnation=self.incarnation,
            credentials=None,
            application=application,
        )
        self.replica.process = self
        cluster.workers[self.replica._id] = self
        self.starting = asyncio.create_task(self._start(), name="start of a worker")
        self._leaving: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.replica._id

    @property
    def pool(self) -> Pool:
        return self.replica._pool

    @property
    def joins(self) -> Pool:
        """The pool that the worker is in, or will join if it changes now."""
        return self.replica._wanted_pool

    @property
    def stays(self) -> bool:
        """Whether the worker runs and has not begun to leave."""
        return self.alive and self._leaving is None and self.replica._stopped is None

    @property
    def record(self) -> WorkerRecord:
        lease = self.replica._lease
        if lease is not None:
            return lease.record
        return WorkerRecord(
            self.id,
            self.pool,
            WorkerState.STARTING,
            self.incarnation,
            self.id,
            (),
            self._cluster.model,
            self.engine.load(),
        )

    @property
    def listens(self) -> bool:
        return self.alive and self.is_serving

    @property
    def requests(self) -> int:
        """How many requests the worker serves now."""
        return sum(len(intake._calls) for intake in self.replica._intakes.values())

    @property
    def has_started(self) -> bool:
        return self.starting.done() and not self.starting.cancelled()

    def all_tasks(self) -> Iterable[asyncio.Task[Any]]:
        own = (self.starting, self._leaving, self.replica._changing, self.replica._stopped)
        return [*self.replica._supervisor._tasks, *(task for task in own if task is not None)]

    def has_prefilled(self, transfer_id: str) -> bool:
        return self.alive and transfer_id in self.engine._held

    async def fetched(self, transfer_id: str) -> None:
        await self.engine.release(transfer_id)

    def kill(self) -> None:
        self.is_serving = False
        super().kill()

    async def leave(self, grace_s: float) -> None:
        """End as Serve ends a replica: a process that still starts is killed, others drain."""
        if not self.has_started:
            self.kill()
        if self._leaving is None and self.alive:
            self._leaving = asyncio.create_task(self._leave(grace_s), name="end of a worker")
        if self._leaving is not None:
            await asyncio.wait([self._leaving])

    async def _leave(self, grace_s: float) -> None:
        await self.replica.stop(grace_s)
        self.alive = False
        self.cut()

    async def _start(self) -> None:
        await elapse(self.load_s)
        await self._running.wait()
        await self.replica.start()

    async def _reach_store(self) -> None:
        slow = self._cluster.store_slow
        await elapse(self.rng.choice((0.0, 0.0, 0.001, 0.3 if slow else 0.01)))
        await self._running.wait()
        if not self.alive:
            raise UnavailableError("this process is dead")

    def _add_prefill(self, _server: Any, engine: Any, intake: Any, _peers: Any) -> None:
        self.prefill_service = PrefillServicer(engine, intake)

    def _add_decode(self, _server: Any, engine: Any, intake: Any, peers: Any) -> None:
        self.decode_service = DecodeServicer(engine, intake, peers)
