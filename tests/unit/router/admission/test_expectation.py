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
    """Return the phases of a request whose first token takes ``first_s``.

    If ``tokens`` is 0, the request has waited for ``first_s`` and has no token yet.
    """
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


def test_with_few_known_requests_growth_is_max_tokens_up_to_a_limit() -> None:
    few = after(*[5] * (FEW_REQUESTS - 1))
    assert few.growth_tokens(200) == 200
    assert few.growth_tokens(100_000) == FIRST_GROWTH_TOKENS
    assert few.service_s(1000) == 0.0, "unknown"


def test_growth_covers_nine_of_ten_requests() -> None:
    known = after(*range(1, 101))
    assert known.growth_tokens(1000) == 91
    assert known.growth_tokens(20) == 20, "never more than max_tokens"


def test_only_the_latest_requests_count() -> None:
    assert after(*[900] * 100, *[5] * KNOWN_REQUESTS).growth_tokens(1000) == 5


def test_service_time_is_the_first_token_and_the_steps_after_it() -> None:
    known = after(*[21] * 50)
    assert known.service_s(1000) == pytest.approx(0.5 + 20 * 0.1)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1)


def test_a_request_with_one_token_does_not_change_the_step_time() -> None:
    known = after(*[21] * 50, 1)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1)


def test_a_resumed_request_that_never_ran_does_not_change_the_times() -> None:
    known = after(*[21] * 50)
    known.note(PhaseClock(lambda: 100.0), 21)
    assert known.service_s(1) == pytest.approx(0.5)


def test_cut_off_requests_can_only_make_the_first_token_time_longer() -> None:
    known = after(*[21] * 50)
    known.note(phases(0.01, 0), None)
    assert known.service_s(11) == pytest.approx(0.5 + 10 * 0.1), "a shorter wait does not count"
    for _ in range(50):
        known.note(phases(3.0, 0), None)
    assert known.service_s(1) == pytest.approx(3.0, rel=0.05)
    for _ in range(50):
        known.note(phases(3.0, 5, step_s=0.4), None)
    assert known.service_s(2) == pytest.approx(3.4, rel=0.05)
    assert known.growth_tokens(1000) == 21, "the length of a cut-off request is unknown"
