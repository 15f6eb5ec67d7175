"""Opens a worker's gRPC server, which carries requests and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2_grpc

from core.config.schema import Config
from core.errors import InternalError
from core.net import host_port
from core.rpc.credentials import ClusterCredentials
from core.rpc.health import SERVING, HealthServicer
from core.rpc.options import server_options
from core.rpc.request_checks import CheckRequests

_MAX_CONNECTIONS: Final = 1024  # of routers; each router has one connection


async def start_server(
    config: Config,
    credentials: ClusterCredentials | None,
    health: HealthServicer,
    add_services: Callable[[grpc.aio.Server], None],
) -> tuple[grpc.aio.Server, str]:
    """Start a server on a free port of ``cluster.host``. Return it and its "host:port".

    The caller owns the server.

    Args:
        credentials: of the cluster; None serves whoever connects, for tests.
        health: reports that the server serves, from now on.

    Raises:
        InternalError: the server cannot listen.
    """
    limit = int(config.router.max_message_bytes)
    server = grpc.aio.server(
        interceptors=(CheckRequests(),),
        options=(
            *server_options(limit, config.cluster.connection_silence_s),
            ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
        ),
    )
    add_services(server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    health.set(SERVING)
    host = config.cluster.host
    try:
        if credentials is None:
            port = server.add_insecure_port(host_port(host, 0))
        else:
            port = server.add_secure_port(host_port(host, 0), credentials.for_server())
    except RuntimeError as error:
        raise InternalError(f"cannot listen on {host}: {error}") from None
    await server.start()
    return server, host_port(host, port)
