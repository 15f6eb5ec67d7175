"""Runs one worker: an engine, its gRPC server, and its lease in the registry.

    start: engine ▸ gRPC server ▸ lease STARTING ▸ KV pairs with the other pool ▸ lease READY
           (routers send requests from here on)
    stop:  lease DRAINING ▸ wait until routers have seen it ▸ refuse new requests
           ▸ wait until requests have ended and held KV was fetched
           ▸ stop server ▸ stop engine ▸ remove lease
           If the waits take longer than ``grace_s``, the worker ends the remaining
           requests, and their routers continue them on other workers.

This module knows neither Ray nor the protocol of a pool. ``add_service`` adds the pool's servicer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Set
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2_grpc

from core.config.schema import Config
from core.errors import InternalError, UnavailableError
from core.model.resolve import ResolvedModel
from core.net import host_port
from core.rpc.credentials import ClusterCredentials
from core.rpc.health import SERVING, HealthServicer
from core.rpc.options import server_options
from core.rpc.request_checks import CheckRequests
from core.state.orders import report_failure
from core.state.registry import Registry
from core.state.store import Store
from core.tasks import Supervisor
from core.types import Pool, WorkerRecord, WorkerState
from engine.protocol import Engine
from engine.vllm.log_buffers import log_buffers_kept
from worker.intake import Intake
from worker.liveness import LivenessProbe
from worker.metrics_server import MetricsServer
from worker.peers import Peers

_log = logging.getLogger(__name__)

AddService = Callable[[grpc.aio.Server, Engine, Intake, Peers], None]

_MAX_CONNECTIONS = 1024  # of routers; each router has one connection
_KV_POLL_S = 0.05  # short compared with a start or a drain
_CANCEL_GRACE_S = 0.2  # time in which cancelled calls send their status


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings that all replicas of a pool start with."""

    config: Config
    pool: Pool
    model: ResolvedModel
    store: Store
    credentials: ClusterCredentials


async def start_worker(
    settings: WorkerSettings, add_service: AddService, *, slot: int, application: str
) -> WorkerReplica:
    """Start a worker. If the start fails, report the error to the launcher and raise it again.

    Args:
        slot: number of this worker among the pool's workers on this machine, from 0. Selects the
            CPU cores.
        application: name of the Serve application that runs the worker.

    Raises:
        ConfigError, BatonError: the worker cannot start.
    """
    incarnation = secrets.token_hex(8)
    try:
        engine = _make_engine(settings, slot, incarnation)
        worker = WorkerReplica(
            config=settings.config,
            pool=settings.pool,
            model=settings.model.served_name,
            engine=engine,
            registry=settings.store.registry(),
            add_service=add_service,
            incarnation=incarnation,
            credentials=settings.credentials,
            application=application,
        )
        await worker.start()
    except Exception as error:
        _log.exception("the %s worker cannot start", settings.pool)
        await report_failure(settings.store.orders(), settings.pool, error)
        raise
    return worker


