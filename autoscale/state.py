"""What the autoscaler remembers from one decision to the next. Bounded in size.

The cluster keeps it in Redis, so that an autoscaler that restarts goes on without a jump.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from core.types import Pool

# Periods of scaling policies are at most 1800 s. More changes than this in that time are merged.
_MAX_CHANGES = 256

# Numbers with the time at which each was current, oldest first. See ``highest`` and ``lowest``.
Window = tuple[tuple[float, int], ...]


def highest(window: Window, now_s: float, length_s: float, value: int) -> tuple[Window, int]:
    """Add ``value`` to a window; return the window and the largest number of the last ``length_s``.

    Only numbers that can still become the largest are kept, so the numbers in a window decrease
    strictly, and there are no more of them than there are different values.
    """
    kept = [(at_s, old) for at_s, old in window if at_s > now_s - length_s and old > value]
    return (*kept, (now_s, value)), kept[0][1] if kept else value


def lowest(window: Window, now_s: float, length_s: float, value: int) -> tuple[Window, int]:
    """Do as ``highest``, for the smallest number."""
    kept = [(at_s, old) for at_s, old in window if at_s > now_s - length_s and old < value]
    return (*kept, (now_s, value)), kept[0][1] if kept else value


@dataclass(frozen=True, slots=True)
class Change:
    """The target of a pool was changed at ``at_s``."""

    at_s: float
    added: int
    removed: int


@dataclass(frozen=True, slots=True)
class Average:
    """An exponential average, as of ``at_s``."""

    at_s: float
    value: float

    def with_value(self, value: float, length_s: float, now_s: float) -> Average:
        """Add a value. Older values lose weight with the time constant ``length_s``."""
        passed_s = max(now_s - self.at_s, 0.0)
        weight = 1.0 if length_s <= 0 else 1 - math.exp(-passed_s / length_s)
        return Average(now_s, self.value + weight * (value - self.value))


@dataclass(frozen=True, slots=True)
class TooFew:
    """The load of each worker when a pool last had too few of them."""

    at_s: float
    load_per_worker: float  # unit: that of ``PoolDemand.arrival_tokens_per_s``
    memory_s: float  # for how long it is remembered


@dataclass(frozen=True, slots=True)
class Unplaced:
    """The cluster had no place for workers of a pool, ``failures`` times in a row."""

    failures: int
    failed_s: float
    retry_s: float  # when to try again


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A worker that changes its role."""

    worker: str
    to: Pool
    since_s: float


@dataclass(frozen=True, slots=True)
class PoolState:
    """What is remembered of one pool."""

    target: int
    # Recommendations of the signals, for the stabilisation windows.
    smallest: Window = ()
    largest: Window = ()
    # Workers that the signals needed, without tolerance, and steps of load: for the N−1 check.
    needed: Window = ()
    load: Window = ()
    changes: tuple[Change, ...] = ()
    too_few: TooFew | None = None
    grew_s: float | None = None  # when the signals last asked for more workers
    unplaced: Unplaced | None = None
    arrival_tokens_per_s: Average | None = None
    # The last known values, for while the pool is empty; 0: never known.
    tokens_per_s: float = 0.0
    kv_tokens_total: float = 0.0
    gpus: float = 0.0

    def after_change(self, target: int, now_s: float, longest_period_s: float) -> PoolState:
        """Return the state with a new target, and with the change noted."""
        changes = [each for each in self.changes if each.at_s > now_s - longest_period_s]
        if target != self.target:
            delta = target - self.target
            changes.append(Change(now_s, added=max(delta, 0), removed=max(-delta, 0)))
        if len(changes) > _MAX_CHANGES:  # the merged change counts a little longer than the older
            first, second, *rest = changes
            merged = Change(second.at_s, first.added + second.added, first.removed + second.removed)
            changes = [merged, *rest]
        return replace(self, target=target, changes=tuple(changes))

    def not_after(self, now_s: float) -> PoolState:
        """Return the state without times in the future, in case the clock was set back."""

        def past(window: Window) -> Window:
            return tuple((min(at_s, now_s), value) for at_s, value in window)

        changes = tuple(replace(each, at_s=min(each.at_s, now_s)) for each in self.changes)
        too_few, unplaced = self.too_few, self.unplaced
        if too_few is not None:
            too_few = replace(too_few, at_s=min(too_few.at_s, now_s))
        if unplaced is not None and unplaced.failed_s > now_s:
            wait_s = unplaced.retry_s - unplaced.failed_s
            unplaced = replace(unplaced, failed_s=now_s, retry_s=now_s + wait_s)
        return replace(
            self,
            smallest=past(self.smallest),
            largest=past(self.largest),
            needed=past(self.needed),
            load=past(self.load),
            changes=changes,
            too_few=too_few,
            grew_s=None if self.grew_s is None else min(self.grew_s, now_s),
            unplaced=unplaced,
        )


@dataclass(frozen=True, slots=True)
class State:
    """What the autoscaler remembers."""

    pools: Mapping[Pool, PoolState]
    measured_s: float | None = None  # of the latest demand that was used
    role_change: RoleChange | None = None
    role_change_failed_s: float | None = None  # when the latest one that failed was given up
