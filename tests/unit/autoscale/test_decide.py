"""What is decided, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoscale.decide import Decision, decide
from autoscale.policy import Policy
from autoscale.snapshot import ActionKind, Phase, PoolDemand, Snapshot, WorkerView
from autoscale.state import State
from core.types import Pool
from tests.support.autoscale_views import (
    AT_ONCE,
    NOW_S,
    demand,
    policy,
    snapshot,
    stored,
    worker,
    workers,
)

GPU = dict.fromkeys(Pool, 1.0)
BUSY = {"running_requests": 1, "arrival_requests_per_s": 1.0}


def run(policy: Policy, seen: Snapshot, state: State | None = None, after_s: float = 0) -> Decision:
    return decide(seen, state, NOW_S + after_s, policy)


def targets(decision: Decision) -> tuple[int, ...]:
    return tuple(each.target for each in decision.pools)


def actions(decision: Decision, kind: ActionKind) -> list[Any]:
    return [each.worker or each.pool for each in decision.actions if each.kind is kind]


# Signals and reasons


def test_each_pool_follows_its_own_queue() -> None:
    decision = run(policy(), snapshot(workers(1, 1), 4, 1))
    assert targets(decision) == (4, 1)
    assert actions(decision, ActionKind.ADD) == [Pool.PREFILL] * 3


def test_the_largest_signal_wins_and_comes_first() -> None:
    signals = [
        {"type": "QueueRequests", "target": 2},
        {"type": "QueueTokens", "target": 100},
        {"type": "QueueSeconds", "target": 3},
    ]
    (prefill, _) = run(policy({"signals": signals}), snapshot(workers(1, 1), 6, 1)).pools
    assert prefill.target == 6
    assert [reason.rule for reason in prefill.reasons] == [
        "signals[1] QueueTokens",
        "signals[0] QueueRequests",
        "signals[2] QueueSeconds",
        "signals",
    ]
    assert [reason.workers for reason in prefill.reasons] == [6, 3, 2, 1]
    assert "600 tokens waiting or running / 100 per worker = 6.00" in prefill.reasons[0].text


def test_the_rule_that_bounds_the_number_comes_before_the_signals() -> None:
    (prefill, _) = run(policy({"maxReplicas": 3}), snapshot(workers(1, 1), 6, 1)).pools
    assert prefill.reasons[0].rule == "maxReplicas"
    assert prefill.reasons[0].workers == prefill.target == 3
    assert prefill.reasons[1].workers == 6


def test_starting_workers_count_as_coming() -> None:
    views = (
        *workers(1, 1),
        worker("p7", Phase.STARTING),
        worker("p8", Phase.PENDING, phase_since_s=NOW_S),
    )
    assert run(policy(), snapshot(views, 3, 1)).actions == ()


def test_workers_that_leave_do_not_count() -> None:
    views = (*workers(1, 1), worker("p7", Phase.LEAVING))
    decision = run(policy(), snapshot(views, 2, 1))
    assert decision.pools[0].current == 1
    assert actions(decision, ActionKind.ADD) == [Pool.PREFILL]


def test_a_worker_that_dies_is_replaced_without_new_numbers() -> None:
    state = run(policy(), snapshot(workers(3, 1), 3, 1)).state
    decision = run(policy(), snapshot(workers(2, 1), 3, 1), state, 1)
    assert actions(decision, ActionKind.ADD) == [Pool.PREFILL]


# Unknown and old numbers


def test_missing_numbers_hold() -> None:
    state = run(policy(), snapshot(workers(3, 1), 3, 1)).state
    decision = run(policy(), Snapshot(workers(3, 1), None, NOW_S, GPU), state, 600)
    assert targets(decision) == (3, 1)
    assert decision.actions == ()
    assert decision.pools[0].reasons[0].rule == "hold"


def test_numbers_that_are_not_new_hold_even_if_windows_run_out() -> None:
    rules = policy({"behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}}})
    state = run(rules, snapshot(workers(3, 1), 3, 1)).state
    state = run(rules, snapshot(workers(3, 1), 1, 1, NOW_S + 1), state, 1).state
    for after_s in range(2, 60):
        decision = run(rules, snapshot(workers(3, 1), 1, 1, NOW_S + 1), state, after_s)
        state = decision.state
        assert targets(decision) == (3, 1)


def test_bounds_apply_while_numbers_are_missing() -> None:
    decision = run(policy({"minReplicas": 4}), Snapshot(workers(1, 1), None, NOW_S, GPU))
    assert targets(decision) == (4, 1)
    decision = run(policy({"maxReplicas": 2}), Snapshot(workers(5, 1), None, NOW_S, GPU))
    assert targets(decision) == (2, 1)


def test_after_missing_numbers_the_whole_window_has_to_pass() -> None:
    rules = policy({"behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}}})
    state = run(rules, snapshot(workers(3, 1), 3, 1)).state
    state = run(rules, Snapshot(workers(3, 1), None, NOW_S, GPU), state, 30).state
    for after_s in range(31, 40):
        decision = run(rules, snapshot(workers(3, 1), 1, 1, NOW_S + after_s), state, after_s)
        assert targets(decision) == (3, 1)
        state = decision.state
    assert targets(run(rules, snapshot(workers(3, 1), 1, 1, NOW_S + 40), state, 40)) == (1, 1)


def test_a_pool_keeps_the_workers_without_which_its_load_was_too_much() -> None:
    """Two workers have shorter queues than one has, so the queue alone would ask for one again."""
    down = {**AT_ONCE["scaleDown"], "stabilizationWindowSeconds": 10}
    rules = policy(decode={"behavior": {**AT_ONCE, "scaleDown": down}, "averagingSeconds": 1})

    def after(state: State | None, times: range, count: int, waiting: int, load: float) -> Decision:
        for after_s in times:
            queue = demand(waiting, running_requests=1, arrival_tokens_per_s=load)
            seen = snapshot(workers(1, count), 1, queue, NOW_S + after_s)
            decision = run(rules, seen, state, after_s)
            state = decision.state
        return decision

    grown = after(after(None, range(1), 1, 0, 100.0).state, range(1, 2), 1, 1, 100.0)
    assert targets(grown) == (1, 2)
    kept = after(grown.state, range(2, 100), 2, 0, 100.0)  # nearly twelve windows
    assert targets(kept) == (1, 2)
    assert kept.pools[1].reasons[0].text.startswith("fewer than 2 workers were too few")
    assert targets(after(kept.state, range(100, 115), 2, 0, 10.0)) == (1, 1)  # less load
    forgotten = after(kept.state, range(100, 130), 2, 0, 100.0)
    assert targets(forgotten) == (1, 1)
    again = after(forgotten.state, range(130, 131), 1, 1, 100.0)
    assert targets(after(again.state, range(131, 500), 2, 0, 100.0)) == (1, 2)  # for longer now


SECONDS = {"signals": [{"type": "QueueSeconds", "target": 1}]}


def test_an_unknown_rate_holds_and_other_signals_may_still_add() -> None:
    views = (*workers(2, 1, tokens_per_s=0.0),)
    assert targets(run(policy(SECONDS), snapshot(views, 9, 1))) == (2, 1)
    both = {"signals": [*SECONDS["signals"], {"type": "QueueRequests", "target": 1}]}
    assert targets(run(policy(both), snapshot(views, 9, 1))) == (9, 1)
    assert targets(run(policy(both), snapshot(views, 1, 1))) == (2, 1)


def test_cold_workers_do_not_change_the_rate() -> None:
    """The first samples of new workers are ten times too slow, and would ask for ten times more."""
    cold = tuple(worker(f"p{i}", phase_since_s=NOW_S - 5, tokens_per_s=10.0) for i in range(5, 9))
    views = (*workers(1, 1), *cold)
    decision = run(policy(SECONDS, warmupSeconds=30), snapshot(views, 5, 1))
    assert decision.pools[0].target == 5
    assert decision.state.pools[Pool.PREFILL].tokens_per_s == 100


def test_one_slow_worker_does_not_change_the_rate() -> None:
    views = (*workers(4, 1), worker("p9", tokens_per_s=1.0))
    assert run(policy(SECONDS), snapshot(views, 5, 1)).pools[0].target == 5


# To and from zero

ZERO = {
    "minReplicas": 0,
    "behavior": {
        "scaleUp": {
            "stabilizationWindowSeconds": 60,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}],
        },
        "scaleDown": {"stabilizationWindowSeconds": 10},
    },
}


def test_a_request_that_waits_for_an_empty_pool_gets_a_worker_at_once() -> None:
    """Regardless of windows, of percentages of nothing, and of a rate that was never measured."""
    rules = policy({**ZERO, **SECONDS}, ZERO)
    state = run(rules, snapshot((), 0, 0)).state
    decision = run(rules, snapshot((), 1, 1, NOW_S + 1), state, 1)
    assert targets(decision) == (1, 1)
    assert actions(decision, ActionKind.ADD) == [Pool.PREFILL, Pool.DECODE]


def test_a_pool_goes_to_zero_after_the_window_without_any_request() -> None:
    rules = policy(ZERO, ZERO)
    state: State | None = None
    for second in range(30):
        arriving = PoolDemand(
            arrival_requests_per_s=1.0 if second < 5 else 0.0, latency_window_s=0.0
        )
        seen = snapshot(workers(1, 1), arriving, 1 if second < 9 else 0, NOW_S + second)
        decision = run(rules, seen, state, second)
        state = decision.state
        # The last requests were seen at seconds 4 and 8.
        assert targets(decision) == (1 if second < 14 else 0, 1 if second < 18 else 0)


def test_the_average_of_arrivals_keeps_no_worker_in_an_idle_pool() -> None:
    """The average never reaches 0."""
    quick = {"scaleDown": {**AT_ONCE["scaleDown"], "stabilizationWindowSeconds": 10}}
    pool = {"minReplicas": 0, "behavior": {**AT_ONCE, **quick}, "averagingSeconds": 60}
    signals = [{"type": "Utilization", "target": 0.7}]
    rules = policy({**pool, "signals": signals}, pool)
    busy = demand(0, running_requests=1, arrival_requests_per_s=1.0, arrival_tokens_per_s=50.0)
    decision = run(rules, snapshot(workers(1, 1), busy, busy))
    for second in range(1, 11):
        assert targets(decision) == (1, 1)
        seen = snapshot(workers(1, 1), 0, 0, NOW_S + second)
        decision = run(rules, seen, decision.state, second)
    assert targets(decision) == (0, 0)


def test_an_empty_pool_remembers_its_rate() -> None:
    free = {"scaleUp": {"policies": [{"type": "Pods", "value": 9, "periodSeconds": 15}]}}
    rules = policy({**ZERO, **SECONDS, "behavior": free}, ZERO)
    state = run(rules, snapshot(workers(1, 1), 1, 1)).state
    state = replace(state, pools={k: replace(v, target=0) for k, v in state.pools.items()})
    decision = run(rules, snapshot((), 5, 1, NOW_S + 1), state, 1)
    assert decision.pools[0].target == 5


def test_the_last_ready_worker_stays_while_requests_run() -> None:
    rules = policy({"minReplicas": 0}, {"minReplicas": 0})
    busy = demand(0, running_requests=1, running_tokens=5)
    decision = run(rules, snapshot(workers(2, 2), busy, busy))
    assert targets(decision) == (1, 1)


# Who leaves


def test_the_worker_with_least_to_lose_leaves() -> None:
    views = (
        worker("p0", requests=3),
        worker("p1", requests=1, kv_tokens_used=50),
        worker("p2", requests=1, kv_tokens_used=20, phase_since_s=NOW_S - 9),
        worker("p3", requests=1, kv_tokens_used=20, phase_since_s=NOW_S - 5),
        worker("p4", Phase.STARTING, phase_since_s=NOW_S - 9),
        worker("p5", Phase.STARTING, phase_since_s=NOW_S - 5),
        worker("p6", Phase.PENDING, phase_since_s=NOW_S - 2),
        worker("p7", Phase.LEAVING),
        worker("d0"),
    )
    order = ["p6", "p5", "p4", "p3", "p2", "p1"]
    for left in range(1, 7):
        decision = run(policy(), snapshot(views, left, 1))
        assert actions(decision, ActionKind.REMOVE) == order[: 7 - left]


# Schedules


def office(**bounds: Any) -> dict[str, Any]:
    return {"name": "office", "start": "0 8 * * *", "end": "0 18 * * *", **bounds}


def at_hour(hour: float) -> float:
    return NOW_S - NOW_S % 86400 + 3600 * hour


@pytest.mark.parametrize(("hour", "expected"), [(7.99, 1), (8, 4), (17.99, 4), (18, 1)])
def test_a_schedule_raises_the_minimum(hour: float, expected: int) -> None:
    rules = policy(schedules=[office(prefill={"minReplicas": 4})])
    decision = decide(snapshot(workers(1, 1), 1, 1), None, at_hour(hour), rules)
    assert targets(decision) == (expected, 1)
    if expected == 4:
        assert decision.pools[0].reasons[0].rule == "minReplicas"
        assert "schedule office" in decision.pools[0].reasons[0].text


def test_an_off_peak_profile_lowers_both_bounds() -> None:
    rules = policy(schedules=[office(prefill={"minReplicas": 0, "maxReplicas": 2})])
    assert targets(decide(snapshot(workers(5, 1), 9, 1), None, at_hour(12), rules)) == (2, 1)
    assert targets(decide(snapshot(workers(5, 1), 0, 1), None, at_hour(12), rules)) == (0, 1)


def test_of_several_schedules_the_largest_minimum_holds() -> None:
    other = {**office(prefill={"minReplicas": 5}), "name": "noon", "start": "0 11 * * *"}
    rules = policy(schedules=[office(prefill={"minReplicas": 4, "maxReplicas": 4}), other])
    assert targets(decide(snapshot(workers(1, 1), 1, 1), None, at_hour(12), rules)) == (5, 1)


# Budget and ratio


def test_a_worker_is_added_only_once_its_gpus_are_free() -> None:
    rules = policy(budget={"gpus": 4, "priority": "Decode"})
    decision = run(rules, snapshot(workers(3, 1), 3, 3))
    assert targets(decision) == (1, 3)
    assert len(actions(decision, ActionKind.REMOVE)) == 2
    assert actions(decision, ActionKind.ADD) == []
    leaving = (*workers(1, 1), worker("p8", Phase.LEAVING), worker("p9", Phase.LEAVING))
    decision = run(rules, snapshot(leaving, 3, 3, NOW_S + 1), decision.state, 1)
    assert decision.actions == ()
    assert "2 of them by workers that leave" in decision.pools[1].reasons[-1].text
    one_left = (*workers(1, 1), worker("p8", Phase.LEAVING))
    decision = run(rules, snapshot(one_left, 3, 3, NOW_S + 2), decision.state, 2)
    assert actions(decision, ActionKind.ADD) == [Pool.DECODE]


def test_without_priority_no_pool_takes_what_the_other_one_wants() -> None:
    rules = policy(budget={"gpus": 4})
    decision = run(rules, snapshot(workers(3, 1), 3, 3))
    assert targets(decision) == (3, 1)
    assert decision.pools[1].reasons[0].rule == "budget"
    assert targets(run(rules, snapshot(workers(3, 1), 1, 3))) == (1, 3)


def test_free_gpus_are_shared_by_need() -> None:
    rules = policy({"maxReplicas": 100}, {"maxReplicas": 100}, budget={"gpus": 8})
    assert targets(run(rules, snapshot(workers(1, 1), 12, 4))) == (6, 2)


def test_an_empty_pool_gets_a_worker_even_from_the_pool_with_priority() -> None:
    rules = policy({"minReplicas": 0}, budget={"gpus": 4, "priority": "Decode"})
    decision = run(rules, snapshot(workers(0, 4), 1, 9))
    assert targets(decision) == (1, 3)


def test_the_budget_counts_all_gpus_of_a_worker() -> None:
    rules = policy(budget={"gpus": 7})
    seen = replace(
        snapshot(workers(1, 1, gpus=2.0), 9, 1), gpus_per_worker=dict.fromkeys(Pool, 2.0)
    )
    decision = run(rules, seen)
    assert targets(decision) == (2, 1)
    assert len(actions(decision, ActionKind.ADD)) == 1


def test_no_worker_of_unknown_size_is_added_under_a_budget() -> None:
    rules = policy({"minReplicas": 0}, {"minReplicas": 0}, budget={"gpus": 4})
    decision = run(rules, replace(snapshot((), 1, 1), gpus_per_worker={}))
    assert decision.actions == ()
    assert "not known" in decision.pools[0].reasons[-1].text


def test_a_lowered_budget_takes_workers_away() -> None:
    decision = run(policy(budget={"gpus": 3}), snapshot(workers(4, 4), 4, 4))
    assert sum(targets(decision)) == 3
    assert len(actions(decision, ActionKind.REMOVE)) == 5


def test_the_ratio_adds_to_the_smaller_pool() -> None:
    rules = policy(ratio={"min": 0.5, "max": 2})
    assert targets(run(rules, snapshot(workers(1, 1), 8, 1))) == (8, 4)
    assert targets(run(rules, snapshot(workers(1, 1), 1, 8))) == (4, 8)


@pytest.mark.parametrize("idle", Pool)
def test_the_ratio_keeps_no_worker_in_an_idle_pool(idle: Pool) -> None:
    """It is for pools that both have workers."""
    empty = {"minReplicas": 0}
    pools = [empty if pool is idle else {} for pool in Pool]
    rules = policy(*pools, ratio={"min": 0.5, "max": 2})
    needs = [0 if pool is idle else 4 for pool in Pool]
    assert targets(run(rules, snapshot(workers(1, 4), *needs))) == tuple(needs)


def test_the_ratio_bounds_the_larger_pool_if_the_smaller_cannot_grow() -> None:
    rules = policy({}, {"maxReplicas": 2}, ratio={"min": 0.5, "max": 2})
    decision = run(rules, snapshot(workers(1, 1), 8, 1))
    assert targets(decision) == (4, 2)
    assert decision.pools[0].reasons[0].rule == "ratio"


# Change of role

CHANGING: dict[str, Any] = {
    "budget": {"gpus": 4},
    "roleChange": "WhenBudgetIsSpent",
}


def views_that_change(prefill: int, decode: int) -> tuple[WorkerView, ...]:
    return workers(prefill, decode, can_change_role=True)


def test_a_worker_changes_its_role_if_the_budget_is_spent() -> None:
    busy = tuple(replace(w, requests=2 if w.id == "p0" else 0) for w in views_that_change(3, 1))
    decision = run(policy(**CHANGING), snapshot(busy, 1, 3))
    assert targets(decision) == (1, 3)
    (action,) = decision.actions  # one at a time, and no worker leaves meanwhile
    assert (action.kind, action.pool, action.worker) == (ActionKind.CHANGE_ROLE, Pool.DECODE, "p1")


def test_no_role_changes_for_a_worker_whose_gpus_are_about_to_be_free() -> None:
    views = (*views_that_change(2, 1), worker("p9", Phase.LEAVING))
    decision = run(policy(**CHANGING), snapshot(views, 1, 2))
    assert not actions(decision, ActionKind.CHANGE_ROLE)
    assert targets(decision) == (1, 2)


def test_a_change_of_role_is_followed_until_the_worker_is_ready() -> None:
    rules = policy(**CHANGING)
    decision = run(rules, snapshot(views_that_change(3, 1), 1, 2))
    (action,) = decision.actions
    drained = tuple(
        replace(w, phase=Phase.LEAVING) if w.id == action.worker else w
        for w in views_that_change(3, 1)
    )
    starting = tuple(
        replace(w, pool=Pool.DECODE, phase=Phase.STARTING) if w.id == action.worker else w
        for w in drained
    )
    ready = tuple(replace(w, phase=Phase.READY) for w in starting)
    for second, (views, expected) in enumerate(
        [(views_that_change(3, 1), 2), (drained, 2), (starting, 2), (ready, 2)], start=1
    ):
        decision = run(rules, snapshot(views, 1, 2, NOW_S + second), decision.state, second)
        assert decision.pools[1].target == expected
        assert not actions(decision, ActionKind.CHANGE_ROLE)
        assert not actions(decision, ActionKind.ADD)
    assert decision.state.role_change is None


def test_a_pool_gives_no_worker_that_its_own_check_needs() -> None:
    assert run(policy(**CHANGING), snapshot(views_that_change(3, 1), 3, 3)).actions == ()


def test_a_pool_gives_no_worker_that_it_needed_within_its_window() -> None:
    window = {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}}}
    rules = policy(window, **CHANGING)
    views = views_that_change(3, 1)
    state = run(rules, snapshot(views, 3, 1)).state
    for second in range(1, 60):
        decision = run(rules, snapshot(views, 1, 3, NOW_S + second), state, second)
        assert decision.actions == ()
        state = decision.state
    assert actions(run(rules, snapshot(views, 1, 3, NOW_S + 60), state, 60), ActionKind.CHANGE_ROLE)


@pytest.mark.parametrize(
    "changes",
    [{"roleChange": "Never"}, {"budget": {"gpus": 6}}, {"ratio": {"min": 2, "max": 4}}],
)
def test_otherwise_no_role_changes(changes: dict[str, Any]) -> None:
    rules = policy(**{**CHANGING, **changes})
    decision = run(rules, snapshot(views_that_change(3, 1), 1, 3))
    assert not actions(decision, ActionKind.CHANGE_ROLE)


def test_workers_that_cannot_change_their_role_are_replaced() -> None:
    decision = run(policy(**CHANGING), snapshot(workers(3, 1), 1, 3))
    assert len(actions(decision, ActionKind.REMOVE)) == 2


@pytest.mark.parametrize("tolerance", [0, 0.6])  # with 0.6 the pool would not shrink by itself
def test_the_last_ready_worker_does_not_change_its_role(tolerance: float) -> None:
    behavior = {**AT_ONCE, "scaleDown": {**AT_ONCE["scaleDown"], "tolerance": tolerance}}
    rules = policy({"behavior": behavior}, **CHANGING)
    ready, starts = worker("p0", can_change_role=True), worker("p1", Phase.STARTING)
    assert not actions(
        run(rules, snapshot((ready, starts, *workers(0, 2)), 1, 3)), ActionKind.CHANGE_ROLE
    )
    both = (ready, replace(starts, phase=Phase.READY), *workers(0, 2))
    assert actions(run(rules, snapshot(both, 1, 3)), ActionKind.CHANGE_ROLE) == ["p0"]


def test_a_change_of_role_that_is_lost_is_given_up_for_a_new_worker() -> None:
    rules = policy(**CHANGING, roleChangeTimeoutSeconds=20)
    views = views_that_change(3, 1)
    state = run(rules, snapshot(views, 2, 2)).state
    assert state.role_change is not None
    decision = run(rules, snapshot(views, 2, 2, NOW_S + 20), state, 20)
    assert decision.actions == ()
    decision = run(rules, snapshot(views, 2, 2, NOW_S + 21), decision.state, 21)
    assert decision.state.role_change is None
    assert len(actions(decision, ActionKind.REMOVE)) == 1
    assert targets(decision) == (2, 2)
    decision = run(rules, snapshot(views_that_change(2, 1), 2, 2, NOW_S + 22), decision.state, 22)
    assert actions(decision, ActionKind.ADD) == [Pool.DECODE]


def test_a_change_of_role_ends_with_its_worker() -> None:
    rules = policy(**CHANGING)
    views = views_that_change(3, 1)
    state = run(rules, snapshot(views, 2, 2)).state
    assert state.role_change is not None
    gone = tuple(each for each in views if each.id != state.role_change.worker)
    decision = run(rules, snapshot(gone, 2, 2, NOW_S + 1), state, 1)
    assert decision.state.role_change is None
    assert actions(decision, ActionKind.ADD) == [Pool.DECODE]


# Workers without a place


def test_a_worker_without_a_place_is_given_up_and_tried_again() -> None:
    rules = policy(
        placementTimeoutSeconds=60, placementRetrySeconds=30, placementMaxRetrySeconds=50
    )
    stuck = worker("p9", Phase.PENDING, phase_since_s=NOW_S, problem="no node has a GPU")
    views = (*workers(1, 1), stuck)
    state = run(rules, snapshot(views, 2, 1)).state
    assert run(rules, snapshot(views, 2, 1, NOW_S + 60), state, 60).actions == ()
    decision = run(rules, snapshot(views, 2, 1, NOW_S + 61), state, 61)
    assert actions(decision, ActionKind.REMOVE) == ["p9"]
    assert targets(decision) == (1, 1)
    assert decision.pools[0].reasons[0].rule == "placementTimeoutSeconds"
    assert "no node has a GPU" in decision.pools[0].reasons[0].text
    for second in range(62, 91):  # 30 s
        seen = snapshot(workers(1, 1), 9, 1, NOW_S + second)
        decision = run(rules, seen, decision.state, second)
        assert decision.actions == ()
    decision = run(rules, snapshot(workers(1, 1), 9, 1, NOW_S + 91), decision.state, 91)
    assert actions(decision, ActionKind.ADD) == [Pool.PREFILL]
    again = (*workers(1, 1), replace(stuck, phase_since_s=NOW_S + 91))
    decision = run(rules, snapshot(again, 9, 1, NOW_S + 152), decision.state, 152)
    assert actions(decision, ActionKind.REMOVE) == ["p9"]
    unplaced = decision.state.pools[Pool.PREFILL].unplaced
    assert unplaced is not None
    assert unplaced.retry_s == NOW_S + 152 + 50  # 60 s is more than the longest time


def test_workers_that_were_ordered_together_fail_once() -> None:
    stuck = [worker(f"p{i}", Phase.PENDING, phase_since_s=NOW_S + i) for i in (1, 2)]
    state: State | None = None
    for second in (3, 62, 63):  # the first one stays for a while after it was given up
        seen = snapshot((*workers(1, 1), *stuck), 3, 1, NOW_S + second)
        decision = run(policy(), seen, state, second)
        state = decision.state
    assert actions(decision, ActionKind.REMOVE) == ["p2", "p1"]
    unplaced = state.pools[Pool.PREFILL].unplaced if state is not None else None
    assert unplaced is not None
    assert (unplaced.failures, unplaced.retry_s) == (1, NOW_S + 62 + 60)


def test_a_place_that_is_found_ends_the_wait() -> None:
    stuck = worker("p9", Phase.PENDING, phase_since_s=NOW_S - 100)
    state = run(policy(), snapshot((*workers(1, 1), stuck), 5, 1)).state
    starts = (*workers(1, 1), worker("p9", Phase.STARTING, phase_since_s=NOW_S + 1))
    early = run(policy(), snapshot(starts, 5, 1, NOW_S + 16), state, 16)
    assert targets(early) == (2, 1), "it may still turn out to have no place"
    assert targets(run(policy(), snapshot(starts, 5, 1, NOW_S + 17), state, 17)) == (5, 1)
    ready = (*workers(1, 1), worker("p9", phase_since_s=NOW_S + 65))  # the retry was at 60 s
    assert targets(run(policy(), snapshot(ready, 5, 1, NOW_S + 66), state, 66)) == (5, 1)


def test_a_worker_without_a_place_does_not_block_the_other_pool() -> None:
    rules = policy(budget={"gpus": 3, "priority": "Prefill"})
    stuck = worker("p9", Phase.PENDING, phase_since_s=NOW_S - 100)
    decision = run(rules, snapshot((*workers(1, 1), stuck), 2, 2))
    assert targets(decision) == (1, 2)
    decision = run(rules, snapshot(workers(1, 1), 2, 2, NOW_S + 1), decision.state, 1)
    assert actions(decision, ActionKind.ADD) == [Pool.DECODE]


# State


def test_advice_starts_from_the_workers_that_there_are() -> None:
    rules = policy(
        {
            "behavior": {
                "scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}
            }
        },
        mode="Advisory",
    )
    state: State | None = None
    for second in range(5):
        seen = snapshot(workers(2, 1), 9, 1, NOW_S + second)
        decision = run(rules, seen, state, second)
        state = decision.state
        assert decision.pools[0].current == 2
        assert decision.pools[0].target == 3
        assert state.pools[Pool.PREFILL].changes == ()


def test_a_state_that_is_written_can_be_read() -> None:
    rules = policy(**CHANGING)
    state = run(rules, snapshot(views_that_change(3, 1), 1, 3)).state
    assert stored(state) == state


def test_a_clock_that_is_set_back_wedges_nothing() -> None:
    rules = policy({"behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}}})
    later = snapshot(workers(5, 1), 5, 1, NOW_S + 86400)
    state: State | None = run(rules, later, None, 86400).state
    for second in range(12):
        decision = run(rules, snapshot(workers(5, 1), 1, 1, NOW_S + second), state, second)
        state = decision.state
    assert targets(decision) == (1, 1)
