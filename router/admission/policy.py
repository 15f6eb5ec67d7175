"""Who waits, who is refused, whose turn it is. Pure: ``gate`` is the live shell.

A request runs as soon as there is room for it on the workers (``router.placement``). Until then it
waits in the queue of its class. Classes share what becomes free by their weights, and within a
class the earliest deadline is first. A queue is bounded in requests and in time: who would wait too
long, or be done too late, is told so at once.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
# Of the time that a request can spare; the rest is for all that takes longer than expected. Without
# it, those whose turn comes would all be at the edge of their deadlines, and half of them over it.
WAIT_SHARE = 0.5

T = TypeVar("T")

FULL = "QUEUE_FULL"  # reasons of refusals
LATE = "WOULD_BE_LATE"


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """From the configuration (``router.classes``)."""

    weight: int
    max_queue: int
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """From the configuration; ``classes`` by name, the first one for those that name none."""

    max_concurrent: int
    classes: Mapping[str, ClassLimits]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for.

    Args:
        deadline_s: its end, on the clock that ``now_s`` is on.
        service_s: how long it will likely run; 0: nobody knows.
        cost: what it takes of its class's share; any unit.
    """

    service_class: str
    deadline_s: float
    service_s: float = 0.0
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str
    message: str
    retry_after_s: float


def decide_admission(
    limits: AdmissionLimits, ask: Ask, waiting: int, before: float, rate: float, now_s: float
) -> Refusal | None:
    """Whether a request that finds no room is refused; None: it waits.

    Args:
        waiting: requests of its class that wait.
        before: requests of all classes that will run before it.
        rate: requests that end per second; 0: nobody knows.
    """
    of_class = limits.classes[ask.service_class]
    wait_s = (before + 1) / rate if rate else 0.0
    retry_after_s = min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    if waiting >= of_class.max_queue:
        message = f"{waiting} requests of class {ask.service_class!r} wait, which is the limit"
        return Refusal(FULL, message, retry_after_s)
    if wait_s > of_class.queue_timeout_s:
        message = f"the wait would be {wait_s:.1f} s, the limit is {of_class.queue_timeout_s:g} s"
        return Refusal(FULL, message, retry_after_s)
    slack_s = ask.deadline_s - now_s - ask.service_s
    if wait_s > WAIT_SHARE * slack_s:
        return Refusal(LATE, _late(ask, wait_s, now_s), retry_after_s)
    return None


def decide_dispatch(ask: Ask, now_s: float) -> Refusal | None:
    """Whether a request whose turn has come is refused, before it costs anything."""
    if now_s + ask.service_s <= ask.deadline_s:
        return None
    return Refusal(LATE, _late(ask, 0.0, now_s), MIN_RETRY_AFTER_S)


def _late(ask: Ask, wait_s: float, now_s: float) -> str:
    left_s = ask.deadline_s - now_s
    return (
        f"{left_s:.1f} s are left until the deadline, about {wait_s + ask.service_s:.1f} s would "
        "be needed"
    )


@dataclass(slots=True)
class _Queue(Generic[T]):
    limits: ClassLimits
    # In the order of deadlines; equal ones in the order of arrival.
    entries: list[tuple[float, int, Ask, T]] = field(default_factory=list)
    served: float = 0.0  # cost over weight; the class that has least is next


class Queues(Generic[T]):
    """The queues of all classes.

    Shares are kept by stride scheduling (Waldspurger and Weihl, 1995): each class's ``served``
    grows by cost over weight, and the least is next. A class that was empty starts at the level of
    the others: nobody saves up.
    """

    def __init__(self, classes: Mapping[str, ClassLimits]) -> None:
        self._queues = {name: _Queue[T](limits) for name, limits in classes.items()}
        self._level = 0.0  # of the class that was served last
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(queue.entries) for queue in self._queues.values())

    def waiting(self, service_class: str) -> int:
        """Requests of one class."""
        return len(self._queues[service_class].entries)

    def before(self, ask: Ask) -> float:
        """About how many requests run before one that comes now."""
        queue = self._queues[ask.service_class]
        earlier = bisect.bisect(queue.entries, ask.deadline_s, key=lambda entry: entry[0])
        # For each of its own class, the others run by their weights, as long as they have any.
        return earlier + sum(
            min(len(other.entries), (earlier + 1) * other.limits.weight / queue.limits.weight)
            for other in self._queues.values()
            if other is not queue
        )

    def push(self, ask: Ask, item: T) -> None:
        """Let one wait."""
        queue = self._queues[ask.service_class]
        if not queue.entries:
            queue.served = max(queue.served, self._level)
        self._arrivals += 1
        bisect.insort(
            queue.entries,
            (ask.deadline_s, self._arrivals, ask, item),
            key=lambda entry: entry[:2],
        )

    def peek(self) -> tuple[Ask, T] | None:
        """Whose turn it is; None: nobody waits."""
        queue = self._next()
        return queue.entries[0][2:] if queue is not None else None

    def pop(self) -> None:
        """Take out whose turn it is, who is served."""
        queue = self._next()
        assert queue is not None, "nobody waits"
        _, _, ask, _ = queue.entries.pop(0)
        self._level = queue.served
        queue.served += ask.cost / queue.limits.weight

    def remove(self, item: T) -> None:
        """Take one out who is not served; unknown ones are ignored."""
        for queue in self._queues.values():
            queue.entries = [entry for entry in queue.entries if entry[3] is not item]

    def _next(self) -> _Queue[T] | None:
        filled = [queue for queue in self._queues.values() if queue.entries]
        return min(filled, key=lambda queue: queue.served, default=None)
