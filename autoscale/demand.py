"""Adds up what the requests of all routers need of one pool. Pure.

The live autoscaler and the simulator both call it, so their numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoscale.snapshot import PoolDemand
from core.histogram import Histogram
from core.types import Need, Pool, RouterRecord

# A request that waits for one of these waits for the pool.
_NEEDS = {Pool.PREFILL: (Need.PREFILL, Need.BOTH), Pool.DECODE: (Need.DECODE, Need.BOTH)}


def demand_of(pool: Pool, routers: Sequence[RouterRecord], latency_window_s: float) -> PoolDemand:
    """Return the demand of one pool. Each request is at one router only.

    Args:
        latency_window_s: the latencies of the records are those of this many latest seconds.
    """
    queues = [each for router in routers for each in router.queues if each.need in _NEEDS[pool]]
    shares = [each for router in routers for each in router.shares if each.pool is pool]
    is_prefill = pool is Pool.PREFILL
    windows = [router for router in routers if router.window_s > 0]
    requests_per_s = sum(router.arrived_requests / router.window_s for router in windows)
    tokens_per_s = sum(
        (router.arrived_prompt_tokens if is_prefill else router.output_tokens) / router.window_s
        for router in windows
    )
    latencies = [router.ttft_s if is_prefill else router.itl_s for router in routers]
    return PoolDemand(
        waiting_requests=sum(each.requests for each in queues),
        waiting_tokens=sum(q.prompt_tokens if is_prefill else q.kv_tokens for q in queues),
        oldest_wait_s=max((each.oldest_wait_s for each in queues), default=0.0),
        running_requests=sum(each.requests for each in shares),
        running_tokens=sum(each.tokens for each in shares),
        arrival_requests_per_s=requests_per_s,
        arrival_tokens_per_s=tokens_per_s,
        latency_s=sum(latencies, Histogram()),
        latency_window_s=latency_window_s,
    )
