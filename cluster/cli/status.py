"""``baton status``: reads the workers from the registry, and formats them.

``baton scale`` and ``baton drain`` use ``wait_for_workers`` to wait until they take effect.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from cluster.autoscale.view import AutoscaleView, decode_view
from cluster.local.readiness import count_ready
from cluster.local.run_dir import ClusterState
from core.errors import UnavailableError
from core.state.registry import RedisRegistry
from core.types import Pool, WorkerRecord

_POLL_S = 0.2  # by default, workers report their load every 0.5 s
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
    """Return the workers in the registry: those whose lease has not expired.

    Raises:
        UnavailableError: the registry does not answer, or the cluster has no registry yet.
    """

    async def read() -> tuple[WorkerRecord, ...]:
        async with open_registry(state) as registry:
            return await registry.list()

    return asyncio.run(read())


def read_view(state: ClusterState) -> AutoscaleView | None:
    """Return the autoscaler's latest view; None if it has not answered within a lease.

    Raises:
        UnavailableError: the store does not answer, or the cluster has no store yet.
    """
    if state.store is None:
        raise UnavailableError(f"the cluster {state.name!r} has no store yet")
    store = state.store.autoscale()

    async def read() -> AutoscaleView | None:
        try:
            return decode_view(await store.read_view())
        finally:
            await store.close()

    return asyncio.run(read())


def wait_for_workers(
    state: ClusterState,
    remaining: Callable[[Sequence[WorkerRecord]], str | None],
    progress: Callable[[str], None],
) -> None:
    """Poll the workers until ``remaining`` returns None.

    Args:
        remaining: returns what is still missing, as text for the user, or None if nothing is.
        progress: called with each text that ``remaining`` returns.

    Raises:
        UnavailableError: something is missing after ``cluster.start_timeout_s``, or the
            registry does not answer.
    """
    deadline_s = time.monotonic() + state.start_timeout_s
    while (line := remaining(read_workers(state))) is not None:
        progress(line)
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"after {state.start_timeout_s:.0f} s: {line}")
        time.sleep(_POLL_S)


@asynccontextmanager
async def open_registry(state: ClusterState) -> AsyncIterator[RedisRegistry]:
    """Open the cluster's registry, and close it at the end of the block.

    Raises:
        UnavailableError: the cluster has no registry yet.
    """
    if state.store is None:
        raise UnavailableError(f"the cluster {state.name!r} has no registry yet")
    registry = state.store.registry()
    try:
        yield registry
    finally:
        await registry.close()


def as_json(
    state: ClusterState, workers: Sequence[WorkerRecord], view: AutoscaleView | None
) -> str:
    """Return one JSON object: fields of the cluster, and ``workers`` as a list of flat objects."""
    return json.dumps(
        {
            "name": state.name,
            "phase": _phase(state, workers, view)[0],
            "address": state.address,
            "model": state.model,
            "pid": state.pid,
            "policy": view.policy if view is not None else "",
            "targets": _targets(view),
            "workers": [_row(worker) for worker in workers],
        },
        indent=2,
    )


def as_table(
    state: ClusterState, workers: Sequence[WorkerRecord], view: AutoscaleView | None
) -> str:
    """Return one line about the cluster, a table with one row for each worker, and problems."""
    phase, reason = _phase(state, workers, view)
    if reason:
        phase = f"{phase} ({reason})"
    head = f"{state.name}: {phase}, {state.model or 'no model yet'}, gRPC at {state.address}"
    problems = [
        f"{each.id} has not started: {each.problem}"
        for each in (view.workers if view is not None else ())
        if each.problem
    ]
    if not workers:
        return "\n".join([head, "no workers", *problems])
    rows = [
        [str(each[column]) for column in _COLUMNS]
        for each in ({**_row(worker), "state": _state(worker)} for worker in workers)
    ]
    table = [list(_COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table
    ]
    return "\n".join([head, *(line.rstrip() for line in lines), *problems])


def _phase(
    state: ClusterState, workers: Sequence[WorkerRecord], view: AutoscaleView | None
) -> tuple[str, str]:
    """Return the cluster's phase, and why: a pool has no ready worker.

    The phase is "degraded", unless the policy has no worker for that pool at the moment.
    """
    ready = count_ready(workers)
    empty = [pool for pool in Pool if not ready[pool]]
    if state.phase != "ready" or not empty:
        return state.phase, ""
    targets = _targets(view)
    missing = [pool for pool in empty if targets.get(pool) != 0]
    if not missing:
        return "ready", ", ".join(f"{pool} is scaled to zero" for pool in empty)
    return "degraded", ", ".join(f"no ready {pool} worker" for pool in missing)


def _targets(view: AutoscaleView | None) -> dict[str, int]:
    """Return the number of workers that each pool should have; empty if it is unknown."""
    return {} if view is None else {each.pool.value: each.target for each in view.pools}


def _state(worker: WorkerRecord) -> str:
    """Return the worker's state for people: a drain may end in the other pool."""
    if worker.changes_to is None:
        return worker.state.value
    return f"{worker.state}, changes to {worker.changes_to}"


def _row(worker: WorkerRecord) -> dict[str, str | int]:
    load = worker.load
    return {
        "id": worker.id,
        "pool": worker.pool.value,
        "state": worker.state.value,
        "changes_to": worker.changes_to.value if worker.changes_to is not None else "",
        "address": worker.address,
        "queue_depth": load.queue_depth,
        "running": load.running,
        "queued_tokens": load.queued_tokens,
        "kv_blocks_free": load.kv_blocks_free,
        "kv_blocks_total": load.kv_blocks_total,
        "metrics": worker.metrics,
    }
