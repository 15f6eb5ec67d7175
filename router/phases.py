"""Where the time of one request went, seen from the router. The clock is passed in."""

from __future__ import annotations

from collections.abc import Callable

from baton.v1 import inference_pb2


class PhaseClock:
    """Time marks of one request: accepted, dispatched, tokens, first token handed out.

    Args:
        clock: monotonic time, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accepted_s = clock()
        self._dispatched_s: float | None = None
        self._first_s: float | None = None
        self._second_s: float | None = None
        self._last_s: float | None = None
        self._handed_s: float | None = None
        self._tokens = 0

    def dispatched(self) -> None:
        """The first attempt goes to the workers; later ones count as prefill or hand-off."""
        if self._dispatched_s is None:
            self._dispatched_s = self._clock()

    def tokens_arrived(self, count: int) -> None:
        """``count`` tokens reached the router."""
        if count == 0:
            return
        self._last_s = self._clock()
        if self._tokens == 0:
            self._first_s = self._last_s
        if self._tokens < 2 <= self._tokens + count:
            self._second_s = self._last_s
        self._tokens += count

    def response_written(self) -> None:
        """A response was handed to the client's stream; the first one ends TTFT."""
        if self._handed_s is None:
            self._handed_s = self._clock()

    @property
    def first_s(self) -> float | None:
        """Dispatch to first token, or to now if there is none yet; None: it never got to a
        worker."""
        if self._dispatched_s is None:
            return None
        return _between(self._dispatched_s, self._first_s or self._clock())

    @property
    def step_s(self) -> float | None:
        """Between two tokens after the first; None: there were none."""
        if self._tokens < 2:
            return None
        return _between(self._first_s, self._last_s) / (self._tokens - 1)

    def report(self) -> inference_pb2.Phases:
        """The times so far. Phases that were not reached are 0."""
        handed_s = self._handed_s if self._handed_s is not None else self._clock()
        return inference_pb2.Phases(
            queue_ms=1000 * _between(self._accepted_s, self._dispatched_s),
            prefill_ms=1000 * _between(self._dispatched_s, self._first_s),
            ttft_ms=1000 * _between(self._accepted_s, handed_s) if self._tokens else 0.0,
            handoff_ms=1000 * _between(self._first_s, self._second_s),
            decode_ms=1000 * _between(self._second_s, self._last_s),
            tokens_per_s=1 / self.step_s if self.step_s else 0.0,
        )


def _between(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else end_s - start_s
