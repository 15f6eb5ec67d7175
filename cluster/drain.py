"""``baton drain``: has one worker leave, and waits until it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cluster.errors import ConfigError, UnavailableError
from cluster.run_dir import ClusterState
from cluster.status import open_registry, read_workers

_POLL_S = 0.2


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
    deadline_s = time.monotonic() + state.start_timeout_s
    while True:
        here = [worker for worker in read_workers(state) if worker.id == worker_id]
        if not here:
            return
        line = f"{worker_id} is {here[0].state}, {here[0].load.running} requests run"
        progress(line)
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"after {state.start_timeout_s:.0f} s: {line}")
        time.sleep(_POLL_S)


async def _ask(state: ClusterState, worker_id: str) -> None:
    async with open_registry(state) as registry:
        await registry.ask_to_drain(worker_id)
