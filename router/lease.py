"""The router's lease in the registry: what this router measures, for the autoscaler."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Protocol

from core.types import RouterRecord
from router.admission.turns import Turns
from router.dispatch.dispatcher import Dispatcher
from router.placement.ledger import PlacementLedger
from router.signals import Signals

logger = logging.getLogger(__name__)


class RouterLeases(Protocol):
    """The part of the registry to which routers write."""

    async def put_router(self, record: RouterRecord) -> None: ...

    async def remove_router(self, router_id: str) -> None: ...


def new_router_id() -> str:
    """Return an id for this process. A router that starts again is another one."""
    return f"router-{uuid.uuid4().hex[:12]}"


class RouterLease:
    """Renews the record of one router.

    If the store does not answer, the record expires. Requests are not affected.

    Args:
        address: of this router, "host:port".
        renew_s: time between two renewals.
        timeout_s: a write that takes longer counts as failed.
    """

    def __init__(
        self,
        registry: RouterLeases,
        *,
        router_id: str,
        address: str,
        turns: Turns,
        dispatcher: Dispatcher,
        ledger: PlacementLedger,
        signals: Signals,
        renew_s: float,
        timeout_s: float,
    ) -> None:
        self._registry = registry
        self._id = router_id
        self._address = address
        self._turns = turns
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._signals = signals
        self._renew_s = renew_s
        self._timeout_s = timeout_s
        self._renewals = 0
        self._failed = False

    async def run(self) -> None:
        """Renew the lease again and again, until cancelled."""
        while True:
            await self.renew()
            await asyncio.sleep(self._renew_s)

    async def renew(self) -> None:
        """Write the record once. A failure of the store is logged."""
        self._renewals += 1
        record = self.record()  # outside of ``try``: a defect here is not the store's
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._registry.put_router(record)
        except Exception as err:  # noqa: BLE001 - routing goes on, whichever error the store raises
            if not self._failed:
                logger.warning("the registry gets no numbers from this router: %r", err)
            self._failed = True
            return
        if self._failed:
            logger.warning("the registry gets this router's numbers again")
        self._failed = False

    async def remove(self) -> None:
        """End the lease. If the store does not answer, the lease expires."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._registry.remove_router(self._id)
        except Exception as err:  # noqa: BLE001 - as above
            logger.warning("this router's lease stays until it expires: %r", err)

    def record(self) -> RouterRecord:
        """What this router measures now. A request either waits or is on its workers."""
        rates = self._signals.rates()
        ttft_s, itl_s = self._signals.latencies()
        return RouterRecord(
            id=self._id,
            address=self._address,
            renewals=self._renewals,
            queues=(*self._turns.queue_loads(), *self._dispatcher.stranded_loads()),
            shares=self._ledger.shares(),
            window_s=rates.window_s,
            arrived_requests=rates.requests,
            arrived_prompt_tokens=rates.prompt_tokens,
            output_tokens=rates.output_tokens,
            ttft_s=ttft_s,
            itl_s=itl_s,
        )
