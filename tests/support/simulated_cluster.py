"""Runs routers and workers in virtual time, without sockets, Redis or vLLM.

The routers' and workers' code that handles requests is real. The engines are fake, and the stores
are in memory. ``SimCall`` replaces a gRPC call. It delays messages, and loses some of them if its
connection breaks.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import UnavailableError
from core.messages import worker_pb2
from core.state.journal import Change, MemoryJournal, Written
from core.state.registry import MemoryRegistry
from core.tasks import Supervisor
from core.types import Pool, WorkerRecord, WorkerState
from decode_worker.servicer import DecodeServicer
from engine.fake import FakeEngine, FakeLatency, FakeSize
from engine.protocol import EngineRequest, KvReceive
from prefill_worker.servicer import PrefillServicer
from router.admission.gate import AdmissionGate
from router.admission.policy import AdmissionLimits
from router.api.handler import RequestBounds, RequestHandler
from router.api.servicer import InferenceServicer
from router.dispatch.dispatcher import Dispatcher, DispatchSettings
from router.dispatch.retry import RetryLimits
from router.lease import RouterLease
from router.placement.ledger import PlacementLedger
from router.placement.policy import (
    PlacementLimits,
)
from router.resume.journal import Journal, JournalSettings
from router.signals import Signals
from router.workers.membership import Workers, WorkersSettings
from tests.support.router_harness import make_codec
from tests.support.virtual_time import elapse
from worker.intake import Intake
from worker.peers import Peers

LEASE_S = 3.0
RENEW_S = 1.0
POLL_S = 0.25
FAILOVER_S = 60.0  # how long a request searches for another worker
CONTEXT_TOKENS = 64
KV_BLOCKS = 64
PLACEMENT = PlacementLimits(dict.fromkeys(Pool, 6), prefill_backlog_s=0.05)
MAX_UNREAD = 4  # a sender waits while a call has this many unread messages
SETTLE_S = 100.0  # wait after the last request; after this wait, nothing may be left

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
CONNECTION_LOST = ""  # the client's reason if the connection broke before a status came


class _ServerContext:
    """The worker's side of one call."""

    def __init__(self, call: SimCall) -> None:
        self._call = call

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Do nothing, because no caller reads the metadata."""

    def time_remaining(self) -> float:
        return self._call.time_remaining()

    async def write(self, message: Any) -> None:
        await self._call.send(message)

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        await self._call.send_status(code, details, metadata)
        raise grpc.aio.AbortError


class SimCall:
    """One call to one worker. Has the parts of a ``grpc.aio`` call that routers use."""

    def __init__(
        self,
        worker: SimProcess,
        handle: Callable[[Any], Awaitable[Any]],
        timeout_s: float,
    ) -> None:
        self._worker = worker
        self._handle = handle
        self._messages: deque[Any] = deque()
        self._error: grpc.aio.AioRpcError | None = None
        self._ended = False
        self._changed = asyncio.Event()
        worker.calls[self] = None
        loop = asyncio.get_running_loop()
        code = grpc.StatusCode.DEADLINE_EXCEEDED
        self._deadline_s = loop.time() + timeout_s
        self._deadline = loop.call_at(self._deadline_s, self.break_, code, "deadline")
        self._cancel: asyncio.Task[None] | None = None
        self.server = asyncio.create_task(self._serve())
        self.server.add_done_callback(lambda _: worker.calls.pop(self, None))

    def cancel(self) -> None:
        """Cancel the call. It ends immediately for the caller, and a little later on the worker."""
        if self._cancel is None and not self.server.done():
            self._cancel = asyncio.create_task(self._cancel_server())
        self._end()

    async def _cancel_server(self) -> None:
        await self._worker.link()
        self.server.cancel()

    def break_(self, code: grpc.StatusCode, details: str) -> None:
        """Break the connection. A random number of the latest unread messages are lost."""
        for _ in range(self._worker.rng.randrange(len(self._messages) + 1)):
            self._messages.pop()
        self._fail(code, details)
        self.server.cancel()

    def time_remaining(self) -> float:
        """Return the seconds until the deadline. After the deadline, return 0, as gRPC does."""
        return max(0.0, self._deadline_s - asyncio.get_running_loop().time())

    async def send_status(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        await self._worker.link()
        self._fail(code, details, metadata)

    def __await__(self) -> Any:
        return self._receive().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self._receive()) is not None:
            yield message

    async def _receive(self) -> Any:
        while not (self._messages or self._ended):
            self._changed.clear()
            await self._changed.wait()
        if self._messages:
            message = self._messages.popleft()
            self._changed.set()
            return message
        if self._error is not None:
            raise self._error
        return None

    async def _serve(self) -> None:
        try:
            await self._worker.link()
            if not self._worker.listens:
                self._fail(UNAVAILABLE, "connection refused")
                return
            answer = await self._handle(_ServerContext(self))
            if answer is not None:  # the call is unary
                await self.send(answer)
            await self._worker.link()
            self._end()
        except grpc.aio.AbortError:
            pass

    async def send(self, message: Any) -> None:
        await self._worker.link()
        while len(self._messages) >= MAX_UNREAD:
            self._changed.clear()
            await self._changed.wait()
        self._messages.append(message)
        self._changed.set()

    def _fail(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        if not self._ended:
            nothing = grpc.aio.Metadata()
            trailing = grpc.aio.Metadata(*metadata)
            self._error = grpc.aio.AioRpcError(code, nothing, trailing, details=details)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._deadline.cancel()
        self._changed.set()


class SimProcess(abc.ABC):
    """The process of one worker. Routers also use this object as their client of the worker.

    Attributes:
        alive: whether the process runs.
        killed: whether it was killed.
        calls: those that the process has not ended.
        asked: keys of all Prefill and Decode calls that arrived.
        prefilled: keys whose KV a decode worker may fetch.
        slow: whether some messages take long.
        slowness: factor on the engine's latencies.
    """

    engine: FakeEngine
    prefill_service: PrefillServicer
    decode_service: DecodeServicer

    def __init__(self, incarnation: str, cluster: SimCluster) -> None:
        self.rng = cluster.rng
        self.incarnation = incarnation
        self.alive = True
        self.killed = False
        self.calls: dict[SimCall, None] = {}  # in order of arrival
        self.asked: list[str] = []
        self.prefilled: set[str] = set()
        self.slow = False
        self.slowness = 1.0
        self._cluster = cluster
        self._running = asyncio.Event()  # cleared while a signal stops the process
        self._running.set()

    @property
    @abc.abstractmethod
    def record(self) -> WorkerRecord:
        """What the worker says about itself in the registry."""

    @property
    def pool(self) -> Pool:
        """The pool that the worker is in, or joins now."""
        return self.record.pool

    @property
    def listens(self) -> bool:
        """Whether the worker accepts calls."""
        return self.alive

    @abc.abstractmethod
    def all_tasks(self) -> Iterable[asyncio.Task[Any]]:
        """The tasks that run as long as the process, and those that start, change or stop it."""

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those of ``all_tasks`` that run now."""
        return [task for task in self.all_tasks() if not task.done()]

    def check_tasks(self) -> None:
        """Raise the exception of a task that has failed. Those of a killed process may."""
        for task in () if self.killed else self.all_tasks():
            if task.done() and not task.cancelled():
                task.result()

    async def link(self) -> None:
        """Wait for the transit of one message. If the process is stopped, wait until it resumes."""
        await elapse(self.rng.choice((0.0, 0.0, 0.001, 0.3 if self.slow else 0.01)))
        await self._running.wait()

    async def _sleep(self, seconds: float) -> None:
        await elapse(seconds * self.slowness)
        await self._running.wait()

    async def _fetch(self, request: EngineRequest) -> bool:
        return await self._cluster.fetch(request, self._sleep)

    def has_prefilled(self, transfer_id: str) -> bool:
        """Whether a decode worker may fetch this KV now."""
        return self.alive and transfer_id in self.prefilled

    async def fetched(self, transfer_id: str) -> None:
        """Note that a decode worker has the KV."""
        self.prefilled.discard(transfer_id)

    # The router calls these.

    async def connected(self) -> bool:
        return self.listens

    def prefill(self, request: worker_pb2.PrefillRequest, timeout_s: float) -> SimCall:
        async def handle(context: Any) -> worker_pb2.PrefillResponse:
            self.asked.append(_key(request.key))
            response = await self.prefill_service.Prefill(request, context)
            self.prefilled.add(_key(request.key))
            return response

        return SimCall(self, handle, timeout_s)

    def decode(self, request: worker_pb2.DecodeRequest, timeout_s: float) -> SimCall:
        async def handle(context: Any) -> None:
            self.asked.append(_key(request.key))
            await self.decode_service.Decode(request, context)

        return SimCall(self, handle, timeout_s)

    async def release(self, key: worker_pb2.TransferKey, timeout_s: float) -> None:
        async def handle(context: Any) -> worker_pb2.ReleaseResponse:
            self.prefilled.discard(_key(key))
            return await self.prefill_service.Release(worker_pb2.ReleaseRequest(key=key), context)

        await SimCall(self, handle, timeout_s)

    async def close(self) -> None:  # noqa: B027 - all workers use this
        """Do nothing, because the router has no channel here."""

    # Faults call these.

    def kill(self) -> None:
        """As ``kill -9``: the connections break, the lease expires and the memory is lost."""
        self.alive, self.killed = False, True
        for task in self.tasks():
            task.cancel()
        self.engine.fail()
        self._running.set()
        self.cut()

    def cut(self) -> None:
        """Break all connections. The process keeps running."""
        for call in list(self.calls):
            call.break_(UNAVAILABLE, "connection reset")

    def stop(self) -> None:
        """As SIGSTOP: the connections stay open, but nothing runs."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def end(self) -> None:
        """End at once, at the end of the test."""
        tasks = self.tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class SimWorker(SimProcess):
    """A worker whose lease and drain are simple models of ``worker.replica.WorkerReplica``."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        cluster: SimCluster,
        latency: FakeLatency,
        limit: int,
        kv_blocks: int,
    ) -> None:
        super().__init__(f"{name}'s", cluster)
        self.engine = FakeEngine(
            Config(),
            pool,
            latency=latency,
            size=FakeSize(kv_blocks=kv_blocks, kv_block_tokens=4),
            sleep=self._sleep,
            clock=cluster.clock,
            fetch=self._fetch,
        )
        self.intake = Intake(limit)
        self.prefill_service = PrefillServicer(self.engine, self.intake)
        self._peers = Peers(cluster.registry, Pool.DECODE)
        self.decode_service = DecodeServicer(self.engine, self.intake, self._peers)
        self._record = WorkerRecord(
            id=name,
            pool=pool,
            state=WorkerState.READY,
            incarnation=self.incarnation,
            address=name,
            kv_addresses=("tcp://sim",),
            model=cluster.model,
            load=self.engine.load(),
        )
        self._lease = asyncio.create_task(self._keep_lease())

    @property
    def record(self) -> WorkerRecord:
        return self._record

    def all_tasks(self) -> Iterable[asyncio.Task[Any]]:
        return (self._lease,)

    async def drain(self, grace_s: float) -> None:
        """Drain and stop as ``worker.replica.WorkerReplica`` does."""
        self._record = replace(self.record, state=WorkerState.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._renew()
                await elapse(2 * POLL_S)
                self.intake.close()
                await self.intake.drained()
        self.intake.close()
        self.intake.send_away()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.intake.drained()
        self.alive = False
        self._lease.cancel()
        for call in list(self.calls):
            call.break_(grpc.StatusCode.CANCELLED, "server shut down")
        with contextlib.suppress(Exception):
            await self._cluster.registry.remove(self.record.id)

    async def _keep_lease(self) -> None:
        while True:
            await self._renew()
            with contextlib.suppress(UnavailableError):
                await self._peers.refresh()
            await elapse(RENEW_S)

    async def _renew(self) -> None:
        await self._running.wait()
        with contextlib.suppress(Exception):  # the registry is away; the next renewal may succeed
            await self._cluster.registry.put(replace(self.record, load=self.engine.load()))


class _RouterStore:
    """The journal's store, as one router uses it. A dead router cannot reach the store."""

    def __init__(self, store: MemoryJournal, router: SimRouter) -> None:
        self._store = store
        self._router = router

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        await self._link()
        return await self._store.write(changes)

    async def take(self, request_id: str, writer: str, token: str) -> bytes | Written:
        await self._link()
        return await self._store.take(request_id, writer, token)

    async def close(self) -> None:
        """Do nothing, because nothing is open."""

    async def _link(self) -> None:
        slow = self._router.cluster.store_slow
        await elapse(self._router.rng.choice((0.0, 0.001, 0.01, 0.2 if slow else 0.01)))
        if not self._router.alive:
            raise UnavailableError("this router is dead")


class SimRouter:
    """One router process."""

    def __init__(self, cluster: SimCluster, limits: AdmissionLimits) -> None:
        self.rng = cluster.rng
        self.cluster = cluster
        self.alive = True
        self.calls: dict[asyncio.Task[None], None] = {}  # running calls of clients, in order
        clock = cluster.clock
        codec = cluster.codec
        self.ledger = PlacementLedger(
            cluster.placement, clock, LEASE_S, report_snapshots=int(RENEW_S / POLL_S)
        )
        admission = self.admission = AdmissionGate(limits, clock)
        self.ledger.on_room = admission.wake
        self.workers = Workers(
            cluster.registry,
            WorkersSettings(
                poll_s=POLL_S,
                poll_timeout_s=1.0,
                lost_after_s=LEASE_S,
                connect_timeout_s=1.0,
                max_message_bytes=2**20,
                connection_silence_s=10.0,
            ),
            clock,
            lambda snapshot: self.ledger.new_snapshot(frozenset(record.key for record in snapshot)),
            connect=lambda record: cluster.workers[record.id],  # type: ignore[arg-type, return-value]
        )
        self.signals = Signals(clock)
        self.dispatcher = Dispatcher(
            self.workers,
            self.ledger,
            DispatchSettings(
                model=cluster.model,
                local_prefill="never",
                retries=RetryLimits(50, FAILOVER_S, LEASE_S, limits.cold_start_timeout_s),
                buffer_responses=8,
                release_timeout_s=1.0,
                max_releases=64,
            ),
            clock,
            self.signals,
        )
        self.supervisor = Supervisor()
        store = _RouterStore(cluster.journal, self)
        self.journal = Journal(store, JournalSettings(LEASE_S, patience_s=0.05))
        self.handler = RequestHandler(
            text=codec,
            dispatcher=self.dispatcher,
            admission=admission,
            bounds=RequestBounds(600.0, 3600.0, 30.0),
            clock=clock,
            journal=self.journal,
            phase_clock=clock,
            signals=self.signals,
        )
        self.lease = RouterLease(
            cluster.registry,
            router_id=cluster.next_router_id(),
            address="sim",
            turns=admission.turns,
            dispatcher=self.dispatcher,
            ledger=self.ledger,
            signals=self.signals,
            renew_s=RENEW_S,
            timeout_s=1.0,
        )
        self.servicer = InferenceServicer(self.handler, clock)

    async def start(self) -> None:
        await self.workers.refresh()
        self.supervisor.start("registry poll", self.workers.poll)
        self.supervisor.start("router lease", self.lease.run)
        self.journal.start(self.supervisor)

    async def stop(self) -> None:
        await self.handler.drained()
        await self.dispatcher.close()
        await self.supervisor.stop()
        if self.alive:
            await self.lease.remove()
        await self.journal.close()
        await self.workers.close()

    async def kill(self) -> None:
        """As ``kill -9``: the connections to clients and workers break."""
        self.alive = False
        for call in self.calls:
            call.cancel()
        await self.stop()


class SimCluster:
    """Routers and workers in a ``VirtualLoop``. ``async with`` starts one router. At the end of the
    block, it stops all routers and workers.

    Args:
        limits: the limits of each router's admission.
        placement: the limits of each router's placement.
    """

    def __init__(
        self,
        rng: random.Random,
        limits: AdmissionLimits,
        placement: PlacementLimits = PLACEMENT,
    ) -> None:
        self.rng = rng
        self.placement = placement
        self._limits = limits
        self.clock = asyncio.get_running_loop().time
        self.codec = make_codec(CONTEXT_TOKENS)
        self.model = self.codec.model.served_name
        self.registry = MemoryRegistry(lease_s=LEASE_S, clock=self.clock)
        self.journal = MemoryJournal(lease_s=LEASE_S, clock=self.clock)
        self.store_slow = False
        self.transfer_s = 0.0  # how long the KV transfer takes after the prefill
        self.workers: dict[str, SimProcess] = {}  # includes dead workers
        self.routers: list[SimRouter] = []
        self._numbers = 0
        self._router_numbers = 0

    async def __aenter__(self) -> Self:
        await self.add_router()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for router in self.routers:
            if router.alive:
                await router.stop()
        for worker in self.workers.values():
            await worker.end()

    async def add_router(self) -> None:
        router = SimRouter(self, self._limits)
        await router.start()
        self.routers.append(router)

    def standing_tasks(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that run as long as their process."""
        tasks = {task for worker in self.workers.values() for task in worker.tasks()}
        for router in self.living_routers():
            tasks |= {*router.supervisor._tasks}
        return tasks

    def living_routers(self) -> list[SimRouter]:
        return [router for router in self.routers if router.alive]

    def add(
        self,
        pool: Pool,
        latency: FakeLatency | None = None,
        limit: int = 8,
        kv_blocks: int = KV_BLOCKS,
    ) -> SimProcess:
        """Start a worker that runs at most ``limit`` requests at the same time. The worker is ready
        when it has its first lease. If ``latency`` is None, latency and limit are random."""
        name = f"{pool}-{self.next_number()}"
        if latency is None:
            limit, latency = self.rng.choice((2, 8)), self.random_latency()
        worker = SimWorker(
            name=name, pool=pool, cluster=self, latency=latency, limit=limit, kv_blocks=kv_blocks
        )
        self.workers[name] = worker
        return worker

    def next_router_id(self) -> str:
        """Return an id that no other router has. It depends only on the seed."""
        self._router_numbers += 1
        return f"router-{self._router_numbers}"

    def next_number(self) -> int:
        """Return a number that no other worker has."""
        self._numbers += 1
        return self._numbers

    def random_latency(self) -> FakeLatency:
        return FakeLatency(
            prefill_ms_per_token=self.rng.choice((0.1, 2.0)),
            decode_step_ms=self.rng.choice((0.0, 5.0, 30.0)),
            transfer_ms=self.rng.choice((0.0, 20.0)),
        )

    def living(self, pool: Pool | None = None) -> list[SimProcess]:
        """Return the workers that are neither dead nor draining."""
        return [
            worker
            for worker in self.workers.values()
            if worker.alive
            and worker.record.state is WorkerState.READY
            and pool in (None, worker.pool)
        ]

    async def fetch(self, request: EngineRequest, wait: Callable[[float], Awaitable[None]]) -> bool:
        """Fetch a prompt's KV for a decode worker. Waits for the prefill, then for the transfer.

        Returns False if the prefill worker is dead or does not finish the prefill in time.
        """
        assert isinstance(request.kv, KvReceive)
        source = next(
            worker
            for worker in self.workers.values()
            if worker.incarnation == request.kv.incarnation
        )
        for _ in range(400):
            if not source.alive:
                return False
            if source.has_prefilled(request.transfer_id):
                await wait(self.transfer_s)
                if not source.has_prefilled(request.transfer_id):
                    return False  # the transfer broke
                await source.fetched(request.transfer_id)
                return True
            await wait(0.025)
        return False


def _key(key: worker_pb2.TransferKey) -> str:
    return f"{key.request_id}#{key.attempt}"


class SimClient:
    """One request of an application. It is also the gRPC context that the router's servicer gets.

    Args:
        living: returns the living routers.
        timeout_s: seconds from the start of a call to its deadline.
        read_s: how long the client takes to read one response.
    """

    def __init__(
        self, request: inference_pb2.GenerateRequest, clock: Callable[[], float],
        living: Callable[[], list[SimRouter]], timeout_s: float, read_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.request = request
        self._clock = clock
        self._living = living
        self.timeout_s = timeout_s
        self._read_s = read_s
        self.responses: list[inference_pb2.GenerateResponse] = []
        self.statuses: list[tuple[grpc.StatusCode, str]] = []  # (code, reason) of each call
        self.refusals: list[tuple[float, str]] = []  # (time, reason) of calls that were repeated
        self.resumes = False  # whether the next call is Resume
        self.deadline_s = 0.0
        self.began_s = 0.0
        self.first_s = 0.0  # time of the first response; 0 before it
        self.ended_s = 0.0

    async def call(self, router: SimRouter) -> None:
        """Call a router. Return when the router ends the call or dies. To cancel the call, cancel
        the task that runs this method."""
        task = asyncio.current_task()
        assert task is not None
        if router not in self._living():
            self.statuses.append((UNAVAILABLE, CONNECTION_LOST))
            return
        router.calls[task] = None
        self.began_s = self._clock()
        self.deadline_s = self.began_s + self.timeout_s
        try:
            if self.resumes:
                request = inference_pb2.ResumeRequest(
                    request_id=self.request.request_id,
                    resume_token="".join(each.resume_token for each in self.responses)[:32],
                )
                if self.responses:
                    request.last_sequence = self.responses[-1].sequence
                await router.servicer.Resume(request, self)  # type: ignore[arg-type]
            else:
                self.responses.clear()  # a new request has a new answer
                await router.servicer.Generate(self.request, self)  # type: ignore[arg-type]
            self.statuses.append((grpc.StatusCode.OK, ""))
        except grpc.aio.AbortError:
            pass  # ``abort`` has recorded the status
        except asyncio.CancelledError:
            if router in self._living():
                self.statuses.append((grpc.StatusCode.CANCELLED, ""))
                raise
            self.statuses.append((UNAVAILABLE, CONNECTION_LOST))
        finally:
            router.calls.pop(task, None)
            self.ended_s = self._clock()

    def time_remaining(self) -> float:
        return self.deadline_s - self._clock()

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Do nothing, because the client does not read the metadata."""

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        await elapse(self._read_s)
        self.first_s = self.first_s or self._clock()
        self.responses.append(response)

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        reason = inference_pb2.ErrorDetail.FromString(dict(metadata)["baton-error-bin"]).reason
        self.statuses.append((code, reason))
        raise grpc.aio.AbortError(details)
