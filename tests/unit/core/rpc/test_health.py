"""The health service: statuses, watches, and clients that read nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from core.rpc.health import NOT_SERVING, SERVING, HealthServicer

UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

pytestmark = pytest.mark.asyncio


class Context:
    """A call's context. A client that reads nothing never lets ``write`` end."""

    def __init__(self, *, reads: bool = True) -> None:
        self.statuses: asyncio.Queue[int] = asyncio.Queue()
        self.aborted: grpc.StatusCode | None = None
        self._reads = reads

    async def write(self, response: Any) -> None:
        self.statuses.put_nowait(response.status)
        if not self._reads:
            await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, *_: Any) -> None:
        self.aborted = code
        raise grpc.aio.AbortError


def request(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_a_client_that_reads_nothing_stops_no_other_watch() -> None:
    health: Any = HealthServicer("", "a")
    health.set(SERVING)
    stuck, other = Context(reads=False), Context()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        watches: Any = [group.create_task(health.Watch(request(), each)) for each in (stuck, other)]
        assert [await each.statuses.get() for each in (stuck, other)] == [SERVING, SERVING]
        health.stop()
        health.set(SERVING)  # has no effect any more
        assert await other.statuses.get() == NOT_SERVING
        for watch in watches:
            watch.cancel()


async def test_a_watch_of_an_unknown_service_goes_on_and_a_check_fails() -> None:
    health: Any = HealthServicer("a")
    watched = Context()
    watch: Any = asyncio.create_task(health.Watch(request("a"), watched))
    assert await watched.statuses.get() == UNKNOWN, "no status was set yet"
    health.set(SERVING)
    assert await watched.statuses.get() == SERVING
    watch.cancel()
    assert (await health.Check(request("a"), Context())).status == SERVING
    for name, code in (
        ("b", grpc.StatusCode.NOT_FOUND),
        ("x" * 201, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        context = Context()
        with pytest.raises(grpc.aio.AbortError):
            await health.Check(request(name), context)
        assert context.aborted is code
