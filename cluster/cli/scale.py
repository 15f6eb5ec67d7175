"""``baton scale``: asks the autoscaler for numbers of workers, and waits until they are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from cluster.cli.status import read_view, wait_for_workers
from cluster.local.run_dir import ClusterState
from core.errors import ConfigError
from core.types import Pool, WorkerRecord, WorkerState


def scale(
    state: ClusterState, targets: Mapping[Pool, int], progress: Callable[[str], None]
) -> None:
    """Ask the autoscaler for the numbers of workers in ``targets``.

    Return when each pool in ``targets`` has exactly the requested number of ready workers.

    Raises:
        ConfigError: a number is out of its pool's bounds, the cluster is not ready, or a policy
            decides.
        UnavailableError: a pool does not reach its number within ``cluster.start_timeout_s``, or
            the registry does not answer.
    """
    if state.phase != "ready":
        raise ConfigError(f"the cluster {state.name!r} is {state.phase}; wait until it is ready")
    for pool, replicas in targets.items():
        limit = state.max_replicas[pool]
        if not 1 <= replicas <= limit:
            raise ConfigError(
                f"{pool}={replicas} is not between 1 and {limit} ({pool}.max_replicas)"
            )
    view = read_view(state)
    if view is not None and view.policy and not view.advisory:
        raise ConfigError(
            f"policy {view.policy!r} decides how many workers there are; change it with baton "
            "policy apply, or remove it with baton policy remove"
        )
    asyncio.run(_send_order(state, targets))

    def remaining(workers: Sequence[WorkerRecord]) -> str | None:
        ready = {
            pool: sum(w.pool is pool and w.state is WorkerState.READY for w in workers)
            for pool in targets
        }
        if ready == dict(targets):
            return None
        return ", ".join(f"{pool} {ready[pool]} of {targets[pool]} ready" for pool in targets)

    wait_for_workers(state, remaining, progress)


async def _send_order(state: ClusterState, targets: Mapping[Pool, int]) -> None:
    assert state.store is not None, "a ready cluster has a store"
    orders = state.store.orders()
    try:
        for pool, replicas in targets.items():
            await orders.ask_scale(pool, replicas)
    finally:
        await orders.close()
