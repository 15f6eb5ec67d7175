"""The Ray head node on this machine, with Ray Serve. The launcher starts and stops both.

Ray reads its settings from the environment when it is first imported. So set the environment
(see ``cluster.local.environment``) before importing this module.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.serve import Application
from ray.serve.schema import ApplicationStatus

from cluster.autoscale.apps import parse_name
from cluster.ray.app import APP, ROUTER
from core.config.schema import Config
from core.errors import InternalError, last_line

_OBJECT_STORE_BYTES = 75 * 2**20  # Ray's minimum; Baton stores no objects in it
_DELETE_POLL_S = 0.05  # how soon the end of the last replica is noticed


class _QuietNode(Node):
    """A head node without the dashboard process (75 MB).

    Ray starts that process even when the dashboard is switched off. The log monitor and Ray's
    autoscaler (95 MB) are switched off by parameters.
    """

    def start_api_server(self, **_: Any) -> None:
        self._webui_url = ""


class RayRuntime:
    """One Ray head node with Serve. A process may have at most one.

    Args:
        folder: Ray's session and log files go here.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._node: Node | None = None

    def start(self) -> None:
        """Start Ray and Serve, without Serve's HTTP proxy. This takes some seconds.

        Must be called from the main thread, because the kernel ends Ray's processes together
        with the thread that started them. Ray does not replace this process's SIGTERM handler.

        Raises:
            InternalError: Ray does not start.
        """
        try:
            self._start()
        except Exception as error:  # Ray also raises plain Exception
            raise InternalError(f"Ray does not start: {error}") from error

    def has_cuda(self) -> bool:
        """Return whether Ray found GPUs."""
        return bool(ray.cluster_resources().get("GPU", 0) > 0)

    def deploy(self, app: Application) -> None:
        """Give the application to Serve and return. Serve starts it in the background."""
        target = serve.RunTarget(app, name=APP, route_prefix=None, external_scaler_enabled=True)
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def failure(self) -> str | None:
        """Return why Serve gave up deploying an application, or None if it has not given up."""
        for status in serve.status().applications.values():
            if status.status is ApplicationStatus.DEPLOY_FAILED:
                messages = [d.message for d in status.deployments.values() if d.message]
                return last_line("\n".join(messages or [status.message]))
        return None

    def is_alive(self) -> bool:
        """Return whether all of Ray's own processes still run."""
        return self._node is not None and not self._node.dead_processes()

    def has_replicas(self) -> bool:
        """Return whether replicas may still run. They end when Ray's raylet process ends."""
        if self._node is None:
            return False
        return PROCESS_TYPE_RAYLET not in {kind for kind, _ in self._node.dead_processes()}

    def drain_router(self, grace_s: float) -> None:
        """Let the router finish its accepted requests, for at most ``grace_s``."""
        handle = serve.get_deployment_handle(ROUTER, APP)
        handle.drain.remote(grace_s).result(timeout_s=grace_s + 1)

    def delete(self, timeout_s: float) -> bool:
        """Drain and stop all replicas. Return False if some are left after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        # The autoscaler goes first, so that it starts no other worker in between.
        return _delete(lambda name: name == APP, deadline_s) and _delete(
            lambda name: parse_name(name) is not None, deadline_s
        )

    def stop(self, *, disconnect: bool = True) -> None:
        """End Ray immediately. Idempotent.

        Args:
            disconnect: whether to shut down Ray's client in this process first. Must be False
                while another thread is inside a Ray call. Otherwise Ray aborts this process.
        """
        if self._node is None:
            return
        node, self._node = self._node, None
        if disconnect:
            ray.shutdown()
        node.kill_all_processes(check_alive=False, allow_graceful=False)

    def worker_logs(self) -> list[Path]:
        """Return the log files of the workers and their engines, last modified last."""
        logs = [*self._folder.glob("session_latest/logs/worker-*.err")]
        logs += self._folder.glob("session_latest/logs/worker-*.out")
        return sorted(logs, key=os.path.getmtime)

    def _start(self) -> None:
        host = self._config.cluster.host
        parameters = RayParams(
            node_ip_address=host,
            temp_dir=str(self._folder),
            num_cpus=self._config.cluster.num_cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            gcs_server_port=0,
            dashboard_agent_listen_port=0,
        )
        self._node = _QuietNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
        with _keep_sigterm_handler():
            ray.init(
                address=self._node.gcs_address,
                _node_ip_address=host,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        # Otherwise this process prints pages about a dead worker, even with log_to_driver off.
        ray_worker._worker_logs_enabled = False
        serve.start(proxy_location="Disabled")


def _delete(chosen: Callable[[str], bool], deadline_s: float) -> bool:
    """Delete the applications that ``chosen`` accepts, and wait until they are gone."""
    asked: set[str] = set()
    while left := {name for name in serve.status().applications if chosen(name)}:
        if time.monotonic() > deadline_s:
            return False
        for name in left - asked:
            serve.delete(name, _blocking=False)
        asked |= left
        time.sleep(_DELETE_POLL_S)
    return True


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep this process's SIGTERM handler. Ray's handler would end the process immediately.

    Ray's Python code must not install its handler at all, because that handler would be active
    for the seconds that ``ray.init`` takes. Ray's C++ code installs another handler, which prints
    a stack trace. Therefore the original handler is restored at the end of the block.
    """
    handler = signal.getsignal(signal.SIGTERM)
    original = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = original
        if handler is not None:  # None: Python did not install it and cannot restore it
            signal.signal(signal.SIGTERM, handler)
