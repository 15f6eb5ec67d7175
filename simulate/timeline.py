"""Virtual time: calls in the order of their times."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualTimeline:
    """Implements ``engines.Timeline``. Calls at the same time run in the order they were planned.

    Attributes:
        now_s: seconds since the start of the simulation.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Plan a call."""
        assert time_s >= self.now_s, "the past does not change"
        heapq.heappush(self._calls, (time_s, next(self._order), call))

    def every(self, period_s: float, call: Callable[[], bool]) -> None:
        """Call now and then once per period, until the call returns False."""

        def again() -> None:
            if call():
                self.at(self.now_s + period_s, again)

        self.at(self.now_s, again)

    def run(self) -> None:
        """Return when no call is planned any more."""
        while self._calls:
            self.now_s, _, call = heapq.heappop(self._calls)
            call()
