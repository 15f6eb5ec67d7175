"""A running worker changes its pool: what routers see of it, and what disturbs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Set
from dataclasses import replace
from typing import Any, Self

import grpc
import pytest

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import WORKER_DRAINING, WorkerLostError
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.status import from_rpc_error
from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerOrder, WorkerRecord, WorkerState
from engine.fake import FakeEngine, FakeLatency, next_tokens
from engine.protocol import EngineOutput, EngineRequest
from tests.support.registry_rules import DECODE, PREFILL
from tests.support.waiting import until, until_awaited
from tests.support.worker_parts import SERVICES, NoMetrics
from worker.replica import WorkerReplica

pytestmark = pytest.mark.asyncio

NEVER_S = 3600.0
WAIT_S = 10.0  # bound for events that happen soon; only a failing test waits this long
PROMPT = [1, 2, 3]


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.replica.MetricsServer", NoMetrics)


class Registry(MemoryRegistry):
    """Remembers what the worker has said about itself.

    Attributes:
        said: (pool, state, changes_to) of the worker's renewals, without repetitions.
        after_put: called after each renewal, with its record.
    """

    def __init__(self) -> None:
        super().__init__(lease_s=NEVER_S)
        self.said: list[tuple[Pool, WorkerState, Pool | None]] = []
        self.after_put: Callable[[WorkerRecord], None] = lambda _: None

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        order = await super().put(record)
        if record.incarnation == "i":
            now = record.pool, record.state, record.changes_to
            if [now] != self.said[-1:]:
                self.said.append(now)
            self.after_put(record)
        return order


class Engine(FakeEngine):
    """Its requests wait at a gate. It has a pair with each worker that the test adds to ``up``."""

    def __init__(self, config: Config, pool: Pool, transfer_ms: float) -> None:
        super().__init__(config, pool, latency=FakeLatency(0, 0, transfer_ms))
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = 0
        self.up: set[str] | None = None  # None: pairs with all workers
        self.requested: list[tuple[Pool, frozenset[str]]] = []  # of pair_up, without repetitions
        self.defect: Exception | None = None
        self.fault: str | None = None
        self.stopped = False

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.entered += 1
        await self.gate.wait()
        async for output in super().generate(request):
            yield output

    async def pair_up(self, others: Mapping[str, tuple[str, ...]], pool: Pool) -> Set[str]:
        if self.defect is not None:
            raise self.defect
        now = pool, frozenset(others)
        if [now] != self.requested[-1:]:
            self.requested.append(now)
        return frozenset() if self.up is None else others.keys() - self.up

    def must_be_replaced(self) -> str | None:
        return self.fault

    async def stop(self) -> None:
        self.stopped = True
        await super().stop()


class Worker:
    """A worker that joins ``pool`` first. ``async with`` starts and stops it."""

    def __init__(
        self,
        pool: Pool,
        *,
        role_change: bool = True,
        grace_s: float = WAIT_S,
        transfer_ms: float = 0.0,
        pair_timeout_s: float = NEVER_S,
    ) -> None:
        pools = {"shutdown_grace_s": grace_s}
        self.config = Config.model_validate(
            {
                "cluster": {"role_change": role_change},
                "router": {"registry_poll_s": 0.01},
                "redis": {"renew_s": 0.01},
                "kv_transfer": {"pair_timeout_s": pair_timeout_s},
                "prefill": pools,
                "decode": pools,
            }
        )
        self.pool = pool
        self.registry = Registry()
        self.engine = Engine(self.config, pool, transfer_ms)
        self.replica = WorkerReplica(
            config=self.config,
            pool=pool,
            model="m",
            engine=self.engine,
            registry=self.registry,
            services=SERVICES if role_change else {pool: SERVICES[pool]},
            incarnation="i",
            credentials=None,
        )
        self._calls: list[asyncio.Task[list[int]]] = []

    async def __aenter__(self) -> Self:
        self.record = await self.replica.start()
        self.channel = grpc.aio.insecure_channel(self.record.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self.replica.stop(0.01)

    async def order(self, pool: Pool) -> None:
        await self.registry.ask_to_change_role(self.record.id, pool)

    async def until_said(self, pool: Pool, state: WorkerState) -> None:
        def said() -> bool:
            return [each[:2] for each in self.registry.said[-1:]] == [(pool, state)]

        await until(said, what=f"the worker is {state} in {pool}", within_s=WAIT_S)

    async def until_gone(self) -> None:
        async def gone() -> bool:
            return not await self.registry.list()

        await until_awaited(gone, what="the worker has left the registry")

    async def change(self, pool: Pool) -> None:
        """Order a change and wait for its end."""
        await self.order(pool)
        await self.until_said(pool, WorkerState.READY)

    def call(self, pool: Pool) -> asyncio.Task[list[int]]:
        """Start a request as a router sends it to a worker of ``pool``. Return its tokens."""
        call = asyncio.create_task(self._call(pool, f"r{len(self._calls)}"))
        self._calls.append(call)
        return call

    async def _call(self, pool: Pool, name: str) -> list[int]:
        fields: dict[str, Any] = {
            "key": worker_pb2.TransferKey(request_id=name, attempt=1),
            "token_ids": PROMPT,
            "sampling": inference_pb2.SamplingParams(max_tokens=4),
        }
        if pool is Pool.PREFILL:
            prefill: Any = worker_pb2_grpc.PrefillWorkerStub(self.channel)
            response = await prefill.Prefill(worker_pb2.PrefillRequest(transfer=True, **fields))
            return [response.token_id]
        decode: Any = worker_pb2_grpc.DecodeWorkerStub(self.channel)
        stream = decode.Decode(worker_pb2.DecodeRequest(**fields))
        return [token async for response in stream for token in response.token_ids]

    async def serves(self, pool: Pool) -> None:
        """Check that the worker serves requests of ``pool``, and refuses those of the other."""
        tokens = await self.call(pool)
        assert tokens == list(next_tokens(PROMPT, len(tokens)))
        await self.refuses(pool.other)

    async def refuses(self, pool: Pool) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(pool)
        assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING

    async def start_call(self, pool: Pool) -> asyncio.Task[list[int]]:
        """Start a request that waits at the engine's gate."""
        self.engine.gate.clear()
        entered = self.engine.entered
        call = self.call(pool)
        await until(lambda: self.engine.entered > entered, what="the request runs")
        return call


