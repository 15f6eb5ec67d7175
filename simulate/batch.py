"""A decode worker's continuous batch, advanced many steps at a time.

Between two changes of the batch, ``n`` streams get one token per step, and the KV grows by ``n``
tokens per step. So with the formula of ``DecodeLatency``, step ``j`` (from 0) of a segment takes

    d(j) = d(0) + j * g        g = per_kv_token_s * n

and ``m`` steps take ``m * d(0) + g * m * (m - 1) / 2``, a closed form. A stream joins or leaves the
batch only between two steps, as in vLLM.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from simulate.latency import DecodeLatency

T = TypeVar("T")

# As a share of a step. Rounding errors are smaller. An event this close to a step's end counts as
# at its end.
_ROUNDING = 1e-6
_KEPT_SEGMENTS = 4096  # beyond these, segments that no running stream has seen are dropped
_GAP_QUANTILE = 0.95

GapCounts = list[tuple[float, int]]  # times between two tokens of one stream, and how many of each


@dataclass(frozen=True, slots=True)
class Gaps:
    """``count`` equal steps in each of ``streams`` streams: the times between two tokens.

    The steps take from ``first_s`` to ``last_s``, equally spaced.
    """

    streams: int
    count: int
    first_s: float
    last_s: float

    @property
    def tokens(self) -> int:
        return self.streams * self.count

    @property
    def mean_s(self) -> float:
        return (self.first_s + self.last_s) / 2


@dataclass(slots=True)
class _Member(Generic[T]):
    item: T
    joined_step: int
    finish_step: int
    kv_base: int  # KV tokens at joining, less ``joined_step``
    first_gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """A stream that has all its tokens."""

    item: T
    gaps: GapCounts


@dataclass(frozen=True, slots=True)
class Left:
    """What a stream takes along that leaves before it has all its tokens."""

    kv_tokens: int
    tokens: int  # still to come
    gaps: GapCounts


def gap_p95_s(gaps: Iterable[tuple[float, int]]) -> float:
    """Return what 95% of the times between two tokens do not exceed; 0 if there are none.

    Args:
        gaps: times and how many of each, in any order.
    """
    ordered = sorted(gaps)
    rest = _GAP_QUANTILE * sum(count for _, count in ordered)
    for gap_s, count in ordered:
        rest -= count
        if rest <= 0:
            return gap_s
    return ordered[-1][0] if ordered else 0.0


class Batch(Generic[T]):
    """The streams of one decode worker.

    Args:
        on_gaps: gets the steps that have been done, each once.
    """

    def __init__(self, latency: DecodeLatency, on_gaps: Callable[[Gaps], None]) -> None:
        self._latency = latency
        self._on_gaps = on_gaps
        self._members: dict[int, _Member[T]] = {}  # by number, in the order of joining
        self._ends: list[tuple[int, int]] = []  # heap of (finish step, member's number)
        self._number = 0
        self._step = 0  # steps done
        self._start_s = 0.0  # when the step after them begins
        self._stall_s = 0.0  # by how much longer that step takes
        self.kv_tokens = 0  # of all streams, after the steps done
        # Streams that joined since the last step: how long each has waited since its last token.
        self._waited_s: dict[int, float] = {}
        # The steps done: for each segment the number of its last step, and the mean time of a step.
        self._segment_ends: list[int] = []
        self._segment_steps_s: list[float] = []

    def __len__(self) -> int:
        return len(self._members)

    @property
    def last_end_s(self) -> float:
        """When the latest step ended, at which each of its streams got a token."""
        return self._start_s

    def boundary_s(self, now_s: float) -> float:
        """Return the first end of a step that is not before ``now_s``; ``now_s`` if idle."""
        if not self._members or now_s <= self._start_s:
            return max(now_s, self._start_s)
        return self._end_s(self._steps(now_s, up=True))

    def next_end_s(self) -> float:
        """Return when the next stream will have all its tokens; infinite if there is none."""
        while self._ends and self._ends[0][1] not in self._members:
            heapq.heappop(self._ends)
        return self._end_s(self._ends[0][0] - self._step) if self._ends else math.inf

    def fills_s(self, free_tokens: int) -> float:
        """Return when the KV has no room for one more step; infinite if the batch is empty."""
        if not self._members:
            return math.inf
        return self._end_s(free_tokens // len(self._members))

    def advance(self, now_s: float) -> list[Ended[T]]:
        """Do all steps that end by ``now_s``; remove and return the streams that have ended."""
        if not self._members:
            self._start_s = max(self._start_s, now_s)
            return []
        if steps := self._steps(now_s, up=False):
            self._do(steps)
        ended = []
        while self._ends and self._ends[0][0] <= self._step:
            number = heapq.heappop(self._ends)[1]
            if (member := self._members.pop(number, None)) is not None:
                self.kv_tokens -= self._kv_of(member)
                ended.append(Ended(member.item, self._gaps_of(member)))
        return ended

    def join(
        self, item: T, kv_tokens: int, tokens: int, waited_s: float, stall_s: float = 0.0
    ) -> int:
        """Add a stream between two steps (after ``advance``). Return its number.

        Args:
            kv_tokens: its KV now.
            tokens: how many it will generate.
            waited_s: since its last token.
            stall_s: by how much this makes the next step longer, to recompute a prompt.
        """
        self._number += 1
        self._stall_s += stall_s
        finish_step = self._step + tokens
        self._members[self._number] = _Member(item, self._step, finish_step, kv_tokens - self._step)
        self._waited_s[self._number] = waited_s
        heapq.heappush(self._ends, (finish_step, self._number))
        self.kv_tokens += kv_tokens
        return self._number

    def leave(self, number: int) -> Left:
        """Remove a stream between two steps."""
        member = self._members.pop(number)
        self._waited_s.pop(number, None)
        kv_tokens = self._kv_of(member)
        self.kv_tokens -= kv_tokens
        return Left(kv_tokens, member.finish_step - self._step, self._gaps_of(member))

    @property
    def latest(self) -> T:
        """Return the stream that joined last."""
        return next(reversed(self._members.values())).item

    def is_between_steps(self, now_s: float) -> bool:
        """Whether a step has just ended, or none runs. Valid after ``advance``."""
        if not self._members:
            return True
        return now_s - self._start_s <= _ROUNDING * (self._first_step_s() + self._stall_s)

    def _kv_of(self, member: _Member[T]) -> int:
        return member.kv_base + self._step

    def _first_step_s(self) -> float:
        return self._latency.seconds(len(self._members), self.kv_tokens)

    def _end_s(self, steps: int) -> float:
        """When this many more steps have been done."""
        if steps == 0:
            return self._start_s
        growth_s = self._latency.per_kv_token_s * len(self._members)
        work_s = steps * self._first_step_s() + growth_s * (steps * (steps - 1) / 2)
        return self._start_s + self._stall_s + work_s

    def _steps(self, now_s: float, *, up: bool) -> int:
        """How many more steps end by ``now_s``; ``up``: the least number that ends not before."""
        left_s = now_s - self._start_s - self._stall_s
        first_s = self._first_step_s()
        growth_s = self._latency.per_kv_token_s * len(self._members)
        # The root of growth/2 * m^2 + (first - growth/2) * m - left, in the form that does not
        # cancel if growth is small.
        linear_s = first_s - growth_s / 2
        root = math.sqrt(max(0.0, linear_s * linear_s + 2 * growth_s * max(left_s, 0.0)))
        steps = 2 * max(left_s, 0.0) / (linear_s + root)
        return max(1, math.ceil(steps - _ROUNDING)) if up else math.floor(steps + _ROUNDING)

    def _do(self, steps: int) -> None:
        streams, step_s = len(self._members), self._first_step_s()
        growth_s = self._latency.per_kv_token_s * streams
        end_s = self._end_s(steps)
        first_s = step_s + self._stall_s
        if self._waited_s or self._stall_s:
            for number, waited_s in self._waited_s.items():
                gap_s = self._members[number].first_gap_s = waited_s + first_s
                self._on_gaps(Gaps(1, 1, gap_s, gap_s))
            if others := streams - len(self._waited_s):
                self._on_gaps(Gaps(others, 1, first_s, first_s))
            self._log(self._step + 1, first_s)
            self._waited_s.clear()
            if steps > 1:
                self._note(steps - 1, step_s + growth_s, growth_s, self._step + steps)
        else:
            self._note(steps, step_s, growth_s, self._step + steps)
        self._start_s, self._stall_s = end_s, 0.0
        self._step += steps
        self.kv_tokens += steps * streams

    def _note(self, steps: int, first_s: float, growth_s: float, last_step: int) -> None:
        last_s = first_s + (steps - 1) * growth_s
        self._on_gaps(Gaps(len(self._members), steps, first_s, last_s))
        self._log(last_step, (first_s + last_s) / 2)

    def _log(self, last_step: int, step_s: float) -> None:
        self._segment_ends.append(last_step)
        self._segment_steps_s.append(step_s)
        if len(self._segment_ends) > _KEPT_SEGMENTS:
            needed_step = next(iter(self._members.values())).joined_step
            first = bisect.bisect_right(self._segment_ends, needed_step)
            del self._segment_ends[:first], self._segment_steps_s[:first]

    def _gaps_of(self, member: _Member[T]) -> GapCounts:
        done_step = min(self._step, member.finish_step)
        ends, step = self._segment_ends, member.joined_step + 1
        if done_step < step:
            return []
        gaps = [(member.first_gap_s, 1)]
        for index in range(bisect.bisect_right(ends, step), len(ends)):
            last = min(ends[index], done_step)
            gaps.append((self._segment_steps_s[index], last - step))
            step = last
        return gaps
