"""The prefill worker as Ray Serve runs it: one object per replica."""

from __future__ import annotations

from dataclasses import replace

from cluster.ray.replica import local_slot, on_this_node, prepare_process
from prefill_worker.servicer import add_prefill_service
from worker.replica import WorkerReplica, WorkerSettings, start_worker


class PrefillWorker:
    """Serve awaits the constructor, calls ``check_health`` and drains with ``__del__``."""

    async def __init__(self, settings: WorkerSettings) -> None:  # type: ignore[misc]
        settings = replace(settings, config=on_this_node(settings.config))
        prepare_process(settings.config.cluster.host)
        self._grace_s = settings.config.prefill.shutdown_grace_s
        self._worker: WorkerReplica | None = None
        self._worker = await start_worker(settings, add_prefill_service, slot=local_slot())

    async def check_health(self) -> None:
        """Raises WorkerLostError if the worker can serve no more."""
        assert self._worker is not None, "Serve checks no replica before it is constructed"
        await self._worker.check_health()

    async def __del__(self) -> None:
        if self._worker is not None:
            await self._worker.stop(self._grace_s)
