"""The router's gRPC server: builds the router's parts; serves inference, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.v1 import inference_pb2, inference_pb2_grpc
from core.config.schema import Config
from core.errors import ConfigError, InternalError
from core.model.resolve import resolve_model
from core.net import host_port
from core.rpc.credentials import ClusterCredentials
from core.rpc.health import NOT_SERVING, SERVING, HealthServicer
from core.rpc.options import server_options
from core.rpc.request_checks import CheckRequests
from core.state.journal import JournalStore
from core.tasks import Supervisor
from core.types import Pool, WorkerRecord, WorkerState
from router.admission.gate import AdmissionGate
from router.admission.policy import AdmissionLimits, ClassLimits
from router.api.handler import RequestBounds, RequestHandler
from router.api.servicer import InferenceServicer
from router.dispatch.dispatcher import DispatchCounters, Dispatcher, DispatchSettings
from router.dispatch.retry import RetryLimits
from router.lease import RouterLease, RouterLeases, new_router_id
from router.placement.ledger import PlacementLedger
from router.placement.policy import PlacementLimits
from router.resume.journal import Journal, JournalSettings
from router.signals import Signals
from router.text.codec import TextCodec, load_text_codec
from router.workers.membership import WorkerList, Workers, WorkersSettings

logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_STATUS_S = 0.5  # time to send the status of ended calls to their clients


class RouterRegistry(WorkerList, RouterLeases, Protocol):
    """The part of the registry that the router uses."""


class RouterServer:
    """Serves applications from ``start`` until ``stop``; owns every part that it creates.

    Args:
        registry: the caller closes it.
        text: the server closes it. If None, ``start`` loads it from ``config.model``.
        journal: the server closes it. If None, requests cannot be resumed.
        credentials: of the cluster, for the connections to workers; see ``WorkerClient``.
    """

    def __init__(
        self,
        config: Config,
        registry: RouterRegistry,
        text: TextCodec | None = None,
        journal: JournalStore | None = None,
        credentials: ClusterCredentials | None = None,
    ) -> None:
        self.id = new_router_id()
        self._config = config
        self._credentials = credentials
        self._registry = registry
        self._text = text
        self._journal = Journal(journal, self._journal_settings()) if journal is not None else None
        self._server: grpc.aio.Server | None = None
        self._health = HealthServicer("", SERVICE)
        self._lease: RouterLease | None = None
        self._serving: bool | None = None
        self._can_serve_now = False
        self._supervisor = Supervisor(self._update_serving)
        self._stopped: asyncio.Task[None] | None = None
        self.workers: Workers | None = None
        self._dispatcher: Dispatcher | None = None
        self.handler: RequestHandler | None = None
        self.servicer: InferenceServicer | None = None

    @property
    def counters(self) -> DispatchCounters:
        """What the dispatcher has counted since the start."""
        assert self._dispatcher is not None, "not started"
        return self._dispatcher.counters

    async def start(self) -> int:
        """Start to serve and return the port.

        Raises:
            ConfigError: the port cannot be used, or the model's tokeniser cannot be loaded.
        """
        text = self._text
        if text is None:
            text = self._text = await asyncio.to_thread(_load_text, self._config)
        clock = asyncio.get_running_loop().time
        redis = self._config.redis
        signals = Signals(clock)
        ledger = PlacementLedger(
            self._placement_limits(),
            clock,
            suspect_s=self._config.router.avoid_worker_s,
            report_snapshots=math.ceil(redis.renew_s / self._config.router.registry_poll_s),
        )

        def on_snapshot(snapshot: tuple[WorkerRecord, ...]) -> None:
            ledger.new_snapshot(frozenset(record.key for record in snapshot))
            self._can_serve_now = self._can_serve(snapshot)
            self._update_serving()

        self.workers = Workers(self._registry, self._workers_settings(), clock, on_snapshot)
        self._dispatcher = Dispatcher(
            self.workers, ledger, self._dispatch_settings(text.model.served_name), clock, signals
        )
        router = self._config.router
        admission = AdmissionGate(self._admission_limits(), clock)
        ledger.on_room = admission.wake
        self.handler = RequestHandler(
            text=text,
            dispatcher=self._dispatcher,
            admission=admission,
            bounds=RequestBounds(
                router.default_deadline_s, router.max_deadline_s, router.client_stall_s
            ),
            clock=clock,
            journal=self._journal,
            signals=signals,
        )
        servicer = self.servicer = InferenceServicer(self.handler, clock)
        if self._journal is not None:
            self._journal.start(self._supervisor)
        try:
            port = self._bind(servicer)
            self._update_serving()
            await self.workers.refresh()
            self._supervisor.start("registry poll", self.workers.poll)
            self._lease = RouterLease(
                self._registry,
                router_id=self.id,
                address=host_port(self._config.router_host, port),
                turns=admission.turns,
                dispatcher=self._dispatcher,
                ledger=ledger,
                signals=signals,
                renew_s=redis.renew_s,
                timeout_s=redis.socket_timeout_s,
            )
            self._supervisor.start("router lease", self._lease.run)
            assert self._server is not None
            await self._server.start()
        except BaseException:
            await self.stop(grace_s=0)
            raise
        return port

    def check_health(self) -> None:
        """Raise InternalError if this router should be replaced. It drains first."""
        if self._supervisor.has_given_up and self._stopped is None:
            logger.error("a task fails again and again; this router drains and will be replaced")
            grace_s = self._config.cluster.stop_grace_s
            self._stopped = asyncio.create_task(self._stop(grace_s))
        if self._supervisor.has_given_up and self._stopped is not None and self._stopped.done():
            raise InternalError("a task of the router failed again and again; its log says why")

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, give running ones ``grace_s`` to end, and end the rest.

        Clients of ended requests get ROUTER_DRAINING. If there is a journal, they can resume at
        another router. Later calls wait for the first.
        """
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopped)

    async def _stop(self, grace_s: float) -> None:
        self._health.stop()
        if self._server is not None:
            server, self._server = self._server, None
            if self.handler is not None:
                # gRPC's server goes on until the end: it cancels calls that arrive while it stops,
                # and their clients would not know why.
                self.handler.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self.handler.drained()
                self.handler.send_away()
            # The calls that are still open are requests that were just ended, health watches, and
            # calls whose message never came.
            await server.stop(_STATUS_S)
        if self.handler is not None:
            await self.handler.drained()  # ended requests still have to end their calls to workers
        if self._dispatcher is not None:
            await self._dispatcher.close()
        await self._supervisor.stop()
        if self._lease is not None:
            await self._lease.remove()
        if self._journal is not None:
            await self._journal.close()
        if self.workers is not None:
            await self.workers.close()
        if self._text is not None:
            self._text.close()

    def _bind(self, servicer: InferenceServicer) -> int:
        router = self._config.router
        self._server = grpc.aio.server(
            interceptors=(CheckRequests(),),
            options=(
                *server_options(
                    int(router.max_message_bytes), self._config.cluster.connection_silence_s
                ),
                ("grpc.max_concurrent_streams", self._max_calls()),
                ("grpc.max_allowed_incoming_connections", router.max_connections),
                ("grpc.max_connection_age_ms", round(router.max_connection_age_s * 1000)),
                # Only health watches and reflection may still run then.
                ("grpc.max_connection_age_grace_ms", round(router.max_deadline_s * 1000)),
            ),
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        host, address = self._config.router_host, self._config.router_address
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as err:
            port = 0
            logger.debug("cannot listen on %s: %s", address, err)
        if port == 0:
            raise ConfigError(
                f"router.port: cannot listen on port {router.port} of {host}: it is in use, or "
                "permission is missing; free it, or set router.port to another one (0: any)"
            )
        return port

    def _max_calls(self) -> int:
        """Return how many calls one connection may carry.

        Much more than the router can hold: a client whose calls are too many should get a refusal,
        instead of calls that wait in its own channel.
        """
        assert self.handler is not None
        return min(2 * self.handler.admission.max_requests + 100, 2**31 - 1)

    def _can_serve(self, snapshot: tuple[WorkerRecord, ...]) -> bool:
        """Whether each pool has a ready worker, or will get one when a request waits for it.

        If a router with empty pools did not serve, no request would ever reach it.
        """
        assert self.workers is not None
        ready = {record.pool for record in snapshot if record.state is WorkerState.READY}
        ready |= self.workers.coming
        local = self._config.router.local_prefill == "fallback"
        return Pool.DECODE in ready and (Pool.PREFILL in ready or local)

    def _update_serving(self) -> None:
        """Publish whether this router serves: workers are ready, and its own tasks run."""
        serving = self._can_serve_now and not self._supervisor.failing
        if serving is self._serving:
            return
        self._serving = serving
        self._health.set(SERVING if serving else NOT_SERVING)

    def _admission_limits(self) -> AdmissionLimits:
        router = self._config.router
        classes = {
            name: ClassLimits(each.weight, each.max_queue, each.queue_timeout_s)
            for name, each in router.classes.items()
        }
        return AdmissionLimits(router.max_concurrent, classes, router.cold_start_timeout_s)

    def _placement_limits(self) -> PlacementLimits:
        max_requests = {pool: self._config.pool(pool).max_concurrent for pool in Pool}
        return PlacementLimits(max_requests, self._config.router.prefill_backlog_s)

    def _journal_settings(self) -> JournalSettings:
        router = self._config.router
        return JournalSettings(router.journal_lease_s, router.journal_patience_s)

    def _workers_settings(self) -> WorkersSettings:
        config = self._config
        return WorkersSettings(
            poll_s=config.router.registry_poll_s,
            poll_timeout_s=config.redis.socket_timeout_s,
            lost_after_s=config.router.worker_lost_after_s,
            connect_timeout_s=config.router.worker_connect_timeout_s,
            max_message_bytes=int(config.router.max_message_bytes),
            connection_silence_s=config.cluster.connection_silence_s,
            credentials=self._credentials,
        )

    def _dispatch_settings(self, model: str) -> DispatchSettings:
        router = self._config.router
        return DispatchSettings(
            model=model,
            local_prefill=router.local_prefill,
            retries=RetryLimits(
                router.max_attempts,
                router.failover_timeout_s,
                router.avoid_worker_s,
                router.cold_start_timeout_s,
            ),
            buffer_responses=router.stream_buffer_responses,
            release_timeout_s=router.worker_connect_timeout_s,
            max_releases=router.max_concurrent,
        )


def _load_text(config: Config) -> TextCodec:
    model = resolve_model(config.model, logger.info)
    return load_text_codec(
        model.path,
        served_name=model.served_name,
        max_model_len=config.model.max_model_len,
        trust_remote_code=config.model.trust_remote_code,
        threads=config.router.tokenizer_threads,
    )
