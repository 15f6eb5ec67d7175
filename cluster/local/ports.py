"""Finds and checks TCP ports before a server is started on them."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from core.config.schema import Config
from core.errors import ConfigError

# Below the ports that the system gives to outgoing connections and to servers without a port of
# their own (``ip_local_port_range``; 32768 by default), and below the NodePorts of Kubernetes.
_PORTS = range(20_000, 30_000)
_TRIES = 100
_SYSTEM_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str, host_field: str = "cluster.host") -> int:
    """Return a port that is free now, and that the system gives to no other program.

    A program that chooses this port itself may still take it before the caller does.

    Args:
        host_field: the configuration field that holds ``host``, for the error message.

    Raises:
        ConfigError: ``host`` is not an address of this machine.
    """
    for port in (*random.sample(_own_ports(), _TRIES), 0):
        with suppress(_InUseError):
            return _try_bind(host, port, host_field, host_field)
    raise ConfigError(f"{host_field}: {host} has no free port")


class _InUseError(ConfigError):
    """The port is in use."""


def _own_ports() -> Sequence[int]:
    """Return the ports that the system does not give away. If there are few, return all."""
    try:
        low, high = map(int, _SYSTEM_RANGE.read_text().split())
    except (OSError, ValueError):
        return _PORTS
    own = [port for port in _PORTS if not low <= port <= high]
    return own if len(own) >= _TRIES else _PORTS


def check_port_is_free(host: str, port: int, host_field: str = "cluster.host") -> None:
    """Check that the router can listen on ``host`` and ``port``.

    Args:
        host_field: the configuration field that holds ``host``, for the error message.

    Raises:
        ConfigError: the port is in use, or ``host`` is not an address of this machine.
    """
    _try_bind(host, port, host_field, "router.port")


def with_router_port(config: Config) -> Config:
    """Return ``config`` with a router port that is free. If the port is 0, choose one.

    The port is chosen once, so that a restarted router listens on the same port.

    Raises:
        ConfigError: the port is in use, or the router's host is not an address of this machine.
    """
    host, port = config.router_host, config.router.port
    host_field = "cluster.host" if config.router.host is None else "router.host"
    if port == 0:
        port = free_port(host, host_field)
    check_port_is_free(host, port, host_field)
    router = config.router.model_copy(update={"port": port})
    return config.model_copy(update={"router": router})


def _try_bind(host: str, port: int, host_field: str, field: str) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # Servers also set this option. It makes a port in TIME_WAIT count as free. A port with
            # a listener still counts as in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            bound: int = probe.getsockname()[1]
            return bound
    except socket.gaierror as error:
        raise ConfigError(f"{host_field}: {host!r} cannot be resolved: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _InUseError(
                f"{field}: port {port} on {host} is in use by another program; "
                "stop it, or choose another port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host_field}: {host} is not an address of this machine") from None
        raise ConfigError(f"{field}: cannot listen on {host}:{port}: {error.strerror}") from None
