"""What requests will likely need, from those that ended lately. Pure: times are passed in."""

from __future__ import annotations

from collections import deque

from router.phases import PhaseClock

KNOWN_REQUESTS = 256  # the latest ones count
FEW_REQUESTS = 16  # with fewer, nobody knows
FIRST_GROWTH_TOKENS = 512  # assumed until then; a model's whole context would let hardly any begin
GROWTH_QUANTILE = 0.9  # of lengths: KV that turns out too little costs a preemption
SMOOTHING = 0.1  # weight of the newest request in the means


class Expectation:
    """Of one router, about all its requests."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=KNOWN_REQUESTS)  # outputs, tokens
        self._growth_tokens: int | None = None
        self._median_tokens = 0
        self._first_s = 0.0  # dispatch -> first token
        self._step_s = 0.0  # between two tokens

    def note(self, phases: PhaseClock, output_tokens: int | None) -> None:
        """A request has ended.

        Args:
            output_tokens: None: it was cut off, so that its times may be too short.
        """
        first_s, step_s = phases.first_s, phases.step_s
        if first_s is not None and (output_tokens is not None or first_s > self._first_s):
            self._first_s = smoothed(self._first_s, first_s)
        if step_s is not None:
            self._step_s = smoothed(self._step_s, step_s)
        if output_tokens is not None:
            self._lengths.append(output_tokens)
            if len(self._lengths) >= FEW_REQUESTS:
                lengths = sorted(self._lengths)
                self._growth_tokens = lengths[int(GROWTH_QUANTILE * len(lengths))]
                self._median_tokens = lengths[len(lengths) // 2]

    def growth_tokens(self, max_tokens: int) -> int:
        """How many of at most ``max_tokens`` a request should have room for."""
        known = self._growth_tokens
        return min(FIRST_GROWTH_TOKENS if known is None else known, max_tokens)

    def service_s(self, max_tokens: int) -> float:
        """How long a request will likely run; 0 if nobody knows."""
        if self._growth_tokens is None:
            return 0.0
        return self._first_s + (min(self._median_tokens, max_tokens) - 1) * self._step_s


def smoothed(mean: float, newest: float) -> float:
    """The mean with one value more, of which the latest ones count; 0: there was none yet."""
    return newest if mean == 0.0 else mean + SMOOTHING * (newest - mean)
