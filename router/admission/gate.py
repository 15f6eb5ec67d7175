"""Lets requests that are asyncio tasks wait for their turns. ``turns`` decides about them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from core.errors import InvalidArgumentError
from router.admission.policy import AdmissionLimits, AdmissionRequest
from router.admission.turns import Acquire, P, Turn, Turns
from router.request import shown


class AdmissionGate:
    """Bounds the number of running requests. Further requests wait, ordered by class and deadline.

    Args:
        clock: the event loop's time, seconds. Deadlines are times of this clock.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self.turns = Turns(limits, clock)

    @property
    def running(self) -> int:
        return self.turns.running

    @property
    def waiting(self) -> int:
        return self.turns.waiting

    @property
    def max_requests(self) -> int:
        """The most requests that may run and wait together."""
        queues = sum(each.max_queue for each in self._limits.classes.values())
        return self._limits.max_concurrent + queues

    def class_of(self, name: str) -> str:
        """The service class that a request names; the first class if it names none.

        Raises:
            InvalidArgumentError: no class has this name.
        """
        if name in self._limits.classes:
            return name
        if name:
            known = ", ".join(self._limits.classes)
            raise InvalidArgumentError(
                f"service_class is {shown(name)}; this cluster knows {known}",
                reason="UNKNOWN_SERVICE_CLASS",
            )
        return next(iter(self._limits.classes))

    def check(self, request: AdmissionRequest) -> None:
        """Raise early if ``admit`` would refuse the request now. See ``Turns.check``."""
        self.turns.check(request)

    @contextlib.asynccontextmanager
    async def admit(
        self, request: AdmissionRequest, acquire: Acquire[P], *, needs_room: bool = True
    ) -> AsyncIterator[P]:
        """Wait for the request's turn, then run the block with the permit from ``acquire``.

        The permit is closed when the block ends.

        Args:
            needs_room: see ``Turns.enter``.

        Raises:
            CapacityError: the queue is full, the request has waited too long, or it would wait too
                long or miss its deadline.
            DeadlineError: the deadline passed before the request ran.
            UnavailableError: a pool without a worker got none in time.
            BatonError: from ``acquire``.
        """
        decided = asyncio.Event()
        turn = self.turns.enter(
            request, acquire, lambda _turn: decided.set(), needs_room=needs_room
        )
        if turn.permit is None:
            await self._wait(turn, decided)
        assert turn.permit is not None
        try:
            yield turn.permit
        finally:
            self.turns.end(turn)

    def wake(self) -> None:
        """Start waiting requests in turn while there is room. Call when room may have grown."""
        self.turns.wake()

    async def _wait(self, turn: Turn[P], decided: asyncio.Event) -> None:
        """Wait for a permit. After an error, the request is not queued and holds no permit."""
        try:
            async with asyncio.timeout_at(self.turns.give_up_s(turn)) as timeout:

                def reschedule() -> None:
                    if not timeout.expired():
                        timeout.reschedule(self.turns.give_up_s(turn))

                turn.on_limit = reschedule
                await decided.wait()
        except TimeoutError:
            raise self.turns.give_up(turn) from None
        except BaseException:  # the task was cancelled, perhaps after it had got its permit
            self.turns.leave(turn)
            raise
        if turn.error is not None:
            raise turn.error
