"""Knows the workers of the other pool, from the registry."""

from __future__ import annotations

import asyncio
from typing import Final

from core.errors import UnavailableError
from core.state.registry import Registry
from core.types import Pool, WorkerState

_LOOK_UP_S: Final = 1.0  # longer than a healthy registry takes; the request waits meanwhile
_MAX_REMEMBERED: Final = 1024  # more workers than a pool may have


class Peers:
    """The workers of the other pool. Belongs to one event loop.

    KV addresses come from here, and never from a request: a worker connects only to members of its
    cluster.

    Args:
        incarnation: of this worker. While it changes its pool, the registry may list it in the
            other one.

    Attributes:
        pool: this worker's pool. The owner changes it when the worker changes its pool.
    """

    def __init__(self, registry: Registry, pool: Pool, incarnation: str = "") -> None:
        self.pool = pool
        self._registry = registry
        self._incarnation = incarnation
        # By incarnation; those that were seen last are at the end. Workers that the registry has
        # lost are remembered: a restarted registry knows no worker before it renews its lease.
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._reading: asyncio.Task[dict[str, tuple[str, ...]]] | None = None

    async def refresh(self) -> dict[str, tuple[str, ...]]:
        """Read the registry. Return the KV control addresses of each worker, by incarnation.

        Workers that drain are left out: no new pair is made with them.

        Raises:
            UnavailableError: the registry does not answer.
        """
        pool = self.pool
        others = [
            each
            for each in await self._registry.list()
            if each.pool is not pool and each.incarnation != self._incarnation
        ]
        for each in others:
            self._addresses.pop(each.incarnation, None)  # the latest go to the end
            self._addresses[each.incarnation] = each.kv_addresses
        for incarnation in [*self._addresses][:-_MAX_REMEMBERED]:
            del self._addresses[incarnation]
        return {
            each.incarnation: each.kv_addresses
            for each in others
            if each.state is not WorkerState.DRAINING
        }

    async def kv_addresses(self, incarnation: str) -> tuple[str, ...]:
        """Return the KV control addresses of one worker, by rank.

        Raises:
            UnavailableError: no such worker was registered, or the registry does not answer.
        """
        if incarnation not in self._addresses:  # it may have started since the last read
            # One read serves all requests that wait: the registry's client has few connections.
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self.refresh(), name="look up a worker")
            try:
                async with asyncio.timeout(_LOOK_UP_S):
                    await asyncio.shield(self._reading)
            except TimeoutError:
                raise UnavailableError("the registry does not answer") from None
        try:
            return self._addresses[incarnation]
        except KeyError:
            raise UnavailableError(
                "the prefill worker that is named as KV source is not registered"
            ) from None
