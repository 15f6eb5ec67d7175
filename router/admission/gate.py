"""Applies the admission policy to live requests: each one runs, waits or is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

from core.errors import BatonError, CapacityError, DeadlineError, InvalidArgumentError
from router.admission.expectation import smoothed
from router.admission.policy import (
    AdmissionLimits,
    AdmissionRequest,
    Queues,
    Refusal,
    decide_admission,
    decide_dispatch,
)
from router.request import shown

# How many requests behind one that does not fit are tried. Each try asks the placement.
_LOOK_AHEAD_REQUESTS = 16
_MAX_PASSED = 32  # how many of them may pass it, before capacity is kept for it


class Permit(Protocol):
    """The capacity that a running request holds on the workers."""

    def close(self) -> None:
        """Return what the request still holds. Idempotent."""


P = TypeVar("P", bound=Permit)
# Takes capacity on the workers. Returns None if there is no capacity now. Raises BatonError if
# waiting would not help.
Acquire = Callable[[], P | None]


class _Waiter(Generic[P]):
    def __init__(self, acquire: Acquire[P], *, needs_room: bool) -> None:
        self.acquire = acquire
        self.needs_room = needs_room
        self.passed = 0  # how many requests have started before this one, which was next
        self.granted: asyncio.Future[P] = asyncio.get_running_loop().create_future()


class AdmissionGate:
    """Bounds the number of running requests. Further requests wait, ordered by class and deadline.

    Args:
        clock: the event loop's time, seconds. Deadlines are times of this clock.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._mean_run_s = 0.0  # smoothed over the latest requests; 0 if unknown
        self._queues: Queues[_Waiter[Any]] = Queues(limits.classes)
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._queues)

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
        """Raise early if ``admit`` would refuse the request now.

        If this raises nothing, ``admit`` may still refuse the request.

        Raises:
            CapacityError: the queue is full, or the request would wait too long.
            DeadlineError: the deadline has passed.
        """
        self._check_deadline(request)
        if self._must_wait(needs_room=True):
            self._check_wait(request)

    @contextlib.asynccontextmanager
    async def admit(
        self, request: AdmissionRequest, acquire: Acquire[P], *, needs_room: bool = True
    ) -> AsyncIterator[P]:
        """Wait for the request's turn, then run the block with the permit from ``acquire``.

        The permit is closed when the block ends.

        Args:
            needs_room: whether ``acquire`` takes capacity on the workers. A request that takes none
                passes those that wait for capacity.

        Raises:
            CapacityError: the queue is full, the request has waited too long, or it would wait too
                long or miss its deadline.
            DeadlineError: the deadline passed before the request ran.
            BatonError: from ``acquire``.
        """
        self._check_deadline(request)
        permit = None if self._must_wait(needs_room=needs_room) else acquire()
        if permit is None:
            permit = await self._wait(request, _Waiter(acquire, needs_room=needs_room))
        else:
            self.running += 1
        started_s = self._clock()
        try:
            yield permit
        finally:
            permit.close()
            self._mean_run_s = smoothed(self._mean_run_s, self._clock() - started_s)
            self._end_run()

    def wake(self) -> None:
        """Start waiting requests in turn while there is room. Call when room may have grown."""
        while self.running < self._limits.max_concurrent and (head := self._queues.peek()):
            request, waiter = head
            try:
                _raise(decide_dispatch(request, self._clock()))
                permit = waiter.acquire()
            except BatonError as err:
                self._queues.remove(waiter)
                waiter.granted.set_exception(err)
                continue
            if permit is None and not self._backfill(waiter):
                return
            if permit is not None:
                self._grant(waiter, permit)

    def _backfill(self, head: _Waiter[Any]) -> bool:
        """Start a request that fits, although the next one in turn (``head``) does not fit yet.

        Otherwise, one long request would leave workers idle. Each head is passed by at most
        ``_MAX_PASSED`` requests that need room, so it does not starve.
        """
        is_held = head.passed >= _MAX_PASSED
        for request, waiter in self._queues.after_next(_LOOK_AHEAD_REQUESTS):
            if is_held and waiter.needs_room:
                continue
            if decide_dispatch(request, self._clock()) is not None:
                continue  # it is refused at its turn
            try:
                permit = waiter.acquire()
            except BatonError:
                continue  # likewise
            if permit is not None:
                head.passed += waiter.needs_room
                self._grant(waiter, permit)
                return True
        return False

    def _grant(self, waiter: _Waiter[P], permit: P) -> None:
        self._queues.start(waiter)
        self.running += 1
        waiter.granted.set_result(permit)

    async def _wait(self, request: AdmissionRequest, waiter: _Waiter[P]) -> P:
        """Wait for a permit. After an error, the request is not queued and holds no permit."""
        self._check_wait(request)
        self._queues.push(request, waiter)
        self.wake()  # the request may fit, although those before it do not
        timeout_s = self._limits.classes[request.service_class].queue_timeout_s
        try:
            async with asyncio.timeout_at(min(request.deadline_s, self._clock() + timeout_s)):
                # Shielded: a cancel of this task must not cancel ``granted``, which is read below.
                return await asyncio.shield(waiter.granted)
        except BaseException as err:
            self._queues.remove(waiter)
            if not waiter.granted.done():
                waiter.granted.cancel()
            elif waiter.granted.exception() is None:  # granted, but this task has not run since
                waiter.granted.result().close()
                self.running -= 1
            self.wake()  # the requests after this one may fit
            if isinstance(err, TimeoutError):
                raise self._timeout_error(request, timeout_s) from None
            raise

    def _must_wait(self, *, needs_room: bool) -> bool:
        """Whether ``max_concurrent`` requests run, or others wait already for the same room."""
        others_wait = needs_room and bool(self._queues)
        return others_wait or self.running >= self._limits.max_concurrent

    def _check_deadline(self, request: AdmissionRequest) -> None:
        if self._clock() >= request.deadline_s:
            raise DeadlineError("the deadline passed before the request began to run")

    def _check_wait(self, request: AdmissionRequest) -> None:
        # Little's law: running requests = requests that end per second * how long each runs.
        ends_per_s = self.running / self._mean_run_s if self._mean_run_s else 0.0
        _raise(
            decide_admission(
                self._limits,
                request,
                waiting=self._queues.waiting(request.service_class),
                before=self._queues.before(request),
                ends_per_s=ends_per_s,
                now_s=self._clock(),
            )
        )

    def _timeout_error(
        self, request: AdmissionRequest, timeout_s: float
    ) -> CapacityError | DeadlineError:
        if self._clock() >= request.deadline_s:
            return DeadlineError("the deadline passed while the request waited to run")
        return CapacityError(
            f"no room became free within {timeout_s:g} s",
            reason="QUEUE_TIMEOUT",
            retry_after_s=timeout_s,
        )

    def _end_run(self) -> None:
        self.running -= 1
        self.wake()


def _raise(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise CapacityError(
            f"the cluster is full: {refusal.message}",
            reason=refusal.reason,
            retry_after_s=refusal.retry_after_s,
        )
