"""Estimates output length and run time from the latest requests. Pure: times are passed in."""

from __future__ import annotations

from collections import deque

from router.phases import PhaseClock

KNOWN_REQUESTS = 256  # output lengths are estimated from this many of the latest requests
FEW_REQUESTS = 16  # after fewer requests, output lengths count as unknown
# Output length assumed while output lengths are unknown. If the whole remaining context were
# assumed, workers would have room for hardly any request.
FIRST_GROWTH_TOKENS = 512
# KV is reserved for this quantile of output lengths. It is high, because an underestimate costs a
# preemption.
GROWTH_QUANTILE = 0.9
SMOOTHING = 0.1  # weight of the newest request in the means


class Expectation:
    """The estimates of one router, over all its requests."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=KNOWN_REQUESTS)  # output tokens per request
        self._growth_tokens: int | None = None
        self._median_tokens = 0
        self._first_token_s = 0.0  # mean, dispatch to first token
        self._token_s = 0.0  # mean, one token to the next

    def note(self, phases: PhaseClock, output_tokens: int | None) -> None:
        """Learn from a request that has ended.

        Args:
            output_tokens: None if the request was cut off. If that was before its first token,
                ``phases.first_s`` is too short. So the ``first_s`` of a request that was cut off
                counts only if it exceeds the mean.
        """
        first_s, step_s = phases.first_s, phases.step_s
        if first_s is not None and (output_tokens is not None or first_s > self._first_token_s):
            self._first_token_s = smoothed(self._first_token_s, first_s)
        if step_s is not None:
            self._token_s = smoothed(self._token_s, step_s)
        if output_tokens is not None:
            self._lengths.append(output_tokens)
            if len(self._lengths) >= FEW_REQUESTS:
                lengths = sorted(self._lengths)
                self._growth_tokens = lengths[int(GROWTH_QUANTILE * len(lengths))]
                self._median_tokens = lengths[len(lengths) // 2]

    def growth_tokens(self, max_tokens: int) -> int:
        """The output tokens to reserve KV for; at most ``max_tokens``."""
        known = self._growth_tokens
        return min(FIRST_GROWTH_TOKENS if known is None else known, max_tokens)

    def service_s(self, max_tokens: int) -> float:
        """How long a request will likely run; 0 if unknown."""
        if self._growth_tokens is None:
            return 0.0
        return self._first_token_s + (min(self._median_tokens, max_tokens) - 1) * self._token_s


def smoothed(mean: float, newest: float) -> float:
    """Add a value to an exponentially smoothed mean. 0 means that there is no mean yet."""
    return newest if mean == 0.0 else mean + SMOOTHING * (newest - mean)
