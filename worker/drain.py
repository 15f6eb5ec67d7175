"""Ends a worker's requests: refuses new ones, waits for the others, and sends late ones away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Final

from core.types import WorkerLoad
from worker.intake import Intake

_KV_POLL_S: Final = 0.05  # short compared with a drain
CANCEL_GRACE_S: Final = 0.2  # time in which cancelled calls send their status


class Drain:
    """Belongs to one event loop.

    Args:
        intakes: all intakes of the worker.
        load: returns the engine's current load.
    """

    def __init__(self, intakes: Collection[Intake], load: Callable[[], WorkerLoad]) -> None:
        self._intakes = intakes
        self._load = load

    def close(self) -> None:
        """Refuse new requests."""
        for intake in self._intakes:
            intake.close()

    async def run_out(self) -> None:
        """Refuse new requests. Return when the others have ended and all KV was fetched."""
        self.close()
        await self._ended()
        while True:
            # Sleep first: the engine updates its number of free blocks just after the last output.
            await asyncio.sleep(_KV_POLL_S)
            load = self._load()
            if load.kv_blocks_free >= load.kv_blocks_total:
                return  # no decode worker has KV to fetch from here

    async def send_away(self) -> None:
        """End all requests. Their routers continue them on other workers."""
        self.close()
        for intake in self._intakes:
            intake.send_away()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._ended()

    async def _ended(self) -> None:
        for intake in self._intakes:
            await intake.drained()
