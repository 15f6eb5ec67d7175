"""Admits requests to one worker, waits until all have ended, and can end them early.

A worker has an intake for each pool that it may belong to. Only the intake of its current pool is
open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import WORKER_DRAINING, AlreadyExistsError, CapacityError, UnavailableError
from core.rpc.in_flight import InFlight

_RETRY_AFTER_S = 0.1  # about the time until a running request ends


class Intake:
    """Admits requests to one worker and tracks them. Belongs to one event loop.

    Args:
        limit: the largest number of requests in flight at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls = InFlight(_draining_error)
        self._open = True

    @contextmanager
    def admit(self, transfer_id: str) -> Iterator[None]:
        """Admit a request and track it during the block. The current task must serve the request.

        Raises:
            UnavailableError: the intake is closed (raised at the start of the block), or
                ``send_away`` ended the request (raised at the end of the block).
            AlreadyExistsError: ``transfer_id`` is already in flight.
            CapacityError: ``limit`` requests are already in flight.
        """
        if not self._open:
            raise _draining_error()
        if transfer_id in self._calls:
            raise AlreadyExistsError(
                f"the attempt {transfer_id} is already in flight on this worker"
            )
        if len(self._calls) >= self._limit:
            raise CapacityError(
                f"this worker already has {self._limit} requests in flight, its limit",
                retry_after_s=_RETRY_AFTER_S,
            )
        with self._calls.track(transfer_id):
            yield

    def close(self) -> None:
        """Refuse all further requests, until ``open``."""
        self._open = False

    def open(self) -> None:
        """Admit requests again. A new intake is open."""
        self._open = True

    def send_away(self) -> None:
        """End all requests in flight. Their routers continue them on other workers."""
        self._calls.send_away()

    async def drained(self) -> None:
        """Return when no request is in flight."""
        await self._calls.drained()


def _draining_error() -> UnavailableError:
    return UnavailableError("this worker is leaving, or has left, its pool", reason=WORKER_DRAINING)
