"""``baton drain``: has one worker leave, and waits until it has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.cli.status import open_registry, read_workers, wait_for_workers
from cluster.local.run_dir import ClusterState
from core.errors import ConfigError
from core.types import WorkerRecord


def drain(state: ClusterState, worker_id: str, progress: Callable[[str], None]) -> None:
    """Return when the worker has left: its streams have ended or gone on at others.

    Raises:
        ConfigError: there is no such worker.
        UnavailableError: it has not left within ``cluster.start_timeout_s``.
    """
    known = sorted(worker.id for worker in read_workers(state))
    if worker_id not in known:
        raise ConfigError(
            f"no worker {worker_id!r} in the cluster {state.name!r}: there are {', '.join(known)}"
        )
    asyncio.run(_ask(state, worker_id))

    def left(workers: Sequence[WorkerRecord]) -> str | None:
        for worker in workers:
            if worker.id == worker_id:
                return f"{worker_id} is {worker.state}, {worker.load.running} requests run"
        return None

    wait_for_workers(state, left, progress)


async def _ask(state: ClusterState, worker_id: str) -> None:
    async with open_registry(state) as registry:
        await registry.ask_to_drain(worker_id)
