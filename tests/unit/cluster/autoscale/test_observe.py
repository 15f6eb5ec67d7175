"""What the policy sees: applications, workers and routers joined, and nothing counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from autoscale.snapshot import Phase
from cluster.autoscale.apps import AppState, WorkerApp, free_slot, new_name, parse_name
from cluster.autoscale.observe import Facts, Observation, observe
from core.histogram import Histogram
from core.types import (
    Need,
    Pool,
    QueueLoad,
    RouterRecord,
    WorkerLoad,
    WorkerRecord,
    WorkerShare,
    WorkerState,
)

GPUS = {Pool.PREFILL: 1.0, Pool.DECODE: 2.0}
APP = WorkerApp("baton-decode-0-aaaaaa", Pool.DECODE, 0, AppState.RUNNING)


def worker(application: str = APP.name, **fields: object) -> WorkerRecord:
    record = WorkerRecord(
        id="decode-1",
        pool=Pool.DECODE,
        state=WorkerState.READY,
        incarnation="i",
        address="a:1",
        kv_addresses=(),
        model="m",
        load=WorkerLoad(0, 3, 0, kv_blocks_free=60, kv_blocks_total=100),
        application=application,
    )
    return replace(record, **fields)  # type: ignore[arg-type]


def share(requests: int, tokens_per_s: float, **fields: object) -> WorkerShare:
    found = WorkerShare("decode-1", "i", Pool.DECODE, requests, requests * 100, tokens_per_s)
    return replace(found, **fields)  # type: ignore[arg-type]


def queue(need: Need, requests: int) -> QueueLoad:
    return QueueLoad("interactive", need, requests, requests * 10, requests * 30, oldest_wait_s=2.0)


def seen(
    apps: tuple[WorkerApp, ...] = (APP,),
    workers: tuple[WorkerRecord, ...] = (),
    routers: tuple[RouterRecord, ...] = (),
    before: Observation | None = None,
    now_s: float = 100.0,
    roles: Mapping[str, Pool] | None = None,
) -> Observation:
    facts = Facts(apps, workers, routers, GPUS, roles or {}, start_timeout_s=180.0)
    return observe(facts, before, now_s)


@pytest.mark.parametrize(
    ("state", "record", "phase"),
    [
        (AppState.STARTING, None, Phase.STARTING),
        (AppState.UNPLACED, None, Phase.PENDING),
        (AppState.RUNNING, None, Phase.STARTING),
        (AppState.RUNNING, worker(), Phase.READY),
        (AppState.RUNNING, worker(state=WorkerState.STARTING), Phase.STARTING),
        (AppState.RUNNING, worker(state=WorkerState.DRAINING), Phase.STARTING),
        (AppState.LEAVING, worker(), Phase.LEAVING),
        (AppState.LEAVING, None, Phase.LEAVING),
        (AppState.FAILED, None, Phase.LEAVING),
    ],
)
def test_the_phase_of_a_worker(state: AppState, record: WorkerRecord | None, phase: Phase) -> None:
    (view,) = seen((replace(APP, state=state),), (record,) if record else ()).snapshot.workers
    assert view.phase is phase
    assert view.gpus == 2.0, "a worker holds its GPUs in each phase"


def test_a_phase_begins_when_it_is_first_seen() -> None:
    first = seen(now_s=100.0)
    second = seen(before=first, now_s=105.0)
    third = seen(workers=(worker(),), before=second, now_s=107.0)
    since = [each.snapshot.workers[0].phase_since_s for each in (first, second, third)]
    assert since == [100.0, 100.0, 107.0]


def test_a_clock_that_was_set_back_begins_no_phase_in_the_future() -> None:
    first = seen(now_s=5000.0)
    assert seen(before=first, now_s=100.0).snapshot.workers[0].phase_since_s == 100.0


def test_a_worker_that_never_registers_has_no_place() -> None:
    """Serve keeps its last words on a worker whose node is gone, so nothing else tells."""
    first = seen(now_s=100.0)
    (early,) = seen(before=first, now_s=279.0).snapshot.workers
    (late,) = seen(before=first, now_s=281.0).snapshot.workers
    assert (early.phase, late.phase) == (Phase.STARTING, Phase.PENDING)
    assert late.problem == "it has not registered for 181 s"
    assert late.phase_since_s == 100.0


def test_a_worker_keeps_its_role_while_its_lease_is_missing() -> None:
    roles = {APP.name: Pool.PREFILL}
    changed = worker(pool=Pool.PREFILL)
    (with_lease,) = seen(workers=(changed,), roles=roles).snapshot.workers
    (without,) = seen(roles=roles).snapshot.workers
    assert with_lease.pool is without.pool is Pool.PREFILL
    assert without.gpus == GPUS[Pool.DECODE], "its process was started for decode"


def test_a_share_of_an_earlier_role_is_not_the_workers() -> None:
    router = RouterRecord("r1", "a", shares=(share(9, 50.0, pool=Pool.PREFILL),))
    (view,) = seen(workers=(worker(),), routers=(router,)).snapshot.workers
    assert view.tokens_per_s == 0.0


def test_requests_are_counted_once_for_each_pool_that_they_wait_for() -> None:
    routers = (
        RouterRecord("r1", "a", queues=(queue(Need.PREFILL, 4), queue(Need.BOTH, 2))),
        RouterRecord("r2", "b", queues=(queue(Need.DECODE, 5), queue(Need.ROUTER, 7))),
    )
    demand = seen(routers=routers).snapshot.demand
    assert demand is not None
    assert demand[Pool.PREFILL].waiting_requests == 6
    assert demand[Pool.PREFILL].waiting_tokens == 60, "prefill counts prompt tokens"
    assert demand[Pool.DECODE].waiting_requests == 7
    assert demand[Pool.DECODE].waiting_tokens == 210, "decode counts tokens that need KV"


def test_routers_add_up() -> None:
    one = RouterRecord(
        "r1",
        "a",
        shares=(share(2, 50.0),),
        window_s=10.0,
        arrived_requests=20,
        arrived_prompt_tokens=1000,
        output_tokens=400,
        itl_s=Histogram({3: 5}),
    )
    two = replace(one, id="r2", window_s=5.0, shares=(share(1, 40.0),))
    snapshot = seen(workers=(worker(),), routers=(one, two)).snapshot
    assert snapshot.demand is not None
    decode = snapshot.demand[Pool.DECODE]
    assert (decode.running_requests, decode.running_tokens) == (3, 300)
    assert decode.arrival_requests_per_s == 20 / 10 + 20 / 5
    assert decode.arrival_tokens_per_s == 400 / 10 + 400 / 5
    assert decode.latency_s == Histogram({3: 10})
    assert snapshot.demand[Pool.PREFILL].arrival_tokens_per_s == 1000 / 10 + 1000 / 5
    (view,) = snapshot.workers
    assert view.requests == 3
    assert view.tokens_per_s == 90.0, "both use the worker now, so each measures its part"
    assert view.kv_tokens_used == 40 * 16


def test_a_router_without_requests_on_a_worker_does_not_add_to_its_rate() -> None:
    routers = tuple(
        RouterRecord(name, "a", shares=(share(requests, 50.0),))
        for name, requests in (("r1", 2), ("r2", 0))
    )
    (view,) = seen(workers=(worker(),), routers=routers).snapshot.workers
    assert view.tokens_per_s == 50.0


def test_a_share_of_an_earlier_process_is_not_the_workers() -> None:
    router = RouterRecord("r1", "a", shares=(share(9, 50.0, incarnation="earlier"),))
    (view,) = seen(workers=(worker(),), routers=(router,)).snapshot.workers
    assert view.requests == 3, "as the worker reports"
    assert view.tokens_per_s == 0.0


def test_without_routers_the_demand_is_unknown() -> None:
    assert seen().snapshot.demand is None


def test_the_numbers_age_until_a_router_reports_again() -> None:
    router = RouterRecord("r1", "a", renewals=1)
    first = seen(routers=(router,), now_s=100.0)
    same = seen(routers=(router,), before=first, now_s=101.0)
    newer = seen(routers=(replace(router, renewals=2),), before=same, now_s=102.0)
    assert [each.snapshot.measured_s for each in (first, same, newer)] == [100.0, 100.0, 102.0]


def test_a_router_that_left_is_no_new_measurement() -> None:
    routers = RouterRecord("r1", "a", renewals=1), RouterRecord("r2", "b", renewals=1)
    first = seen(routers=routers, now_s=100.0)
    assert seen(routers=routers[:1], before=first, now_s=101.0).snapshot.measured_s == 100.0


def test_a_name_carries_pool_and_slot() -> None:
    assert parse_name(new_name("baton", Pool.DECODE, 12)) == ("baton", Pool.DECODE, 12)
    assert parse_name("my-baton-prefill-0-0a1b2c") == ("my-baton", Pool.PREFILL, 0)
    for other in ("baton", "baton-prefill-0", "baton-router-0-0a1b2c", "baton-prefill-x-0a1b2c"):
        assert parse_name(other) is None


def test_a_new_worker_gets_the_lowest_slot_that_no_worker_has() -> None:
    apps = tuple(WorkerApp(f"w{slot}", Pool.DECODE, slot, AppState.LEAVING) for slot in (0, 1, 3))
    assert free_slot(apps, Pool.DECODE) == 2
    assert free_slot(apps, Pool.PREFILL) == 0
