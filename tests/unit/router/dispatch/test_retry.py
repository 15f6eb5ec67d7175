from __future__ import annotations

import pytest

from core.errors import (
    WORKER_DRAINING,
    BatonError,
    CapacityError,
    InternalError,
    UnavailableError,
    WorkerLostError,
    WorkerUnreachableError,
)
from router.dispatch.retry import FIRST_WAIT_S, MAX_WAIT_S, Retries, RetryLimits

LIMITS = RetryLimits(max_attempts=3, timeout_s=10, avoid_s=3, cold_start_timeout_s=50)
LOST = WorkerLostError("lost")
UNREACHABLE = WorkerUnreachableError("unreachable")
WORKER = ("decode-1", "incarnation")


def failed(retries: Retries, error: BatonError = LOST, tokens: int = 0, now_s: float = 0) -> None:
    retries.failed(error, WORKER, tokens=tokens, now_s=now_s)


def test_a_worker_that_failed_is_avoided_for_a_while() -> None:
    retries = Retries(LIMITS)
    failed(retries, now_s=5)
    assert retries.excluded(7.9) == {WORKER}
    assert retries.excluded(8) == frozenset()


def test_a_full_worker_is_avoided_as_long_as_it_asks() -> None:
    retries = Retries(LIMITS)
    failed(retries, CapacityError("full", retry_after_s=0.5))
    assert retries.excluded(0.4) == {WORKER}
    assert retries.excluded(0.5) == frozenset()


def test_attempts_that_no_worker_accepted_do_not_count() -> None:
    retries = Retries(LIMITS)
    failed(retries)
    failed(retries, UnavailableError("drains", reason=WORKER_DRAINING))
    failed(retries, CapacityError("full"))
    failed(retries, UNREACHABLE)
    failed(retries)
    with pytest.raises(InternalError, match="third"):
        failed(retries, InternalError("third"))


def test_attempts_lost_at_another_router_count() -> None:
    retries = Retries(LIMITS, lost_attempts=2)
    assert not retries.is_over
    with pytest.raises(WorkerLostError):
        failed(retries)
    assert retries.is_over


def test_unreachable_workers_are_tried_until_the_timeout() -> None:
    """``failed`` must check the timeout, too, because ``wait_s`` may never be called.

    With two workers and tries that take longer than ``avoid_s``, one can always be tried again.
    """
    retries = Retries(LIMITS)
    failed(retries, UNREACHABLE, now_s=100)
    failed(retries, UNREACHABLE, now_s=110)
    with pytest.raises(WorkerUnreachableError):
        failed(retries, UNREACHABLE, now_s=110.1)
    failed(retries, UNREACHABLE, tokens=1, now_s=120)  # a token restarts the timeout


def test_waits_grow_and_a_token_resets_them() -> None:
    retries = Retries(LIMITS)
    failed(retries, UNREACHABLE, tokens=1)
    waits_s = [retries.wait_s(0) for _ in range(7)]
    assert waits_s[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits_s[-1] == MAX_WAIT_S
    failed(retries, UNREACHABLE, tokens=1)
    assert retries.wait_s(0) == MAX_WAIT_S
    failed(retries, UNREACHABLE, tokens=2)
    assert retries.wait_s(0) == FIRST_WAIT_S


def test_without_a_token_a_request_waits_no_longer_than_the_timeout() -> None:
    retries = Retries(LIMITS)
    failed(retries, tokens=1, now_s=100)
    failed(retries, tokens=1, now_s=109)
    retries.wait_s(109.9)
    with pytest.raises(WorkerLostError):
        retries.wait_s(109.96)


def test_a_request_without_tokens_does_not_wait_for_full_workers() -> None:
    retries = Retries(LIMITS)
    failed(retries, CapacityError("full", retry_after_s=2))
    with pytest.raises(CapacityError):
        retries.wait_s(0)
    failed(retries, CapacityError("full", retry_after_s=2), tokens=1)
    assert retries.wait_s(0) == FIRST_WAIT_S


def test_the_search_for_first_workers_has_its_own_bound() -> None:
    retries = Retries(LIMITS)
    retries.begin_wait(UnavailableError("no worker"), now_s=100)
    retries.wait_s(149)
    with pytest.raises(UnavailableError):
        retries.wait_s(149.96)
    failed(retries, now_s=149)  # a worker came, and was lost
    retries.wait_s(158)
    with pytest.raises(WorkerLostError):
        retries.wait_s(158.96)
