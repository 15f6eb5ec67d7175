"""How a worker leaves: announced, after its requests, and after its KV was fetched."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from cluster.config import Config
from cluster.registry import MemoryRegistry
from cluster.types import Pool, WorkerRecord, WorkerState
from engine.fake import FakeEngine, FakeLatency
from engine.intake import Intake
from engine.protocol import Engine
from engine.replica import WorkerReplica
from prefill_worker.servicer import PrefillServicer

pytestmark = pytest.mark.asyncio

NEVER_S = 3600.0
WAIT_S = 10.0  # for what should happen soon; only a failing test waits so long


class WatchedEngine(FakeEngine):
    """Remembers what it held when it was stopped."""

    held_at_stop: int | None = None

    async def stop(self) -> None:
        load = self.load()
        self.held_at_stop = load.kv_blocks_total - load.kv_blocks_free
        await super().stop()


class WatchedRegistry(MemoryRegistry):
    """Says when a worker announces that it drains."""

    def __init__(self) -> None:
        super().__init__(lease_s=NEVER_S)
        self.draining = asyncio.Event()

    async def put(self, record: WorkerRecord) -> None:
        await super().put(record)
        if record.state is WorkerState.DRAINING:
            self.draining.set()


class Setup:
    """A prefill worker; ``async with`` starts it, and the test stops it."""

    def __init__(self, *, poll_s: float = 0.01, transfer_ms: float = 0.0) -> None:
        self.config = Config.model_validate({"router": {"registry_poll_s": poll_s}})
        latency = FakeLatency(0, 0, transfer_ms)
        self.engine = WatchedEngine(self.config, Pool.PREFILL, latency=latency)
        self.registry = WatchedRegistry()
        self.replica = WorkerReplica(
            self.config, Pool.PREFILL, "m", self.engine, self.registry, _add, incarnation="i"
        )

    async def __aenter__(self) -> Setup:
        record = await self.replica.start()
        self.channel = grpc.aio.insecure_channel(record.address)
        self.stub: Any = worker_pb2_grpc.PrefillWorkerStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.replica.stop(0.01)

    async def prefill(self, name: str) -> worker_pb2.PrefillResponse:
        request = worker_pb2.PrefillRequest(
            key=worker_pb2.TransferKey(request_id=name, attempt=1),
            token_ids=[1, 2, 3],
            sampling=inference_pb2.SamplingParams(max_tokens=9),
            transfer=True,
        )
        response: worker_pb2.PrefillResponse = await self.stub.Prefill(request)
        return response


def _add(server: grpc.aio.Server, engine: Engine, intake: Intake) -> None:
    servicer = PrefillServicer(engine, intake)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(servicer, server)


async def test_until_routers_know_that_it_drains_a_worker_takes_requests() -> None:
    async with Setup(poll_s=0.25) as worker:
        stopping = asyncio.create_task(worker.replica.stop(WAIT_S))
        await worker.registry.draining.wait()
        assert (await worker.prefill("from a router that has not looked yet")).token_id
        await stopping


async def test_the_wait_for_routers_is_within_the_grace() -> None:
    async with Setup(poll_s=NEVER_S) as worker, asyncio.timeout(WAIT_S):
        await worker.replica.stop(0.1)
        assert worker.engine.held_at_stop == 0
        assert not await worker.registry.list()


async def test_the_engine_is_kept_until_its_kv_was_fetched() -> None:
    async with Setup(transfer_ms=500) as worker:
        await worker.prefill("a")
        await worker.replica.stop(WAIT_S)
        assert worker.engine.held_at_stop == 0


async def test_kv_that_nobody_fetches_does_not_outlast_the_grace() -> None:
    async with Setup(transfer_ms=NEVER_S * 1000) as worker, asyncio.timeout(WAIT_S):
        await worker.prefill("a")
        await worker.replica.stop(0.2)
        assert worker.engine.held_at_stop == 1
