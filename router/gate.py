"""The live shell around ``router.admission``: a semaphore with a bounded, ordered queue."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable

from cluster.errors import CapacityError, DeadlineError
from router.admission import (
    AdmissionLimits,
    AdmissionState,
    Verdict,
    decide,
    retry_after_s,
)

HOLD_SMOOTHING = 0.1  # weight of the newest request in the mean


class Admission:
    """Slots for requests; those who wait get them earliest deadline first.

    Args:
        clock: the event loop's time, seconds; deadlines are on it.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._running = 0
        self._mean_hold_s = 0.0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # heap
        self._order = itertools.count()  # equal deadlines: first come, first served

    @property
    def state(self) -> AdmissionState:
        return AdmissionState(self._running, len(self._waiting), self._mean_hold_s)

    @contextlib.asynccontextmanager
    async def slot(self, deadline_s: float) -> AsyncIterator[None]:
        """Hold a slot for the block.

        Raises:
            CapacityError: the queue is full, or the wait was longer than its bound.
            DeadlineError: the deadline passed while waiting.
        """
        now_s = self._clock()
        decision = decide(self._limits, self.state, deadline_s, now_s)
        if decision.verdict is Verdict.REJECTED:
            raise CapacityError(
                f"the router is full: {decision.reason}",
                reason="QUEUE_FULL",
                retry_after_s=decision.retry_after_s,
            )
        if decision.verdict is Verdict.ADMITTED:
            self._running += 1
        else:
            assert decision.wait_until_s is not None
            await self._wait(deadline_s, decision.wait_until_s)
        started_s = self._clock()
        try:
            yield
        finally:
            self._note_hold(self._clock() - started_s)
            self._leave()

    async def _wait(self, deadline_s: float, wait_until_s: float) -> None:
        """Returns with a slot that is ours; leaves the queue in every other case."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (deadline_s, next(self._order), granted)
        heapq.heappush(self._waiting, entry)
        try:
            async with asyncio.timeout(wait_until_s - self._clock()):
                await granted
        except BaseException as err:
            if granted.done() and not granted.cancelled():
                self._leave()  # granted in the same turn: hand the slot on
            elif entry in self._waiting:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            if isinstance(err, TimeoutError):
                raise self._waited_too_long(deadline_s) from None
            raise

    def _waited_too_long(self, deadline_s: float) -> CapacityError | DeadlineError:
        if self._clock() >= deadline_s:
            return DeadlineError("the deadline passed while the request waited for a slot")
        return CapacityError(
            f"no slot became free within {self._limits.queue_timeout_s:g} s",
            reason="QUEUE_TIMEOUT",
            retry_after_s=retry_after_s(self._limits, self.state),
        )

    def _leave(self) -> None:
        """Give one slot back: to the next who waits, or to all."""
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():  # else it was cancelled in this turn
                granted.set_result(None)
                return
        self._running -= 1

    def _note_hold(self, hold_s: float) -> None:
        if self._mean_hold_s == 0.0:
            self._mean_hold_s = hold_s
        self._mean_hold_s += HOLD_SMOOTHING * (hold_s - self._mean_hold_s)
