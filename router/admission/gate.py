"""The live shell around ``policy``: requests that run, and requests that wait to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

from core.errors import BatonError, CapacityError, DeadlineError, InvalidArgumentError
from router.admission.expectation import smoothed
from router.admission.policy import (
    AdmissionLimits,
    Ask,
    Queues,
    Refusal,
    decide_admission,
    decide_dispatch,
)
from router.request import shown


class Room(Protocol):
    """What a request was given on the workers."""

    def close(self) -> None:
        """Give back what is left of it. Idempotent."""


R = TypeVar("R", bound=Room)
# Takes room on the workers; None: there is none now. Raises BatonError if there can't be any.
Take = Callable[[], R | None]


class _Waiter(Generic[R]):
    def __init__(self, take: Take[R]) -> None:
        self.take = take
        self.granted: asyncio.Future[R] = asyncio.get_running_loop().create_future()


class Admission:
    """Bounds the requests that run, and lets others wait by class and deadline.

    Args:
        clock: the event loop's time, seconds; deadlines are on it.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._mean_hold_s = 0.0  # how long requests ran lately; 0: not known
        self._queues: Queues[_Waiter[Any]] = Queues(limits.classes)
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._queues)

    @property
    def most(self) -> int:
        """Requests that run and wait, at most."""
        queues = sum(each.max_queue for each in self._limits.classes.values())
        return self._limits.max_concurrent + queues

    def class_of(self, name: str) -> str:
        """The class that a request means by ``name``.

        Raises:
            InvalidArgumentError: there is none of that name.
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

    def check(self, ask: Ask) -> None:
        """Whether a request may come in. Cheap, and changes nothing.

        Raises:
            CapacityError: it would wait too long, or with too many.
            DeadlineError: its deadline has passed.
        """
        self._check_deadline(ask)
        if self._must_wait:
            self._check_wait(ask)

    @contextlib.asynccontextmanager
    async def slot(self, ask: Ask, take: Take[R]) -> AsyncIterator[R]:
        """Run for the block, on the room that ``take`` got; it is closed in the end.

        Raises:
            CapacityError: it would wait too long, or did.
            DeadlineError: the deadline passed while waiting.
            BatonError: of ``take``.
        """
        self._check_deadline(ask)
        room = None if self._must_wait else take()
        if room is None:
            room = await self._wait(ask, take)
        else:
            self.running += 1
        started_s = self._clock()
        try:
            yield room
        finally:
            room.close()
            self._mean_hold_s = smoothed(self._mean_hold_s, self._clock() - started_s)
            self._leave()

    def wake(self) -> None:
        """There may be room: let in whoever's turn it is."""
        while self.running < self._limits.max_concurrent and (head := self._queues.peek()):
            ask, waiter = head
            try:
                _raise(decide_dispatch(ask, self._clock()))
                room = waiter.take()
            except BatonError as err:
                self._queues.remove(waiter)
                waiter.granted.set_exception(err)
                continue
            if room is None:
                return
            self._queues.pop()
            self.running += 1
            waiter.granted.set_result(room)

    async def _wait(self, ask: Ask, take: Take[R]) -> R:
        """Returns with room that is ours; leaves the queue in every other case."""
        self._check_wait(ask)
        waiter = _Waiter(take)
        self._queues.push(ask, waiter)
        timeout_s = self._limits.classes[ask.service_class].queue_timeout_s
        try:
            async with asyncio.timeout_at(min(ask.deadline_s, self._clock() + timeout_s)):
                # Shielded, for a cancel must not hide from us that there is room by now.
                return await asyncio.shield(waiter.granted)
        except BaseException as err:
            self._queues.remove(waiter)
            if not waiter.granted.done():
                waiter.granted.cancel()
            elif waiter.granted.exception() is None:  # in the same turn: hand it on
                waiter.granted.result().close()
                self._leave()
            if isinstance(err, TimeoutError):
                raise self._waited_too_long(ask, timeout_s) from None
            raise

    @property
    def _must_wait(self) -> bool:
        """Whatever room there is."""
        return bool(self._queues) or self.running >= self._limits.max_concurrent

    def _check_deadline(self, ask: Ask) -> None:
        if self._clock() >= ask.deadline_s:
            raise DeadlineError("the deadline passed before the request began to run")

    def _check_wait(self, ask: Ask) -> None:
        waiting = self._queues.waiting(ask.service_class)
        # Little's law: requests that run = those that end per second * how long each runs.
        rate = self.running / self._mean_hold_s if self._mean_hold_s else 0.0
        before = self._queues.before(ask)
        _raise(decide_admission(self._limits, ask, waiting, before, rate, self._clock()))

    def _waited_too_long(self, ask: Ask, timeout_s: float) -> CapacityError | DeadlineError:
        if self._clock() >= ask.deadline_s:
            return DeadlineError("the deadline passed while the request waited to run")
        return CapacityError(
            f"no room became free within {timeout_s:g} s",
            reason="QUEUE_TIMEOUT",
            retry_after_s=timeout_s,
        )

    def _leave(self) -> None:
        self.running -= 1
        self.wake()


def _raise(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise CapacityError(
            f"the cluster is full: {refusal.message}",
            reason=refusal.reason,
            retry_after_s=refusal.retry_after_s,
        )
