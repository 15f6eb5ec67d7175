"""Windows and scaling policies have HPA's meaning, exact to the second."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale.behavior import limit_down, limit_up, stabilise
from autoscale.decide import decide
from autoscale.policy import Behavior
from autoscale.state import Change, State, Window, highest, lowest
from core.types import Pool
from tests.support.autoscale_views import NOW_S, policy, snapshot, workers


def behavior(direction: str, **rules: Any) -> Behavior:
    return Behavior.model_validate({direction: rules})


PODS_2 = {"type": "Pods", "value": 2, "periodSeconds": 60}
PERCENT_50 = {"type": "Percent", "value": 50, "periodSeconds": 60}


@pytest.mark.parametrize(
    ("select", "base", "up", "down"),
    [
        ("Max", 10, 15, 5),
        ("Min", 10, 12, 8),
        ("Max", 2, 4, 0),
        ("Min", 2, 3, 1),
        ("Max", 3, 5, 1),  # up 3 + 50% = 4.5, rounded up to 5; down 1.5, rounded down to 1
        ("Min", 3, 5, 1),
        ("Disabled", 10, 10, 10),
    ],
)
def test_the_selected_policy_bounds_the_change(select: str, base: int, up: int, down: int) -> None:
    rules = {"selectPolicy": select, "policies": [PODS_2, PERCENT_50]}
    assert limit_up(base, (), behavior("scaleUp", **rules), NOW_S) == up
    assert limit_down(base, (), behavior("scaleDown", **rules), NOW_S) == down


def test_changes_of_the_period_count() -> None:
    """At the start of the period there were 4; 3 were added and 1 removed since."""
    changes = (Change(NOW_S - 59, 3, 0), Change(NOW_S - 1, 0, 1))
    up = behavior("scaleUp", policies=[PERCENT_50])
    assert limit_up(6, changes, up, NOW_S) == 6  # not below what there is
    assert limit_up(6, changes, up, NOW_S + 1) == 11  # the first is 60 s old; 7 + 50%
    down = behavior("scaleDown", policies=[PODS_2])
    assert limit_down(6, changes, down, NOW_S) == 2
    assert limit_down(6, changes, down, NOW_S + 1) == 5


def test_the_target_stays_between_the_windows() -> None:
    assert stabilise(5, smallest=3, largest=8) == 5
    assert stabilise(5, smallest=6, largest=8) == 6
    assert stabilise(5, smallest=2, largest=4) == 4


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=40), st.integers(0, 60))
def test_windows_give_the_extremes_and_stay_small(
    steps: list[tuple[int, int]], length_s: int
) -> None:
    now_s, high, low = 0.0, (), ()
    seen: list[tuple[float, int]] = []
    high_window: Window = high
    low_window: Window = low
    for wait_s, value in steps:
        now_s += wait_s
        seen.append((now_s, value))
        inside = [old for at_s, old in seen if at_s > now_s - length_s] or [value]
        high_window, most = highest(high_window, now_s, length_s, value)
        low_window, least = lowest(low_window, now_s, length_s, value)
        assert (least, most) == (min(*inside, value), max(*inside, value))
        assert len(high_window) <= 9
        assert len(low_window) <= 9


def targets_over_time(spec_policy: Any, loads: list[int]) -> list[int]:
    """Return the target of prefill, second by second, if the workers follow at once."""
    state: State | None = None
    count, targets = loads[0], []
    for second, load in enumerate(loads):
        now_s = NOW_S + second
        decision = decide(snapshot(workers(count, 1), load, 1, now_s), state, now_s, spec_policy)
        state, count = decision.state, decision.pools[0].target
        targets.append(count)
    return targets


FREE = [{"type": "Pods", "value": 1000, "periodSeconds": 1}]


def test_a_peak_shorter_than_the_scale_up_window_adds_nothing() -> None:
    up = {"stabilizationWindowSeconds": 10, "tolerance": 0, "policies": FREE}
    rules = policy({"behavior": {"scaleUp": up}})
    assert targets_over_time(rules, [1, *[5] * 9, 1, *[1] * 9])[-1] == 1
    # The last recommendation of 1 is 10 s old at the 10th second of the peak, so 5 counts then.
    assert targets_over_time(rules, [1, *[5] * 10]) == [*[1] * 10, 5]


def test_a_pause_shorter_than_the_scale_down_window_removes_nothing() -> None:
    down = {"stabilizationWindowSeconds": 10, "tolerance": 0, "policies": FREE}
    rules = policy({"behavior": {"scaleDown": down}})
    assert targets_over_time(rules, [5, *[1] * 9, 5]) == [5] * 11
    assert targets_over_time(rules, [5, *[1] * 10]) == [*[5] * 10, 1]


def test_the_largest_recommendation_of_the_window_counts() -> None:
    down = {"stabilizationWindowSeconds": 10, "tolerance": 0, "policies": FREE}
    rules = policy({"behavior": {"scaleDown": down}})
    loads = [5, 1, 3, *[1] * 12]
    assert targets_over_time(rules, loads) == [*[5] * 10, 3, 3, 1, 1, 1]


def test_policies_bound_the_speed_over_time() -> None:
    rules = policy(
        {
            "behavior": {
                "scaleUp": {
                    "tolerance": 0,
                    "policies": [{"type": "Pods", "value": 2, "periodSeconds": 5}],
                }
            }
        }
    )
    assert targets_over_time(rules, [1, *[9] * 16]) == [1, *[3] * 5, *[5] * 5, *[7] * 5, 9]


def test_a_signal_within_its_tolerance_changes_nothing() -> None:
    signal = {"signals": [{"type": "QueueRequests", "target": 10}]}
    behave = {"scaleUp": {"tolerance": 0.2}, "scaleDown": {"tolerance": 0.1}}
    rules = policy({**signal, "behavior": behave})

    def target(load: int) -> int:
        return decide(snapshot(workers(4, 1), load, 1), None, NOW_S, rules).pools[0].target

    assert target(48) == 4
    assert target(49) == 5


def test_changes_are_bounded() -> None:
    rules = [policy({"minReplicas": count, "maxReplicas": count}) for count in (1, 2)]
    state: State | None = None
    for second in range(1000):
        now_s = NOW_S + second
        seen = snapshot(workers(1, 1), 1, 1, now_s)
        state = decide(seen, state, now_s, rules[second % 2]).state
        assert len(state.pools[Pool.PREFILL].changes) <= 256
