"""KV addresses come from the registry, and are remembered while it is away or empty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import UnavailableError
from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerState
from tests.support.registry_rules import DECODE, PREFILL
from worker.peers import Peers

pytestmark = pytest.mark.asyncio


async def test_a_worker_that_has_just_started_is_looked_up() -> None:
    registry = MemoryRegistry(lease_s=3600)
    peers = Peers(registry, Pool.DECODE)
    assert await peers.refresh() == {}
    await registry.put(PREFILL)
    assert await peers.kv_addresses(PREFILL.incarnation) == PREFILL.kv_addresses


@pytest.mark.parametrize("incarnation", ["", "no such one", "i2"])
async def test_an_incarnation_that_no_prefill_worker_has_is_refused(incarnation: str) -> None:
    registry = MemoryRegistry(lease_s=3600)
    for record in (PREFILL, replace(DECODE, incarnation="i2")):
        await registry.put(record)
    with pytest.raises(UnavailableError, match="not registered"):
        await Peers(registry, Pool.DECODE).kv_addresses(incarnation)


async def test_the_other_pool_is_the_one_that_this_worker_is_not_in() -> None:
    registry = MemoryRegistry(lease_s=3600)
    peers = Peers(registry, Pool.DECODE, "mine")
    decode = replace(DECODE, incarnation="d1", kv_addresses=("tcp://127.0.0.1:4",))
    for record in (PREFILL, decode):
        await registry.put(record)
    assert await peers.refresh() == {PREFILL.incarnation: PREFILL.kv_addresses}
    peers.pool = Pool.PREFILL
    assert await peers.refresh() == {"d1": decode.kv_addresses}
    peers.pool = Pool.DECODE
    assert await peers.refresh() == {PREFILL.incarnation: PREFILL.kv_addresses}


async def test_a_worker_that_the_registry_lists_in_its_old_pool_is_no_peer_of_itself() -> None:
    registry = MemoryRegistry(lease_s=3600)
    await registry.put(PREFILL)
    assert await Peers(registry, Pool.DECODE, PREFILL.incarnation).refresh() == {}


@pytest.mark.parametrize("lost", ["away", "restarted", "draining"])
async def test_a_known_worker_stays_known(lost: str) -> None:
    registry = MemoryRegistry(lease_s=3600)
    peers = Peers(registry, Pool.DECODE)
    await registry.put(PREFILL)
    assert await peers.refresh() == {PREFILL.incarnation: PREFILL.kv_addresses}
    if lost == "away":
        registry.available = False
    elif lost == "restarted":
        await registry.remove(PREFILL.id)
        assert await peers.refresh() == {}
    else:
        await registry.put(replace(PREFILL, state=WorkerState.DRAINING))
        assert await peers.refresh() == {}
    assert await peers.kv_addresses(PREFILL.incarnation) == PREFILL.kv_addresses
