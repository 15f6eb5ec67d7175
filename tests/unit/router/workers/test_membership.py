"""Snapshots outlive failures of the registry. A channel stays open while its worker
is in the snapshot or a request uses the channel.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from core.state.registry import MemoryRegistry
from core.types import Pool, PoolPlan, RegistrySnapshot, WorkerRecord, WorkerState
from router.workers.membership import Workers, WorkersSettings
from tests.support.fake_workers import FakeDecode

pytestmark = pytest.mark.asyncio

SETTINGS = WorkersSettings(
    poll_s=60,
    poll_timeout_s=1,
    lost_after_s=3,
    connect_timeout_s=1,
    max_message_bytes=1000,
    connection_silence_s=60,
)


class Setup:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.registry = MemoryRegistry(lease_s=3600)
        self.record = FakeDecode().record
        self.snapshots: list[tuple[WorkerRecord, ...]] = []
        self.workers = Workers(self.registry, SETTINGS, lambda: self.now_s, self.snapshots.append)
        self.lost_calls = 0

    def on_lost(self) -> None:
        self.lost_calls += 1


async def test_the_last_snapshot_stays_while_the_registry_is_away() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    await setup.workers.refresh()
    setup.registry.available = False
    await setup.workers.refresh()
    assert setup.workers.snapshot == (setup.record,)
    assert len(setup.snapshots) == 1
    setup.registry.available = True
    await setup.workers.refresh()
    assert setup.workers.snapshot == (setup.record,)


@pytest.mark.parametrize("outage_seen", [False, True])
async def test_a_restarted_store_has_one_lease_to_learn_its_workers(
    outage_seen: bool,
) -> None:
    setup = Setup()
    others = [replace(setup.record, id=f"decode-{i}") for i in (2, 3)]
    for record in (setup.record, *others):
        await setup.registry.put(record)
    await setup.workers.refresh()
    if outage_seen:
        setup.registry.available = False
        await setup.workers.refresh()
        setup.registry.available = True
    for record in (setup.record, *others):
        await setup.registry.remove(record.id)
    if not outage_seen:  # if the outage was seen, one worker is back before the next read
        await setup.workers.refresh()
        assert len(setup.workers.snapshot) == 3

    await setup.registry.put(others[0])
    await setup.workers.refresh()
    assert {record.id for record in setup.workers.snapshot} == {"decode-1", "decode-2", "decode-3"}
    assert setup.snapshots[-1] == setup.workers.snapshot
    await setup.registry.put(others[1])
    setup.now_s = 2.9
    await setup.workers.refresh()
    assert len(setup.workers.snapshot) == 3
    setup.now_s = 3.0
    await setup.workers.refresh()
    assert setup.workers.snapshot == tuple(others), "the first worker is really gone"


async def test_if_all_workers_leave_the_snapshot_is_empty_after_one_lease() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    await setup.workers.refresh()
    await setup.registry.remove(setup.record.id)
    for setup.now_s in (10.0, 12.9):
        await setup.workers.refresh()
        assert setup.workers.snapshot == (setup.record,)
    for setup.now_s in (13.0, 14.0):
        await setup.workers.refresh()
        assert not setup.workers.snapshot


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
async def test_a_snapshot_that_loses_most_workers_at_once_is_distrusted(lost: int) -> None:
    """The store answers all the time. It may have refused to renew leases, for example."""
    setup = Setup()
    records = [replace(setup.record, id=f"decode-{number}") for number in range(4)]
    leaving = replace(setup.record, id="decode-9", state=WorkerState.DRAINING)
    for record in (*records, leaving):
        await setup.registry.put(record)
    await setup.workers.refresh()
    for record in (*records[:lost], leaving):
        await setup.registry.remove(record.id)
    await setup.workers.refresh()
    left = tuple(records[lost:])
    if lost <= 2:
        assert setup.workers.snapshot == left
        return
    assert set(setup.workers.snapshot) >= set(records)
    setup.now_s = 3.0
    await setup.workers.refresh()
    assert setup.workers.snapshot == left, "they are really gone"


async def test_a_worker_that_leaves_alone_is_gone_at_once() -> None:
    setup = Setup()
    other = replace(setup.record, id="decode-2")
    for record in (setup.record, other):
        await setup.registry.put(record)
    await setup.workers.refresh()
    await setup.registry.remove(setup.record.id)
    await setup.workers.refresh()
    assert setup.workers.snapshot == (other,)


async def test_plans_outlive_a_restart_of_the_store() -> None:
    setup = Setup()
    await setup.registry.put_plans((PoolPlan(Pool.DECODE, 2), PoolPlan(Pool.PREFILL, 0)))
    await setup.workers.refresh()
    assert setup.workers.coming == {Pool.DECODE}
    setup.registry.available = False
    setup.now_s = 100.0
    await setup.workers.refresh()
    setup.registry = setup.workers._registry = MemoryRegistry(lease_s=3600)
    for setup.now_s in (100.5, 103.4):
        await setup.workers.refresh()
        assert setup.workers.coming == {Pool.DECODE}
    setup.now_s = 103.5
    await setup.workers.refresh()
    assert setup.workers.coming == frozenset()
    await setup.registry.put_plans((PoolPlan(Pool.DECODE, 2),))
    await setup.workers.refresh()
    assert setup.workers.coming == {Pool.DECODE}
    await setup.registry.put_plans((PoolPlan(Pool.DECODE, 0),))
    await setup.workers.refresh()
    assert setup.workers.coming == frozenset(), "the autoscaler says so"


async def test_a_read_of_a_hung_registry_times_out() -> None:
    class Hanging:
        async def snapshot(self) -> RegistrySnapshot:
            await asyncio.get_running_loop().create_future()
            raise AssertionError

    settings = replace(SETTINGS, poll_timeout_s=0.01)
    workers = Workers(Hanging(), settings, lambda: 0.0, lambda snapshot: None)
    await workers.refresh()
    await workers.close()


async def test_one_channel_per_incarnation_closed_after_its_last_user() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    await setup.registry.put(replace(setup.record, id="decode-2"))
    await setup.workers.refresh()
    async with setup.workers.connection(setup.record, setup.on_lost) as first:
        async with setup.workers.connection(setup.record, setup.on_lost) as second:
            assert first is second
        await setup.registry.remove(setup.record.id)
        await setup.workers.refresh()
        assert setup.workers.open_channels == 1, "the channel is still used"
    await setup.workers.refresh()
    assert setup.workers.open_channels == 0
    await setup.workers.close()


async def test_a_channel_stays_open_while_its_worker_lives() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    async with setup.workers.connection(setup.record, setup.on_lost) as first:
        pass
    await setup.workers.refresh()
    async with setup.workers.connection(setup.record, setup.on_lost) as second:
        assert first is second
    await setup.workers.close()
    assert setup.workers.open_channels == 0


async def test_a_worker_that_changes_its_pool_keeps_its_channel_and_is_listed_once() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    await setup.workers.refresh()
    changed = replace(setup.record, pool=Pool.PREFILL)
    async with setup.workers.connection(setup.record, setup.on_lost) as first:
        setup.registry.available = False
        await setup.workers.refresh()
        setup.registry.available = True
        await setup.registry.put(changed)
        setup.now_s = 10.0
        await setup.workers.refresh()
        assert setup.workers.snapshot == (changed,), "the old record counts as missing"
        async with setup.workers.connection(changed, setup.on_lost) as second:
            assert first is second
    assert setup.lost_calls == 0
    await setup.workers.close()


async def test_on_lost_is_called_only_after_a_worker_is_missing_for_a_lease() -> None:
    setup = Setup()
    await setup.registry.put(setup.record)
    async with setup.workers.connection(setup.record, setup.on_lost):
        await setup.workers.refresh()
        await setup.registry.remove(setup.record.id)
        await setup.workers.refresh()
        setup.now_s = 2.9
        await setup.workers.refresh()
        assert setup.lost_calls == 0

        setup.registry.available = False  # during an outage, no worker counts as missing
        setup.now_s = 50.0
        await setup.workers.refresh()
        setup.registry.available = True
        await setup.workers.refresh()
        assert setup.lost_calls == 0

        setup.now_s = 53.0
        await setup.workers.refresh()
        assert setup.lost_calls == 1
        await setup.registry.put(setup.record)
        await setup.workers.refresh()
        assert setup.lost_calls == 1
    await setup.workers.close()
