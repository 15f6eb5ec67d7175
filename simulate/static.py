"""The pools of fixed size to compare with, and the size to start with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.types import Pool
from simulate.cluster import ClusterSettings, run
from simulate.latency import LatencyModel
from simulate.metrics import Results, Slo, evaluate
from simulate.trace import Trace, TraceRequest

ATTAINMENT = 0.99  # of both SLOs
MAX_WORKERS = 128  # per pool; a trace that needs more has no fixed pools here
_MAX_TRIES = 24  # simulations after the two bisections
_BUSY = 0.7  # share of the time that the workers of ``first_workers`` are busy


@dataclass(frozen=True, slots=True)
class Static:
    """The smallest fixed pools that attain both SLOs."""

    workers: Mapping[Pool, int]
    results: Results


def first_workers(
    trace: Trace,
    model: LatencyModel,
    slo: Slo,
    within_s: float = 120.0,
    max_tokens: int | None = None,
) -> dict[Pool, int]:
    """Return how many workers the first part of a trace needs, by the rates of the model.

    A simulation begins with so many, as the cluster would have them from the time before.
    ``max_tokens`` is what clients allow, as in ``FrontSettings``.
    """
    first = [each for each in fitting(trace, model, max_tokens) if each.arrival_s <= within_s]
    length_s = max(1.0, min(within_s, trace.duration_s))
    return {
        pool: max(1, math.ceil(seconds / length_s / _BUSY))
        for pool, seconds in work_s(first, model, slo).items()
    }


def fitting(trace: Trace, model: LatencyModel, max_tokens: int | None) -> list[TraceRequest]:
    """Return the requests that are not refused as too long."""
    return [
        each
        for each in trace.requests
        if model.kv.holds(each.prompt_tokens + max(each.output_tokens, max_tokens or 0))
    ]


def work_s(requests: list[TraceRequest], model: LatencyModel, slo: Slo) -> dict[Pool, float]:
    """Return the seconds of work for one worker of each pool. Prefix caches are not counted."""
    outputs = sum(each.output_tokens for each in requests)
    kv_tokens = sum(
        each.output_tokens * (each.prompt_tokens + each.output_tokens / 2) for each in requests
    )
    return {
        Pool.PREFILL: sum(model.prefill.seconds(each.prompt_tokens) for each in requests),
        Pool.DECODE: outputs / model.decode_tokens_per_s(kv_tokens / max(outputs, 1), slo.itl_s),
    }


@dataclass(slots=True)
class StaticSearch:
    """Finds the smallest fixed pools for one trace.

    Attainment does not fall when a pool grows. So the least size of each pool, with an ample other
    one, is found first, by bisection near the size that the mean load needs. Both are lower bounds
    of the answer. From there, the pool whose growth attains more grows until both SLOs are
    attained.
    """

    trace: Trace
    model: LatencyModel
    slo: Slo
    settings: ClusterSettings | None = None
    attainment: float = ATTAINMENT
    _known: dict[tuple[int, int], Results] = field(default_factory=dict)

    def find(self) -> Static | None:
        """Return the pools; None if no pools of up to ``MAX_WORKERS`` attain the SLOs."""
        if not self._is_possible():
            return None
        work = work_s(self._fitting(), self.model, self.slo)
        guess = {
            pool: min(MAX_WORKERS, math.ceil(seconds / max(1.0, self.trace.duration_s)))
            for pool, seconds in work.items()
        }
        ample = {pool: 3 * size + 1 for pool, size in guess.items()}
        while not self._attains(ample[Pool.PREFILL], ample[Pool.DECODE]):
            if max(ample.values()) > MAX_WORKERS:
                return None
            ample = {pool: 2 * size for pool, size in ample.items()}
        prefill = _least(
            lambda size: self._attains(size, ample[Pool.DECODE]),
            guess[Pool.PREFILL],
            ample[Pool.PREFILL],
        )
        decode = _least(
            lambda size: self._attains(ample[Pool.PREFILL], size),
            guess[Pool.DECODE],
            ample[Pool.DECODE],
        )
        for _ in range(_MAX_TRIES):
            if self._attains(prefill, decode):
                break
            more_prefill = self.results(prefill + 1, decode)
            more_decode = self.results(prefill, decode + 1)
            if more_prefill.attainment >= more_decode.attainment:
                prefill += 1
            else:
                decode += 1
        else:
            return None
        workers = {Pool.PREFILL: prefill, Pool.DECODE: decode}
        return Static(workers, self.results(prefill, decode))

    def results(self, prefill: int, decode: int) -> Results:
        """Return the results of fixed pools of these sizes."""
        if (prefill, decode) not in self._known:
            workers = {Pool.PREFILL: prefill, Pool.DECODE: decode}
            done = run(self.trace, self.model, workers, settings=self.settings)
            self._known[prefill, decode] = evaluate(done, self.slo, f"static {prefill}+{decode}")
        return self._known[prefill, decode]

    def _is_possible(self) -> bool:
        """Whether enough prompts take no longer than the TTFT on an idle worker.

        Prompts that may be in a prefix cache count as quick.
        """
        quick = sum(
            bool(each.block_ids)
            or self.model.prefill.seconds(each.prompt_tokens) <= self.slo.ttft_s
            for each in self._fitting()
        )
        return quick >= self.attainment * len(self.trace.requests)

    def _fitting(self) -> list[TraceRequest]:
        max_tokens = None if self.settings is None else self.settings.front.max_tokens
        return fitting(self.trace, self.model, max_tokens)

    def _attains(self, prefill: int, decode: int) -> bool:
        return self.results(prefill, decode).attainment >= self.attainment


def _least(attains: Callable[[int], bool], guess: int, known: int) -> int:
    """Return the least size that attains; ``known`` does. The search begins at the guess."""
    low, high, step = 0, known, 1
    size = min(guess, known - 1)
    while low < size < high:  # away from the guess with growing steps
        if attains(size):
            high, size = size, size - step
        else:
            low, size = size, size + step
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if attains(middle):
            high = middle
        else:
            low = middle
    return high
