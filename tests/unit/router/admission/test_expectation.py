from __future__ import annotations

import pytest

from router.admission.expectation import (
    FEW_REQUESTS,
    FIRST_GROWTH_TOKENS,
    KNOWN_REQUESTS,
    Expectation,
)
from router.phases import PhaseClock


def phases(first_s: float, tokens: int, step_s: float = 0.1) -> PhaseClock:
    """Of a request that got so many tokens; with none, it waited for ``first_s`` so far."""
    now_s = 100.0

    def clock() -> float:
        return now_s

    made = PhaseClock(clock)
    made.dispatched()
    now_s += first_s
    for _ in range(tokens):
        made.tokens_arrived(1)
        now_s += step_s
    return made


def after(*lengths: int) -> Expectation:
    expectation = Expectation()
    for length in lengths:
        expectation.note(phases(0.5, length), length)
    return expectation


def test_before_enough_is_known_a_request_takes_what_it_asks_for_within_reason() -> None:
    few = after(*[5] * (FEW_REQUESTS - 1))
    assert few.growth_tokens(200) == 200
    assert few.growth_tokens(100_000) == FIRST_GROWTH_TOKENS
    assert few.service_s(1000) == 0.0, "nobody knows"


def test_growth_is_that_of_most_requests() -> None:
    known = after(*range(1, 101))
    assert known.growth_tokens(1000) == 91
    assert known.growth_tokens(20) == 20, "and never more than was asked for"


def test_only_the_latest_requests_count() -> None:
    assert after(*[900] * 100, *[5] * KNOWN_REQUESTS).growth_tokens(1000) == 5


def test_a_request_runs_for_its_first_token_and_the_steps_after_it() -> None:
    known = after(*[21] * 50)
    assert known.service_s(1000) == pytest.approx(0.5 + 20 * 0.1)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1)


def test_one_token_says_nothing_of_the_steps() -> None:
    known = after(*[21] * 50, 1)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1)


def test_a_resumed_request_with_nothing_left_to_run_tells_no_times() -> None:
    known = after(*[21] * 50)
    known.note(PhaseClock(lambda: 100.0), 21)
    assert known.service_s(1) == pytest.approx(0.5)


def test_who_was_cut_off_tells_that_all_has_become_slower_and_never_faster() -> None:
    known = after(*[21] * 50)
    known.note(phases(0.01, 0), None)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1), "it waited a moment only"
    for _ in range(50):
        known.note(phases(3.0, 0), None)
    assert known.service_s(1) == pytest.approx(3.0, rel=0.05)
    for _ in range(50):
        known.note(phases(3.0, 5, step_s=0.4), None)
    assert known.service_s(2) == pytest.approx(3.4, rel=0.05)
    assert known.growth_tokens(1000) == 21, "its length is not known"
