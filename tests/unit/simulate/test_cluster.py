"""A trace on a simulated cluster: conservation, a closed formula, worker-hours, determinism."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from autoscale.snapshot import Action, ActionKind, Phase, Snapshot
from core.config.schema import Config
from core.errors import WORKER_DRAINING, ConfigError
from core.types import Pool
from router.admission.policy import AdmissionLimits, ClassLimits
from router.dispatch.retry import RetryLimits
from router.placement.policy import PlacementLimits
from simulate.cluster import (
    MAX_RUNNING_REQUESTS,
    ClusterSettings,
    Run,
    default_settings,
    run,
    worker_seconds,
)
from simulate.front import FrontSettings
from simulate.latency import PRESETS, DecodeLatency, KvRoom, LatencyModel, PrefillLatency
from simulate.metrics import Slo, evaluate, latencies_of
from simulate.trace import Trace, TraceRequest, bursty

MODEL = replace(PRESETS["8b-h100"], cold_start_s=10.0)
ONE_EACH = {Pool.PREFILL: 1, Pool.DECODE: 1}


@dataclass(frozen=True, slots=True)
class Decided:
    actions: tuple[Action, ...]
    state: Any = None


def scripted(
    script: dict[int, Callable[[Snapshot], list[Action]]],
) -> Callable[[Snapshot, Any, float], Decided]:
    """A policy that acts at given seconds."""
    seconds = iter(range(10**9))

    def decide(snapshot: Snapshot, state: Any, now_s: float) -> Decided:
        act = script.get(next(seconds))
        return Decided(tuple(act(snapshot)) if act is not None else ())

    return decide


def add(pool: Pool) -> Callable[[Snapshot], list[Action]]:
    return lambda _snapshot: [Action(ActionKind.ADD, pool, None, "")]


def one(pool: Pool, kind: ActionKind, to: Pool | None = None) -> Callable[[Snapshot], list[Action]]:
    def act(snapshot: Snapshot) -> list[Action]:
        first = next(each for each in snapshot.workers if each.pool is pool)
        return [Action(kind, to or pool, first.id, "")]

    return act


def steady(
    requests: int, per_s: float = 1.0, prompt_tokens: int = 500, output_tokens: int = 50
) -> Trace:
    return Trace(
        "steady",
        tuple(TraceRequest(i / per_s, prompt_tokens, output_tokens) for i in range(requests)),
    )


def outcome(done: Run) -> list[tuple[Any, ...]]:
    return [(each.status, each.first_s, each.ended_s, each.gap_p95_s) for each in done.ended]


def random_scaler(seed: int) -> Callable[[Snapshot, Any, float], Decided]:
    """Adds, removes and changes workers at random, and keeps one of each pool."""
    rng = random.Random(seed)

    def decide(snapshot: Snapshot, state: Any, now_s: float) -> Decided:
        pool = rng.choice(list(Pool))
        ready = [w for w in snapshot.workers if w.pool is pool and w.phase is Phase.READY]
        draw = rng.random()
        if draw < 0.05:
            return Decided((Action(ActionKind.ADD, pool, None, ""),))
        if draw < 0.15 and len(ready) > 1:
            other = Pool.DECODE if pool is Pool.PREFILL else Pool.PREFILL
            kind = rng.choice((ActionKind.REMOVE, ActionKind.CHANGE_ROLE))
            to = pool if kind is ActionKind.REMOVE else other
            return Decided((Action(kind, to, rng.choice(ready).id, ""),))
        return Decided(())

    return decide


@pytest.mark.parametrize("model", sorted(PRESETS))
@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_once_whatever_the_workers_do(seed: int, model: str) -> None:
    """``run`` itself checks that nothing is left behind. The same seed gives the same run."""
    trace = bursty(seed=seed, duration_s=40, base_per_s=4, burst_per_s=20, calm_s=15, burst_s=10)
    limits = replace(default_settings(), drain_s=0.3)
    workers = {Pool.PREFILL: 2, Pool.DECODE: 2}
    latency = replace(PRESETS[model], cold_start_s=3.0)
    done = run(trace, latency, workers, random_scaler(seed), limits)
    assert [each.index for each in done.ended] == list(range(len(trace.requests)))
    for each in done.ended:
        assert each.status
        if each.status == "ok":
            assert each.request.arrival_s <= each.first_s <= each.ended_s
    again = run(trace, latency, workers, random_scaler(seed), limits)
    assert outcome(done) == outcome(again)
    assert done.samples == again.samples


def test_the_settings_are_those_of_the_configuration() -> None:
    config = Config.model_validate(
        {
            "router": {
                "registry_poll_s": 0.2,
                "prefill_backlog_s": 0.7,
                "default_deadline_s": 50.0,
                "cold_start_timeout_s": 90.0,
                "max_attempts": 9,
                "failover_timeout_s": 20.0,
                "avoid_worker_s": 4.0,
                "classes": {"gold": {"weight": 3, "max_queue": 5, "queue_timeout_s": 6.0}},
            },
            "prefill": {"max_concurrent": 11},
            "decode": {"max_concurrent": 12, "shutdown_grace_s": 7.0},
            "redis": {"renew_s": 0.8},
        }
    )
    front = FrontSettings(
        AdmissionLimits(MAX_RUNNING_REQUESTS, {"gold": ClassLimits(3, 5, 6.0)}, 90.0),
        PlacementLimits({Pool.PREFILL: 11, Pool.DECODE: 12}, 0.7),
        deadline_s=50.0,
        report_snapshots=4,
        retries=RetryLimits(9, 20.0, 4.0),
    )
    assert default_settings(config) == ClusterSettings(front, poll_s=0.2, drain_s=7.0)


def test_streams_of_a_decode_worker_that_leaves_move() -> None:
    trace = steady(3, output_tokens=2000)
    workers = {Pool.PREFILL: 1, Pool.DECODE: 2}
    script = scripted({5: one(Pool.DECODE, ActionKind.REMOVE)})
    limits = replace(default_settings(), drain_s=1.0)
    done = run(trace, MODEL, workers, script, limits)
    assert done.moved >= 1
    assert {each.status for each in done.ended} == {"ok"}
    stayed = run(trace, MODEL, workers, None, limits)
    # A moved stream computes its prompt and tokens so far again, and loses no token.
    for moved, still in zip(done.ended, stayed.ended, strict=True):
        assert moved.first_s == still.first_s
        assert moved.ended_s == pytest.approx(still.ended_s, abs=1.0)


@pytest.mark.parametrize("output_tokens", [10, 5])
def test_the_time_for_which_a_moved_stream_stands_still_is_an_itl(output_tokens: int) -> None:
    """It moves at 6 s, with four tokens. Of five, the prefill makes the last one."""
    model = replace(MODEL, prefill=PrefillLatency(0.0, 0.02), decode=DecodeLatency(1.0))
    # The second one keeps the cluster going until the first one has ended.
    requests = (TraceRequest(0.0, 100, output_tokens), TraceRequest(10.0, 100, 1))
    slowest_s: list[float | None] = []

    def remove_the_busy_one(snapshot: Snapshot) -> list[Action]:
        busy = next(each for each in snapshot.workers if each.pool is Pool.DECODE and each.requests)
        return [Action(ActionKind.REMOVE, Pool.DECODE, busy.id, "")]

    def watch(snapshot: Snapshot) -> list[Action]:
        assert snapshot.demand is not None
        slowest_s.append(snapshot.demand[Pool.DECODE].latency_s.quantile(1.0))
        return []

    script = scripted({5: remove_the_busy_one, 9: watch})
    settings = replace(default_settings(), drain_s=1.0)
    done = run(Trace("moved", requests), model, {Pool.PREFILL: 1, Pool.DECODE: 2}, script, settings)
    last_s = 2.0 + model.transfer.seconds(100) + 3.0
    stall_s = 6.0 + 104 * 0.02 - last_s
    assert done.moved == 1
    assert done.ended[0].status == "ok"
    assert done.ended[0].gap_p95_s == pytest.approx(stall_s)
    assert slowest_s == [pytest.approx(stall_s, rel=0.1)]


def test_streams_that_find_no_worker_are_demand_and_end_after_the_failover_timeout() -> None:
    waiting: list[tuple[int, int]] = []

    def watch(snapshot: Snapshot) -> list[Action]:
        demand = snapshot.demand
        assert demand is not None
        waiting.append(
            (demand[Pool.PREFILL].waiting_requests, demand[Pool.DECODE].waiting_requests)
        )
        return []

    script = {5: one(Pool.DECODE, ActionKind.REMOVE), 10: watch}
    limits = replace(default_settings(), drain_s=1.0)
    done = run(steady(3, output_tokens=2000), MODEL, ONE_EACH, scripted(script), limits)
    assert waiting == [(0, 3)]
    timeout_s = limits.front.retries.timeout_s
    for each in done.ended:
        assert each.status == WORKER_DRAINING, "what a live router reports"
        # The last try is in the last second, which is the longest wait between two.
        assert 6 + timeout_s - 1 <= each.ended_s <= 6 + timeout_s

    done = run(
        steady(3, output_tokens=2000),
        MODEL,
        ONE_EACH,
        scripted({**script, 12: add(Pool.DECODE)}),
        limits,
    )
    assert {each.status for each in done.ended} == {"ok"}


def test_the_wait_at_one_prefill_worker_is_that_of_an_m_d_1_queue() -> None:
    """Mean wait rho * S / (2 * (1 - rho)); Pollaczek and Khinchin."""
    service_s, rho = 0.1, 0.5
    rng, arrival_s, requests = random.Random(5), 0.0, []
    for _ in range(3000):
        arrival_s += rng.expovariate(rho / service_s)
        requests.append(TraceRequest(arrival_s, 1000, 1))
    model = replace(MODEL, prefill=PrefillLatency(0.0, service_s / 1000))
    done = run(Trace("m/d/1", tuple(requests)), model, ONE_EACH)
    waits_s = latencies_of(done).ttft_s - service_s
    assert waits_s.mean() == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.1)


def test_worker_time_counts_from_the_order_until_gone() -> None:
    done = run(
        steady(400),
        MODEL,
        ONE_EACH,
        scripted({100: add(Pool.PREFILL), 300: one(Pool.PREFILL, ActionKind.REMOVE)}),
    )
    assert worker_seconds(done, Pool.DECODE, 399) == 399
    assert worker_seconds(done, Pool.PREFILL, 399) == pytest.approx(399 + 200, abs=1)
    assert done.cold_starts == 1
    assert done.changes[ActionKind.REMOVE] == 1
    results = evaluate(done, Slo(1, 1), "scripted")
    assert results.replica_hours == pytest.approx((599 + 399) / 3600, rel=0.01)
    assert [each.ready[0] for each in done.samples][105:115] == [1] * 5 + [2] * 5


def test_a_worker_that_changes_its_role_is_ready_sooner_than_a_new_one() -> None:
    workers = {Pool.PREFILL: 2, Pool.DECODE: 1}
    script = scripted({20: one(Pool.PREFILL, ActionKind.CHANGE_ROLE, Pool.DECODE)})
    done = run(steady(100), MODEL, workers, script)
    assert done.cold_starts == 0
    assert [each.ready for each in done.samples][25] == (1, 2)
    assert worker_seconds(done, Pool.PREFILL, 99) == pytest.approx(99 + 20, abs=0.1)
    assert worker_seconds(done, Pool.DECODE, 99) == pytest.approx(99 + 79, abs=0.1)


def test_a_worker_may_leave_between_its_drain_and_its_new_role() -> None:
    def between(snapshot: Snapshot) -> list[Action]:
        worker = next(each for each in snapshot.workers if each.phase is Phase.STARTING)
        return [Action(ActionKind.REMOVE, worker.pool, worker.id, "")]

    script = {20: one(Pool.PREFILL, ActionKind.CHANGE_ROLE, Pool.DECODE), 22: between}
    model = replace(MODEL, role_change_s=5.0)
    done = run(steady(40), model, {Pool.PREFILL: 2, Pool.DECODE: 1}, scripted(script))
    assert {each.status for each in done.ended} == {"ok"}
    assert done.changes == {ActionKind.ADD: 0, ActionKind.REMOVE: 1, ActionKind.CHANGE_ROLE: 1}
    assert [each.ordered for each in done.samples][30] == (1, 1)
    assert worker_seconds(done, Pool.DECODE, 39) == pytest.approx(39 + 2, abs=0.1)


def test_a_waiting_request_that_is_larger_than_another_needs_what_it_has_no_room_in() -> None:
    """The prefill worker has two prompts. KV has room for the small request, not for the large."""
    model = replace(MODEL, prefill=PrefillLatency(0.0, 0.03), kv=KvRoom(0, 1600))
    first, small, large = ((100, 500), (50, 50), (200, 400))
    requests = [TraceRequest(0.0, *each) for each in (first, first, small, large)]
    waiting: list[int] = []

    def watch(snapshot: Snapshot) -> list[Action]:
        assert snapshot.demand is not None
        waiting.extend(snapshot.demand[pool].waiting_requests for pool in Pool)
        return []

    trace = Trace("sizes", (*requests, TraceRequest(2.0, 10, 1)))
    run(trace, model, ONE_EACH, scripted({1: watch}))
    assert waiting == [2, 1]


def test_only_actions_that_change_something_and_starts_that_end_are_counted() -> None:
    def latest(pool: Pool, kind: ActionKind) -> Callable[[Snapshot], list[Action]]:
        def act(snapshot: Snapshot) -> list[Action]:
            last = [each for each in snapshot.workers if each.pool is pool][-1]
            return [Action(kind, pool, last.id, "")]

        return act

    script = {
        10: add(Pool.PREFILL),
        15: latest(Pool.PREFILL, ActionKind.REMOVE),  # before it is ready
        20: lambda _: [Action(ActionKind.REMOVE, Pool.PREFILL, "prefill-009", "")],  # is unknown
        25: latest(Pool.DECODE, ActionKind.CHANGE_ROLE),  # has the role
    }
    done = run(steady(40), MODEL, ONE_EACH, scripted(script))
    assert done.cold_starts == 0
    assert done.changes == {ActionKind.ADD: 1, ActionKind.REMOVE: 1, ActionKind.CHANGE_ROLE: 0}


def test_hours_count_until_the_last_end_if_all_requests_arrive_at_once() -> None:
    trace = Trace("at once", tuple(TraceRequest(0.0, 500, 50) for _ in range(20)))
    done = run(trace, MODEL, ONE_EACH)
    last_s = max(each.ended_s for each in done.ended)
    assert last_s > 0
    assert evaluate(done, Slo(1, 1), "t").replica_hours == pytest.approx(2 * last_s / 3600)


def test_requests_wait_for_the_first_workers_of_empty_pools() -> None:
    done = run(
        steady(5),
        MODEL,
        {},
        scripted({2: lambda s: [*add(Pool.PREFILL)(s), *add(Pool.DECODE)(s)]}),
    )
    assert {each.status for each in done.ended} == {"ok"}
    assert done.ended[0].first_s == pytest.approx(12.0, abs=0.3)


def test_workers_without_gpus_wait_for_them() -> None:
    limits = replace(default_settings(), gpus=2.0)
    seen: list[list[Phase]] = []

    def watch(snapshot: Snapshot) -> list[Action]:
        seen.append([each.phase for each in snapshot.workers if each.pool is Pool.DECODE])
        return []

    script = {
        3: add(Pool.DECODE),
        4: watch,
        9: one(Pool.PREFILL, ActionKind.REMOVE),
        14: watch,
        30: watch,
        31: add(Pool.PREFILL),
    }
    trace = Trace("early", (TraceRequest(0.0, 10, 5), TraceRequest(40.0, 10, 1)))
    with_prefill_again = {**script, 35: one(Pool.DECODE, ActionKind.REMOVE)}
    run(trace, MODEL, ONE_EACH, scripted(with_prefill_again), limits)
    ready, pending, starting = Phase.READY, Phase.PENDING, Phase.STARTING
    assert seen == [[ready, pending], [ready, starting], [ready, ready]]


def test_refused_requests_miss_both_slos() -> None:
    trace = steady(2000, per_s=200.0, prompt_tokens=4000)
    done = run(trace, MODEL, ONE_EACH)
    results = evaluate(done, Slo(1e9, 1e9), "one each")
    refused = sum(results.refused.values())
    assert refused > 1000
    assert results.attainment_ttft == results.attainment_itl == (2000 - refused) / 2000
    assert results.attainment_by_class == {
        "interactive": (results.attainment_ttft, results.attainment_itl)
    }


def test_a_request_that_fits_on_no_worker_is_refused() -> None:
    trace = Trace("long", (TraceRequest(0.0, 10**9, 5), TraceRequest(1.0, 10, 5)))
    assert [each.status for each in run(trace, MODEL, ONE_EACH).ended] == ["TOO_LONG", "ok"]


def test_an_unknown_class_is_an_error() -> None:
    trace = Trace("t", (TraceRequest(0.0, 10, 5, service_class="gold"),))
    with pytest.raises(ConfigError, match="'gold'; this cluster knows interactive, batch"):
        run(trace, MODEL, ONE_EACH)


def test_a_prefix_cache_makes_the_first_token_come_sooner() -> None:
    blocks = tuple(range(16))
    first, second = (TraceRequest(at_s, 8192, 5, block_ids=blocks) for at_s in (0.0, 10.0))
    done = run(Trace("prefix", (first, second)), MODEL, ONE_EACH)
    ttft_s = latencies_of(done).ttft_s
    assert ttft_s[0] == pytest.approx(MODEL.prefill.seconds(8192))
    assert ttft_s[1] == pytest.approx(MODEL.prefill.seconds(8192, 8191))


def test_one_request_takes_the_times_of_the_model() -> None:
    done = run(Trace("one", (TraceRequest(0.0, 1000, 3),)), MODEL, ONE_EACH)
    (each,) = done.ended
    steps_s = MODEL.decode.seconds(1, 1000) + MODEL.decode.seconds(1, 1001)
    assert each.first_s == pytest.approx(MODEL.prefill.seconds(1000))
    assert each.ended_s == pytest.approx(each.first_s + MODEL.transfer.seconds(1000) + steps_s)


@pytest.mark.parametrize("max_tokens", [51, 4096])
def test_what_clients_allow_changes_no_answer(max_tokens: int) -> None:
    limits: ClusterSettings = default_settings()
    limits = replace(limits, front=replace(limits.front, max_tokens=max_tokens))
    done = run(steady(20), fake(), ONE_EACH, settings=limits)
    exact = run(steady(20), fake(), ONE_EACH)
    assert {each.status for each in done.ended} == {"ok"}
    assert outcome(done) == outcome(exact)


def fake() -> LatencyModel:
    return PRESETS["fake"]
