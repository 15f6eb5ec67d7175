"""Gets a replica's application and node address from Ray, and prepares the replica's process."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray import serve
from ray._private import worker as ray_worker
from ray.serve._private import replica as serve_replica

from core.config.schema import Config
from core.net import bracketed, is_loopback

logger = logging.getLogger(__name__)


def application_name() -> str:
    """Return the name of the Serve application that this replica belongs to."""
    name: str = serve.get_replica_context().app_name
    return name


def on_this_node(config: Config) -> Config:
    """Return ``config`` with the address of this node as ``cluster.host``.

    ``cluster.host`` is the head's address, but Ray may place a replica on another machine. Such a
    replica must bind and advertise that machine's address. A loopback address is kept, because the
    cluster then has only one machine.
    """
    if is_loopback(config.cluster.host):
        return config
    host = ray.util.get_node_ip_address()
    cluster = config.cluster.model_copy(update={"host": host})
    return config.model_copy(update={"cluster": cluster})


def prepare_process(host: str) -> None:
    """Prepare the process of a replica. Its constructor must call this first."""
    _bind_internal_server(host)
    _raise_file_limit()
    _ignore_logging_errors()


def drain_on_sigterm(drain: Callable[[], Awaitable[None]]) -> None:
    """At SIGTERM, drain and then end this process. A second SIGTERM ends it at once.

    Ray ends a worker process at SIGTERM, which cuts all streams. Ray sets its handler in the main
    thread, where no code of ours runs, so this replaces the function that its handler calls.
    """
    loop = asyncio.get_running_loop()
    end_at_once = ray_worker.raise_sys_exit_with_custom_error_message
    draining = False

    async def drain_and_end() -> None:
        try:
            await drain()
        except Exception:
            logger.exception("draining failed")
        os._exit(0)  # Serve then starts another replica

    def on_sigterm(message: str, exit_code: int = 0) -> None:
        nonlocal draining
        if draining:
            end_at_once(message, exit_code)
        draining = True
        asyncio.run_coroutine_threadsafe(drain_and_end(), loop)

    ray_worker.raise_sys_exit_with_custom_error_message = on_sigterm


def _raise_file_limit() -> None:
    """Allow as many open files as the system does. Each connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind_internal_server(host: str) -> None:
    """Make Serve's internal gRPC server in this replica listen on ``host`` only.

    Serve uses this server for calls between deployments. By default, the server accepts pickles
    from anyone, on all interfaces, and Ray 2.60 has no option to restrict it. Serve starts it
    after the replica's constructor returns, so the constructor must call this function.
    """
    original = serve_replica.add_port_to_grpc_server

    def add_port(server: Any, address: str) -> int:
        port: int = original(server, address.replace("[::]:", f"{bracketed(host)}:"))
        return port

    serve_replica.add_port_to_grpc_server = add_port


def _ignore_logging_errors() -> None:
    """Drop log lines that cannot be written. Without this, a full disk would make requests fail.

    Python reports a failed log line on stderr. Serve redirects stderr to the same log. Therefore
    the report fails, too, and the reports recurse until RecursionError.
    """
    logging.raiseExceptions = False