@pytest.mark.parametrize("old", Pool)
async def test_a_worker_changes_its_pool_and_back(old: Pool) -> None:
    new = old.other
    async with Worker(old) as worker:
        assert worker.record.can_change_role
        assert worker.record.id.startswith("worker-"), "its pool may change, so its id names none"
        await worker.serves(old)
        worker.registry.said.clear()
        await worker.change(new)
        assert worker.registry.said == [
            (old, WorkerState.READY, None),
            (old, WorkerState.DRAINING, new),
            (new, WorkerState.STARTING, None),
            (new, WorkerState.READY, None),
        ]
        (record,) = await worker.registry.list()
        assert record == replace(worker.record, pool=new, load=record.load), "the same process"
        await worker.serves(new)
        await worker.change(old)
        await worker.serves(old)
        assert not worker.engine.stopped


async def test_running_requests_end_before_the_pool_changes() -> None:
    async with Worker(Pool.DECODE) as worker:
        running = await worker.start_call(Pool.DECODE)
        await worker.order(Pool.PREFILL)
        await worker.until_said(Pool.DECODE, WorkerState.DRAINING)
        intake = worker.replica._intakes[Pool.DECODE]
        await until(lambda: not intake._open, what="new requests are refused")
        await worker.refuses(Pool.DECODE)
        assert worker.registry.said[-1][:2] == (Pool.DECODE, WorkerState.DRAINING)
        worker.engine.gate.set()
        assert await running == list(next_tokens(PROMPT, 4))
        await worker.until_said(Pool.PREFILL, WorkerState.READY)


