"""Runs one worker: an engine, its gRPC server, and its lease in the registry.

    start: engine ▸ gRPC server ▸ lease STARTING ▸ KV pairs with the other pool ▸ lease READY
           (routers send requests from here on)
    stop:  lease DRAINING ▸ wait until routers have seen it ▸ refuse new requests
           ▸ wait until requests have ended and held KV was fetched
           ▸ stop server ▸ stop engine ▸ remove lease
           If the waits take longer than ``grace_s``, the worker ends the remaining
           requests, and their routers continue them on other workers.

With ``cluster.role_change``, the registry can order a worker to change its pool. The engine, the
server and the incarnation stay, so the model is not loaded again:

    change: lease DRAINING ▸ wait until routers have seen it ▸ refuse new requests
            ▸ wait as in ``stop``, at most ``shutdown_grace_s`` of the old pool
            ▸ lease STARTING in the new pool ▸ KV pairs ▸ lease READY

The server has the services of both pools from the start. The service of the pool that the worker
does not belong to refuses requests as a draining worker does.

    an order comes...                            result
    to join the pool that the worker is in       nothing changes
    before the worker is ready                   the worker changes when it is ready
    during a change                              the latest order counts: after the drain, the
                                                 worker joins the pool that it names
    while the worker stops                       nothing changes
    and the registry fails before it has         the worker stays in its pool, because routers could
    recorded the drain                           not learn of the change
    and the registry fails later                 the worker changes; it is registered in its new
                                                 pool when the registry is back

A drain, a stop or a failed engine ends a change: the worker drains in the pool it is in, and stops.

This module knows neither Ray nor the protocol of a pool. ``services`` adds the pools' servicers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from core.config.schema import Config
from core.errors import UnavailableError
from core.model.resolve import ResolvedModel
from core.net import host_port
from core.rpc.credentials import ClusterCredentials
from core.rpc.health import HealthServicer
from core.state.orders import report_failure
from core.state.registry import Registry
from core.state.store import Store
from core.tasks import Supervisor
from core.types import Pool, WorkerOrder, WorkerRecord, WorkerState
from engine.protocol import Engine
from engine.vllm.log_buffers import log_buffers_kept
from worker.drain import CANCEL_GRACE_S, Drain
from worker.intake import Intake
from worker.lease import Lease
from worker.liveness import LivenessProbe
from worker.metrics_server import MetricsServer
from worker.pairing import Pairing
from worker.peers import Peers
from worker.server import start_server

_log = logging.getLogger(__name__)

AddService = Callable[[grpc.aio.Server, Engine, Intake, Peers], None]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings that all replicas of a pool start with."""

    config: Config
    pool: Pool
    model: ResolvedModel
    store: Store
    credentials: ClusterCredentials


