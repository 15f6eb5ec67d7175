"""A router whose own tasks fail says so, and is replaced if that goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core import tasks
from core.errors import InternalError
from router.server import SERVICE
from tests.support.fake_workers import FakeDecode, FakePrefill
from tests.support.router_harness import RouterHarness
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WITHIN_S = 5.0


async def fails() -> None:
    raise ZeroDivisionError("a defect")


async def test_a_router_that_reads_no_registry_is_not_serving_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "RESTART_S", 0.01)
    monkeypatch.setattr(tasks, "HEALTHY_S", 0.1)
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        health = health_pb2_grpc.HealthStub(router.channel)
        statuses = aiter(health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
        await wait_for(statuses, SERVING)
        with monkeypatch.context() as broken:
            broken.setattr(router.server.workers, "refresh", fails)
            await wait_for(statuses, NOT_SERVING)
        await wait_for(statuses, SERVING)
        router.server.check_health()


async def test_a_router_whose_task_fails_again_and_again_drains_and_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "RESTART_S", 0.01)
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        router.server.check_health()
        monkeypatch.setattr(router.server.workers, "refresh", fails)

        def is_to_be_replaced() -> bool:
            try:
                router.server.check_health()
            except InternalError:
                return True
            return False

        await until(is_to_be_replaced, what="the router has drained and asks for another one")
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(aiter(router.call(token_ids={"ids": [1, 2, 3]})))


async def wait_for(statuses: Any, status: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (await anext(statuses)).status != status:
            pass
