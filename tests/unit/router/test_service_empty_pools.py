"""A router serves while its pools are empty on purpose, and its lease tells the autoscaler why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.types import Need, Pool, PoolPlan, RouterRecord
from router.server import SERVICE
from tests.support.fake_workers import FakeDecode, FakePrefill, answer_tokens
from tests.support.router_harness import RouterHarness, token_ids
from tests.support.waiting import until, until_awaited
from tests.unit.router.test_service_refusals import IDS, refusal

pytestmark = pytest.mark.asyncio

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PLANS = tuple(PoolPlan(pool, max_workers=1) for pool in Pool)


async def status(router: RouterHarness) -> int:
    health = health_pb2_grpc.HealthStub(router.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    return int(answer.status)


async def add(router: RouterHarness, worker: Any) -> None:
    await worker.start()
    (router.prefill if isinstance(worker, FakePrefill) else router.decode).append(worker)
    await router.registry.put(worker.record)


async def test_a_request_wakes_empty_pools() -> None:
    async with RouterHarness() as router:
        await router.refresh_workers()
        assert await status(router) == NOT_SERVING
        await router.registry.put_plans(PLANS)
        await router.refresh_workers()
        assert await status(router) == SERVING
        answer = asyncio.create_task(router.generate(IDS["ids"], max_tokens=4))

        async def published() -> list[tuple[Need, int]]:
            (record,) = await router.registry.list_routers()
            assert record.address.endswith(f":{router.port}")
            return [(each.need, each.requests) for each in record.queues]

        async def is_published(*expected: tuple[Need, int]) -> bool:
            return await published() == [*expected]

        await until_awaited(lambda: is_published((Need.BOTH, 1)), what="both pools are needed")
        await add(router, FakePrefill())
        await until_awaited(lambda: is_published((Need.DECODE, 1)), what="decode is needed")
        await add(router, FakeDecode())
        assert token_ids(await answer) == answer_tokens(IDS["ids"], 4)
        await until_awaited(is_published, what="nothing waits")
    assert await router.registry.list_routers() == (), "the router has stopped"


async def test_a_request_gives_up_when_no_worker_comes() -> None:
    async with RouterHarness(
        prefill=[FakePrefill()], router={"cold_start_timeout_s": 0.05}
    ) as router:
        await router.registry.put_plans(PLANS)
        await router.refresh_workers()
        _, message, detail = await refusal(router, token_ids=IDS)
        assert detail.reason == "NO_DECODE_WORKER"
        assert detail.retry_after_ms
        assert "none has started within 0.05 s" in message


async def test_without_a_plan_an_empty_pool_refuses_at_once() -> None:
    async with RouterHarness(decode=[FakeDecode()]) as router:
        assert await status(router) == NOT_SERVING
        _, _, detail = await refusal(router, token_ids=IDS)
        assert detail.reason == "NO_PREFILL_WORKER"


async def test_two_routers_have_different_leases() -> None:
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        async with router.another_router():

            async def count() -> int:
                return len(await router.registry.list_routers())

            async def is_two() -> bool:
                return await count() == 2

            await until_awaited(is_two, what="both have published")
        assert await count() == 1
        router.registry.available = False
        assert token_ids(await router.generate(max_tokens=3)), "the store is away"
        router.registry.available = True


async def test_a_failing_lease_makes_no_router_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        lease = router.server._lease
        assert lease is not None

        async def fails(_record: object) -> None:
            raise ZeroDivisionError("a defect of the store's driver")

        monkeypatch.setattr(router.registry, "put_router", fails)
        before = lease.record().renewals
        await until(lambda: lease.record().renewals > before + 2, what="the lease is tried again")
        assert await status(router) == SERVING


async def test_a_defect_in_what_the_router_measures_is_not_the_stores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with RouterHarness(prefill=[FakePrefill()], decode=[FakeDecode()]) as router:
        lease = router.server._lease
        assert lease is not None

        def fails() -> RouterRecord:
            raise ZeroDivisionError("a defect of ours")

        monkeypatch.setattr(lease, "record", fails)
        await until(lambda: router.server._supervisor.failing, what="the router counts its defect")
    assert "router lease has failed" in caplog.text
    assert "the registry gets no numbers" not in caplog.text
