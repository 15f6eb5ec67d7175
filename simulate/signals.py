"""What the autoscaler would see: queues, arrivals and latencies, as routers publish them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from autoscale.snapshot import Phase, PoolDemand, Snapshot, WorkerView
from core.histogram import Histogram, bucket_of
from core.types import Need, Pool, WorkerShare
from simulate.batch import Gaps
from simulate.fleet import Fleet, Worker
from simulate.front import Front

# A request that waits for one of these waits for the pool.
_NEEDS = {Pool.PREFILL: (Need.PREFILL, Need.BOTH), Pool.DECODE: (Need.DECODE, Need.BOTH)}


@dataclass(slots=True)
class _Second:
    """What happened within one second."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: dict[int, int] = field(default_factory=dict)  # counts by bucket
    itl: dict[int, int] = field(default_factory=dict)


class Window:
    """Arrivals and latencies of the latest seconds.

    Args:
        window_s: how many of them count.
    """

    def __init__(self, window_s: int) -> None:
        self._seconds: deque[_Second] = deque([_Second()], maxlen=window_s)

    def arrived(self, prompt_tokens: int) -> None:
        """Count a new request, also one that is refused."""
        second = self._seconds[-1]
        second.requests += 1
        second.prompt_tokens += prompt_tokens

    def first_token(self, ttft_s: float) -> None:
        """Count a TTFT."""
        ttft, bucket = self._seconds[-1].ttft, bucket_of(ttft_s)
        ttft[bucket] = ttft.get(bucket, 0) + 1

    def gaps(self, gaps: Gaps) -> None:
        """Count times between two tokens."""
        second = self._seconds[-1]
        second.output_tokens += gaps.streams * gaps.count
        for bucket, count in gaps.by_bucket():
            second.itl[bucket] = second.itl.get(bucket, 0) + count

    def next_second(self) -> None:
        """Begin a new second."""
        self._seconds.append(_Second())

    def demand(self, pool: Pool) -> tuple[float, float, Histogram]:
        """Return requests per second, tokens per second and latencies of a pool."""
        seconds, length_s = self._seconds, len(self._seconds)
        is_prefill = pool is Pool.PREFILL
        tokens = sum(each.prompt_tokens if is_prefill else each.output_tokens for each in seconds)
        return (
            sum(each.requests for each in seconds) / length_s,
            tokens / length_s,
            _added(each.ttft if is_prefill else each.itl for each in seconds),
        )


class DecodeRates:
    """The output tokens per second of each decode worker while it was busy, smoothed."""

    _WEIGHT = 0.1  # of the latest second

    def __init__(self) -> None:
        self._totals: dict[tuple[str, int], tuple[float, int]] = {}
        self._rates: dict[tuple[str, int], float] = {}

    def measure(self, workers: Iterable[Worker]) -> None:
        """Note what the workers have done since the last call."""
        totals = {}
        for worker in workers:
            if worker.decode is None:
                continue
            key = (worker.id, worker.incarnation)
            busy_s, tokens = worker.decode.busy_s, worker.decode.done_tokens
            totals[key] = busy_s, tokens
            before_s, before = self._totals.get(key, (0.0, 0))
            if busy_s > before_s:
                rate = (tokens - before) / (busy_s - before_s)
                was = self._rates.get(key)
                self._rates[key] = rate if was is None else was + self._WEIGHT * (rate - was)
        self._totals = totals
        self._rates = {key: rate for key, rate in self._rates.items() if key in totals}

    def rate(self, worker: Worker) -> float:
        """Return the rate; 0 while unknown."""
        return self._rates.get((worker.id, worker.incarnation), 0.0)


def snapshot_of(
    fleet: Fleet, front: Front, window: Window, rates: DecodeRates, gpus: float, now_s: float
) -> Snapshot:
    """Return what the autoscaler sees now.

    Args:
        now_s: on the policy's clock, whose zero is ``now_s`` less the timeline's time.
    """
    offset_s = now_s - front.now_s
    views, shares = [], []
    for worker in fleet:
        view, share = _view(worker, front, rates, gpus, offset_s)
        views.append(view)
        if share is not None:
            shares.append(share)
    demand = {pool: _demand(pool, front, window, shares) for pool in Pool}
    return Snapshot(tuple(views), demand, measured_s=now_s)


def _view(
    worker: Worker, front: Front, rates: DecodeRates, gpus: float, offset_s: float
) -> tuple[WorkerView, WorkerShare | None]:
    share, load = None, None
    if worker.record is not None:
        load = worker.load()
        own = front.ledger.own_load(worker.record.key)
        rate = own.tokens_per_s if worker.pool is Pool.PREFILL else rates.rate(worker)
        share = WorkerShare(
            worker.id, worker.record.incarnation, worker.pool, own.requests, own.tokens, rate
        )
    block_tokens = load.kv_block_tokens if load is not None else 0
    view = WorkerView(
        id=worker.id,
        pool=worker.role,
        phase=worker.phase,
        phase_since_s=worker.since_s + offset_s,
        gpus=0.0 if worker.phase is Phase.PENDING else gpus,
        requests=share.requests if share is not None else 0,
        kv_tokens_used=(load.kv_blocks_total - load.kv_blocks_free) * block_tokens if load else 0,
        kv_tokens_total=load.kv_blocks_total * block_tokens if load else 0,
        tokens_per_s=share.tokens_per_s if share is not None else 0.0,
        can_change_role=True,
        problem="no GPU is free" if worker.phase is Phase.PENDING else "",
    )
    return view, share


def _demand(pool: Pool, front: Front, window: Window, shares: list[WorkerShare]) -> PoolDemand:
    """Add up what the requests need of one pool."""
    queues = [each for each in front.turns.queue_loads() if each.need in _NEEDS[pool]]
    own = [each for each in shares if each.pool is pool]
    is_prefill = pool is Pool.PREFILL
    requests_per_s, tokens_per_s, latencies = window.demand(pool)
    return PoolDemand(
        waiting_requests=sum(each.requests for each in queues),
        waiting_tokens=sum(q.prompt_tokens if is_prefill else q.kv_tokens for q in queues),
        oldest_wait_s=max((each.oldest_wait_s for each in queues), default=0.0),
        running_requests=sum(each.requests for each in own),
        running_tokens=sum(each.tokens for each in own),
        arrival_requests_per_s=requests_per_s,
        arrival_tokens_per_s=tokens_per_s,
        latency_s=latencies,
    )


def _added(counts: Iterable[dict[int, int]]) -> Histogram:
    total: dict[int, int] = {}
    for each in counts:
        for bucket, count in each.items():
            total[bucket] = total.get(bucket, 0) + count
    return Histogram(total)
