"""What each signal asks for."""

from __future__ import annotations

from typing import Any

import pytest

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
from autoscale.signals import Measured, evaluate
from autoscale.snapshot import PoolDemand
from core.histogram import Histogram, bucket_of

DEMAND = PoolDemand(
    waiting_requests=6,
    waiting_tokens=3000,
    running_requests=4,
    running_tokens=1000,
    arrival_requests_per_s=2.0,
    arrival_tokens_per_s=900.0,
    latency_window_s=30.0,
)


def measured(demand: PoolDemand = DEMAND, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "base": 2,
        "demand": demand,
        "tokens_per_s": 500.0,
        "kv_tokens_total": 2000.0,
        "settled": 2,
        "tolerance_up": 0.1,
        "tolerance_down": 0.1,
    }
    return Measured(**{**values, **changes})


def signal(kind: type[Any], **fields: Any) -> Any:
    return kind.model_validate({"type": kind.__name__, **fields})


@pytest.mark.parametrize(
    ("each", "needed"),
    [
        (signal(QueueRequests, target=3), 4),  # 10 requests
        (signal(QueueTokens, target=800), 5),  # 4000 tokens
        (signal(QueueSeconds, target=2), 4),  # 4000 tokens / 500 per s = 8 s
        (signal(Utilization, target=0.6), 3),  # 900 / 500 = 1.8 busy workers
        (signal(KVUtilization, target=0.5), 4),  # 4000 of 2000 tokens of KV
    ],
)
def test_a_linear_signal_divides_by_its_target(each: Signal, needed: int) -> None:
    vote = evaluate(0, each, measured())
    assert (vote.needed, vote.wanted) == (needed, needed)
    assert vote.rule == f"signals[0] {each.type}"


@pytest.mark.parametrize("each", [signal(QueueSeconds, target=2), signal(Utilization, target=0.6)])
def test_an_unknown_rate_gives_no_number(each: Signal) -> None:
    vote = evaluate(0, each, measured(tokens_per_s=0.0))
    assert (vote.needed, vote.wanted) == (None, None)
    assert "unknown" in vote.text


def test_unknown_kv_room_gives_no_number() -> None:
    assert (
        evaluate(0, signal(KVUtilization, target=0.5), measured(kv_tokens_total=0)).wanted is None
    )


def test_without_requests_an_unknown_rate_does_not_matter() -> None:
    idle = PoolDemand(latency_window_s=30.0)
    vote = evaluate(0, signal(QueueSeconds, target=2), measured(idle, tokens_per_s=0.0))
    assert vote.wanted == 0


def latencies(seconds: float, count: int = 100) -> Histogram:
    return Histogram({bucket_of(seconds): count})


def with_latency(seconds: float, count: int = 100, **changes: Any) -> PoolDemand:
    values: dict[str, Any] = {
        "waiting_requests": 50,
        "arrival_requests_per_s": 2.0,
        "latency_s": latencies(seconds, count),
        "latency_window_s": 30.0,
    }
    return PoolDemand(**{**values, **changes})


SLO = signal(TTFT, percentile=95, targetMilliseconds=1000)
TOKENS_SLO = signal(ITL, percentile=95, targetMilliseconds=50)


def test_a_latency_follows_the_ratio_law() -> None:
    assert evaluate(0, SLO, measured(with_latency(1.5), base=4, settled=4)).wanted == 6
    assert evaluate(0, SLO, measured(with_latency(1.02), base=4, settled=4)).wanted == 4
    assert evaluate(0, TOKENS_SLO, measured(with_latency(0.025), base=4, settled=4)).wanted in (
        2,
        3,
    )


def test_a_latency_at_most_doubles() -> None:
    assert evaluate(0, SLO, measured(with_latency(100.0), base=4, settled=4)).wanted == 8


def test_a_slow_request_alone_adds_no_worker() -> None:
    """Its latency is above the target on an idle pool, and more workers would not change it."""
    for requests in (0, 1):
        busy = with_latency(5.0, waiting_requests=0, running_requests=requests)
        assert evaluate(0, SLO, measured(busy, base=1, settled=1)).wanted == 1


def test_no_requests_need_no_workers_whatever_the_latencies_were() -> None:
    idle = with_latency(5.0, waiting_requests=0, arrival_requests_per_s=0.0)
    assert evaluate(0, SLO, measured(idle)).wanted == 0


def test_workers_that_start_count_as_coming() -> None:
    """Of 8 workers 4 have settled. The latencies are those of the 4, so 8 are enough."""
    vote = evaluate(0, SLO, measured(with_latency(100.0), base=8, settled=4))
    assert vote.wanted == 8


def test_a_low_latency_takes_no_worker_while_others_start() -> None:
    assert evaluate(0, SLO, measured(with_latency(0.01), base=8, settled=4)).wanted == 8


def test_a_low_latency_takes_one_worker_if_the_rate_is_unknown() -> None:
    slow = measured(with_latency(0.01), base=8, settled=8, tokens_per_s=0.0)
    assert evaluate(0, SLO, slow).wanted == 7


def test_few_latencies_add_nothing() -> None:
    assert evaluate(0, SLO, measured(with_latency(5.0, count=19))).wanted in (1, 2)
    assert evaluate(0, SLO, measured(with_latency(5.0, count=20))).wanted == 4


def test_without_a_settled_worker_a_latency_holds() -> None:
    assert evaluate(0, SLO, measured(with_latency(5.0), settled=0)).wanted is None
