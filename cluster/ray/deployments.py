"""The classes that Ray Serve runs: one object for each replica of the router and of both pools.

Serve awaits the constructor, calls ``check_health``, and drains a replica by awaiting ``__del__``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.autoscale.apps import parse_name
from cluster.ray.replica import application_name, drain_on_sigterm, on_this_node, prepare_process
from core.config.schema import Config
from core.errors import InternalError
from core.memory import trim_heap
from core.model.resolve import ResolvedModel
from core.rpc.credentials import ClusterCredentials
from core.state.orders import ROUTER, report_failure
from core.state.store import Store
from core.types import Pool
from worker.replica import WorkerReplica, WorkerSettings, start_worker

if TYPE_CHECKING:
    from router.server import RouterServer
    from worker.replica import AddService


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The arguments of the router's replica."""

    config: Config
    store: Store
    credentials: ClusterCredentials


@dataclass(frozen=True, slots=True)
class WorkerAppSettings:
    """What the applications of all workers have in common; the autoscaler's argument."""

    config: Config
    model: ResolvedModel
    store: Store
    credentials: ClusterCredentials  # known only to this cluster's processes
    # Whether the cluster has CUDA devices. If True, a worker takes one device for each rank, unless
    # its pool sets ``num_gpus_per_replica``.
    cuda: bool
    main_app: str  # the application of router and autoscaler; names of workers begin with it


class Router:
    """The router's replica. The launcher drains it before Serve does.

    Args:
        _autoscaler: unused. Serve deploys only the ingress deployment (this router) and the
            deployments that are bound to it. Therefore the autoscaler is bound to it.
    """

    async def __init__(self, settings: RouterSettings, _autoscaler: object) -> None:  # type: ignore[misc]
        from router.server import RouterServer  # workers need not load its libraries
        from router.text.codec import keep_torch_out

        keep_torch_out()
        config, store = settings.config, settings.store
        prepare_process(config.cluster.host)
        drain_on_sigterm(self.__del__)
        self._grace_s = config.cluster.stop_grace_s
        self._server: RouterServer | None = None
        self._registry = store.registry()
        journal = store.journal() if config.router.journal else None
        try:
            server = RouterServer(
                config, self._registry, journal=journal, credentials=settings.credentials
            )
            await server.start()
        except Exception as error:
            await report_failure(store.orders(), ROUTER, error)
            raise
        self._server = server
        trim_heap()

    def check_health(self) -> None:
        """Raises InternalError if the router should be replaced."""
        if self._server is not None:
            self._server.check_health()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests. End the requests that still run after ``grace_s``, then return."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def __del__(self) -> None:
        await self.drain(self._grace_s)
        await self._registry.close()


class Worker:
    """The replica of a worker. ``settings.pool`` is the pool that it joins first."""

    async def __init__(self, settings: WorkerSettings) -> None:  # type: ignore[misc]
        settings = replace(settings, config=on_this_node(settings.config))
        prepare_process(settings.config.cluster.host)
        drain_on_sigterm(self.__del__)
        name = application_name()
        parts = parse_name(name)
        assert parts is not None, f"{name} is no worker"
        self._grace_s = settings.config.pool(settings.pool).shutdown_grace_s
        self._worker: WorkerReplica | None = None
        pools = tuple(Pool) if settings.config.cluster.role_change else (settings.pool,)
        services = {pool: _pool_service(pool) for pool in pools}
        self._worker = await start_worker(settings, services, slot=parts[2], application=name)
        trim_heap()

    async def check_health(self) -> None:
        """Raise WorkerLostError if the worker can no longer serve requests."""
        assert self._worker is not None, "Serve checks a replica only after its constructor"
        await self._worker.check_health()

    async def __del__(self) -> None:
        if self._worker is not None:
            await self._worker.stop(self._grace_s)


class Autoscaler:
    """The autoscaler's replica. It starts and stops the workers."""

    async def __init__(self, settings: WorkerAppSettings) -> None:  # type: ignore[misc]
        from cluster.autoscale.loop import AutoscaleLoop  # workers need not load the policy
        from cluster.autoscale.policy_file import worker_gpus
        from cluster.ray.worker_apps import ServeWorkerApps

        prepare_process(settings.config.cluster.host)
        self._apps = ServeWorkerApps(settings)
        self._loop = AutoscaleLoop(
            settings.config, self._apps, settings.store, gpus=worker_gpus(settings.config)
        )
        self._loop.start()
        trim_heap()

    def check_health(self) -> None:
        """Raises InternalError if the autoscaler should be replaced."""
        self._loop.check_health()
        if self._apps.hangs:
            raise InternalError("a call of Ray Serve does not return")

    async def __del__(self) -> None:
        await self._loop.stop()
        self._apps.close()


def _pool_service(pool: Pool) -> AddService:
    """Return the function that adds a pool's gRPC service. Other pools' code is not imported."""
    if pool is Pool.PREFILL:
        from prefill_worker.servicer import add_prefill_service

        return add_prefill_service
    from decode_worker.servicer import add_decode_service

    return add_decode_service