async def test_held_kv_is_fetched_before_the_pool_changes() -> None:
    async with Worker(Pool.PREFILL, transfer_ms=300) as worker:
        free: list[int] = []

        def on_put(record: WorkerRecord) -> None:
            if record.pool is Pool.DECODE:
                free.append(record.load.kv_blocks_total - record.load.kv_blocks_free)

        worker.registry.after_put = on_put
        await worker.call(Pool.PREFILL)
        await worker.change(Pool.DECODE)
        assert not any(free)


@pytest.mark.parametrize("old", Pool)
async def test_requests_that_outlast_the_grace_are_continued_elsewhere(old: Pool) -> None:
    async with Worker(old, grace_s=0.1) as worker:
        running = [await worker.start_call(old) for _ in range(5)]
        await worker.change(old.other)
        for call in running:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING
        worker.engine.gate.set()
        await worker.serves(old.other)


async def test_kv_that_is_never_fetched_delays_the_change_by_the_grace_only() -> None:
    async with Worker(Pool.PREFILL, grace_s=0.1, transfer_ms=NEVER_S * 1000) as worker:
        await worker.call(Pool.PREFILL)
        await worker.change(Pool.DECODE)
        load = worker.engine.load()
        assert load.kv_blocks_free < load.kv_blocks_total, "a decode worker can still fetch it"


async def test_an_order_to_join_the_current_pool_changes_nothing() -> None:
    async with Worker(Pool.DECODE) as worker:
        worker.registry.said.clear()
        await worker.order(Pool.DECODE)
        running = await worker.start_call(Pool.DECODE)  # some renewals pass meanwhile
        await until_awaited(lambda: taken(worker), what="the worker has the order")
        worker.engine.gate.set()
        await running
        assert {state for _, state, _ in worker.registry.said} == {WorkerState.READY}


async def taken(worker: Worker) -> bool:
    """Return whether the worker has read its orders."""
    return not worker.registry._orders


async def test_the_latest_order_during_the_drain_counts() -> None:
    async with Worker(Pool.PREFILL) as worker:
        running = await worker.start_call(Pool.PREFILL)
        worker.registry.said.clear()
        await worker.order(Pool.DECODE)
        await worker.until_said(Pool.PREFILL, WorkerState.DRAINING)
        await worker.order(Pool.PREFILL)
        await until_awaited(lambda: taken(worker), what="the worker has the order")
        worker.engine.gate.set()
        await running
        await worker.until_said(Pool.PREFILL, WorkerState.READY)
        assert {pool for pool, *_ in worker.registry.said} == {Pool.PREFILL}
        await worker.serves(Pool.PREFILL)


async def test_the_same_order_twice_is_one_change() -> None:
    async with Worker(Pool.PREFILL) as worker:
        running = await worker.start_call(Pool.PREFILL)
        worker.registry.said.clear()
        for _ in range(2):
            await worker.order(Pool.DECODE)
            await until_awaited(lambda: taken(worker), what="the worker has the order")
        worker.engine.gate.set()
        await running
        await worker.change(Pool.DECODE)
        assert [state for _, state, _ in worker.registry.said].count(WorkerState.DRAINING) == 1


async def test_an_order_during_the_join_is_carried_out_after_it() -> None:
    async with Worker(Pool.PREFILL) as worker:
        await worker.registry.put(PREFILL)
        worker.engine.up = set()
        await worker.order(Pool.DECODE)
        await worker.until_said(Pool.DECODE, WorkerState.STARTING)
        await worker.order(Pool.PREFILL)
        await until_awaited(lambda: taken(worker), what="the worker has the order")
        worker.engine.up = None
        await worker.until_said(Pool.PREFILL, WorkerState.READY)
        await worker.serves(Pool.PREFILL)
        assert (Pool.DECODE, WorkerState.READY, None) in worker.registry.said


async def test_an_order_during_the_start_is_carried_out_when_the_worker_is_ready() -> None:
    worker = Worker(Pool.PREFILL)
    await worker.registry.put(DECODE)
    worker.engine.up = set()
    starting = asyncio.create_task(worker.replica.start())
    await until(lambda: bool(worker.registry.said), what="the worker is registered")
    (record,) = [each for each in await worker.registry.list() if each.incarnation == "i"]
    await worker.registry.ask_to_change_role(record.id, Pool.DECODE)
    await until_awaited(lambda: taken(worker), what="the worker has the order")
    assert not starting.done()
    worker.engine.up = None
    assert (await starting).state is WorkerState.READY
    await worker.until_said(Pool.DECODE, WorkerState.READY)
    await worker.replica.stop(0.01)


