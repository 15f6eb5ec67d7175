"""Stabilisation windows and scaling policies, as in Kubernetes' HorizontalPodAutoscaler v2. Pure.

Source: pkg/controller/podautoscaler/horizontal.go, stabilizeRecommendationWithBehaviors and
calculateScaleUpLimitWithScalingRules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoscale.policy import Behavior, ScalingPolicy
from autoscale.state import Change


def stabilise(base: int, smallest: int, largest: int) -> int:
    """Return the count nearest to ``base`` that both windows agree to.

    Args:
        base: the target so far.
        smallest: the smallest recommendation of the scale-up window.
        largest: the largest recommendation of the scale-down window.
    """
    return min(max(base, smallest), largest)


def limit_up(base: int, changes: Sequence[Change], behavior: Behavior, now_s: float) -> int:
    """Return the largest target that the scale-up policies allow now; at least ``base``."""
    rules = behavior.scale_up
    if rules.select_policy == "Disabled":
        return base
    select = max if rules.select_policy == "Max" else min
    limits = []
    for each in rules.policies:
        start = _at_start_of_period(base, changes, each, now_s)
        if each.type == "Pods":
            limits.append(start + each.value)
        else:
            limits.append(math.ceil(start * (100 + each.value) / 100))
    return max(select(limits), base)


def limit_down(base: int, changes: Sequence[Change], behavior: Behavior, now_s: float) -> int:
    """Return the smallest target that the scale-down policies allow now; at most ``base``."""
    rules = behavior.scale_down
    if rules.select_policy == "Disabled":
        return base
    select = min if rules.select_policy == "Max" else max
    limits = []
    for each in rules.policies:
        start = _at_start_of_period(base, changes, each, now_s)
        if each.type == "Pods":
            limits.append(start - each.value)
        else:
            limits.append(start * max(100 - each.value, 0) // 100)
    return min(max(select(limits), 0), base)


def longest_period_s(behavior: Behavior) -> int:
    """Return for how long changes have to be remembered."""
    policies = (*behavior.scale_up.policies, *behavior.scale_down.policies)
    return max(each.period_seconds for each in policies)


def _at_start_of_period(
    base: int, changes: Sequence[Change], policy: ScalingPolicy, now_s: float
) -> int:
    recent = [each for each in changes if each.at_s > now_s - policy.period_seconds]
    return base - sum(each.added for each in recent) + sum(each.removed for each in recent)