async def start_worker(
    settings: WorkerSettings,
    services: Mapping[Pool, AddService],
    *,
    slot: int,
    application: str,
) -> WorkerReplica:
    """Start a worker. If the start fails, report the error to the launcher and raise it again.

    Args:
        services: see ``WorkerReplica``.
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
            services=services,
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
        pool: the pool that the worker joins first.
        services: registers a pool's servicer on the server. With ``cluster.role_change``, those of
            both pools are needed, otherwise that of ``pool``.
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
        services: Mapping[Pool, AddService],
        *,
        incarnation: str,
        credentials: ClusterCredentials | None,
        application: str = "",
    ) -> None:
        can_change = config.cluster.role_change
        assert not can_change or services.keys() == set(Pool), "a role has no service"
        self._config = config
        self._application = application
        self._credentials = credentials
        self._pool = pool  # now
        self._wanted_pool = pool  # by the latest order
        self._model = model
        self._engine = engine
        self._registry = registry
        self._peers = Peers(registry, pool, incarnation)
        self._services = services
        self._incarnation = incarnation
        self._id = f"{'worker' if can_change else pool}-{secrets.token_hex(3)}"
        self._pairing = Pairing(
            self._id,
            engine,
            self._peers,
            timeout_s=config.kv_transfer.pair_timeout_s,
            renew_s=config.redis.renew_s,
        )
        self._intakes = {each: Intake(config.pool(each).max_concurrent) for each in services}
        self._drain = Drain(self._intakes.values(), engine.load)
        self._drain.close()  # until the worker joins a pool
        # The longest step is the engine's, so it does not depend on the role.
        progress_timeout_s = max(config.pool(each).progress_timeout_s for each in services)
        self._liveness = LivenessProbe(engine.ping, progress_timeout_s)
        self._health = HealthServicer("")
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None
        self._lease: Lease | None = None
        self._supervisor = Supervisor()
        self._is_started = False
        self._changing: asyncio.Task[None] | None = None
        self._stopped: asyncio.Task[None] | None = None

    async def start(self) -> WorkerRecord:
        """Start everything, wait for the KV pairs, and return the record with state READY.

        If the registry is not reachable, the worker starts anyway and registers later.

        Raises:
            ConfigError, BatonError: the engine or the server does not start.
        """
        try:
            facts = await self._engine.start()
            record = WorkerRecord(
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
                can_change_role=self._config.cluster.role_change,
            )
            self._lease = Lease(
                self._registry,
                record,
                load=self._engine.load,
                renew_s=self._config.redis.renew_s,
                on_order=self._obey,
            )
            self._supervisor.start("lease", self._lease.keep)
            await self._join(self._lease, self._pool)
        except BaseException:
            await self._end()
            raise
        # An order to drain may have come during the start.
        if self._stopped is None and (
            self._config.cluster.role_change or self._pool is Pool.DECODE
        ):
            self._supervisor.start("KV pairs", self._pairing.keep)
        self._is_started = True
        record = self._lease.record
        self._change_pool()  # if this was ordered meanwhile
        return record

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
        self._server, address = await start_server(
            self._config, self._credentials, self._health, self._add_services
        )
        return address

    def _add_services(self, server: grpc.aio.Server) -> None:
        for pool, add_service in self._services.items():
            add_service(server, self._engine, self._intakes[pool], self._peers)

    def _serve_metrics(self) -> str:
        """Serve this process's Prometheus metrics on a free port and return the URL."""
        host = self._config.cluster.host
        self._metrics = MetricsServer(host)
        return f"http://{host_port(host, self._metrics.port)}/metrics"

    def _stop_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()

    async def _join(self, lease: Lease, pool: Pool) -> None:
        """Become a worker of ``pool``: register, make the KV pairs, and be ready for requests."""
        self._pool = self._peers.pool = pool
        self._intakes[pool].open()
        fields = {"pool": pool, "changes_to": None}
        if await lease.publish(state=WorkerState.STARTING, **fields):
            await self._pairing.make()
        if self._stopped is None:
            await lease.publish(state=WorkerState.READY)

    def _obey(self, order: WorkerOrder) -> None:
        """Do what the registry asks for. Return before it is done."""
        if order is WorkerOrder.DRAIN:
            self._drain_for_replacement("its drain was requested in the registry")
        elif not self._config.cluster.role_change:
            _log.error(
                "%s was ordered to join the %s pool, and cannot: cluster.role_change is not set",
                self._id,
                order.value,
            )
        else:
            self._wanted_pool = Pool(order.value)
            self._change_pool()

    def _change_pool(self) -> None:
        """Begin to change to the wanted pool, unless there is nothing to do or no time for it."""
        is_changing = self._changing is not None and not self._changing.done()
        if self._wanted_pool is self._pool or is_changing:
            return
        if self._is_started and self._stopped is None:
            self._changing = asyncio.create_task(self._change(), name="change of pool")

    async def _change(self) -> None:
        """Change pools until this worker is in the wanted one. If that fails, begin to stop."""
        assert self._lease is not None
        try:
            while self._wanted_pool is not self._pool:
                await self._change_once(self._lease)
        except Exception:  # noqa: BLE001 - a worker between two pools must not stay
            _log.exception("%s failed to change its pool", self._id)
            self._drain_for_replacement("it failed to change its pool")

    async def _change_once(self, lease: Lease) -> None:
        """Drain, and join the pool that is wanted then, which may be the old one."""
        _log.info("%s leaves the %s pool to join %s", self._id, self._pool, self._wanted_pool)
        if not await self._announce_drain(lease, changes_to=self._wanted_pool):
            _log.error("%s stays in its pool, because the registry is not reachable", self._id)
            self._wanted_pool = self._pool
            lease.change(state=WorkerState.READY, changes_to=None)
            return
        grace_s = self._config.pool(self._pool).shutdown_grace_s
        try:
            async with asyncio.timeout(grace_s):
                await self._drain.run_out()
        except TimeoutError:
            await self._send_away(grace_s)
        await self._join(lease, self._wanted_pool)

    async def _stop(self, grace_s: float) -> None:
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)
        try:
            async with asyncio.timeout(grace_s):
                self._health.stop()
                if self._lease is not None:
                    await self._announce_drain(self._lease, changes_to=None)
                await self._drain.run_out()
        except TimeoutError:
            await self._send_away(grace_s)
        await self._end()

    async def _send_away(self, grace_s: float) -> None:
        """End the requests that outlast the grace, so that routers continue them elsewhere."""
        _log.warning(
            "%s: some requests or KV transfers did not end within %.1f s", self._id, grace_s
        )
        await self._drain.send_away()

    async def _end(self) -> None:
        """Stop everything that ``start`` has started, also after a failed start."""
        if self._server is not None:
            await self._server.stop(CANCEL_GRACE_S)
        await self._supervisor.stop()  # its tasks use the engine and the registry
        await asyncio.gather(self._engine.stop(), asyncio.to_thread(self._stop_metrics))
        # Cancel the ping after the engine has stopped: a health check then raises WorkerLostError
        # before it looks at the ping. While the engine runs, the check would raise CancelledError.
        await self._liveness.close()
        try:
            await self._registry.remove(self._id)
        except UnavailableError as error:  # the lease then expires by itself
            _log.warning("%s could not end its lease: %s", self._id, error)
        await self._registry.close()

    async def _announce_drain(self, lease: Lease, changes_to: Pool | None) -> bool:
        """Mark this worker as draining, and give the routers time to see the mark.

        A router that has not seen the mark gets a refusal and retries on another worker. Returns
        False if the mark could not be written.
        """
        announced = await lease.publish(state=WorkerState.DRAINING, changes_to=changes_to)
        # A poll that is under way may miss the change. The next poll sees it.
        await asyncio.sleep(2 * self._config.router.registry_poll_s)
        return announced


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
