"""Workers for which the cluster has no place: given up after a time, tried again later. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from autoscale.policy import Spec
from autoscale.snapshot import Phase, Reason, WorkerView
from autoscale.state import PoolState, Unplaced
from autoscale.workers import PoolWorkers

_MAX_DOUBLINGS = 16  # so that the number stays small; the time is bounded by the policy
# A worker that starts may still turn out to have no place. Ray Serve says so within this time.
_PLACED_S = 15.0


def give_up(
    spec: Spec, workers: PoolWorkers, state: PoolState, now_s: float
) -> tuple[PoolState, list[WorkerView]]:
    """Return the workers to give up, and the state with the time of the next try."""
    failed = state.unplaced
    if failed is not None and _has_found_a_place(workers, failed, now_s):
        state, failed = replace(state, unplaced=None), None
    late = [
        each
        for each in workers.of(Phase.PENDING)
        if now_s - each.phase_since_s > spec.placement_timeout_seconds
    ]
    # Workers that were ordered together fail once.
    if any(failed is None or each.phase_since_s > failed.failed_s for each in late):
        failures = 0 if failed is None else failed.failures
        wait_s = spec.placement_retry_seconds * 2 ** min(failures, _MAX_DOUBLINGS)
        retry_s = now_s + min(wait_s, spec.placement_max_retry_seconds)
        state = replace(state, unplaced=Unplaced(failures + 1, now_s, retry_s))
    return state, late


def most_placeable(state: PoolState, workers: PoolWorkers, now_s: float) -> int | None:
    """Return how many workers the pool can have while places are short; None: no bound.

    Args:
        workers: without those that were given up.
    """
    if state.unplaced is None:
        return None
    tries = [w for w in workers.of(Phase.STARTING) if now_s - w.phase_since_s <= _PLACED_S]
    may_try = now_s >= state.unplaced.retry_s and not tries and not workers.of(Phase.PENDING)
    return len(workers) + (1 if may_try else 0)


def _has_found_a_place(workers: PoolWorkers, failed: Unplaced, now_s: float) -> bool:
    """Return whether a worker has got a place after the failure.

    One that is ready since then may have got its place before, unless it is younger than the retry.
    """
    return any(
        each.phase_since_s > failed.failed_s and now_s - each.phase_since_s > _PLACED_S
        for each in workers.of(Phase.STARTING)
    ) or any(each.phase_since_s > failed.retry_s for each in workers.of(Phase.READY))


def describe(
    state: PoolState, late: Collection[WorkerView], placeable: int, now_s: float
) -> Reason:
    """Return why a pool does not get its workers."""
    assert state.unplaced is not None
    problem = next((each.problem for each in late if each.problem), "the cluster has no place")
    wait_s = state.unplaced.retry_s - now_s
    when = f"comes in {wait_s:.0f} s" if wait_s > 0 else "is under way"
    text = f"{problem}; try {state.unplaced.failures + 1} {when}"
    return Reason("placementTimeoutSeconds", placeable, text)
