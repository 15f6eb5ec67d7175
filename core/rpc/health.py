"""The standard health service, ``grpc.health.v1``, for all of Baton's servers.

grpcio's own one sends while it holds a lock. A client that reads nothing could then stop every
other watch, and the server from saying that it no longer serves.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import InvalidArgumentError, NotFoundError
from core.rpc.status import abort

_Status = health_pb2.HealthCheckResponse
SERVING: Final[int] = _Status.SERVING
NOT_SERVING: Final[int] = _Status.NOT_SERVING
_UNKNOWN: Final[int] = _Status.SERVICE_UNKNOWN

_MAX_NAME_CHARS: Final = 200  # bounds the memory of a watch


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Belongs to one event loop.

    Args:
        names: the services whose status ``set`` changes. The name "" stands for the whole server.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._status: int | None = None  # None: not known yet
        self._stops = False
        self._changed = asyncio.Event()  # set and replaced at each change

    def set(self, status: int) -> None:
        """Set the status of all services. Has no effect after ``stop``."""
        if not self._stops:
            self._change(status)

    def stop(self) -> None:
        """Report NOT_SERVING from now on."""
        self._change(NOT_SERVING)
        self._stops = True

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Return the status. Aborts with NOT_FOUND if the service is unknown."""
        name = await _name_in(request, context)
        if (status := self._status_of(name)) == _UNKNOWN:
            await abort(context, NotFoundError(f"no service {name!r}", reason="UNKNOWN_SERVICE"))
        return _Status(status=status)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send the status now and at each change."""
        name, sent = await _name_in(request, context), None
        while True:
            changed, status = self._changed, self._status_of(name)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            await changed.wait()

    def _status_of(self, name: str) -> int:
        if name not in self._names or self._status is None:
            return _UNKNOWN
        return self._status

    def _change(self, status: int) -> None:
        self._status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _name_in(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> str:
    name: str = request.service
    if len(name) > _MAX_NAME_CHARS:
        error = InvalidArgumentError("the service's name is too long", reason="UNKNOWN_SERVICE")
        await abort(context, error)
    return name
