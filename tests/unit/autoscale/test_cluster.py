"""The ready policies on a small cluster, and what went wrong in the autoscalers of others."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from autoscale.decide import Decision, decide
from autoscale.load import load_policy
from autoscale.policy import Policy
from autoscale.snapshot import ActionKind, Phase, Snapshot
from autoscale.state import State
from core.types import Pool
from tests.support.autoscale_views import AT_ONCE, NOW_S, demand, policy, snapshot, worker, workers
from tests.support.autoscaled_cluster import Cluster, Decide, Load

POLICIES = Path(__file__).resolve().parents[3] / "deploy" / "policies"
READY = sorted(POLICIES.glob("*.yaml"))
each_ready_policy = pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)

LONG_PROMPTS = Load(2.0, prompt_tokens=8000, output_tokens=50)  # 2 busy prefill workers
LONG_ANSWERS = Load(0.25, prompt_tokens=200, output_tokens=4000)  # about 35 streams
NOTHING = Load(0.0)


def by(rules: Policy) -> Decide:
    return functools.partial(_decide, rules)


def _decide(rules: Policy, seen: Snapshot, state: State | None, now_s: float) -> Decision:
    return decide(seen, state, now_s, rules)


def stay(seen: Snapshot, state: State | None, now_s: float) -> Decision:
    return replace(decide(seen, state, now_s, policy()), actions=())


def ready(name: str) -> Policy:
    return load_policy(POLICIES / f"{name}.yaml")


def targets(decision: Decision) -> tuple[int, int]:
    prefill, decode = decision.pools
    return prefill.target, decode.target


@each_ready_policy
@pytest.mark.parametrize("load", [LONG_PROMPTS, LONG_ANSWERS], ids=["prompts", "answers"])
@pytest.mark.parametrize("start", [1, 4])
def test_constant_load_settles(path: Path, load: Load, start: int) -> None:
    """A pool may grow too far at first. Once one worker has left, none comes back."""
    cluster = Cluster(start, start)
    if start > 1:  # until as many streams end as begin
        for _ in cluster.run(load, 400, stay):
            pass
        cluster.state = None
    runs = [targets(each) for each in cluster.run(load, 2400, by(load_policy(path)))]
    for counts in zip(*runs, strict=True):
        peak = counts.index(max(counts))
        after = counts[peak:]
        assert list(after) == sorted(after, reverse=True)
    # With one worker less, the pool was overloaded; so the policy did find a number that serves.
    assert all(len(queue) <= 3 for queue in cluster.queues.values())


@each_ready_policy
def test_without_traffic_the_pools_shrink_to_their_minimum(path: Path) -> None:
    rules = load_policy(path)
    cluster = Cluster(4, 4)
    for _ in cluster.run(LONG_PROMPTS, 60, by(rules)):
        pass
    for _ in cluster.run(NOTHING, 3600, by(rules), every_s=20):
        pass
    counts = [cluster.count(pool) for pool in Pool]
    scheduled = [2, 2] if rules.spec.schedules else []
    minimums = [rules.spec.pool(pool).min_replicas for pool in Pool]
    assert counts in (minimums, scheduled)


def test_an_empty_cluster_starts_with_the_first_request() -> None:
    cluster = Cluster(0, 0)
    first = next(cluster.run(Load(1.0), 1, by(ready("cost-saver"))))
    assert targets(first)[0] == 1
    for _ in cluster.run(Load(1.0), 240, by(ready("cost-saver"))):
        pass
    assert all(cluster.count(pool, Phase.READY) for pool in Pool)
    assert all(len(queue) <= 1 for queue in cluster.queues.values())


def test_prefill_heavy_load_adds_prefill_workers_only() -> None:
    cluster = Cluster(1, 1)
    for _ in cluster.run(Load(3.0, 8000, 20), 300, by(ready("chat"))):
        pass
    assert cluster.count(Pool.PREFILL) >= 4
    assert cluster.count(Pool.DECODE) == 1


def test_decode_heavy_load_adds_decode_workers_only() -> None:
    cluster = Cluster(1, 1)
    for _ in cluster.run(LONG_ANSWERS, 600, by(ready("chat"))):
        pass
    assert cluster.count(Pool.DECODE) >= 4
    assert cluster.count(Pool.PREFILL) == 1


def test_a_load_between_one_and_two_workers_does_not_alternate() -> None:
    """The queue of two workers is so short that it alone would ask for one."""
    signals = [{"type": "QueueSeconds", "target": 1.0}]
    down = {"stabilizationWindowSeconds": 30, "tolerance": 0}
    rules = policy({"signals": signals, "behavior": {**AT_ONCE, "scaleDown": down}})
    cluster = Cluster(1, 4)
    runs = [targets(each)[0] for each in cluster.run(Load(1.1, 8000, 20), 1800, by(rules))]
    assert runs[-1] >= 2
    peak = runs.index(max(runs))
    assert runs[peak:] == sorted(runs[peak:], reverse=True)


def test_a_latency_that_one_worker_keeps_only_at_less_load_does_not_alternate() -> None:
    """The latency alone knows nothing of the load with fewer workers. The pool remembers it."""
    signals = [{"type": "ITL", "percentile": 95, "targetMilliseconds": 40}]
    down = {"stabilizationWindowSeconds": 30}
    rules = policy(decode={"signals": signals, "behavior": {**AT_ONCE, "scaleDown": down}})
    cluster = Cluster(2, 1)
    runs = [targets(each)[1] for each in cluster.run(Load(0.25, 100, 2600), 3000, by(rules))]
    turns = sum(after > before for before, after in itertools.pairwise(runs))
    assert turns <= 3
    assert len(set(runs[len(runs) // 2 :])) == 1


def test_a_burst_is_not_held_against_the_load_before_it() -> None:
    """The queue of a burst is seen at once, and its load later. One worker was enough before."""
    signals = [{"type": "QueueRequests", "target": 8}]
    behavior = {**AT_ONCE, "scaleDown": {"stabilizationWindowSeconds": 30}}
    rules = policy(decode={"signals": signals, "behavior": behavior, "averagingSeconds": 1})
    cluster = Cluster(1, 1)
    before, burst = Load(0.25, 100, 400), Load(20.0, 100, 400)
    runs = [
        [targets(each)[1] for each in cluster.run(load, seconds, by(rules), every_s=1)]
        for load, seconds in ((before, 120), (burst, 2), (before, 240))
    ]
    assert max(runs[2]) > runs[0][-1] == runs[2][-1] == 1


def test_a_worker_that_cannot_be_placed_wedges_nothing() -> None:
    cluster = Cluster(1, 1)
    cluster.places = 2
    rules = ready("chat")
    for _ in cluster.run(Load(3.0, 8000, 20), 600, by(rules)):
        pass
    assert cluster.count(Pool.PREFILL, Phase.READY) == 1
    tries = cluster.made - 2
    assert 3 <= tries <= 12  # the first tries of growth, then one after 60, 120 and 240 s
    cluster.places = 8
    for _ in cluster.run(Load(3.0, 8000, 20), 900, by(rules)):
        pass
    assert cluster.count(Pool.PREFILL, Phase.READY) >= 3


@pytest.mark.parametrize("role_change", ["Never", "WhenBudgetIsSpent"])
def test_a_rebalance_keeps_the_budget_and_arrives(role_change: str) -> None:
    rules = policy(
        {"signals": [{"type": "Utilization", "target": 0.7}]},
        {"signals": [{"type": "KVUtilization", "target": 0.8}]},
        budget={"gpus": 6},
        roleChange=role_change,
    )
    cluster = Cluster(4, 2)
    for load, prefill in ((LONG_PROMPTS, 3), (LONG_ANSWERS, 1), (LONG_PROMPTS, 3)):
        for _ in cluster.run(load, 400, by(rules)):
            assert len(cluster.workers) <= 6
        assert cluster.count(Pool.PREFILL, Phase.READY) >= prefill
        if load is LONG_ANSWERS:
            assert cluster.count(Pool.DECODE, Phase.READY) >= 3


def test_a_series_that_stopped_adds_no_worker() -> None:
    """The last number said: more. It must not be acted on again and again."""
    rules = policy({"maxReplicas": 50, "behavior": {"scaleUp": {"stabilizationWindowSeconds": 0}}})
    state = decide(snapshot(workers(1, 1), 1, 1), None, NOW_S, rules).state
    busy = snapshot(workers(1, 1), demand(1000), 1, NOW_S + 1)
    decision = decide(busy, state, NOW_S + 1, rules)
    grown = decision.pools[0].target
    assert grown == 5
    views = (*workers(1, 1), *(worker(f"p{i}", Phase.STARTING) for i in range(5, 9)))
    for second in range(2, 400, 7):
        seen = snapshot(views, demand(1000), 1, NOW_S + 1)
        decision = decide(seen, decision.state, NOW_S + second, rules)
        assert decision.pools[0].target == grown
        assert not [each for each in decision.actions if each.kind is ActionKind.ADD]


def test_a_restart_changes_no_decision() -> None:
    """``Cluster`` writes and reads the state each time. Here it is kept as it is."""

    def keep(rules: Policy) -> list[tuple[int, int]]:
        kept: list[State] = []

        def decide_with_own_state(seen: Snapshot, state: State | None, now_s: float) -> Decision:
            decision = decide(seen, kept[-1] if kept else None, now_s, rules)
            kept.append(decision.state)
            return decision

        return [
            targets(each) for each in Cluster(1, 1).run(LONG_PROMPTS, 600, decide_with_own_state)
        ]

    rules = ready("chat")
    assert keep(rules) == [
        targets(each) for each in Cluster(1, 1).run(LONG_PROMPTS, 600, by(rules))
    ]
