"""Counts of durations in fixed buckets, so that the counts of several processes can be added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_GROWTH = 1.1  # a bucket's upper bound, relative to the one before; so a quantile is 5% off at most
_SMALLEST_S = 1e-3  # shorter durations share one bucket


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many durations fell into each bucket. Bucket ``i`` ends at ``bound_s(i)``."""

    counts: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __add__(self, other: Histogram) -> Histogram:
        counts = dict(self.counts)
        for bucket, count in other.counts.items():
            counts[bucket] = counts.get(bucket, 0) + count
        return Histogram(counts)

    def quantile(self, fraction: float) -> float | None:
        """Return the duration that ``fraction`` of all durations do not exceed; None if empty."""
        rest = fraction * self.total
        for bucket in sorted(self.counts):
            rest -= self.counts[bucket]
            if rest <= 0 and self.counts[bucket]:
                return _middle_s(bucket)
        return None


def bucket_of(duration_s: float) -> int:
    """Return the bucket of a duration."""
    if duration_s <= _SMALLEST_S:
        return 0
    return math.ceil(math.log(duration_s / _SMALLEST_S, _GROWTH))


def bound_s(bucket: int) -> float:
    """Return the upper bound of a bucket."""
    return _SMALLEST_S * _GROWTH**bucket


def _middle_s(bucket: int) -> float:
    return bound_s(bucket) / math.sqrt(_GROWTH) if bucket else _SMALLEST_S
