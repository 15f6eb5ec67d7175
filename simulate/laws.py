"""The scaling laws of other systems, for one pool. Pure; ``baselines`` makes policies of them.

Each law is a frozen value with its parameters. ``decide(seen, memory)`` returns the wanted number
of workers and the memory for the next call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from core.types import Pool

_DELAY_ROUNDING_S = 1e-6  # as in Ray Serve


@dataclass(frozen=True, slots=True)
class Seen:
    """One pool, as its law sees it."""

    now_s: float
    pool: Pool
    current: int  # workers ordered and not leaving; the other systems count these as replicas
    waiting: int  # requests
    running: int
    kv_used: float  # share of the room of the pool
    tokens_per_s: float  # arriving prompt tokens, or output tokens
    worker_tokens_per_s: float  # of one worker, by the latency model
    least: int = 1
    most: int = 64

    def bounded(self, workers: int) -> int:
        """Return a number of workers within the bounds."""
        return max(self.least, min(self.most, workers))


class Law(Protocol):
    """Wants a number of workers."""

    def decide(self, seen: Seen, memory: Any) -> tuple[int, Any]:
        """Return the number, and the next memory. The first memory is None."""


@dataclass(frozen=True, slots=True)
class _HpaMemory:
    synced_s: float = -math.inf
    wanted: int = 0
    # (time, recommendation), for the stabilisation window
    recommended: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Hpa:
    """Kubernetes' HorizontalPodAutoscaler v2 with averages per pod as metrics; the largest wins.

    Source: the algorithm details of its documentation. The desired number is ceil(total / target),
    unless total / (target * current) is within the tolerance. The highest number of the latest
    ``down_window_s`` counts when it goes down. It at most doubles, or grows by 4, per 15 s.

    KEDA computes nothing itself: it feeds such an HPA. Its ``cooldownPeriod`` is the time before
    the last worker goes; here it is ``down_window_s``.

    Args:
        requests: target per worker; None: not a metric.
        counts_running: whether running requests count, beside the waiting ones.
        kv_used: target share of the KV room; None: not a metric. Only decode workers have it.
    """

    requests: float | None
    counts_running: bool = False
    kv_used: float | None = None
    sync_s: float = 15.0
    tolerance: float = 0.1
    down_window_s: float = 300.0

    def decide(self, seen: Seen, memory: Any) -> tuple[int, Any]:
        was = memory or _HpaMemory()
        if seen.now_s - was.synced_s < self.sync_s:
            return was.wanted, was
        wanted = seen.bounded(max(self._by_metric(seen), default=seen.current))
        recent = tuple(
            (at_s, number)
            for at_s, number in was.recommended
            if at_s > seen.now_s - self.down_window_s
        )
        recommended = (*recent, (seen.now_s, wanted))
        if wanted < seen.current:
            wanted = min(seen.current, max(number for _, number in recommended))
        else:
            wanted = min(wanted, max(2 * seen.current, seen.current + 4))
        return wanted, _HpaMemory(seen.now_s, wanted, recommended)

    def _by_metric(self, seen: Seen) -> list[int]:
        numbers = []
        if self.requests is not None:
            total = seen.waiting + (seen.running if self.counts_running else 0)
            numbers.append(self._desired(total, self.requests, seen.current))
        if self.kv_used is not None and seen.pool is Pool.DECODE:
            total_used = seen.kv_used * seen.current
            numbers.append(self._desired(total_used, self.kv_used, seen.current))
        return numbers

    def _desired(self, total: float, target: float, current: int) -> int:
        if current and abs(total / (target * current) - 1) <= self.tolerance:
            return current
        return math.ceil(total / target)


@dataclass(frozen=True, slots=True)
class _ServeMemory:
    target: int
    ongoing: tuple[tuple[float, int], ...] = ()  # (time, requests) of the look-back period
    direction: int = 0  # of the decision that waits for its delay
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RayServe:
    """Ray Serve's default policy (ray/serve/autoscaling_policy.py, Ray 2.60).

    Desired is ongoing requests / ``target_ongoing_requests``, smoothed by the factors. It must
    differ from the target number of workers in one direction for the whole delay.
    """

    target_ongoing_requests: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    look_back_s: float = 30.0

    def decide(self, seen: Seen, memory: Any) -> tuple[int, Any]:
        was = memory or _ServeMemory(seen.current)
        recent = (each for each in was.ongoing if each[0] > seen.now_s - self.look_back_s)
        ongoing = (*recent, (seen.now_s, seen.waiting + seen.running))
        mean = sum(count for _, count in ongoing) / len(ongoing)
        desired = self.scaled(mean / self.target_ongoing_requests, seen.current)
        target, direction, since_s = self.delayed(
            seen.bounded(desired), was.target, was.direction, was.since_s, seen.now_s
        )
        return seen.bounded(target), _ServeMemory(target, ongoing, direction, since_s)

    def scaled(self, desired: float, current: int) -> int:
        """Serve's ``_apply_scaling_factors``."""
        if current == 0:
            return math.ceil(desired)
        change = desired - current
        factor = self.upscaling_factor if change > 0 else self.downscaling_factor
        number = math.ceil(current + factor * change)
        is_stuck = math.ceil(desired) < current and number == current
        return number - 1 if is_stuck else number

    def delayed(
        self, desired: int, target: int, direction: int, since_s: float, now_s: float
    ) -> tuple[int, int, float]:
        """Serve's ``_apply_delay_logic``. Return target, direction, and since when it is wanted."""
        wanted = (desired > target) - (desired < target)
        if wanted == 0:
            return target, 0, 0.0
        if wanted != direction:
            since_s = now_s
        delay_s = self.upscale_delay_s if wanted > 0 else self.downscale_delay_s
        if now_s - since_s + _DELAY_ROUNDING_S >= delay_s:
            return (desired if wanted > 0 or target == 1 else max(1, desired)), 0, 0.0
        return target, wanted, since_s


