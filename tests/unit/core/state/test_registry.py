"""The in-memory registry replaces Redis in other tests. It follows the rules of RedisRegistry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import UnavailableError
from core.histogram import Histogram
from core.state.registry import MemoryRegistry, decode_plans, decode_record, decode_router
from core.types import Pool, PoolPlan, RouterRecord
from tests.support import registry_rules as rules

LEASE_S = 3.0


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> MemoryRegistry:
    return MemoryRegistry(lease_s=LEASE_S, clock=clock)


async def test_put_list_remove(registry: MemoryRegistry) -> None:
    await rules.check_put_list_remove(registry)


async def test_asked_to_drain_once(registry: MemoryRegistry) -> None:
    await rules.check_asked_to_drain_once(registry)


async def test_asked_to_change_role_once(registry: MemoryRegistry) -> None:
    await rules.check_asked_to_change_role_once(registry)


async def test_the_pool_of_a_record_may_change(registry: MemoryRegistry) -> None:
    await rules.check_the_pool_of_a_record_may_change(registry)


async def test_renewal_replaces(registry: MemoryRegistry) -> None:
    await rules.check_renewal_replaces(registry)


async def test_a_removed_worker_can_come_back(registry: MemoryRegistry) -> None:
    await rules.check_a_removed_worker_can_come_back(registry)


async def test_routers(registry: MemoryRegistry) -> None:
    await rules.check_routers(registry)


async def test_plans(registry: MemoryRegistry) -> None:
    await rules.check_plans(registry)


async def test_a_routers_numbers_end_with_its_lease(registry: MemoryRegistry, clock: Clock) -> None:
    dead = replace(rules.ROUTER, id="router-0")
    await registry.put_router(dead)
    await registry.put_router(rules.ROUTER)
    clock.now_s = LEASE_S * 0.6
    await registry.put_router(rules.ROUTER)
    clock.now_s = LEASE_S
    assert await registry.list_routers() == (rules.ROUTER,)


async def test_plans_outlive_the_restart_of_an_autoscaler(
    registry: MemoryRegistry, clock: Clock
) -> None:
    await registry.put_plans(rules.PLANS)
    clock.now_s = LEASE_S * 9
    assert (await registry.snapshot()).plans == rules.PLANS
    clock.now_s = LEASE_S * 10
    assert (await registry.snapshot()).plans == ()


async def test_a_lease_ends_unless_renewed(registry: MemoryRegistry, clock: Clock) -> None:
    await registry.put(rules.DECODE)
    await registry.put(rules.PREFILL)
    clock.now_s = LEASE_S * 0.6
    await registry.put(rules.DECODE)
    clock.now_s = LEASE_S
    assert await registry.list() == (rules.DECODE,)
    clock.now_s = LEASE_S * 1.6
    assert await registry.list() == ()


async def test_every_call_fails_while_the_store_is_unavailable(registry: MemoryRegistry) -> None:
    await registry.put(rules.DECODE)
    registry.available = False
    for call in (
        registry.list(),
        registry.put(rules.PREFILL),
        registry.remove("x"),
        registry.put_router(rules.ROUTER),
        registry.list_routers(),
        registry.remove_router("x"),
        registry.put_plans(rules.PLANS),
    ):
        with pytest.raises(UnavailableError):
            await call
    registry.available = True
    assert await registry.list() == (rules.DECODE,)


def test_a_record_of_a_newer_version_can_be_read() -> None:
    text = (
        b'{"id":"decode-1","pool":"decode","state":"ready","incarnation":"i1",'
        b'"address":"127.0.0.1:1","kv_addresses":[],"model":"tiny","colour":"blue",'
        b'"load":{"queue_depth":0,"running":0,"queued_tokens":0,"kv_blocks_free":10,'
        b'"kv_blocks_total":10,"temperature":3}}'
    )
    assert decode_record(text) == rules.DECODE


@pytest.mark.parametrize("text", [b"", b"{}", b'{"id": 3}', b"\xff", b"[1]"])
def test_a_malformed_record_is_an_error(text: bytes) -> None:
    for decode in (decode_record, decode_router):
        with pytest.raises(UnavailableError, match="cannot be read"):
            decode(text)
    assert decode_plans(text) == ()


def test_records_of_other_versions_of_routers_and_autoscalers_can_be_read() -> None:
    text = b'{"id":"r","address":"a:1","ttft_s":{"counts":{"3":2},"unit":"s"},"colour":"blue"}'
    assert decode_router(text) == RouterRecord("r", "a:1", ttft_s=Histogram({3: 2}))
    text = b'[{"pool":"decode","max_workers":2,"colour":"blue"}]'
    assert decode_plans(text) == (PoolPlan(Pool.DECODE, max_workers=2),)
