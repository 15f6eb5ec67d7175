"""Starts, lists and stops the Serve applications of workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.autoscale.apps import AppState, WorkerApp, new_name, parse_name
from cluster.ray.app import build_worker
from cluster.ray.deployments import WorkerAppSettings
from core.errors import UnavailableError, last_line
from core.types import Pool

_CALL_TIMEOUT_S = 10.0  # if Serve's controller dies, its replacement runs within seconds
_HANGS_S = 60.0  # by then, a call has been lost
# Serve says this of a replica that Ray has not placed for RAY_SERVE_SLOW_STARTUP_WARNING_S, see
# ``cluster.local.environment``.
_UNPLACED = "to be scheduled"

T = TypeVar("T")


class ServeWorkerApps:
    """Implements ``WorkerApps`` on Ray Serve's public functions.

    The functions block, so they run in a thread, one at a time.
    """

    def __init__(self, settings: WorkerAppSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="serve")
        self._call: Future[Any] | None = None  # the latest, and when it began
        self._called_s = 0.0

    async def list(self) -> tuple[WorkerApp, ...]:
        """See ``WorkerApps``."""
        overviews = await self._run(lambda: serve.status().applications)
        if self._settings.main_app not in overviews:  # Serve has no controller at the moment
            raise UnavailableError("Ray Serve does not answer")
        found = (_worker_app(self._settings.main_app, *each) for each in overviews.items())
        return tuple(app for app in found if app is not None)

    async def add(self, pool: Pool, slot: int) -> str:
        """See ``WorkerApps``."""
        name = new_name(self._settings.main_app, pool, slot)
        target = serve.RunTarget(build_worker(self._settings, pool), name=name, route_prefix=None)

        def deploy() -> None:
            serve.run_many(
                [target],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )

        await self._run(deploy)
        return name

    async def remove(self, name: str) -> None:
        """See ``WorkerApps``."""
        await self._run(lambda: serve.delete(name, _blocking=False))

    @property
    def hangs(self) -> bool:
        """Whether a call has not returned for so long that another process should try."""
        is_open = self._call is not None and not self._call.done()
        return is_open and time.monotonic() - self._called_s > _HANGS_S

    def close(self) -> None:
        """Do not wait for a call that hangs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[[], T]) -> T:
        if self._call is not None and not self._call.done():
            raise UnavailableError("Ray Serve does not answer")
        future = self._thread.submit(call)
        self._call, self._called_s = future, time.monotonic()
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as error:
            raise UnavailableError("Ray Serve does not answer") from error
        except (RayError, RayServeException) as error:
            raise UnavailableError(f"Ray Serve failed: {last_line(str(error))}") from error


def _worker_app(main_app: str, name: str, overview: ApplicationStatusOverview) -> WorkerApp | None:
    parts = parse_name(name)
    if parts is None or parts[0] != main_app:
        return None
    messages = [overview.message, *(each.message for each in overview.deployments.values())]
    message = next((text for text in reversed(messages) if text), "")
    return WorkerApp(name, *parts[1:], state=_state(overview.status, message), message=message)


def _state(status: ApplicationStatus, message: str) -> AppState:
    if status is ApplicationStatus.DELETING:
        return AppState.LEAVING
    if status is ApplicationStatus.DEPLOY_FAILED:
        return AppState.FAILED
    if status in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY):
        return AppState.RUNNING
    return AppState.UNPLACED if _UNPLACED in message else AppState.STARTING
