"""Applies the admission policy to live requests: each one runs, waits or is refused. No asyncio.

``gate`` wraps ``Turns`` for requests that are tasks. The simulator calls it in virtual time::

    enter ──▶ runs ─────────────────────────▶ end
      │         ▲
      │         │ wake: there is room
      ├──▶ waits ──▶ leave, give_up
      │         │
      │         │ wake: its turn comes, and waiting longer would not help
      └──▶ refused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from core.errors import BatonError, CapacityError, DeadlineError
from core.types import Need, Pool, QueueLoad
from router.admission.expectation import smoothed
from router.admission.policy import (
    AdmissionLimits,
    AdmissionRequest,
    Queues,
    Refusal,
    decide_admission,
    decide_dispatch,
)
from router.errors import no_worker_error
from router.room import NoRoom

# How many requests behind one that does not fit are tried. Each try asks the placement.
_LOOK_AHEAD_REQUESTS = 16
MAX_PASSED = 32  # how many of them may pass it, before capacity is kept for it


class Permit(Protocol):
    """The capacity that a running request holds on the workers."""

    def close(self) -> None:
        """Return what the request still holds. Idempotent."""


P = TypeVar("P", bound=Permit)
# Takes capacity on the workers, or says which pools have none now. Raises BatonError if waiting
# would not help.
Acquire = Callable[[], P | NoRoom]


class Turn(Generic[P]):
    """One request, from ``Turns.enter`` until it ends or leaves. Only ``Turns`` changes it.

    Attributes:
        permit: held since the request runs; None while it waits.
        error: why the request was refused after it had waited; None otherwise.
        on_limit: called when ``Turns.give_up_s`` has changed; the caller of ``enter`` may set it.
    """

    def __init__(
        self,
        request: AdmissionRequest,
        acquire: Acquire[P],
        *,
        needs_room: bool,
        now_s: float,
        empty_s: float,
    ) -> None:
        self.request = request
        self.acquire = acquire
        self.needs_room = needs_room
        self.arrived_s = now_s
        self.started_s = now_s
        self.empty_before_s = empty_s  # ``Turns._waited_empty_s()`` when the request came
        self.no_room: NoRoom | None = None  # the answer of the latest try
        self.tried = 0  # the number of that try's round
        self.permit: P | None = None
        self.error: BatonError | None = None
        self.passed = 0  # how many requests have started before this one, which was next
        self.on_decided: Callable[[Turn[P]], None] = lambda _turn: None
        self.on_limit: Callable[[], None] = lambda: None


class Turns:
    """Bounds the number of running requests. Further requests wait, ordered by class and deadline.

    Args:
        clock: seconds. Deadlines are times of this clock.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._mean_run_s = 0.0  # smoothed over the latest requests; 0 if unknown
        self._queues: Queues[Turn[Any]] = Queues(limits.classes)
        self._round = 0  # in each round, ``wake`` tries the next request and some after it
        self._head: Turn[Any] | None = None  # which had no room in the latest round
        # Pools whose first worker requests wait for: as the latest round has found so far, and as
        # the latest ``wake`` found, and since when.
        self._found_empty: frozenset[Pool] = frozenset()
        self._empty: frozenset[Pool] = frozenset()
        self._empty_since_s = 0.0
        self._empty_s = 0.0  # how long requests waited for first workers before that
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._queues)

    def need(self, turn: Turn[P]) -> Need:
        """What a waiting request waits for, as of the latest ``wake``.

        A request that was not tried then waits for the same as the one that was next.
        """
        if self._head is None or self.running >= self._limits.max_concurrent:
            return Need.ROUTER
        no_room = turn.no_room if turn.tried == self._round else self._head.no_room
        assert no_room is not None
        return no_room.need

    def queue_loads(self) -> tuple[QueueLoad, ...]:
        """The waiting requests by class and need. Each is in one of the sums."""
        groups: dict[tuple[str, Need], list[Turn[Any]]] = {}
        for request, turn in self._queues:
            groups.setdefault((request.service_class, self.need(turn)), []).append(turn)
        now_s = self._clock()
        return tuple(
            QueueLoad(
                service_class,
                need,
                requests=len(turns),
                prompt_tokens=sum(turn.request.prompt_tokens for turn in turns),
                kv_tokens=sum(turn.request.kv_tokens for turn in turns),
                oldest_wait_s=now_s - min(turn.arrived_s for turn in turns),
            )
            for (service_class, need), turns in groups.items()
        )

    def check(self, request: AdmissionRequest) -> None:
        """Raise early if ``enter`` would refuse the request now.

        If this raises nothing, ``enter`` may still refuse the request.

        Raises:
            CapacityError: the queue is full, or the request would wait too long.
            DeadlineError: the deadline has passed.
        """
        self._check_deadline(request)
        if self._must_wait(needs_room=True):
            self._check_wait(request)

    def enter(
        self,
        request: AdmissionRequest,
        acquire: Acquire[P],
        on_decided: Callable[[Turn[P]], None],
        *,
        needs_room: bool = True,
    ) -> Turn[P]:
        """Run a request now, or let it wait. It runs if the returned turn has a permit.

        Call ``end`` when the request has run. While it waits, call ``leave`` if it is cancelled,
        and ``give_up`` at ``give_up_s``.

        Args:
            on_decided: called once if the request waits, and later runs or is refused. It must not
                call this object.
            needs_room: whether ``acquire`` takes capacity on the workers. A request that takes none
                passes those that wait for capacity.

        Raises:
            CapacityError: the queue is full, or the request would wait too long or miss its
                deadline.
            DeadlineError: the deadline has passed.
            BatonError: from ``acquire``.
        """
        self._check_deadline(request)
        now_s = self._clock()
        turn = Turn(
            request, acquire, needs_room=needs_room, now_s=now_s, empty_s=self._waited_empty_s()
        )
        permit = None if self._must_wait(needs_room=needs_room) else self._try(turn)
        if permit is not None:
            self._start(turn, permit)
            return turn
        self._check_wait(request, turn.no_room)
        self._queues.push(request, turn)
        self.wake()  # the request may fit, although those before it do not
        if turn.error is not None:
            raise turn.error
        turn.on_decided = on_decided
        return turn

    def end(self, turn: Turn[P]) -> None:
        """Note that a request has run: close its permit and start others."""
        assert turn.permit is not None
        turn.permit.close()
        self._mean_run_s = smoothed(self._mean_run_s, self._clock() - turn.started_s)
        self.running -= 1
        self.wake()

    def leave(self, turn: Turn[P]) -> None:
        """Forget a request that has not run: it waits, or has just got its permit or an error."""
        self._queues.remove(turn)
        if turn.permit is not None:
            turn.permit.close()
            self.running -= 1
        self.wake()  # the requests after this one may fit

    def give_up_s(self, turn: Turn[P]) -> float:
        """When a waiting request has waited for as long as it may. See ``Turn.on_limit``.

        While a pool has no worker, ``cold_start_timeout_s`` bounds the wait for the first one. That
        time does not count towards the class's ``queue_timeout_s``.
        """
        now_s = self._clock()
        empty_s = self._waited_empty_s() - turn.empty_before_s
        if self._empty:
            left_s = self._limits.cold_start_timeout_s - empty_s
        else:
            left_s = self._timeout_s(turn) - (now_s - turn.arrived_s - empty_s)
        return min(turn.request.deadline_s, now_s + left_s)

    def give_up(self, turn: Turn[P]) -> BatonError:
        """Forget a request that has waited for as long as it may. Return the error to raise."""
        empty = self._empty
        self.leave(turn)
        if self._clock() >= turn.request.deadline_s:
            return DeadlineError("the deadline passed while the request waited to run")
        if empty:
            detail = f"none has started within {self._limits.cold_start_timeout_s:g} s"
            return no_worker_error(next(pool for pool in Pool if pool in empty), detail)
        timeout_s = self._timeout_s(turn)
        return CapacityError(
            f"no room became free within {timeout_s:g} s",
            reason="QUEUE_TIMEOUT",
            retry_after_s=timeout_s,
        )

    def wake(self) -> None:
        """Start waiting requests in turn while there is room. Call when room may have grown."""
        while self.running < self._limits.max_concurrent and (head := self._queues.peek()):
            request, turn = head
            self._round += 1
            self._found_empty = frozenset()
            try:
                _raise(decide_dispatch(request, self._clock()))
                permit = self._try(turn)
            except BatonError as err:
                self._queues.remove(turn)
                turn.error = err
                turn.on_decided(turn)
                continue
            if permit is None and not self._backfill(turn):
                self._head = turn
                self._note_empty(self._found_empty)
                return
            if permit is not None:
                self._grant(turn, permit)
        self._head = None
        if not self._queues:
            self._found_empty = frozenset()
        self._note_empty(self._found_empty)

    def _backfill(self, head: Turn[Any]) -> bool:
        """Start a request that fits, although the next one in turn (``head``) does not fit yet.

        Otherwise, one long request would leave workers idle. Each head is passed by at most
        ``MAX_PASSED`` requests that need room, so it does not starve. This bound does not apply
        while the head waits for a pool's first worker, because others take nothing from it then.
        """
        assert head.no_room is not None
        self._found_empty = head.no_room.empty
        is_passed_freely = bool(head.no_room.empty)
        is_held = head.passed >= MAX_PASSED and not is_passed_freely
        for request, turn in self._queues.after_next(_LOOK_AHEAD_REQUESTS):
            if is_held and turn.needs_room:
                continue
            if decide_dispatch(request, self._clock()) is not None:
                continue  # it is refused at its turn
            try:
                permit = self._try(turn)
            except BatonError:
                continue  # likewise
            if permit is not None:
                head.passed += turn.needs_room and not is_passed_freely
                self._grant(turn, permit)
                return True
            assert turn.no_room is not None
            self._found_empty |= turn.no_room.empty
        return False

    def _try(self, turn: Turn[P]) -> P | None:
        """Take capacity on the workers for a request. Keep the reason if there is none now."""
        taken = turn.acquire()
        if not isinstance(taken, NoRoom):
            return taken
        turn.no_room, turn.tried = taken, self._round
        return None

    def _note_empty(self, empty: frozenset[Pool]) -> None:
        """Note which pools without a worker requests wait for now."""
        waited_s, was_empty = self._waited_empty_s(), bool(self._empty)
        self._empty = empty
        if bool(empty) is was_empty:
            return
        self._empty_s, self._empty_since_s = waited_s, self._clock()
        for _, turn in self._queues:
            turn.on_limit()

    def _waited_empty_s(self) -> float:
        """For how long, in total, requests have waited for the first worker of a pool."""
        return self._empty_s + (self._clock() - self._empty_since_s if self._empty else 0.0)

    def _timeout_s(self, turn: Turn[P]) -> float:
        return self._limits.classes[turn.request.service_class].queue_timeout_s

    def _grant(self, turn: Turn[P], permit: P) -> None:
        self._queues.start(turn)
        self._start(turn, permit)
        turn.on_decided(turn)

    def _start(self, turn: Turn[P], permit: P) -> None:
        turn.permit = permit
        turn.started_s = self._clock()
        self.running += 1

    def _must_wait(self, *, needs_room: bool) -> bool:
        """Whether ``max_concurrent`` requests run, or others wait already for the same room."""
        others_wait = needs_room and bool(self._queues)
        return others_wait or self.running >= self._limits.max_concurrent

    def _check_deadline(self, request: AdmissionRequest) -> None:
        if self._clock() >= request.deadline_s:
            raise DeadlineError("the deadline passed before the request began to run")

    def _check_wait(self, request: AdmissionRequest, no_room: NoRoom | None = None) -> None:
        """Raise CapacityError if a request must not wait.

        Args:
            no_room: why it cannot run now, if that is known.
        """
        # The first worker of a pool comes at a time that the running requests do not tell.
        is_cold = bool(self._empty) or (no_room is not None and bool(no_room.empty))
        # Little's law: running requests = requests that end per second * how long each runs.
        is_known = self._mean_run_s > 0 and not is_cold
        ends_per_s = self.running / self._mean_run_s if is_known else 0.0
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


def _raise(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise CapacityError(
            f"the cluster is full: {refusal.message}",
            reason=refusal.reason,
            retry_after_s=refusal.retry_after_s,
        )
