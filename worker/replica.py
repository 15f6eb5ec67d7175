"""One worker: an engine, its gRPC server, and its lease in the registry.

    start: engine ▸ gRPC server ▸ lease STARTING ▸ KV pairs with the other pool ▸ lease READY
           (the router sends work from here on)
    stop:  lease DRAINING ▸ routers have seen it ▸ nothing new ▸ what runs has ended and held KV
           was fetched, or the grace is over and what runs moves to other workers ▸ server ▸ engine

Knows neither Ray nor a pool's protocol: the pool passes in what it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Set
from dataclasses import dataclass, field, replace
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from prometheus_client import start_http_server

from core.config.schema import Config
from core.errors import InternalError, UnavailableError, WorkerLostError
from core.model.resolve import ResolvedModel
from core.net import host_port
from core.rpc.malformed import RefuseMalformed
from core.rpc.options import server_options
from core.state.orders import report_failure
from core.state.registry import Registry
from core.state.store import Store
from core.types import Pool, WorkerRecord, WorkerState
from engine.protocol import Engine
from engine.vllm.log_buffers import log_buffers_kept
from worker.intake import Intake
from worker.liveness import LivenessProbe

_log = logging.getLogger(__name__)

AddService = Callable[[grpc.aio.Server, Engine, Intake], None]

_KV_POLL_S = 0.05
_CANCEL_GRACE_S = 0.2  # for cancelled calls to say so to their callers


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What each replica of a pool is started with."""

    config: Config
    pool: Pool
    model: ResolvedModel
    store: Store
    kv_token: str = field(repr=False)  # secret of the KV control channels


async def start_worker(
    settings: WorkerSettings, add_service: AddService, *, slot: int
) -> WorkerReplica:
    """Start a worker, and tell the launcher why if that fails.

    Args:
        slot: counts the pool's workers on this machine; chooses the CPU cores.

    Raises:
        ConfigError, BatonError: the reason.
    """
    incarnation = secrets.token_hex(8)
    try:
        engine = _make_engine(settings, slot, incarnation)
        worker = WorkerReplica(
            settings.config,
            settings.pool,
            settings.model.served_name,
            engine,
            settings.store.registry(),
            add_service,
            incarnation=incarnation,
        )
        await worker.start()
    except Exception as error:
        _log.exception("this %s worker cannot start", settings.pool)
        await report_failure(settings.store.orders(), settings.pool, error)
        raise
    return worker


