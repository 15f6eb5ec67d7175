"""The Ray Serve applications: the main one with router and autoscaler, and one for each worker.

Each worker has an application of its own, because Serve chooses by itself which replica of a
deployment leaves, and may start another one in place of a replica that drains.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from cluster.ray.deployments import Autoscaler, Router, RouterSettings, Worker, WorkerAppSettings
from core.config.schema import PoolConfig
from core.types import Pool
from worker.replica import WorkerSettings

APP = "baton"  # the main application
ROUTER = "Router"
AUTOSCALER = "Autoscaler"
DEPLOYMENTS = {Pool.PREFILL: "PrefillWorker", Pool.DECODE: "DecodeWorker"}

# Ray places replicas by GPUs and labels. Baton binds engines to CPU cores, so Ray need not count
# cores.
_NUM_CPUS = 0.01
# Applications connect to the router at the head's address, so the router must run on the head.
_ON_HEAD = {"node:__internal_head__": 0.001}
_HEALTH_TIMEOUT_S = 10.0  # an event loop that blocks this long cannot serve requests
_STOP_MARGIN_S = 5.0  # time for a replica to end, after the grace period of its requests
_DRAIN_POLL_S = 0.05  # how soon Serve notices that a replica has drained
_CONTROL_CALLS = 10  # only the launcher calls replicas through Serve, and rarely


def build_app(settings: WorkerAppSettings) -> Application:
    """Build the main application: the router and the autoscaler, which starts the workers.

    Serve wants an ingress, but requests reach the router directly, not through Serve.
    """
    config = settings.config
    autoscaler = serve.deployment(
        name=AUTOSCALER,
        num_replicas=1,
        ray_actor_options={"num_cpus": _NUM_CPUS, "resources": _ON_HEAD},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=_STOP_MARGIN_S,
        **_common(),
    )(Autoscaler)
    router = serve.deployment(
        name=ROUTER,
        num_replicas=1,
        ray_actor_options={"num_cpus": _NUM_CPUS, "resources": _ON_HEAD},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=config.cluster.stop_grace_s + _STOP_MARGIN_S,
        **_common(),
    )(Router)
    return router.bind(
        RouterSettings(config, settings.store, settings.credentials), autoscaler.bind(settings)
    )


def build_worker(settings: WorkerAppSettings, pool: Pool) -> Application:
    """Build the application of one worker."""
    options = settings.config.pool(pool)
    deployment = serve.deployment(
        name=DEPLOYMENTS[pool],
        num_replicas=1,
        ray_actor_options=actor_options(options, cuda=settings.cuda),
        health_check_period_s=options.health_check_period_s,
        graceful_shutdown_timeout_s=options.shutdown_grace_s + _STOP_MARGIN_S,
        **_common(),
    )
    return deployment(Worker).bind(
        WorkerSettings(settings.config, pool, settings.model, settings.store, settings.credentials)
    )


def actor_options(pool: PoolConfig, *, cuda: bool) -> dict[str, Any]:
    """Return the Ray actor options of one worker: reserved resources and placement labels."""
    gpus = pool.num_gpus_per_replica
    if gpus is None:
        gpus = pool.tensor_parallel_size if cuda else 0
    options: dict[str, Any] = {"num_cpus": _NUM_CPUS, "num_gpus": gpus}
    if pool.label_selector:
        options["label_selector"] = pool.label_selector
    return options


def _common() -> dict[str, Any]:
    return {
        "max_ongoing_requests": _CONTROL_CALLS,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
        # The launcher reports the first failure and ends the start. Once a replica of a
        # deployment has started, Serve retries failed replicas without a limit.
        "max_constructor_retry_count": 1,
    }
