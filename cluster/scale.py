"""``baton scale``: asks the launcher for other numbers of workers, and waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from cluster.errors import ConfigError, UnavailableError
from cluster.orders import Orders
from cluster.run_dir import ClusterState
from cluster.status import read_workers
from cluster.types import Pool, WorkerState

_POLL_S = 0.2


def scale(
    state: ClusterState, targets: Mapping[Pool, int], progress: Callable[[str], None]
) -> None:
    """Return when each pool in ``targets`` has that many ready workers.

    Raises:
        ConfigError: a number is out of its pool's bounds, or the cluster is not ready.
        UnavailableError: not reached within ``cluster.start_timeout_s``.
    """
    if state.phase != "ready":
        raise ConfigError(f"the cluster {state.name!r} is {state.phase}; wait until it is ready")
    for pool, replicas in targets.items():
        limit = state.max_replicas[pool]
        if not 1 <= replicas <= limit:
            raise ConfigError(
                f"{pool}={replicas} is not within 1 and {limit} ({pool}.max_replicas)"
            )
    asyncio.run(_ask(state, targets))
    deadline_s = time.monotonic() + state.start_timeout_s
    while True:
        ready = {pool: _count_ready(state, pool) for pool in targets}
        if ready == dict(targets):
            return
        census = ", ".join(f"{pool} {ready[pool]} of {targets[pool]} ready" for pool in targets)
        progress(census)
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"after {state.start_timeout_s:.0f} s: {census}")
        time.sleep(_POLL_S)


async def _ask(state: ClusterState, targets: Mapping[Pool, int]) -> None:
    orders = Orders(state.redis_url, cluster=state.name, socket_timeout_s=state.socket_timeout_s)
    try:
        for pool, replicas in targets.items():
            await orders.ask_scale(pool, replicas)
    finally:
        await orders.close()


def _count_ready(state: ClusterState, pool: Pool) -> int:
    workers = read_workers(state)
    return sum(w.pool is pool and w.state is WorkerState.READY for w in workers)