class WorkerReplica:
    """See the module. Belongs to one event loop; started once and stopped once.

    Args:
        model: served name.
        incarnation: new at each process start.
        add_service: registers the pool's servicer on the server.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        model: str,
        engine: Engine,
        registry: Registry,
        add_service: AddService,
        *,
        incarnation: str,
    ) -> None:
        self._config = config
        self._pool = pool
        self._model = model
        self._engine = engine
        self._registry = registry
        self._add_service = add_service
        self._incarnation = incarnation
        self._id = f"{pool}-{secrets.token_hex(3)}"
        self._intake = Intake(config.pool(pool).max_concurrent)
        self._liveness = LivenessProbe(engine.ping, config.pool(pool).progress_timeout_s)
        self._health = health_aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._metrics: WSGIServer | None = None
        self._record: WorkerRecord | None = None
        self._lease: asyncio.Task[None] | None = None
        self._pairing: asyncio.Task[None] | None = None
        self._stopped: asyncio.Task[None] | None = None

    async def start(self) -> WorkerRecord:
        """Be ready for requests, and in the registry soon after.

        Raises:
            ConfigError, BatonError: the engine or the server does not start.
        """
        try:
            facts = await self._engine.start()
            self._record = WorkerRecord(
                id=self._id,
                pool=self._pool,
                state=WorkerState.STARTING,
                incarnation=self._incarnation,
                address=await self._serve(),
                kv_addresses=facts.kv_addresses,
                model=self._model,
                load=self._engine.load(),
                metrics=self._serve_metrics(),
            )
            self._lease = asyncio.create_task(self._keep_lease())
            await self._pair_up()
        except BaseException:
            await self._end()
            raise
        self._record = replace(self._record, state=WorkerState.READY)
        await self._tell(self._renew())
        if self._pool is Pool.DECODE:
            self._pairing = asyncio.create_task(self._keep_pairing())
        return self._record

    async def check_health(self) -> None:
        """Raises WorkerLostError if this worker can serve no more.

        A registry that is away is no reason: running requests do not need it.
        """
        if (reason := self._engine.must_be_replaced()) is not None:
            self._leave(reason)
        await self._engine.check_health()
        await self._liveness.check()
        if self._lease is None or (self._lease.done() and self._stopped is None):
            raise WorkerLostError(f"{self._id} does not renew its lease")

    def _leave(self, reason: str) -> None:
        """Drain and end, for Serve to start another worker in this one's place."""
        if self._stopped is None:
            _log.error("%s drains, to be replaced: %s", self._id, reason)
            grace_s = self._config.pool(self._pool).shutdown_grace_s
            self._stopped = asyncio.create_task(self._stop(grace_s))

    async def stop(self, grace_s: float) -> None:
        """Drain for at most ``grace_s``, then end everything. Later calls wait for the first."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopped)

    async def _serve(self) -> str:
        """Start the server on a free port and return "host:port"."""
        limit = int(self._config.router.max_message_bytes)
        server = grpc.aio.server(
            interceptors=(RefuseMalformed(),),
            options=server_options(limit, self._config.cluster.connection_silence_s),
        )
        self._add_service(server, self._engine, self._intake)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        host = self._config.cluster.host
        try:
            port = server.add_insecure_port(host_port(host, 0))
        except RuntimeError as error:
            raise InternalError(f"cannot listen on {host}: {error}") from None
        await server.start()
        self._server = server
        return host_port(host, port)

    def _serve_metrics(self) -> str:
        """Serve this process's Prometheus metrics on a free port, from a thread of its own."""
        host = self._config.cluster.host
        self._metrics, _ = start_http_server(0, host)
        return f"http://{host_port(host, self._metrics.server_port)}/metrics"

    def _stop_metrics(self) -> None:
        """Takes up to half a second."""
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()

    async def _pair_up(self) -> None:
        """Wait for the KV pairs with the other pool's workers, so that no request has to."""
        timeout_s = self._config.kv_transfer.pair_timeout_s
        missing: Set[str] = set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._renew()  # so that the other pool knows of this worker
                while True:
                    missing = await self._engine.pair_up(await self._others())
                    if not missing:
                        return
                    await asyncio.sleep(_KV_POLL_S)
        except UnavailableError as error:
            _log.warning("%s: no KV pairs are made in advance: %s", self._id, error)
        except TimeoutError:
            _log.warning("%s: no KV pair with %s in %.1f s", self._id, sorted(missing), timeout_s)

    async def _keep_pairing(self) -> None:
        """Make pairs with prefill workers that come later; those wait for it."""
        met: Set[str] = set()
        while True:
            with contextlib.suppress(UnavailableError):  # the lease's task says so
                others = await self._others()
                if others.keys() - met:
                    await self._engine.pair_up(others)
                met = others.keys()
            await asyncio.sleep(self._config.redis.renew_s)

    async def _others(self) -> dict[str, tuple[str, ...]]:
        """KV control addresses of the other pool's workers, by incarnation."""
        return {
            record.incarnation: record.kv_addresses
            for record in await self._registry.list()
            if record.pool is not self._pool and record.state is not WorkerState.DRAINING
        }

    async def _keep_lease(self) -> None:
        away = False
        while True:
            try:
                await self._renew()
                if away:
                    _log.warning("%s: the registry is back", self._id)
                away = False
            except UnavailableError as error:
                if not away:
                    _log.warning("%s: %s; trying on", self._id, error)
                away = True
            await asyncio.sleep(self._config.redis.renew_s)

    async def _renew(self) -> None:
        assert self._record is not None
        if await self._registry.put(replace(self._record, load=self._engine.load())):
            self._leave("somebody asked for it")

    async def _stop(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._announce_end()
                self._intake.close()
                await self._intake.drained()
                await self._kv_fetched()
        except TimeoutError:
            self._intake.close()
            _log.warning("%s: not all requests and KV transfers ended in %.1f s", self._id, grace_s)
            self._intake.move_out()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CANCEL_GRACE_S):
                    await self._intake.drained()
        await self._end()

    async def _end(self) -> None:
        """End what has begun, in whatever state."""
        if self._server is not None:
            await self._server.stop(_CANCEL_GRACE_S)
        await self._liveness.close()
        await asyncio.gather(self._engine.stop(), asyncio.to_thread(self._stop_metrics))
        tasks = [task for task in (self._lease, self._pairing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tell(self._registry.remove(self._id))
        await self._registry.close()

    async def _announce_end(self) -> None:
        """Return when the routers send nothing more here, or will find out by a refusal."""
        await self._health.enter_graceful_shutdown()
        if self._record is not None:
            self._record = replace(self._record, state=WorkerState.DRAINING)
            await self._tell(self._renew())
            # One look that was under way, and the next.
            await asyncio.sleep(2 * self._config.router.registry_poll_s)

    async def _kv_fetched(self) -> None:
        """Return when the engine holds no KV for a decode worker that is still receiving it."""
        while True:
            # First, for the engine reports its blocks just after the last output.
            await asyncio.sleep(_KV_POLL_S)
            load = self._engine.load()
            if load.kv_blocks_free >= load.kv_blocks_total:
                return

    async def _tell(self, change: Coroutine[None, None, None]) -> None:
        """Change the registry if it is there; without it, the lease runs out by itself."""
        try:
            await change
        except UnavailableError as error:
            _log.warning("%s: %s", self._id, error)


def _make_engine(settings: WorkerSettings, slot: int, incarnation: str) -> Engine:
    pool = settings.config.pool(settings.pool)
    if pool.engine_kind == "fake":
        from engine.fake import FakeEngine

        return FakeEngine(settings.config, settings.pool)
    with log_buffers_kept():
        from engine.vllm.engine import VllmEngine  # seconds of import

    binding = pool.cpu_binding[slot % len(pool.cpu_binding)] if pool.cpu_binding else None
    return VllmEngine(
        settings.config, settings.pool, settings.model, binding, settings.kv_token, incarnation
    )
