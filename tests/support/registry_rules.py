"""Checks that ``MemoryRegistry`` and ``RedisRegistry`` must pass."""

from __future__ import annotations

from dataclasses import replace

from core.histogram import Histogram
from core.state.registry import Registry
from core.types import (
    Need,
    Pool,
    PoolPlan,
    QueueLoad,
    RouterRecord,
    WorkerLoad,
    WorkerOrder,
    WorkerRecord,
    WorkerShare,
    WorkerState,
)

DECODE = WorkerRecord(
    id="decode-1",
    pool=Pool.DECODE,
    state=WorkerState.READY,
    incarnation="i1",
    address="127.0.0.1:1",
    kv_addresses=(),
    model="tiny",
    load=WorkerLoad(
        queue_depth=0, running=0, queued_tokens=0, kv_blocks_free=10, kv_blocks_total=10
    ),
)
PREFILL = replace(
    DECODE,
    id="prefill-1",
    pool=Pool.PREFILL,
    kv_addresses=("tcp://127.0.0.1:2", "tcp://127.0.0.1:3"),
)
ROUTER = RouterRecord(
    id="router-1",
    address="127.0.0.1:4",
    queues=(QueueLoad("interactive", Need.BOTH, 3, 300, 400, 1.5),),
    shares=(WorkerShare("decode-1", "i1", Pool.DECODE, 2, 64, 30.5),),
    window_s=10.0,
    arrived_requests=7,
    arrived_prompt_tokens=700,
    output_tokens=50,
    ttft_s=Histogram({3: 4, 60: 1}),
    itl_s=Histogram({0: 45}),
)
PLANS = (
    PoolPlan(Pool.PREFILL, max_workers=0),
    PoolPlan(Pool.DECODE, max_workers=2),
)


async def check_put_list_remove(registry: Registry) -> None:
    assert await registry.list() == ()
    await registry.put(PREFILL)
    await registry.put(DECODE)
    assert await registry.list() == (DECODE, PREFILL)  # sorted by id, with every field
    await registry.remove(PREFILL.id)
    await registry.remove("never-there")
    assert await registry.list() == (DECODE,)


async def check_renewal_replaces(registry: Registry) -> None:
    await registry.put(DECODE)
    busy = replace(
        DECODE,
        state=WorkerState.DRAINING,
        load=WorkerLoad(
            queue_depth=1, running=2, queued_tokens=3, kv_blocks_free=4, kv_blocks_total=5
        ),
    )
    await registry.put(busy)
    assert await registry.list() == (busy,)


async def check_asked_to_drain_once(registry: Registry) -> None:
    await registry.ask_to_drain(DECODE.id)
    assert await registry.put(PREFILL) is None
    assert await registry.put(DECODE) is WorkerOrder.DRAIN
    assert await registry.put(DECODE) is None


async def check_asked_to_change_role_once(registry: Registry) -> None:
    await registry.ask_to_change_role("never-there", Pool.DECODE)
    await registry.ask_to_change_role(DECODE.id, Pool.DECODE)
    await registry.ask_to_change_role(DECODE.id, Pool.PREFILL)
    assert await registry.put(PREFILL) is None
    assert await registry.put(DECODE) is WorkerOrder.PREFILL  # the latest
    assert await registry.put(DECODE) is None
    for asks in ("drain first", "role first"):
        if asks == "drain first":
            await registry.ask_to_drain(DECODE.id)
        await registry.ask_to_change_role(DECODE.id, Pool.PREFILL)
        if asks == "role first":
            await registry.ask_to_drain(DECODE.id)
        assert await registry.put(DECODE) is WorkerOrder.DRAIN
        assert await registry.put(DECODE) is None


async def check_the_pool_of_a_record_may_change(registry: Registry) -> None:
    await registry.put(replace(DECODE, changes_to=Pool.PREFILL))
    changed = replace(DECODE, pool=Pool.PREFILL)
    await registry.put(changed)
    assert await registry.list() == (changed,)


async def check_a_removed_worker_can_come_back(registry: Registry) -> None:
    await registry.put(DECODE)
    await registry.remove(DECODE.id)
    restarted = replace(DECODE, incarnation="i2")
    await registry.put(restarted)
    assert await registry.list() == (restarted,)


async def check_routers(registry: Registry) -> None:
    assert await registry.list_routers() == ()
    other = replace(ROUTER, id="router-0", queues=())
    await registry.put_router(ROUTER)
    await registry.put_router(other)
    assert await registry.list_routers() == (other, ROUTER)  # sorted by id, with every field
    idle = replace(ROUTER, queues=(), shares=())
    await registry.put_router(idle)
    await registry.put(DECODE)
    await registry.remove_router(other.id)
    await registry.remove_router("never-there")
    assert await registry.list_routers() == (idle,)
    assert await registry.list() == (DECODE,), "workers and routers are apart"


async def check_plans(registry: Registry) -> None:
    assert (await registry.snapshot()).plans == ()
    await registry.put_plans(PLANS)
    snapshot = await registry.snapshot()
    assert (snapshot.workers, snapshot.plans) == ((), PLANS)
    assert snapshot.coming == {Pool.DECODE}
    await registry.put(PREFILL)
    await registry.put(DECODE)
    await registry.put_plans(PLANS[:1])
    snapshot = await registry.snapshot()
    assert (snapshot.workers, snapshot.plans) == ((DECODE, PREFILL), PLANS[:1])
    assert snapshot.coming == frozenset()
