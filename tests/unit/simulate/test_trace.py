"""Changes of a trace, and the bursty one."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from simulate.trace import Trace, TraceOptions, TraceRequest, bursty, prepared

TRACE = Trace("t", tuple(TraceRequest(float(at), 10, 5, block_ids=(at,)) for at in range(4)))


def test_options_apply_in_their_order() -> None:
    changed = prepared(TRACE, TraceOptions(duration_s=2.5, speed=2.0, service_class="batch"))
    assert [each.arrival_s for each in changed.requests] == [0.0, 0.5, 1.0]
    assert {each.service_class for each in changed.requests} == {"batch"}


def test_copies_share_no_blocks_and_come_up_to_the_jitter_later() -> None:
    changed = prepared(TRACE, TraceOptions(copies=3, jitter_s=0.25))
    assert len(changed.requests) == 12
    blocks = [block for each in changed.requests for block in each.block_ids]
    assert len(set(blocks)) == 12
    assert all(each.arrival_s % 1 <= 0.25 for each in changed.requests)
    assert changed == prepared(TRACE, TraceOptions(copies=3, jitter_s=0.25))


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan")])
def test_a_speed_must_be_positive(speed: float) -> None:
    with pytest.raises(ConfigError, match="speed"):
        TraceOptions(speed=speed)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (TraceOptions(speed=1e-6), r"lasts 3e\+06 s \(seconds\), more than 31 days"),
        (TraceOptions(speed=1e-310), r"lasts inf s"),
        (TraceOptions(copies=10**9), "4 requests with 1,000,000,000 copies are more than"),
    ],
)
def test_a_trace_that_is_too_long_is_refused(options: TraceOptions, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        prepared(TRACE, options)


def test_a_jitter_must_be_finite() -> None:
    with pytest.raises(ConfigError, match="the jitter is nan s"):
        TraceOptions(jitter_s=float("nan"))


def test_bursts_have_about_the_rates_asked_for() -> None:
    trace = bursty(seed=3, duration_s=20_000, base_per_s=1, burst_per_s=10, calm_s=90, burst_s=10)
    expected = 20_000 * (1 * 90 + 10 * 10) / 100
    assert len(trace.requests) == pytest.approx(expected, rel=0.15)
    mean = sum(each.prompt_tokens for each in trace.requests) / len(trace.requests)
    assert mean == pytest.approx(1200, rel=0.1)
    assert trace == bursty(
        seed=3, duration_s=20_000, base_per_s=1, burst_per_s=10, calm_s=90, burst_s=10
    )