async def test_without_role_change_an_order_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Worker(Pool.PREFILL, role_change=False) as worker:
        assert not worker.record.can_change_role
        assert worker.record.id.startswith("prefill-")
        await worker.order(Pool.DECODE)
        await until_awaited(lambda: taken(worker), what="the worker has the order")
        assert "cluster.role_change" in caplog.text
        assert (await worker.call(Pool.PREFILL)) == list(next_tokens(PROMPT, 1))
        assert worker.registry.said[-1][:2] == (Pool.PREFILL, WorkerState.READY)


# What ends a change


@pytest.mark.parametrize("phase", [WorkerState.DRAINING, WorkerState.STARTING])
@pytest.mark.parametrize("cause", ["drain", "stop", "fault"])
async def test_a_worker_that_must_leave_during_a_change_leaves(
    cause: str, phase: WorkerState
) -> None:
    worker = Worker(Pool.PREFILL)
    async with worker:
        if phase is WorkerState.DRAINING:
            await worker.start_call(Pool.PREFILL)
            pool = Pool.PREFILL
        else:
            await worker.registry.put(PREFILL)
            worker.engine.up = set()
            pool = Pool.DECODE
        await worker.order(Pool.DECODE)
        await worker.until_said(pool, phase)
        if cause == "drain":
            await worker.registry.ask_to_drain(worker.record.id)
            await until_awaited(lambda: taken(worker), what="the worker has the order")
        elif cause == "stop":
            await worker.replica.stop(0.1)
        else:
            worker.engine.fault = "a process group could not be aborted"
            await worker.replica.check_health()
        worker.engine.gate.set()
        await worker.registry.remove(PREFILL.id)
        await worker.until_gone()
        await until(lambda: worker.engine.stopped, what="the engine has stopped")
        with pytest.raises(WorkerLostError):
            await worker.replica.check_health()
    assert (Pool.DECODE, WorkerState.READY, None) not in worker.registry.said


async def test_an_order_after_the_stop_has_begun_changes_nothing() -> None:
    async with Worker(Pool.PREFILL) as worker:
        running = await worker.start_call(Pool.PREFILL)
        stopping = asyncio.create_task(worker.replica.stop(WAIT_S))
        await worker.until_said(Pool.PREFILL, WorkerState.DRAINING)
        await worker.order(Pool.DECODE)
        await until_awaited(lambda: taken(worker), what="the worker has the order")
        worker.engine.gate.set()
        await running
        await stopping
        assert Pool.DECODE not in {pool for pool, *_ in worker.registry.said}


async def test_a_worker_that_fails_to_change_is_replaced() -> None:
    async with Worker(Pool.PREFILL) as worker:
        worker.engine.defect = RuntimeError("a defect")
        await worker.order(Pool.DECODE)
        await worker.until_gone()
        await until(lambda: worker.engine.stopped, what="the engine has stopped")


# Outages of the registry


async def test_a_worker_whose_drain_nobody_would_see_stays_in_its_pool() -> None:
    async with Worker(Pool.PREFILL) as worker:
        running = await worker.start_call(Pool.PREFILL)
        registry = worker.registry

        def on_put(_: WorkerRecord) -> None:
            if not registry._orders:  # this renewal has brought the order
                registry.available = False
                registry.after_put = lambda _: None

        registry.after_put = on_put
        registry._orders[worker.record.id] = WorkerOrder.DECODE
        registry.said.clear()
        await until(lambda: not registry.available, what="the registry is away")
        worker.engine.gate.set()
        await running
        await worker.serves(Pool.PREFILL)
        await until(
            lambda: worker.replica._changing is not None and worker.replica._changing.done(),
            what="the change was given up",
        )
        registry.available = True
        await worker.until_said(Pool.PREFILL, WorkerState.READY)
        await worker.serves(Pool.PREFILL)
        await worker.change(Pool.DECODE)  # when it is ordered again
        await worker.serves(Pool.DECODE)


