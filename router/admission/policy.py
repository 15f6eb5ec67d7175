"""Decides which requests wait, which are refused and which runs next. Pure; used by ``turns``.

A request runs immediately if no other request waits, fewer than ``max_concurrent`` run, and workers
have room for it (``router.placement``). Otherwise it waits in the queue of its service class.
Classes share free capacity by their weights. Within a class the earliest deadline comes first. Each
queue is bounded in requests and in time. A request is refused if its queue is full, or if it would
wait too long or likely miss its deadline.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MIN_RETRY_AFTER_S = 0.1  # a busy loop of retries would add to the load
MAX_RETRY_AFTER_S = 60.0  # a longer estimate is too inaccurate to be of use
# A request may wait for this share of its spare time: the time until its deadline, less the
# expected run time. If a request could wait for all its spare time, the queue would fill with
# requests that have no time to spare, and half of them would be late.
WAIT_SHARE = 0.5

T = TypeVar("T")

# Reasons of refusals.
FULL = "QUEUE_FULL"
LATE = "WOULD_BE_LATE"


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """From the configuration (``router.classes``)."""

    weight: int
    max_queue: int
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """From the configuration. The first of ``classes`` serves requests that name no class."""

    max_concurrent: int
    classes: Mapping[str, ClassLimits]
    cold_start_timeout_s: float = 180.0  # replaces queue_timeout_s while a pool has no worker


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What admission must know of a request.

    Args:
        deadline_s: on the clock of ``now_s``.
        service_s: how long the request will likely run; 0 if unknown.
        cost: how much of its class's share the request uses, in any unit.
        prompt_tokens: to compute. These two are only reported, for the autoscaler.
        kv_tokens: that will likely need KV when the request ends.
    """

    service_class: str
    deadline_s: float
    service_s: float = 0.0
    cost: float = 1.0
    prompt_tokens: int = 0
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str
    message: str
    retry_after_s: float


def decide_admission(
    limits: AdmissionLimits,
    request: AdmissionRequest,
    *,
    waiting: int,
    before: float,
    ends_per_s: float,
    now_s: float,
) -> Refusal | None:
    """Whether to refuse a request that cannot run immediately; None lets it wait.

    Args:
        waiting: requests of its class that wait.
        before: requests of all classes that will run before it.
        ends_per_s: requests that end per second; 0 if unknown.
    """
    of_class = limits.classes[request.service_class]
    wait_s = (before + 1) / ends_per_s if ends_per_s else 0.0
    retry_after_s = min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    if waiting >= of_class.max_queue:
        message = f"{waiting} requests of class {request.service_class!r} wait, which is the limit"
        return Refusal(FULL, message, retry_after_s)
    if wait_s > of_class.queue_timeout_s:
        message = f"the wait would be {wait_s:.1f} s, the limit is {of_class.queue_timeout_s:g} s"
        return Refusal(FULL, message, retry_after_s)
    slack_s = request.deadline_s - now_s - request.service_s
    if wait_s > WAIT_SHARE * slack_s:
        return Refusal(LATE, _late(request, wait_s, now_s), retry_after_s)
    return None


def decide_dispatch(request: AdmissionRequest, now_s: float) -> Refusal | None:
    """Whether to refuse the next request in turn, before workers get it; None lets it run."""
    if now_s + request.service_s <= request.deadline_s:
        return None
    return Refusal(LATE, _late(request, 0.0, now_s), MIN_RETRY_AFTER_S)


def _late(request: AdmissionRequest, wait_s: float, now_s: float) -> str:
    left_s = request.deadline_s - now_s
    return (
        f"{left_s:.1f} s are left until the deadline, about {wait_s + request.service_s:.1f} s "
        "would be needed"
    )


@dataclass(slots=True)
class _Queue(Generic[T]):
    limits: ClassLimits
    # Ordered by deadline; equal deadlines by arrival.
    entries: list[tuple[float, int, AdmissionRequest, T]] = field(default_factory=list)
    charged: float = 0.0  # sum of cost / weight; the class with the smallest sum is next


class Queues(Generic[T]):
    """The queues of all service classes.

    Stride scheduling (Waldspurger and Weihl, 1995) keeps the shares: a class is charged
    cost / weight for each waiting request that it starts, and the class with the smallest charge is
    next. An empty class gathers no credit: when a request joins it, the charge of the class becomes
    at least ``_latest_charge``.
    """

    def __init__(self, classes: Mapping[str, ClassLimits]) -> None:
        self._queues = {name: _Queue[T](limits) for name, limits in classes.items()}
        # The charge of the class whose request started last, before that request was charged.
        self._latest_charge = 0.0
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(queue.entries) for queue in self._queues.values())

    def __iter__(self) -> Iterator[tuple[AdmissionRequest, T]]:
        """All waiting requests: class by class, in each the earliest deadline first."""
        return (entry[2:] for queue in self._queues.values() for entry in queue.entries)

    def waiting(self, service_class: str) -> int:
        """The number of waiting requests of one class."""
        return len(self._queues[service_class].entries)

    def before(self, request: AdmissionRequest) -> float:
        """About how many waiting requests would run before ``request`` if it were queued now."""
        queue = self._queues[request.service_class]
        earlier = bisect.bisect(queue.entries, request.deadline_s, key=lambda entry: entry[0])
        # While the request's class runs one request, another class runs n requests:
        # n = weight of the other class / weight of the request's class.
        return earlier + sum(
            min(len(other.entries), (earlier + 1) * other.limits.weight / queue.limits.weight)
            for other in self._queues.values()
            if other is not queue
        )

    def push(self, request: AdmissionRequest, item: T) -> None:
        """Add a waiting request."""
        queue = self._queues[request.service_class]
        if not queue.entries:
            queue.charged = max(queue.charged, self._latest_charge)
        self._arrivals += 1
        bisect.insort(
            queue.entries,
            (request.deadline_s, self._arrivals, request, item),
            key=lambda entry: entry[:2],
        )

    def peek(self) -> tuple[AdmissionRequest, T] | None:
        """The next request; None if none waits."""
        queue = self._next()
        return queue.entries[0][2:] if queue is not None else None

    def after_next(self, count: int) -> list[tuple[AdmissionRequest, T]]:
        """The ``count`` requests after the next one: all of a class, then those of the next."""
        queues = [queue for queue in self._queues.values() if queue.entries]
        queues.sort(key=lambda queue: queue.charged)
        each = (entry[2:] for queue in queues for entry in queue.entries[: count + 1])
        return list(itertools.islice(each, 1, count + 1))

    def start(self, item: T) -> None:
        """Remove a waiting request and charge its class."""
        for queue in self._queues.values():
            for place, (_, _, request, each) in enumerate(queue.entries):
                if each is item:
                    # A request that passes others must not move the start of idle classes.
                    filled = [other for other in self._queues.values() if other.entries]
                    self._latest_charge = min(other.charged for other in filled)
                    del queue.entries[place]
                    queue.charged += request.cost / queue.limits.weight
                    return
        raise AssertionError("the request does not wait")

    def remove(self, item: T) -> None:
        """Remove a request without charging its class. Unknown items are ignored."""
        for queue in self._queues.values():
            queue.entries = [entry for entry in queue.entries if entry[3] is not item]

    def _next(self) -> _Queue[T] | None:
        filled = [queue for queue in self._queues.values() if queue.entries]
        return min(filled, key=lambda queue: queue.charged, default=None)
