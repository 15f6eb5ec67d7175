"""What a run says about a policy: latencies, attainment of the SLOs, and cost.

A request attains an SLO if it ended well and its latency does not exceed the SLO. So a request that
was refused, or gave up waiting, misses both. TTFT counts from the arrival, the wait included. ITL
is the request's mean time between two tokens (TPOT, as in DistServe), the hand-off between the
pools included; ``attainment_itl_p95`` takes the 95th percentile of the request's gaps instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscale.snapshot import ActionKind
from core.types import Pool
from simulate.cluster import Run, worker_seconds
from simulate.front import Active

_WINDOW_S = 10.0  # for the time over target
OK = "ok"

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Slo:
    """The latencies to keep, in seconds."""

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """By request, in the order of the trace. Infinite for requests that did not end well."""

    arrival_s: Array
    ttft_s: Array
    itl_s: Array
    gap_p95_s: Array
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """One policy on one trace.

    Hours count until the last arrival; until the last end if all requests arrive at once.
    """

    policy: str
    requests: int
    completed: int
    refused: Mapping[str, int]  # by reason
    attainment_ttft: float
    attainment_itl: float
    attainment_itl_p95: float
    attainment_by_class: Mapping[str, tuple[float, float]]  # TTFT and ITL
    ttft_s: tuple[float, float, float]  # p50, p95, p99 of the completed requests
    itl_s: tuple[float, float, float]
    over_target_ttft: float  # share of 10 s windows whose p95 exceeds the SLO
    over_target_itl: float
    replica_hours_by_pool: Mapping[Pool, float]
    changes: int
    role_changes: int
    cold_starts: int
    moved: int
    preemptions: int

    @property
    def replica_hours(self) -> float:
        return sum(self.replica_hours_by_pool.values())

    @property
    def attainment(self) -> float:
        """The smaller one of both."""
        return min(self.attainment_ttft, self.attainment_itl)


def latencies_of(run: Run) -> Latencies:
    """Return the latencies of all requests."""
    rows = [_latencies(each) for each in run.ended]
    ttft_s, itl_s, gap_s = (np.array(column) for column in zip(*rows, strict=True))
    return Latencies(
        np.array([each.request.arrival_s for each in run.ended]),
        ttft_s,
        itl_s,
        gap_s,
        tuple(each.service_class for each in run.ended),
    )


def evaluate(run: Run, slo: Slo, policy: str) -> Results:
    """Return the results of a run."""
    found = latencies_of(run)
    meets_ttft, meets_itl = found.ttft_s <= slo.ttft_s, found.itl_s <= slo.itl_s
    horizon_s = run.trace.duration_s or max(each.ended_s for each in run.ended)
    classes = np.array(found.classes)
    refused = Counter(each.status for each in run.ended if each.status != OK)
    return Results(
        policy=policy,
        requests=len(run.ended),
        completed=len(run.ended) - refused.total(),
        refused=dict(sorted(refused.items())),
        attainment_ttft=float(meets_ttft.mean()),
        attainment_itl=float(meets_itl.mean()),
        attainment_itl_p95=float((found.gap_p95_s <= slo.itl_s).mean()),
        attainment_by_class={
            name: (
                float(meets_ttft[classes == name].mean()),
                float(meets_itl[classes == name].mean()),
            )
            for name in sorted(set(found.classes))
        },
        ttft_s=_percentiles(found.ttft_s),
        itl_s=_percentiles(found.itl_s),
        over_target_ttft=_over(found.arrival_s, found.ttft_s, slo.ttft_s),
        over_target_itl=_over(found.arrival_s, found.itl_s, slo.itl_s),
        replica_hours_by_pool={pool: worker_seconds(run, pool, horizon_s) / 3600 for pool in Pool},
        changes=sum(run.changes.values()),
        role_changes=run.changes[ActionKind.CHANGE_ROLE],
        cold_starts=run.cold_starts,
        moved=run.moved,
        preemptions=run.preemptions,
    )


def _windows(arrival_s: Array, values_s: Array) -> list[Array]:
    """Group values by windows of 10 s of their arrivals."""
    numbers = (arrival_s // _WINDOW_S).astype(int)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return np.split(values_s, starts[1:])


def _latencies(active: Active) -> tuple[float, float, float]:
    if active.status != OK:
        return math.inf, math.inf, math.inf
    ttft_s = active.first_s - active.request.arrival_s
    tokens = active.request.output_tokens
    itl_s = (active.ended_s - active.first_s) / (tokens - 1) if tokens > 1 else 0.0
    return ttft_s, itl_s, active.gap_p95_s


def _percentiles(values_s: Array) -> tuple[float, float, float]:
    finite = values_s[np.isfinite(values_s)]
    if not len(finite):
        return math.nan, math.nan, math.nan
    p50, p95, p99 = np.percentile(finite, [50, 95, 99], method="inverted_cdf")
    return float(p50), float(p95), float(p99)


def _over(arrival_s: Array, values_s: Array, target_s: float) -> float:
    groups = _windows(arrival_s, values_s)
    over = sum(float(np.quantile(each, 0.95, method="inverted_cdf")) > target_s for each in groups)
    return over / len(groups)