async def test_a_worker_changes_although_the_registry_goes_away_meanwhile() -> None:
    async with Worker(Pool.DECODE) as worker:
        registry = worker.registry

        def on_put(record: WorkerRecord) -> None:
            if record.state is WorkerState.DRAINING:
                registry.available = False

        registry.after_put = on_put
        registry._orders[worker.record.id] = WorkerOrder.PREFILL
        changed = worker.replica
        await until(lambda: not registry.available, what="the registry is away")
        await until(
            lambda: changed._changing is not None and changed._changing.done(),
            what="it has changed",
        )
        await worker.serves(Pool.PREFILL)
        registry.after_put = lambda _: None
        registry.available = True
        await worker.until_said(Pool.PREFILL, WorkerState.READY)
        assert worker.registry.said[-2:] == [
            (Pool.DECODE, WorkerState.DRAINING, Pool.PREFILL),
            (Pool.PREFILL, WorkerState.READY, None),
        ]


# KV pairs


async def test_the_worker_is_ready_when_its_pairs_of_the_new_role_exist() -> None:
    async with Worker(Pool.PREFILL) as worker:
        await worker.registry.put(PREFILL)
        await worker.registry.put(replace(DECODE, incarnation="i2"))
        worker.engine.up = set()
        await worker.order(Pool.DECODE)
        await worker.until_said(Pool.DECODE, WorkerState.STARTING)
        await until(
            lambda: (
                worker.engine.requested[-1:] == [(Pool.DECODE, frozenset({PREFILL.incarnation}))]
            ),
            what="the pairs with the prefill workers were requested",
        )
        assert worker.registry.said[-1][:2] == (Pool.DECODE, WorkerState.STARTING)
        worker.engine.up.add(PREFILL.incarnation)
        await worker.until_said(Pool.DECODE, WorkerState.READY)


async def test_only_a_decode_worker_pairs_with_workers_that_come_later() -> None:
    async with Worker(Pool.DECODE) as worker:
        requested = worker.engine.requested
        p1, p2 = (replace(PREFILL, id=name, incarnation=name) for name in ("p1", "p2"))

        async def until_paired(*names: str) -> None:
            wanted = [(Pool.DECODE, frozenset(names))]
            await until(lambda: requested[-1:] == wanted, what=f"pairs with {names}")

        await worker.registry.put(p1)
        await until_paired("p1")
        await worker.registry.put(replace(p1, pool=Pool.DECODE))
        await until_paired()  # the engine forgets it, and pairs again when it is back
        await worker.registry.put(p1)
        await until_paired("p1")
        await worker.change(Pool.PREFILL)
        assert requested[-1] == (Pool.PREFILL, frozenset())
        await worker.registry.put(p2)
        await worker.registry.put(replace(DECODE, incarnation="d1"))
        await worker.change(Pool.DECODE)
        later = requested[requested.index((Pool.PREFILL, frozenset())) + 1 :]
        assert later == [(Pool.DECODE, frozenset({"p1", "p2"}))]


async def test_pairs_that_an_outage_prevents_are_made_after_it() -> None:
    async with Worker(Pool.DECODE) as worker:
        registry, requested = worker.registry, worker.engine.requested
        await registry.put(PREFILL)
        wanted = [(Pool.DECODE, frozenset({PREFILL.incarnation}))]
        await until(lambda: requested[-1:] == wanted, what="the pair was requested")
        await worker.change(Pool.PREFILL)
        requested.clear()

        def on_put(record: WorkerRecord) -> None:
            if record.state is WorkerState.DRAINING:
                registry.available = False

        registry.after_put = on_put
        await worker.order(Pool.DECODE)
        await until(lambda: not registry.available, what="the registry is away")
        change = worker.replica._changing
        await until(lambda: change is not None and change.done(), what="it has changed")
        assert not requested
        registry.after_put = lambda _: None
        registry.available = True
        await until(lambda: requested[-1:] == wanted, what="the pair was requested again")
