"""What ``baton status`` shows: the workers whose leases hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster.registry import RedisRegistry
from cluster.run_dir import ClusterState
from cluster.types import WorkerRecord

_COLUMNS = (
    "id",
    "pool",
    "state",
    "address",
    "queue_depth",
    "running",
    "kv_blocks_free",
    "kv_blocks_total",
    "metrics",
)


def read_workers(state: ClusterState) -> tuple[WorkerRecord, ...]:
    """Raises UnavailableError if the registry does not answer."""

    async def read() -> tuple[WorkerRecord, ...]:
        async with open_registry(state) as registry:
            return await registry.list()

    return asyncio.run(read())


@asynccontextmanager
async def open_registry(state: ClusterState) -> AsyncIterator[RedisRegistry]:
    """The registry of a cluster that runs, for the block."""
    registry = RedisRegistry(
        state.redis_url,
        cluster=state.name,
        lease_s=state.lease_s,
        socket_timeout_s=state.socket_timeout_s,
    )
    try:
        yield registry
    finally:
        await registry.close()


def as_json(state: ClusterState, workers: Sequence[WorkerRecord]) -> str:
    """One object: the cluster's own fields, and ``workers``, a list of flat objects."""
    return json.dumps(
        {
            "name": state.name,
            "phase": state.phase,
            "address": state.address,
            "model": state.model,
            "pid": state.pid,
            "workers": [_row(worker) for worker in workers],
        },
        indent=2,
    )


def as_table(state: ClusterState, workers: Sequence[WorkerRecord]) -> str:
    """A line about the cluster, then one for each worker."""
    head = f"{state.name}: {state.phase}, {state.model or 'no model yet'}, gRPC at {state.address}"
    if not workers:
        return f"{head}\nno workers"
    rows = [[str(_row(worker)[column]) for column in _COLUMNS] for worker in workers]
    table = [list(_COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table
    ]
    return "\n".join([head, *(line.rstrip() for line in lines)])


def _row(worker: WorkerRecord) -> dict[str, str | int]:
    load = worker.load
    return {
        "id": worker.id,
        "pool": worker.pool.value,
        "state": worker.state.value,
        "address": worker.address,
        "queue_depth": load.queue_depth,
        "running": load.running,
        "queued_tokens": load.queued_tokens,
        "kv_blocks_free": load.kv_blocks_free,
        "kv_blocks_total": load.kv_blocks_total,
        "metrics": worker.metrics,
    }
