"""``baton drain``: drains one worker, and waits until it has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.cli.status import open_registry, read_workers, wait_for_workers
from cluster.local.run_dir import ClusterState
from core.errors import ConfigError
from core.types import WorkerRecord, WorkerState


def drain(state: ClusterState, worker_id: str, progress: Callable[[str], None]) -> None:
    """Drain a worker, and return when it has left the registry.

    By then the worker's streams have ended or continue on other workers.

    Raises:
        ConfigError: there is no such worker.
        UnavailableError: the worker has not left within ``cluster.start_timeout_s``, the registry
            does not answer, or the cluster has no registry yet.
    """
    known = sorted(worker.id for worker in read_workers(state))
    if worker_id not in known:
        raise ConfigError(
            f"no worker {worker_id!r} in the cluster {state.name!r}; "
            f"its workers: {', '.join(known)}"
        )
    asyncio.run(_request_drain(state, worker_id))

    def remaining(workers: Sequence[WorkerRecord]) -> str | None:
        worker = next((each for each in workers if each.id == worker_id), None)
        if worker is None:
            return None
        # The request is lost if the store's answer to the worker is. A worker that has it drains.
        if worker.state is not WorkerState.DRAINING:
            asyncio.run(_request_drain(state, worker_id))
        return f"{worker_id} is {worker.state}, {worker.load.running} requests still run"

    wait_for_workers(state, remaining, progress)


async def _request_drain(state: ClusterState, worker_id: str) -> None:
    async with open_registry(state) as registry:
        await registry.ask_to_drain(worker_id)
