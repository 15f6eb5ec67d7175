"""What one worker has in flight: refuses what is too much, double or too late, and moves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import WORKER_DRAINING, AlreadyExistsError, CapacityError, UnavailableError
from core.rpc.in_flight import InFlight

_RETRY_AFTER_S = 0.1  # about as long as a request takes to make room


class Intake:
    """The requests of one worker. Belongs to one event loop.

    Args:
        limit: requests at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls = InFlight(_leaves)
        self._open = True

    @contextmanager
    def admit(self, key: str) -> Iterator[None]:
        """Hold a place for the request ``key``, which the current task serves.

        Raises:
            UnavailableError: the worker drains; at the end of the block if it was moved out.
            AlreadyExistsError: ``key`` is in flight.
            CapacityError: all places are taken.
        """
        if not self._open:
            raise _leaves()
        if key in self._calls:
            raise AlreadyExistsError(f"the attempt {key} is in flight on this worker")
        if len(self._calls) >= self._limit:
            raise CapacityError(
                f"this worker has {self._limit} requests in flight already",
                retry_after_s=_RETRY_AFTER_S,
            )
        with self._calls.track(key):
            yield

    def close(self) -> None:
        """Admit nothing more."""
        self._open = False

    def move_out(self) -> None:
        """End what is in flight; whoever asked for it goes on at another worker."""
        self._calls.send_away()

    async def drained(self) -> None:
        """Return when nothing is in flight."""
        await self._calls.drained()


def _leaves() -> UnavailableError:
    return UnavailableError("this worker is shutting down", reason=WORKER_DRAINING)
