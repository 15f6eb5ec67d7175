"""One worker's lease in the registry: its record, and the orders that arrive with each renewal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from core.errors import UnavailableError
from core.state.registry import Registry
from core.types import WorkerLoad, WorkerOrder, WorkerRecord

_log = logging.getLogger(__name__)


class Lease:
    """Belongs to one event loop. Borrows the registry.

    Args:
        record: as it is at first. No other object changes it later.
        load: returns the worker's current load.
        renew_s: time between two renewals.
        on_order: called with each order that the registry has for this worker. Must not wait.
    """

    def __init__(
        self,
        registry: Registry,
        record: WorkerRecord,
        *,
        load: Callable[[], WorkerLoad],
        renew_s: float,
        on_order: Callable[[WorkerOrder], None],
    ) -> None:
        self.record = record
        self._registry = registry
        self._load = load
        self._renew_s = renew_s
        self._on_order = on_order
        # Renewals go out one at a time. Otherwise an older record could overtake a newer one.
        self._turn = asyncio.Lock()

    def change(self, **fields: Any) -> None:
        """Change fields of the record. The next renewal writes them."""
        self.record = replace(self.record, **fields)

    async def publish(self, **fields: Any) -> bool:
        """Change fields of the record and renew the lease now.

        Returns False if the registry is not reachable. This is logged and does no harm: the next
        renewal that succeeds writes the fields.
        """
        self.change(**fields)
        try:
            await self._renew()
        except UnavailableError as error:
            _log.warning("%s could not update the registry: %s", self.record.id, error)
            return False
        return True

    async def keep(self) -> NoReturn:
        """Renew until cancelled. Log when the registry goes away and comes back."""
        unreachable = False
        while True:
            try:
                await self._renew()
                if unreachable:
                    _log.warning("%s reaches the registry again", self.record.id)
                unreachable = False
            except UnavailableError as error:
                if not unreachable:
                    _log.warning("%s cannot renew its lease and retries: %s", self.record.id, error)
                unreachable = True
            await asyncio.sleep(self._renew_s)

    async def _renew(self) -> None:
        async with self._turn:
            order = await self._registry.put(replace(self.record, load=self._load()))
        if order is not None:
            self._on_order(order)
