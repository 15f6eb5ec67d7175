"""Renewals of one lease, and the orders that they bring."""

from __future__ import annotations

import asyncio

import pytest

from core.state.registry import MemoryRegistry
from core.types import Pool, WorkerOrder, WorkerRecord, WorkerState
from tests.support.registry_rules import DECODE
from tests.support.waiting import until
from worker.lease import Lease

pytestmark = pytest.mark.asyncio


class SlowRegistry(MemoryRegistry):
    """Its first answer comes when the test opens the gate. Later ones come at once."""

    def __init__(self) -> None:
        super().__init__(lease_s=3600)
        self.gate = asyncio.Event()
        self.puts = 0
        self.answered = 0

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        self.puts += 1
        if self.puts == 1:
            await self.gate.wait()
        order = await super().put(record)
        self.answered += 1
        return order


def lease(registry: MemoryRegistry, orders: list[WorkerOrder]) -> Lease:
    return Lease(registry, DECODE, load=lambda: DECODE.load, renew_s=3600, on_order=orders.append)


async def test_an_older_record_does_not_overtake_a_newer_one() -> None:
    registry = SlowRegistry()
    one = lease(registry, [])
    renewing = asyncio.create_task(one.keep())
    await until(lambda: registry.puts == 1, what="a renewal is under way")
    publishing = asyncio.create_task(one.publish(pool=Pool.PREFILL, state=WorkerState.STARTING))
    await asyncio.sleep(0)
    registry.gate.set()
    assert await publishing
    await until(lambda: registry.answered == 2, what="both records are written")
    (record,) = await registry.list()
    assert (record.pool, record.state) == (Pool.PREFILL, WorkerState.STARTING)
    renewing.cancel()
    await asyncio.gather(renewing, return_exceptions=True)


async def test_an_update_that_is_lost_is_written_by_the_next_renewal() -> None:
    registry = MemoryRegistry(lease_s=3600)
    orders: list[WorkerOrder] = []
    one = lease(registry, orders)
    await registry.ask_to_change_role(DECODE.id, Pool.PREFILL)
    registry.available = False
    assert not await one.publish(state=WorkerState.DRAINING)
    assert orders == []
    registry.available = True
    assert await one.publish()
    assert [record.state for record in await registry.list()] == [WorkerState.DRAINING]
    assert orders == [WorkerOrder.PREFILL]
