"""How many workers each signal of a policy asks for. Pure.

Most signals are linear: a number of the pool, divided by the target per worker. A latency is not.
It follows HPA's ratio law (workers × measured / target) with three restraints, because more workers
lower a latency only while requests wait for each other:

- It grows only up to one worker per request, and at most doubles.
- It counts only workers that have been ready for as long as the latencies were collected.
  So old latencies and cold workers don't add workers again and again.
- It shrinks by one worker at a time, unless another law tells that more can go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscale.policy import (
    ITL,
    TTFT,
    KVUtilization,
    QueueRequests,
    QueueSeconds,
    QueueTokens,
    Signal,
    Utilization,
)
from autoscale.snapshot import PoolDemand

_LARGEST_GROWTH = 2.0  # of a latency's ratio: latencies explode under overload, and say little then
_MANY_WORKERS = 1_000_000  # bounds a quotient before it becomes an integer


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a pool when its signals are evaluated.

    ``tokens_per_s`` and ``kv_tokens_total`` are those of one worker, 0 if unknown. ``settled`` is
    the number of workers that have been ready for longer than the window of the latencies.
    """

    base: int  # the target so far
    demand: PoolDemand
    tokens_per_s: float
    kv_tokens_total: float
    settled: int
    tolerance_up: float
    tolerance_down: float
    # A worker leaves only if the signal stays below its target by this fraction. In decode, streams
    # run more slowly on fewer workers, so there are more of them.
    margin: float = 0.0

    @property
    def requests(self) -> int:
        return self.demand.waiting_requests + self.demand.running_requests

    @property
    def tokens(self) -> int:
        return self.demand.waiting_tokens + self.demand.running_tokens

    @property
    def is_idle(self) -> bool:
        """No request waits, runs or has arrived lately."""
        return self.demand.is_idle


@dataclass(frozen=True, slots=True)
class Vote:
    """What one signal asks for.

    ``wanted`` is the number of workers with which the signal is within its target, or the target so
    far if that is within the tolerance. ``needed`` is the number that must stay, for the N−1 check;
    it knows no tolerance. Both are None if a number that the signal depends on is unknown.
    """

    rule: str
    needed: int | None
    wanted: int | None
    text: str


def evaluate(index: int, signal: Signal, measured: Measured) -> Vote:
    """Return the vote of the signal at ``index`` of the policy."""
    rule = f"signals[{index}] {signal.type}"
    if isinstance(signal, TTFT | ITL):
        return _evaluate_latency(rule, signal, measured)
    amount, unit, missing = _amount(signal, measured)
    if missing:
        return Vote(rule, None, None, f"{missing}, so it holds")
    exact = min(amount / signal.target, _MANY_WORKERS)
    text = f"{amount:.4g} {unit} / {signal.target:g} per worker = {exact:.2f}"
    if exact > measured.requests and not isinstance(signal, Utilization):
        # One long prompt is many seconds of work, but only one worker can do it.
        exact = measured.requests
        text += f", for {measured.requests} requests"
    needed = ceil(exact / (1 - measured.margin))
    low, high = 1 - measured.tolerance_down, 1 + measured.tolerance_up
    if measured.base and low <= exact / measured.base <= high:
        return Vote(rule, needed, measured.base, f"{text}, within the tolerance")
    return Vote(rule, needed, ceil(exact), text)


def ceil(exact: float) -> int:
    """Round up, except for an error of rounding."""
    return math.ceil(exact - 1e-9)


def _amount(
    signal: QueueRequests | QueueTokens | QueueSeconds | Utilization | KVUtilization,
    measured: Measured,
) -> tuple[float, str, str]:
    """Return the pool's number, its unit, and what is missing for it ("": nothing)."""
    rate, room = measured.tokens_per_s, measured.kv_tokens_total
    match signal:
        case QueueRequests():
            return measured.requests, "requests waiting or running", ""
        case QueueTokens():
            return measured.tokens, "tokens waiting or running", ""
        case KVUtilization():
            if measured.tokens and not room:
                return 0, "", "the KV room of a worker is unknown"
            return measured.tokens / (room or 1), "workers' KV waiting or running", ""
        case QueueSeconds():
            amount, unit = float(measured.tokens), "s of work waiting or running"
        case Utilization():
            amount, unit = measured.demand.arrival_tokens_per_s, "busy workers"
    if amount and not rate:
        return 0, "", "the rate of a worker is unknown"
    return amount / (rate or 1), unit, ""


def _fewest(signal: TTFT | ITL, measured: Measured) -> int:
    """Return the number below which a low latency does not ask to go.

    ITL grows at most in proportion to the streams of a worker, so the ratio law is safe. TTFT grows
    more steeply. That is safe only if the N−1 check knows the rate and so the utilisation.
    """
    if measured.settled < measured.base:  # some workers start
        return max(measured.base, 1)
    if isinstance(signal, ITL) or measured.tokens_per_s:
        return 1
    return max(measured.settled - 1, 1)


def _evaluate_latency(rule: str, signal: TTFT | ITL, measured: Measured) -> Vote:
    settled, latencies = measured.settled, measured.demand.latency_s
    if measured.is_idle:
        return Vote(rule, 0, 0, "no requests")
    if settled == 0:
        return Vote(rule, None, None, "no worker has been ready for long enough, so it holds")
    fewest = _fewest(signal, measured)
    quantile = latencies.quantile(signal.percentile / 100)
    enough = math.ceil(100 / (100 - signal.percentile))  # with fewer, the quantile is the maximum
    if quantile is None or latencies.total < enough:
        return Vote(rule, fewest, fewest, f"{latencies.total} latencies, fewer than {enough}")
    ratio = quantile * 1000 / signal.target_milliseconds
    text = (
        f"p{signal.percentile} {quantile * 1000:.4g} ms / {signal.target_milliseconds:g} ms, "
        f"{settled} workers"
    )
    if ratio <= 1:
        needed = max(ceil(settled * ratio), fewest)
    else:
        grown = ceil(settled * min(ratio, _LARGEST_GROWTH))
        needed = max(fewest, min(grown, measured.requests))
        text += f", {measured.requests} requests"
    if 1 - measured.tolerance_down <= ratio <= 1 + measured.tolerance_up:
        return Vote(rule, needed, max(measured.base, 1), f"{text}, within the tolerance")
    return Vote(rule, needed, needed, text)
