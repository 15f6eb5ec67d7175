"""How a worker comes, with its KV pairs made, and leaves, with its requests and KV fetched."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Set
from typing import Any, Self

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from core.config.schema import Config
from core.errors import WORKER_DRAINING, WorkerLostError
from core.rpc.status import from_rpc_error
from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerLoad, WorkerRecord, WorkerState
from engine.fake import FakeEngine, FakeLatency
from engine.protocol import EngineOutput, EngineRequest
from prefill_worker.servicer import add_prefill_service
from tests.support.waiting import until, until_awaited
from worker.replica import WorkerReplica

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

    async def put(self, record: WorkerRecord) -> bool:
        if record.state is WorkerState.DRAINING:
            self.draining.set()
        return await super().put(record)


class Setup:
    """A prefill worker; ``async with`` starts it, and the test stops it."""

    def __init__(self, *, poll_s: float = 0.01, transfer_ms: float = 0.0) -> None:
        self.config = Config.model_validate({"router": {"registry_poll_s": poll_s}})
        latency = FakeLatency(0, 0, transfer_ms)
        self.registry = WatchedRegistry()
        self.serve_with(WatchedEngine(self.config, Pool.PREFILL, latency=latency), Pool.PREFILL)

    def serve_with(self, engine: WatchedEngine, pool: Pool) -> None:
        self.engine = engine
        self.replica = WorkerReplica(
            self.config, pool, "m", engine, self.registry, add_prefill_service, incarnation="i"
        )

    async def __aenter__(self) -> Self:
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


class GatedEngine(WatchedEngine):
    """A request waits for the gate, and holds no KV block yet: as one that waits for its turn."""

    def __init__(self, config: Config, pool: Pool) -> None:
        super().__init__(config, pool, latency=FakeLatency(0, 0, 0))
        self.gate = asyncio.Event()
        self.waiting = 0

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.waiting += 1
        await self.gate.wait()
        async for output in super().generate(request):
            yield output


class GatedSetup(Setup):
    def __init__(self) -> None:
        super().__init__()
        self.gated = GatedEngine(self.config, Pool.PREFILL)
        self.serve_with(self.gated, Pool.PREFILL)

    async def start_prefills(self, count: int) -> list[asyncio.Task[worker_pb2.PrefillResponse]]:
        tasks = [asyncio.create_task(self.prefill(f"running-{n}")) for n in range(count)]
        await until(lambda: self.gated.waiting == count, what="all run")
        return tasks

    async def is_refused(self) -> bool:
        """A request that comes now."""
        try:
            async with asyncio.timeout(0.1):
                await self.prefill("late")
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, "w").reason == WORKER_DRAINING
        except TimeoutError:
            return False  # it was taken
        return False


async def test_within_the_grace_what_runs_ends_and_what_comes_is_refused() -> None:
    async with GatedSetup() as worker, asyncio.timeout(WAIT_S):
        running = await worker.start_prefills(3)
        stopping = asyncio.create_task(worker.replica.stop(WAIT_S))
        await until_awaited(worker.is_refused, what="it takes nothing more")
        assert not stopping.done()
        worker.gated.gate.set()
        for task in running:
            assert (await task).token_id
        await stopping
        assert worker.engine.held_at_stop == 0


async def test_what_outlasts_the_grace_is_told_to_go_elsewhere() -> None:
    async with GatedSetup() as worker, asyncio.timeout(WAIT_S):
        running = await worker.start_prefills(20)
        await worker.replica.stop(0.1)
        for task in running:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await task
            assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING


async def test_a_worker_that_is_asked_to_drains_and_leaves() -> None:
    worker = PairingSetup(Pool.PREFILL)
    record = await worker.replica.start()
    async with grpc.aio.insecure_channel(record.address) as channel:
        request = health_pb2.HealthCheckRequest()
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(request))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        await worker.registry.ask_to_drain(record.id)
        async with asyncio.timeout(WAIT_S):
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await worker.registry.draining.wait()

    async def gone() -> bool:
        return not await worker.registry.list()

    await until_awaited(gone, what="it has left")
    await worker.replica.stop(0.01)


class PairingEngine(WatchedEngine):
    """Its KV pairs come up when the test says so."""

    def __init__(self, config: Config, pool: Pool) -> None:
        super().__init__(config, pool, latency=FakeLatency(0, 0, 0))
        self.up: set[str] = set()
        self.asked: set[str] = set()
        self.stuck: str | None = None

    async def pair_up(self, others: Mapping[str, tuple[str, ...]]) -> Set[str]:
        self.asked |= others.keys()
        return others.keys() - self.up

    def must_be_replaced(self) -> str | None:
        return self.stuck


class PairingSetup(Setup):
    """One worker of a pool, and what the registry says of the other pool."""

    def __init__(self, pool: Pool, *, pair_timeout_s: float = NEVER_S) -> None:
        super().__init__()
        self.config = Config.model_validate(
            {
                "router": {"registry_poll_s": 0.01},
                "redis": {"renew_s": 0.01},
                "kv_transfer": {"pair_timeout_s": pair_timeout_s},
            }
        )
        self.pairing = PairingEngine(self.config, pool)
        self.serve_with(self.pairing, pool)
        self.pool = pool

    async def add(self, name: str, state: WorkerState = WorkerState.READY) -> None:
        pool = Pool.PREFILL if self.pool is Pool.DECODE else Pool.DECODE
        load = WorkerLoad(0, 0, 0, 1, 1)
        await self.registry.put(WorkerRecord(name, pool, state, name, "a", ("k",), "m", load))

    async def state(self) -> WorkerState | None:
        records = [r for r in await self.registry.list() if r.incarnation == "i"]
        return records[0].state if records else None

    async def until_state(self, state: WorkerState) -> None:
        await until_awaited(lambda: self._is(state), what=f"the worker is {state}")

    async def _is(self, state: WorkerState) -> bool:
        return await self.state() is state


@pytest.mark.parametrize("pool", list(Pool))
async def test_a_worker_is_ready_when_its_kv_pairs_are_up(pool: Pool) -> None:
    worker = PairingSetup(pool)
    await worker.add("one")
    await worker.add("two", WorkerState.STARTING)
    await worker.add("leaving", WorkerState.DRAINING)
    starting = asyncio.create_task(worker.replica.start())
    try:
        await worker.until_state(WorkerState.STARTING)
        worker.pairing.up.add("one")
        await until(lambda: worker.pairing.asked == {"one", "two"}, what="it asked for both")
        assert not starting.done()
        worker.pairing.up.add("two")
        await starting
        assert await worker.state() is WorkerState.READY
    finally:
        await worker.replica.stop(0.01)


async def test_a_pair_that_does_not_come_up_holds_up_nobody_for_long() -> None:
    worker = PairingSetup(Pool.PREFILL, pair_timeout_s=0.05)
    await worker.add("broken")
    await worker.replica.start()
    assert await worker.state() is WorkerState.READY
    await worker.replica.stop(0.01)


async def test_decode_pairs_up_with_a_prefill_worker_that_comes_later() -> None:
    worker = PairingSetup(Pool.DECODE)
    await worker.replica.start()
    await worker.add("later", WorkerState.STARTING)
    await until(lambda: worker.pairing.asked == {"later"}, what="it pairs up")
    await worker.replica.stop(0.01)


async def test_a_worker_with_a_stuck_group_drains_and_then_is_unhealthy() -> None:
    worker = PairingSetup(Pool.DECODE)
    await worker.replica.start()
    await worker.replica.check_health()
    worker.pairing.stuck = "a process group could not be aborted"
    await worker.replica.check_health()
    await worker.registry.draining.wait()
    await worker.replica.stop(0.01)
    with pytest.raises(WorkerLostError):
        await worker.replica.check_health()


async def test_metrics_are_served_where_the_registry_says() -> None:
    worker = PairingSetup(Pool.DECODE)
    record = await worker.replica.start()
    page = await asyncio.to_thread(urllib.request.urlopen, record.metrics)
    with page:
        assert b"process_resident_memory_bytes" in page.read()
    await worker.replica.stop(0.01)
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(urllib.request.urlopen, record.metrics)
