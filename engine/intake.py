"""Counts what one worker has in flight, and refuses what is too much, double or too late."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import AlreadyExistsError, CapacityError, UnavailableError

WORKER_DRAINING = "WORKER_DRAINING"  # reason of a refusal: nothing was done, try another worker

_RETRY_AFTER_S = 0.1  # about as long as a request takes to make room


class Intake:
    """The requests of one worker. Belongs to one event loop.

    Args:
        limit: requests at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: set[str] = set()
        self._open = True
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(self, key: str) -> Iterator[None]:
        """Hold a place for the request ``key``.

        Raises:
            UnavailableError: the worker drains.
            AlreadyExistsError: ``key`` is in flight.
            CapacityError: all places are taken.
        """
        if not self._open:
            raise UnavailableError("this worker is shutting down", reason=WORKER_DRAINING)
        if key in self._keys:
            raise AlreadyExistsError(f"the attempt {key} is in flight on this worker")
        if len(self._keys) >= self._limit:
            raise CapacityError(
                f"this worker has {self._limit} requests in flight already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._keys.add(key)
        self._idle.clear()
        try:
            yield
        finally:
            self._keys.remove(key)
            if not self._keys:
                self._idle.set()

    def close(self) -> None:
        """Admit nothing more."""
        self._open = False

    async def drained(self) -> None:
        """Return when nothing is in flight."""
        await self._idle.wait()
