from __future__ import annotations

import pytest

from router.phases import PhaseClock


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_phases_of_a_whole_request() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    clock.now_s += 0.010
    phases.dispatched()
    clock.now_s += 0.200
    phases.tokens_arrived(1)
    clock.now_s += 0.001
    phases.response_written()
    clock.now_s += 0.039
    phases.tokens_arrived(1)
    for _ in range(3):
        clock.now_s += 0.020
        phases.tokens_arrived(1)
        phases.response_written()
    clock.now_s += 9
    report = phases.report()
    assert report.queue_ms == pytest.approx(10)
    assert report.prefill_ms == pytest.approx(200)
    assert report.ttft_ms == pytest.approx(211)
    assert report.handoff_ms == pytest.approx(40)
    assert report.decode_ms == pytest.approx(60)
    assert report.tokens_per_s == pytest.approx(4 / 0.1)


def test_only_the_first_attempt_counts_as_dispatch() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    phases.dispatched()
    clock.now_s += 1
    phases.dispatched()
    phases.tokens_arrived(1)
    assert phases.report().prefill_ms == pytest.approx(1000)


def test_phases_that_were_not_reached_are_zero() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    phases.tokens_arrived(0)
    report = phases.report()
    assert (report.ttft_ms, report.handoff_ms, report.tokens_per_s) == (0, 0, 0)
    phases.tokens_arrived(5)
    assert phases.report().tokens_per_s == 0
