"""Old measurements count no longer, and nothing counts twice."""

from __future__ import annotations

import pytest

from core.histogram import Histogram, bucket_of
from router.phases import PhaseClock
from router.signals import LATENCY_WINDOW_S, RATE_WINDOW_S, Rates, Signals


class Clock:
    now_s = 100.25

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signals(clock: Clock) -> Signals:
    return Signals(clock)


def test_rates_cover_the_latest_seconds(clock: Clock, signals: Signals) -> None:
    begin_s = clock.now_s
    for second in range(60):
        clock.now_s = begin_s + second
        signals.arrived(50)
        signals.decoded(8)
    rates = signals.rates()
    # Ten complete seconds, and the quarter of a second that has begun.
    assert rates == Rates(RATE_WINDOW_S + 0.25, 11, 11 * 50, 11 * 8)
    clock.now_s += RATE_WINDOW_S + 1
    assert signals.rates() == Rates(RATE_WINDOW_S + 0.25, 0, 0, 0)


def test_a_young_router_divides_by_its_age(clock: Clock, signals: Signals) -> None:
    signals.arrived(10)
    assert signals.rates().window_s == 1.0
    clock.now_s += 4
    assert signals.rates() == Rates(4.0, 1, 10, 0)


def test_requests_that_were_refused_untokenised_count_with_the_mean(signals: Signals) -> None:
    signals.arrived(None)
    assert signals.rates().prompt_tokens == 0, "nothing is known of any prompt"
    signals.arrived(100)
    signals.arrived(200)
    rates = signals.rates()
    assert (rates.requests, rates.prompt_tokens) == (3, 450)


def test_latencies_end_with_their_window(clock: Clock, signals: Signals) -> None:
    signals.first_token(0.5)
    signals.next_tokens(1, 0.02)
    expected = Histogram({bucket_of(0.5): 1}), Histogram({bucket_of(0.02): 1})
    for clock.now_s in (101.0, 100.25 + LATENCY_WINDOW_S):
        assert signals.latencies() == expected
    clock.now_s = 101.0 + LATENCY_WINDOW_S
    assert signals.latencies() == (Histogram(), Histogram()), "the router is idle"


def test_the_memory_is_bounded(clock: Clock, signals: Signals) -> None:
    for _ in range(1000):
        clock.now_s += 0.7
        signals.arrived(1)
    assert len(signals._slots) == LATENCY_WINDOW_S + 1


def test_ttft_and_gaps_of_one_request(clock: Clock, signals: Signals) -> None:
    phases = PhaseClock(clock, signals)
    clock.now_s += 3.0  # it waits for room
    phases.dispatched()
    clock.now_s += 0.5
    phases.tokens_arrived(1)
    clock.now_s += 0.04
    phases.tokens_arrived(4)  # four tokens of one message
    phases.tokens_arrived(0)
    clock.now_s += 0.1
    phases.tokens_arrived(1)
    ttft, itl = signals.latencies()
    assert ttft == Histogram({bucket_of(3.5): 1})
    assert itl == Histogram({bucket_of(0.01): 4, bucket_of(0.1): 1})


def test_a_resumed_request_has_no_ttft_here(clock: Clock, signals: Signals) -> None:
    phases = PhaseClock(clock, signals)
    phases.resumed()
    for _ in range(2):
        clock.now_s += 0.05
        phases.tokens_arrived(1)
    ttft, itl = signals.latencies()
    assert ttft == Histogram()
    assert itl == Histogram({bucket_of(0.05): 1})
