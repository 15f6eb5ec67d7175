"""Measures the phases of a request, as the router sees them. Pure: the clock is passed in."""

from __future__ import annotations

from collections.abc import Callable

from baton.v1 import inference_pb2
from router.signals import Signals


class PhaseClock:
    """The times at which one request was accepted and dispatched, and its tokens arrived.

    Args:
        clock: monotonic time, seconds.
        signals: get TTFT and the time between tokens; None: nobody does.
    """

    def __init__(self, clock: Callable[[], float], signals: Signals | None = None) -> None:
        self._clock = clock
        self._signals = signals
        self._is_resumed = False
        self._accepted_s = clock()
        self._dispatched_s: float | None = None
        self._first_s: float | None = None
        self._second_s: float | None = None
        self._last_s: float | None = None
        self._first_written_s: float | None = None
        self._tokens = 0

    def dispatched(self) -> None:
        """Note that an attempt was sent to workers.

        Only the first attempt ends the queue phase. The time of a later attempt counts as prefill,
        hand-off or decode, depending on how many tokens have arrived.
        """
        if self._dispatched_s is None:
            self._dispatched_s = self._clock()

    def resumed(self) -> None:
        """Note that the request began at another router, so its TTFT is not known here."""
        self._is_resumed = True

    def tokens_arrived(self, count: int) -> None:
        """Note that ``count`` tokens reached the router."""
        if count == 0:
            return
        before_s, self._last_s = self._last_s, self._clock()
        if self._signals is not None and before_s is not None:
            self._signals.next_tokens(count, self._last_s - before_s)
        elif self._signals is not None and not self._is_resumed:
            # Not the time of the first write: a client that reads slowly is no reason to scale.
            self._signals.first_token(self._last_s - self._accepted_s)
        if self._tokens == 0:
            self._first_s = self._last_s
        if self._tokens < 2 <= self._tokens + count:
            self._second_s = self._last_s
        self._tokens += count

    def response_written(self) -> None:
        """Note that a response was written to the client's stream. The first one ends TTFT."""
        if self._first_written_s is None:
            self._first_written_s = self._clock()

    @property
    def first_s(self) -> float | None:
        """Seconds from dispatch to the first token, or until now if no token has arrived.

        None if the request was not dispatched.
        """
        if self._dispatched_s is None:
            return None
        return _between(self._dispatched_s, self._first_s or self._clock())

    @property
    def step_s(self) -> float | None:
        """Mean seconds from one token to the next; None with fewer than two tokens."""
        if self._tokens < 2:
            return None
        return _between(self._first_s, self._last_s) / (self._tokens - 1)

    def report(self) -> inference_pb2.Phases:
        """The phases so far, in ms, and the token rate. Phases that were not reached are 0."""
        written_s = self._first_written_s
        written_s = self._clock() if written_s is None else written_s
        return inference_pb2.Phases(
            queue_ms=1000 * _between(self._accepted_s, self._dispatched_s),
            prefill_ms=1000 * _between(self._dispatched_s, self._first_s),
            ttft_ms=1000 * _between(self._accepted_s, written_s) if self._tokens else 0.0,
            handoff_ms=1000 * _between(self._first_s, self._second_s),
            decode_ms=1000 * _between(self._second_s, self._last_s),
            tokens_per_s=1 / self.step_s if self.step_s else 0.0,
        )


def _between(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else end_s - start_s