class WorkerReplica:
    """An engine, its gRPC server and its lease. The module docstring shows how they start and stop.

    Owns the engine and the registry client, and stops both. Belongs to one event loop. Start it
    once and stop it once.

    Args:
        model: name under which the model is served.
        add_service: registers the pool's servicer on the server.
        incarnation: id of this process start.
        credentials: of the cluster; None serves whoever connects, for tests.
        application: name of the Serve application that runs the worker; empty in tests.
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
        credentials: ClusterCredentials | None,
        application: str = "",
    ) -> None:
        self._config = config
        self._application = application
        self._credentials = credentials
        self._pool = pool
        self._model = model
        self._engine = engine
        self._registry = registry
        self._peers = Peers(registry, pool)
        self._add_service = add_service
        self._incarnation = incarnation
        self._id = f"{pool}-{secrets.token_hex(3)}"
        self._intake = Intake(config.pool(pool).max_concurrent)
        self._liveness = LivenessProbe(engine.ping, config.pool(pool).progress_timeout_s)
        self._health = HealthServicer("")
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None
        self._record: WorkerRecord | None = None
        self._supervisor = Supervisor()
        self._stopped: asyncio.Task[None] | None = None

    async def start(self) -> WorkerRecord:
        """Start everything, wait for the KV pairs, and return the record with state READY.

        If the registry is not reachable, the worker starts anyway and registers later.

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
                application=self._application,
            )
            self._supervisor.start("lease", self._keep_lease)
            await self._pair_up()
        except BaseException:
            await self._end()
            raise
        self._record = replace(self._record, state=WorkerState.READY)
        await self._try_update(self._renew())
        if self._pool is Pool.DECODE:
            self._supervisor.start("KV pairs", self._keep_pairing)
        return self._record

    async def check_health(self) -> None:
        """Raise WorkerLostError if this worker can no longer serve requests.

        Starts a drain if the engine must be replaced. An unreachable registry is not an error,
        because running requests do not need it.
        """
        if (reason := self._engine.must_be_replaced()) is not None:
            self._drain_for_replacement(reason)
        await self._engine.check_health()
        await self._liveness.check()
        if self._supervisor.has_given_up:
            self._drain_for_replacement("a task fails again and again")

    def _drain_for_replacement(self, reason: str) -> None:
        """Begin to drain and stop. Ray Serve then starts another worker in place of this one."""
        if self._stopped is None:
            _log.error("%s drains and will be replaced: %s", self._id, reason)
            grace_s = self._config.pool(self._pool).shutdown_grace_s
            self._stopped = asyncio.create_task(self._stop(grace_s))

    async def stop(self, grace_s: float) -> None:
        """Drain for at most ``grace_s``, then stop everything.

        If the worker is already stopping, only wait until it has stopped.
        """
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopped)

    async def _serve(self) -> str:
        """Start the server on a free port and return "host:port"."""
        limit = int(self._config.router.max_message_bytes)
        server = grpc.aio.server(
            interceptors=(CheckRequests(),),
            options=(
                *server_options(limit, self._config.cluster.connection_silence_s),
                ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
            ),
        )
        self._add_service(server, self._engine, self._intake, self._peers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._health.set(SERVING)
        host = self._config.cluster.host
        try:
            if self._credentials is None:
                port = server.add_insecure_port(host_port(host, 0))
            else:
                port = server.add_secure_port(host_port(host, 0), self._credentials.for_server())
        except RuntimeError as error:
            raise InternalError(f"cannot listen on {host}: {error}") from None
        await server.start()
        self._server = server
        return host_port(host, port)

    def _serve_metrics(self) -> str:
        """Serve this process's Prometheus metrics on a free port and return the URL."""
        host = self._config.cluster.host
        self._metrics = MetricsServer(host)
        return f"http://{host_port(host, self._metrics.port)}/metrics"

    def _stop_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()

    async def _pair_up(self) -> None:
        """Wait for the KV pairs with the other pool's workers, so that no request waits for them.

        Waits at most ``kv_transfer.pair_timeout_s``. Later requests make the missing pairs.
        """
        timeout_s = self._config.kv_transfer.pair_timeout_s
        missing: Set[str] = set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._renew()  # registers this worker, so that the other pool finds it
                while True:
                    missing = await self._engine.pair_up(await self._peers.refresh())
                    if not missing:
                        return
                    await asyncio.sleep(_KV_POLL_S)
        except UnavailableError as error:
            _log.warning("%s could not make KV pairs in advance: %s", self._id, error)
        except TimeoutError:
            _log.warning(
                "%s made no KV pair with %s within %.1f s", self._id, sorted(missing), timeout_s
            )

    async def _keep_pairing(self) -> None:
        """Make pairs with prefill workers that start later. Their ``start`` waits for the pairs."""
        paired: Set[str] = set()
        while True:
            with contextlib.suppress(UnavailableError):  # _keep_lease logs it
                others = await self._peers.refresh()
                if others.keys() - paired:
                    await self._engine.pair_up(others)
                paired = others.keys()
            await asyncio.sleep(self._config.redis.renew_s)

    async def _keep_lease(self) -> None:
        """Renew the lease until cancelled. Log when the registry goes away and comes back."""
        unreachable = False
        while True:
            try:
                await self._renew()
                if unreachable:
                    _log.warning("%s reaches the registry again", self._id)
                unreachable = False
            except UnavailableError as error:
                if not unreachable:
                    _log.warning("%s cannot renew its lease and retries: %s", self._id, error)
                unreachable = True
            await asyncio.sleep(self._config.redis.renew_s)

    async def _renew(self) -> None:
        """Renew the lease with the current load. Start a drain if the registry asks for one."""
        assert self._record is not None
        if await self._registry.put(replace(self._record, load=self._engine.load())):
            self._drain_for_replacement("its drain was requested in the registry")

    async def _stop(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._announce_drain()
                self._intake.close()
                await self._intake.drained()
                await self._kv_fetched()
        except TimeoutError:
            self._intake.close()
            _log.warning(
                "%s: some requests or KV transfers did not end within %.1f s", self._id, grace_s
            )
            self._intake.send_away()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CANCEL_GRACE_S):
                    await self._intake.drained()
        await self._end()

    async def _end(self) -> None:
        """Stop everything that ``start`` has started, also after a failed start."""
        if self._server is not None:
            await self._server.stop(_CANCEL_GRACE_S)
        await self._supervisor.stop()  # its tasks use the engine and the registry
        await asyncio.gather(self._engine.stop(), asyncio.to_thread(self._stop_metrics))
        # Cancel the ping after the engine has stopped: a health check then raises WorkerLostError
        # before it looks at the ping. While the engine runs, the check would raise CancelledError.
        await self._liveness.close()
        await self._try_update(self._registry.remove(self._id))
        await self._registry.close()

    async def _announce_drain(self) -> None:
        """Mark this worker as draining, and give the routers time to see the mark.

        A router that has not seen the mark gets a refusal and retries on another worker.
        """
        self._health.stop()
        if self._record is not None:
            self._record = replace(self._record, state=WorkerState.DRAINING)
            await self._try_update(self._renew())
            # A poll that is under way may miss the change. The next poll sees it.
            await asyncio.sleep(2 * self._config.router.registry_poll_s)

    async def _kv_fetched(self) -> None:
        """Return when all KV blocks are free. Then no decode worker has KV to fetch from here."""
        while True:
            # Sleep first: the engine updates its number of free blocks just after the last output.
            await asyncio.sleep(_KV_POLL_S)
            load = self._engine.load()
            if load.kv_blocks_free >= load.kv_blocks_total:
                return

    async def _try_update(self, update: Coroutine[None, None, None]) -> None:
        """Await an update of the registry. Log a warning if the registry is not reachable.

        A lost update does no harm. The next renewal writes the new state, and a lease that is not
        removed expires by itself.
        """
        try:
            await update
        except UnavailableError as error:
            _log.warning("%s could not update the registry: %s", self._id, error)


def _make_engine(settings: WorkerSettings, slot: int, incarnation: str) -> Engine:
    pool = settings.config.pool(settings.pool)
    if pool.engine_kind == "fake":
        from engine.fake import FakeEngine

        return FakeEngine(settings.config, settings.pool)
    with log_buffers_kept():
        from engine.vllm.engine import VllmEngine  # takes seconds to import

    binding = pool.cpu_binding[slot % len(pool.cpu_binding)] if pool.cpu_binding else None
    return VllmEngine(
        config=settings.config,
        pool=settings.pool,
        model=settings.model,
        cpu_binding=binding,
        kv_secret=settings.credentials.kv_secret,
        incarnation=incarnation,
    )
