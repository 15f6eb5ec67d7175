"""What holds for all policies, loads and histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale.decide import Decision, decide
from autoscale.fit import Claim, fit
from autoscale.policy import Policy, Ratio
from autoscale.snapshot import ActionKind, Phase, PoolDemand, Snapshot, WorkerView
from autoscale.state import State
from core.types import Pool
from tests.support.autoscale_views import NOW_S, policy, snapshot, stored, workers

FEW = settings(derandomize=True, max_examples=25, deadline=None)
MANY = settings(derandomize=True, max_examples=300, deadline=None)

counts = st.integers(0, 30)
priorities = st.sampled_from(["Prefill", "Decode", "Neither"])
rules = st.fixed_dictionaries(
    {
        "tolerance": st.sampled_from([0, 0.1, 0.3]),
        "stabilizationWindowSeconds": st.sampled_from([0, 5, 30]),
        "selectPolicy": st.sampled_from(["Max", "Min", "Disabled"]),
        "policies": st.lists(
            st.fixed_dictionaries(
                {
                    "type": st.sampled_from(["Pods", "Percent"]),
                    "value": st.integers(1, 200),
                    "periodSeconds": st.integers(1, 30),
                }
            ),
            min_size=1,
            max_size=2,
        ),
    }
)
targets = st.sampled_from([0.5, 1, 3])
load_signals = st.one_of(
    st.builds(lambda t: {"type": "QueueRequests", "target": t}, targets),
    st.builds(lambda t: {"type": "QueueTokens", "target": 100 * t}, targets),
)


@st.composite
def pools(draw: Any) -> dict[str, Any]:
    least = draw(st.integers(0, 3))
    return {
        "minReplicas": least,
        "maxReplicas": draw(st.integers(max(least, 1), 9)),
        "signals": draw(st.lists(load_signals, min_size=1, max_size=2)),
        "behavior": {"scaleUp": draw(rules), "scaleDown": draw(rules)},
    }


@st.composite
def policies(draw: Any) -> Policy:
    extra: dict[str, Any] = {"placementTimeoutSeconds": 8, "placementRetrySeconds": 5}
    if draw(st.booleans()):
        extra["budget"] = {"gpus": draw(st.integers(6, 12)), "priority": draw(priorities)}
        extra["roleChange"] = draw(st.sampled_from(["Never", "WhenBudgetIsSpent"]))
        extra["roleChangeTimeoutSeconds"] = 10
    if draw(st.booleans()):
        extra["ratio"] = {"min": 0.3, "max": 3}
    return policy(draw(pools()), draw(pools()), **extra)


class World:
    """Workers that take time to be placed, to start and to leave; some never get a place."""

    def __init__(self, rules: Policy, draw: st.DataObject) -> None:
        self.rules, self.draw = rules, draw
        self.views: list[WorkerView] = list(workers(2, 2, can_change_role=True))
        self.made, self.second = 0, 0
        self.state: State | None = None

    def step(self, demand: dict[Pool, PoolDemand] | None) -> Decision:
        self.second += 1
        self.views = [view for view in map(self.age, self.views) if view is not None]
        now_s = NOW_S + self.second
        seen = Snapshot(tuple(self.views), demand, now_s, dict.fromkeys(Pool, 1.0))
        decision = decide(seen, self.state, now_s, self.rules)
        self.state = stored(decision.state)
        assert self.state == decision.state
        for action in decision.actions:
            if action.kind is ActionKind.ADD:
                self.made += 1
                self.views.append(
                    WorkerView(
                        f"{action.pool}-{self.made}",
                        action.pool,
                        Phase.PENDING,
                        now_s,
                        gpus=1.0,
                        can_change_role=True,
                    )
                )
            else:
                (index,) = [i for i, v in enumerate(self.views) if v.id == action.worker]
                view = self.views[index]
                assert view.phase is not Phase.LEAVING
                if action.kind is ActionKind.REMOVE:
                    self.views[index] = replace(view, phase=Phase.LEAVING, phase_since_s=now_s)
                else:
                    self.views[index] = replace(
                        view, pool=action.pool, phase=Phase.STARTING, phase_since_s=now_s
                    )
        return decision

    def age(self, view: WorkerView) -> WorkerView | None:
        """Return the worker a second later."""
        moves: dict[Phase, list[Phase | None]] = {
            Phase.PENDING: [Phase.PENDING, Phase.STARTING],
            Phase.STARTING: [Phase.STARTING, Phase.READY],
            Phase.READY: [Phase.READY],
            Phase.LEAVING: [Phase.LEAVING, None],
        }
        phase = self.draw.draw(st.sampled_from(moves[view.phase]))
        if phase is view.phase:
            return view
        if phase is None:
            return None
        return replace(view, phase=phase, phase_since_s=NOW_S + self.second)


@FEW
@given(policies(), st.data())
def test_budget_bounds_and_ratio_hold_at_every_instant(rules: Policy, data: st.DataObject) -> None:
    spec = rules.spec
    budget = spec.budget.gpus if spec.budget is not None else 10**9
    world = World(rules, data)
    for _ in range(data.draw(st.integers(5, 40))):
        prefill, decode = data.draw(counts), data.draw(counts)
        demand = {
            Pool.PREFILL: PoolDemand(prefill, 100 * prefill, latency_window_s=0.0),
            Pool.DECODE: PoolDemand(0, 0, 0.0, decode, 100 * decode, latency_window_s=0.0),
        }
        decision = world.step(demand if data.draw(st.integers(0, 9)) else None)
        assert sum(view.gpus for view in world.views) <= budget
        goals = {each.pool: each.target for each in decision.pools}
        assert sum(goals.values()) <= budget
        stuck = any(world.state and world.state.pools[pool].unplaced for pool in Pool)
        for pool, goal in goals.items():
            assert goal <= spec.pool(pool).max_replicas
            assert goal >= spec.pool(pool).min_replicas or stuck
            first = next(each for each in decision.pools if each.pool is pool).reasons[0]
            assert first.workers == goal
        assert sum(a.kind is ActionKind.CHANGE_ROLE for a in decision.actions) <= 1
        if spec.ratio is not None and not stuck and all(goals.values()):
            assert in_ratio(spec.ratio, *goals.values()) or not any(
                in_ratio(spec.ratio, prefill, decode) and prefill + decode <= budget
                for prefill in range(spec.prefill.min_replicas or 1, spec.prefill.max_replicas + 1)
                for decode in range(spec.decode.min_replicas or 1, spec.decode.max_replicas + 1)
            )


def in_ratio(ratio: Ratio, prefill: int, decode: int) -> bool:
    return ratio.min - 1e-9 <= prefill / decode <= ratio.max + 1e-9


@MANY
@given(
    st.tuples(counts, counts),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(counts, counts),
    st.one_of(st.none(), st.integers(1, 40)),
    priorities,
    st.one_of(st.none(), st.sampled_from([(0.25, 4), (0.5, 0.5), (1, 1), (2, 5)])),
    st.sampled_from([(1.0, 1.0), (2.0, 1.0), (1.0, 4.0)]),
)
def test_what_fits_obeys_budget_and_ratio_and_wastes_nothing(
    wanted: tuple[int, int],
    least: tuple[int, int],
    base: tuple[int, int],
    budget: int | None,
    priority: Any,
    bounds: tuple[float, float] | None,
    gpus: tuple[float, float],
) -> None:
    claims = {
        pool: Claim(max(wanted[i], least[i]), least[i], 30, base[i], gpus[i])
        for i, pool in enumerate(Pool)
    }
    ratio = None if bounds is None else Ratio(min=bounds[0], max=bounds[1])
    fitted = fit(claims, budget, priority, ratio)
    held = fitted.prefill * gpus[0] + fitted.decode * gpus[1]
    assert budget is None or held <= budget
    asked = {pool: claim.wanted for pool, claim in claims.items()}
    asked_gpus = sum(asked[pool] * claims[pool].gpus for pool in Pool)
    if ratio is None and (budget is None or asked_gpus <= budget):
        assert (fitted.prefill, fitted.decode) == tuple(asked.values())
    if ratio is None and budget is not None and asked_gpus > budget:
        short = [pool for pool in Pool if fitted.of(pool) < asked[pool]]
        assert held + max(claims[pool].gpus for pool in short) > budget
    if ratio is not None and budget is None and fitted.prefill and fitted.decode:
        fits = in_ratio(ratio, fitted.prefill, fitted.decode)
        assert fits or 30 in (fitted.prefill, fitted.decode)  # no more workers are allowed


@FEW
@given(policies(), st.data())
def test_more_waiting_work_never_gives_a_smaller_target(rules: Policy, data: st.DataObject) -> None:
    rules = policy_without_pairs(rules)
    state: State | None = None
    count = 2
    for second in range(data.draw(st.integers(1, 20))):
        load = data.draw(counts)
        seen = snapshot(workers(count, 2), load, load, NOW_S + second)
        decision = decide(seen, state, NOW_S + second, rules)
        more = snapshot(workers(count, 2), load + data.draw(counts), load, NOW_S + second)
        other = decide(more, state, NOW_S + second, rules)
        assert other.pools[0].target >= decision.pools[0].target
        state, count = decision.state, decision.pools[0].target


def policy_without_pairs(rules: Policy) -> Policy:
    """Return the policy without what one pool takes from the other."""
    spec = rules.spec.model_copy(update={"budget": None, "ratio": None, "role_change": "Never"})
    return rules.model_copy(update={"spec": spec})


@FEW
@given(policies(), st.lists(st.tuples(counts, counts), min_size=1, max_size=10), st.floats(0, 4000))
def test_nothing_changes_without_new_numbers(
    rules: Policy, loads: list[tuple[int, int]], after_s: float
) -> None:
    state: State | None = None
    sizes = (2, 2)
    for second, (prefill, decode) in enumerate(loads):
        seen = snapshot(workers(*sizes), prefill, decode, NOW_S + second)
        decision = decide(seen, state, NOW_S + second, rules)
        state, sizes = decision.state, (decision.pools[0].target, decision.pools[1].target)
    now_s = NOW_S + len(loads) + after_s
    again = decide(replace(seen, workers=workers(*sizes)), state, now_s, rules)
    assert tuple(each.target for each in again.pools) == sizes
    assert again.actions == ()
    unknown = Snapshot(workers(*sizes), None, now_s, dict.fromkeys(Pool, 1.0))
    assert tuple(each.target for each in decide(unknown, state, now_s, rules).pools) == sizes


@FEW
@given(policies(), st.lists(st.tuples(counts, counts), min_size=40, max_size=40))
def test_constant_load_after_any_history_is_followed_by_growth_or_shrinking_alone(
    rules: Policy, loads: list[tuple[int, int]]
) -> None:
    """The N−1 check: what has left is never wanted back while the load stays the same."""
    rules = policy_without_pairs(rules)
    state: State | None = None
    size, sizes = 2, []
    last = loads[-1][0]
    for second, load in enumerate([*(p for p, _ in loads), *[last] * 60]):
        seen = snapshot(workers(size, 1), load, 1, NOW_S + second)
        decision = decide(seen, state, NOW_S + second, rules)
        state, size = decision.state, decision.pools[0].target
        sizes.append(size)
    steady = sizes[40:]
    assert steady in (sorted(steady), sorted(steady, reverse=True))


@FEW
@given(policies(), st.data())
def test_the_state_stays_small(rules: Policy, data: st.DataObject) -> None:
    world = World(rules, data)
    for _ in range(60):
        load = data.draw(counts)
        demand = PoolDemand(load, 100 * load, arrival_tokens_per_s=load, latency_window_s=0.0)
        decision = world.step(dict.fromkeys(Pool, demand))
    assert len(msgspec.json.encode(decision.state)) < 8000
