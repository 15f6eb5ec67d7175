"""Counts arrivals, output tokens and latencies of the latest seconds. Reads no clock of its own.

Everything is counted in slots of one second. A slot that is too old counts no longer, so an idle
router soon reports nothing, and the memory is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from core.histogram import Histogram, bucket_of

# Long enough for steady rates, and short enough to notice a burst.
RATE_WINDOW_S = 10
# Longer, because a high percentile needs many requests.
LATENCY_WINDOW_S = 30
_FIRST_WINDOW_S = 1.0  # a younger router's rates would be too uncertain


@dataclass(frozen=True, slots=True)
class Rates:
    """Counts of the latest ``window_s`` seconds."""

    window_s: float
    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class _Slot:
    second: int
    requests: int = 0
    sized_requests: int = 0  # whose prompt tokens are known
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: dict[int, int] = field(default_factory=dict)  # counts by bucket of ``Histogram``
    itl: dict[int, int] = field(default_factory=dict)


class Signals:
    """What one router measures. Belongs to one event loop.

    Args:
        clock: monotonic time, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        # One more slot than seconds: the latest second is not complete.
        self._slots: deque[_Slot] = deque(maxlen=max(RATE_WINDOW_S, LATENCY_WINDOW_S) + 1)

    def arrived(self, prompt_tokens: int | None) -> None:
        """Count a new request.

        Args:
            prompt_tokens: None if the request was refused before it was tokenised. Then it counts
                with the mean of the others.
        """
        slot = self._slot()
        slot.requests += 1
        if prompt_tokens is not None:
            slot.sized_requests += 1
            slot.prompt_tokens += prompt_tokens

    def decoded(self, count: int) -> None:
        """Count tokens from a decode worker."""
        self._slot().output_tokens += count

    def first_token(self, ttft_s: float) -> None:
        """Count the first token of a request, which came ``ttft_s`` after the request."""
        _count(self._slot().ttft, ttft_s, 1)

    def next_tokens(self, count: int, gap_s: float) -> None:
        """Count tokens of a request that came together, ``gap_s`` after the token before them.

        They count as ``count`` equal gaps, because workers may send several tokens at once.
        """
        _count(self._slot().itl, gap_s / count, count)

    def rates(self) -> Rates:
        """The arrivals and output tokens of the latest ``RATE_WINDOW_S`` complete seconds and of
        the second that has begun."""
        now_s = self._clock()
        slots = list(self._since(now_s, RATE_WINDOW_S))
        requests = sum(slot.requests for slot in slots)
        sized = sum(slot.sized_requests for slot in slots)
        prompt_tokens = sum(slot.prompt_tokens for slot in slots)
        age_s = max(now_s - self._started_s, _FIRST_WINDOW_S)
        return Rates(
            window_s=min(now_s - int(now_s) + RATE_WINDOW_S, age_s),
            requests=requests,
            prompt_tokens=prompt_tokens * requests // sized if sized else 0,
            output_tokens=sum(slot.output_tokens for slot in slots),
        )

    def latencies(self) -> tuple[Histogram, Histogram]:
        """TTFT and ITL of the latest ``LATENCY_WINDOW_S`` complete seconds and of the second that
        has begun."""
        slots = list(self._since(self._clock(), LATENCY_WINDOW_S))
        return _sum(slot.ttft for slot in slots), _sum(slot.itl for slot in slots)

    def _slot(self) -> _Slot:
        second = int(self._clock())
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(_Slot(second))
        return self._slots[-1]

    def _since(self, now_s: float, window_s: int) -> Iterator[_Slot]:
        oldest = int(now_s) - window_s
        return (slot for slot in self._slots if slot.second >= oldest)


def _count(counts: dict[int, int], duration_s: float, count: int) -> None:
    bucket = bucket_of(duration_s)
    counts[bucket] = counts.get(bucket, 0) + count


def _sum(parts: Iterator[dict[int, int]]) -> Histogram:
    counts: dict[int, int] = {}
    for part in parts:
        for bucket, count in part.items():
            counts[bucket] = counts.get(bucket, 0) + count
    return Histogram(counts)
