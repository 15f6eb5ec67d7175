"""The in-memory registry replaces Redis in other tests. It follows the rules of RedisRegistry."""

from __future__ import annotations

import pytest

from core.errors import UnavailableError
from core.state.registry import MemoryRegistry, decode_record
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
    for call in (registry.list(), registry.put(rules.PREFILL), registry.remove("x")):
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
    with pytest.raises(UnavailableError, match="cannot be read"):
        decode_record(text)
