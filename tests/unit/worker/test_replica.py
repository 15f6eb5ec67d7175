"""The life cycle of a worker replica: start with KV pairs, drain, stop, and health."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Set
from typing import Any, Self

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import WORKER_DRAINING, WorkerLostError
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.credentials import ClusterCredentials
from core.rpc.status import from_rpc_error
from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerLoad, WorkerOrder, WorkerRecord, WorkerState
from engine.fake import FakeEngine, FakeLatency
from engine.protocol import EngineOutput, EngineRequest
from prefill_worker.servicer import add_prefill_service
from router.workers.client import WorkerClient
from tests.support.waiting import until, until_awaited
from worker.replica import WorkerReplica

pytestmark = pytest.mark.asyncio

NEVER_S = 3600.0
WAIT_S = 10.0  # bound for events that happen soon; only a failing test waits this long


class WatchedEngine(FakeEngine):
    """Records how many KV blocks it held when it was stopped."""

    held_at_stop: int | None = None  # blocks

    async def stop(self) -> None:
        load = self.load()
        self.held_at_stop = load.kv_blocks_total - load.kv_blocks_free
        await super().stop()


class WatchedRegistry(MemoryRegistry):
    """Sets ``draining`` when a worker announces that it drains."""

    def __init__(self) -> None:
        super().__init__(lease_s=NEVER_S)
        self.draining = asyncio.Event()

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        if record.state is WorkerState.DRAINING:
            self.draining.set()
        return await super().put(record)


class Setup:
    """A prefill worker. ``async with`` starts and stops it; the test may stop it earlier."""

    def __init__(
        self,
        *,
        poll_s: float = 0.01,
        transfer_ms: float = 0.0,
        credentials: ClusterCredentials | None = None,
    ) -> None:
        self.credentials = credentials
        self.config = Config.model_validate({"router": {"registry_poll_s": poll_s}})
        latency = FakeLatency(0, 0, transfer_ms)
        self.registry = WatchedRegistry()
        self.serve_with(WatchedEngine(self.config, Pool.PREFILL, latency=latency), Pool.PREFILL)

    def serve_with(self, engine: WatchedEngine, pool: Pool) -> None:
        self.engine = engine
        self.replica = WorkerReplica(
            config=self.config,
            pool=pool,
            model="m",
            engine=engine,
            registry=self.registry,
            services={pool: add_prefill_service},
            incarnation="i",
            credentials=self.credentials,
        )

    async def __aenter__(self) -> Self:
        record = await self.replica.start()
        self.address = record.address
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


async def test_a_worker_serves_only_members_of_its_cluster() -> None:
    ours = ClusterCredentials.create()
    async with Setup(credentials=ours) as worker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.prefill("from a stranger")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        client = WorkerClient(
            worker.address,
            credentials=ours,
            connect_timeout_s=10,
            max_message_bytes=2**20,
            silence_s=60,
        )
        assert await client.connected()
        await client.release(worker_pb2.TransferKey(request_id="r", attempt=1), 10)
        await client.close()
        stranger = WorkerClient(
            worker.address,
            credentials=ClusterCredentials.create(),
            connect_timeout_s=10,
            max_message_bytes=2**20,
            silence_s=60,
        )
        assert not await stranger.connected()
        await stranger.close()


async def test_the_wait_for_routers_ends_with_the_grace() -> None:
    async with Setup(poll_s=NEVER_S) as worker, asyncio.timeout(WAIT_S):
        await worker.replica.stop(0.1)
        assert worker.engine.held_at_stop == 0
        assert not await worker.registry.list()


async def test_the_engine_runs_until_its_kv_was_fetched() -> None:
    async with Setup(transfer_ms=500) as worker:
        await worker.prefill("a")
        await worker.replica.stop(WAIT_S)
        assert worker.engine.held_at_stop == 0


async def test_kv_that_is_never_fetched_does_not_delay_the_stop_beyond_the_grace() -> None:
    async with Setup(transfer_ms=NEVER_S * 1000) as worker, asyncio.timeout(WAIT_S):
        await worker.prefill("a")
        await worker.replica.stop(0.2)
        assert worker.engine.held_at_stop == 1


class GatedEngine(WatchedEngine):
    """Makes requests wait at a gate. Like queued requests, they hold no KV blocks there."""

    def __init__(self, config: Config, pool: Pool) -> None:
        super().__init__(config, pool, latency=FakeLatency(0, 0, 0))
        self.gate = asyncio.Event()
        self.entered = 0

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.entered += 1
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
        await until(lambda: self.gated.entered == count, what="all requests run")
        return tasks


async def test_within_the_grace_running_requests_end_and_new_ones_are_refused() -> None:
    async with GatedSetup() as worker, asyncio.timeout(WAIT_S):
        running = await worker.start_prefills(3)
        stopping = asyncio.create_task(worker.replica.stop(WAIT_S))
        intake = worker.replica._intakes[Pool.PREFILL]
        await until(lambda: not intake._open, what="the worker refuses new requests")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.prefill("late")
        assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING
        assert not stopping.done()
        worker.gated.gate.set()
        for task in running:
            assert (await task).token_id
        await stopping
        assert worker.engine.held_at_stop == 0


async def test_requests_that_outlast_the_grace_end_as_on_a_draining_worker() -> None:
    async with GatedSetup() as worker, asyncio.timeout(WAIT_S):
        running = await worker.start_prefills(20)
        await worker.replica.stop(0.1)
        for task in running:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await task
            assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING


async def test_a_worker_that_is_asked_to_drain_drains_and_leaves_the_registry() -> None:
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

    await until_awaited(gone, what="the worker has left the registry")
    await worker.replica.stop(0.01)


class PairingEngine(WatchedEngine):
    """An engine that has a KV pair with each worker that the test has added to ``up``."""

    def __init__(self, config: Config, pool: Pool) -> None:
        super().__init__(config, pool, latency=FakeLatency(0, 0, 0))
        self.pool = pool
        self.up: set[str] = set()  # incarnations of other workers
        self.requested: set[str] = set()  # incarnations that pair_up() was called with
        self.fault: str | None = None

    async def pair_up(self, others: Mapping[str, tuple[str, ...]], pool: Pool) -> Set[str]:
        assert pool is self.pool
        self.requested |= others.keys()
        return others.keys() - self.up

    def must_be_replaced(self) -> str | None:
        return self.fault


class PairingSetup(Setup):
    """One worker. ``add`` puts a record of a worker of the other pool into the registry."""

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
        record = WorkerRecord(
            id=name,
            pool=self.pool.other,
            state=state,
            incarnation=name,
            address="a",
            kv_addresses=("k",),
            model="m",
            load=WorkerLoad(
                queue_depth=0, running=0, queued_tokens=0, kv_blocks_free=1, kv_blocks_total=1
            ),
        )
        await self.registry.put(record)

    async def state(self) -> WorkerState | None:
        records = [r for r in await self.registry.list() if r.incarnation == "i"]
        return records[0].state if records else None

    async def until_state(self, state: WorkerState) -> None:
        await until_awaited(lambda: self._is(state), what=f"the worker is {state}")

    async def _is(self, state: WorkerState) -> bool:
        return await self.state() is state


@pytest.mark.parametrize("pool", list(Pool))
async def test_a_worker_is_ready_when_its_kv_pairs_exist(pool: Pool) -> None:
    worker = PairingSetup(pool)
    await worker.add("one")
    await worker.add("two", WorkerState.STARTING)
    await worker.add("leaving", WorkerState.DRAINING)
    starting = asyncio.create_task(worker.replica.start())
    try:
        await worker.until_state(WorkerState.STARTING)
        worker.pairing.up.add("one")
        await until(
            lambda: worker.pairing.requested == {"one", "two"}, what="both pairs were requested"
        )
        assert not starting.done()
        worker.pairing.up.add("two")
        await starting
        assert await worker.state() is WorkerState.READY
    finally:
        await worker.replica.stop(0.01)


async def test_a_worker_is_ready_without_a_pair_after_the_pair_timeout() -> None:
    worker = PairingSetup(Pool.PREFILL, pair_timeout_s=0.05)
    await worker.add("broken")
    await worker.replica.start()
    assert await worker.state() is WorkerState.READY
    await worker.replica.stop(0.01)


async def test_a_decode_worker_pairs_up_with_a_prefill_worker_that_starts_later() -> None:
    worker = PairingSetup(Pool.DECODE)
    await worker.replica.start()
    await worker.add("later", WorkerState.STARTING)
    await until(lambda: worker.pairing.requested == {"later"}, what="the pair was requested")
    await worker.replica.stop(0.01)


async def test_a_worker_that_must_be_replaced_drains_and_then_is_unhealthy() -> None:
    worker = PairingSetup(Pool.DECODE)
    await worker.replica.start()
    await worker.replica.check_health()
    worker.pairing.fault = "a process group could not be aborted"
    await worker.replica.check_health()
    await worker.registry.draining.wait()
    await worker.replica.stop(0.01)
    with pytest.raises(WorkerLostError):
        await worker.replica.check_health()


async def test_metrics_are_served_at_the_url_in_the_registry() -> None:
    worker = PairingSetup(Pool.DECODE)
    record = await worker.replica.start()
    page = await asyncio.to_thread(urllib.request.urlopen, record.metrics)
    with page:
        assert b"process_resident_memory_bytes" in page.read()
    await worker.replica.stop(0.01)
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(urllib.request.urlopen, record.metrics)
