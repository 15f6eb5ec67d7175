"""The requests that a simulation replays: arrival times and lengths, without any text.

``simulate.trace_file`` reads them from a file; ``bursty`` makes them up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from core.errors import ConfigError

BLOCK_TOKENS = 512  # per entry of ``block_ids``, as in Mooncake's traces
MAX_REQUESTS = 2_000_000  # about 1 GB of memory; a longer trace must be cut first
MAX_DURATION_S = 31 * 86_400.0  # a simulation takes a step per second


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.

    ``block_ids`` name the prompt's blocks of ``BLOCK_TOKENS`` tokens. Two prompts that begin with
    the same ids begin with the same tokens, so that a prefix cache can serve them. Empty: unknown,
    and the prompt shares nothing.
    """

    arrival_s: float  # since the start of the trace
    prompt_tokens: int
    output_tokens: int
    service_class: str = ""  # empty: the cluster's first class
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival. The first one arrives at 0."""

    name: str
    requests: tuple[TraceRequest, ...]

    @property
    def duration_s(self) -> float:
        """The time from the first arrival to the last one."""
        return self.requests[-1].arrival_s if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is changed before it is replayed, in this order.

    Args:
        duration_s: use only the requests that arrive before this time of the trace.
        copies: replay each request this many times. A copy arrives up to ``jitter_s`` later than
            the original, and shares no prefix with it. So the load grows and keeps its course.
        jitter_s: see ``copies``.
        speed: divide all arrival times by this factor.
        service_class: the class of all requests.
        seed: of the jitter.
    """

    duration_s: float = math.inf
    copies: int = 1
    jitter_s: float = 5.0
    speed: float = 1.0
    service_class: str = ""
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.speed > 0 or math.isinf(self.speed):
            raise ConfigError(f"the speed of a trace is {self.speed:g}; write a number above 0")
        if not self.duration_s > 0:
            raise ConfigError(f"the duration is {self.duration_s:g} s; write a number above 0")
        if self.copies < 1:
            raise ConfigError(f"copies is {self.copies}; write 1 or more")
        if not 0 <= self.jitter_s < math.inf:
            raise ConfigError(f"the jitter is {self.jitter_s:g} s; write a finite number from 0 on")


def prepared(trace: Trace, options: TraceOptions) -> Trace:
    """Apply the options.

    Raises:
        ConfigError: no request is left, or the trace becomes too long to replay.
    """
    kept = [each for each in trace.requests if each.arrival_s < options.duration_s]
    if not kept:
        raise ConfigError(f"{trace.name}: no request to replay; use a longer trace or duration")
    if len(kept) * options.copies > MAX_REQUESTS:
        raise ConfigError(
            f"{trace.name}: {len(kept):,} requests with {options.copies:,} copies are more than "
            f"{MAX_REQUESTS:,} requests; write fewer copies or a shorter duration"
        )
    requests = _copied(kept, options)
    if options.speed != 1 or options.service_class:
        requests = [
            replace(
                each,
                arrival_s=each.arrival_s / options.speed,
                service_class=options.service_class or each.service_class,
            )
            for each in requests
        ]
    changed = Trace(trace.name, ordered(requests))
    if not changed.duration_s <= MAX_DURATION_S:
        raise ConfigError(
            f"{trace.name}: lasts {changed.duration_s:g} s (seconds), more than 31 days; check the "
            "unit of its times, or use a shorter duration or a higher speed"
        )
    return changed


def ordered(requests: Iterable[TraceRequest]) -> tuple[TraceRequest, ...]:
    """Sort the requests by arrival, and let the first one arrive at 0."""
    rows = sorted(requests, key=lambda each: each.arrival_s)
    start_s = rows[0].arrival_s if rows else 0.0
    if start_s == 0.0:
        return tuple(rows)
    return tuple(replace(each, arrival_s=each.arrival_s - start_s) for each in rows)


def bursty(
    *,
    seed: int = 1,
    duration_s: float = 3600.0,
    base_per_s: float = 4.0,
    burst_per_s: float = 24.0,
    calm_s: float = 240.0,
    burst_s: float = 45.0,
    prompt_tokens: int = 1200,
    output_tokens: int = 220,
) -> Trace:
    """Make a trace that alternates between calm times and bursts.

    Arrivals are a Markov-modulated Poisson process with two states. Lengths are log-normal.

    Args:
        base_per_s: requests per second in calm times; ``burst_per_s``: in bursts.
        calm_s: mean length of a calm time; ``burst_s``: of a burst.
        prompt_tokens: the mean; ``output_tokens``, too.
    """
    rng = random.Random(seed)
    requests = [
        TraceRequest(
            arrival_s,
            _log_normal(rng, prompt_tokens, sigma=0.9, most=32_000),
            _log_normal(rng, output_tokens, sigma=0.8, most=4_000),
        )
        for arrival_s in _modulated(rng, duration_s, (base_per_s, burst_per_s), (calm_s, burst_s))
    ]
    if not requests:
        raise ConfigError("the bursty trace has no request; raise its rates or its duration")
    return Trace(f"bursty-{seed}", ordered(requests))


def day(
    *,
    seed: int = 1,
    duration_s: float = 7200.0,
    low_per_s: float = 1.0,
    high_per_s: float = 9.0,
    prompt_tokens: int = 1200,
    output_tokens: int = 220,
) -> Trace:
    """Make a trace whose load rises and falls once, as a day's load does, in less time.

    Arrivals are a Poisson process whose rate is a cosine, made by thinning (Lewis and Shedler,
    1979). Lengths are log-normal.

    Args:
        low_per_s: requests per second at both ends; ``high_per_s``: in the middle.
        prompt_tokens: the mean; ``output_tokens``, too.
    """
    rng = random.Random(seed)
    requests, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(high_per_s)) < duration_s:
        share = (1 - math.cos(2 * math.pi * now_s / duration_s)) / 2
        if rng.random() * high_per_s < low_per_s + (high_per_s - low_per_s) * share:
            requests.append(
                TraceRequest(
                    now_s,
                    _log_normal(rng, prompt_tokens, sigma=0.9, most=32_000),
                    _log_normal(rng, output_tokens, sigma=0.8, most=4_000),
                )
            )
    return Trace(f"day-{seed}", ordered(requests))


def _modulated(
    rng: random.Random,
    duration_s: float,
    rates_per_s: tuple[float, float],
    lengths_s: tuple[float, float],
) -> Iterator[float]:
    now_s, state = 0.0, 0
    while now_s < duration_s:
        end_s = min(now_s + rng.expovariate(1 / lengths_s[state]), duration_s)
        while (now_s := now_s + rng.expovariate(rates_per_s[state])) < end_s:
            yield now_s
        now_s, state = end_s, 1 - state


def _log_normal(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    drawn = rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
    return max(1, min(most, round(drawn)))


def _copied(requests: list[TraceRequest], options: TraceOptions) -> list[TraceRequest]:
    if options.copies == 1:
        return requests
    rng = random.Random(options.seed)
    # Block ids of copies lie in ranges of their own.
    offset = 1 + max((max(each.block_ids, default=0) for each in requests), default=0)
    copies = list(requests)
    for copy in range(1, options.copies):
        copies += [
            replace(
                each,
                arrival_s=each.arrival_s + rng.uniform(0, options.jitter_s),
                block_ids=tuple(block + copy * offset for block in each.block_ids),
            )
            for each in requests
        ]
    return copies