@dataclass(frozen=True, slots=True)
class _ForecastMemory:
    binned_s: float = -math.inf
    bins: tuple[float, ...] = ()  # tokens per second, oldest first
    wanted: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """Provides capacity for the load that is expected when a worker ordered now has started.

    Args:
        margin: capacity relative to the forecast.
        lags: order of an autoregressive model, fitted by least squares to the differences between
            bins; 0: the mean of the latest minute, a moving average.
        horizon_s: the cold start.
        down_window_s: the largest number of this window counts when it goes down.
    """

    margin: float
    lags: int
    horizon_s: float
    bin_s: float = 10.0
    kept_bins: int = 90
    down_window_s: float = 300.0

    def decide(self, seen: Seen, memory: Any) -> tuple[int, Any]:
        was = memory or _ForecastMemory()
        bins, binned_s = was.bins, was.binned_s
        if seen.now_s - binned_s >= self.bin_s:
            bins, binned_s = (*bins, seen.tokens_per_s)[-self.kept_bins :], seen.now_s
        expected = self.expected(bins)
        number = seen.bounded(math.ceil(expected * self.margin / seen.worker_tokens_per_s))
        recent = (each for each in was.wanted if each[0] > seen.now_s - self.down_window_s)
        # Only numbers that may still be the largest of a later window are kept.
        wanted = (*(each for each in recent if each[1] > number), (seen.now_s, number))
        highest = min(seen.current, wanted[0][1]) if number < seen.current else number
        return highest, _ForecastMemory(binned_s, bins, wanted)

    def expected(self, bins: tuple[float, ...]) -> float:
        """Return the load after ``horizon_s``."""
        steps = math.ceil(self.horizon_s / self.bin_s)
        mean = sum(bins[-6:]) / len(bins[-6:])
        differences = np.diff(np.array(bins))
        rows = len(differences) - self.lags
        if self.lags == 0 or rows < 2 * self.lags:
            return mean
        past = np.stack([differences[lag : lag + rows] for lag in range(self.lags)], axis=1)
        factors = np.linalg.lstsq(past, differences[self.lags :], rcond=None)[0]
        latest = differences[-self.lags :]
        load, highest = bins[-1], 2 * max(bins)
        for _ in range(steps):
            change = float(latest @ factors)
            latest = np.append(latest[1:], change)
            load = min(max(load + change, 0.0), highest)  # an unstable fit must not run away
        return load
