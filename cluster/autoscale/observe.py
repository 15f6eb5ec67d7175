"""Joins what Serve, the workers and the routers report into the policy's snapshot. Pure.

The reports carry no times, so the clocks of other machines do not matter. A comparison with the
last observation shows what is new, and since when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autoscale.demand import demand_of
from autoscale.snapshot import Phase, Snapshot, WorkerView
from cluster.autoscale.apps import AppState, WorkerApp
from core.types import Pool, RouterRecord, WorkerRecord, WorkerShare, WorkerState
from router.signals import LATENCY_WINDOW_S


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read of a cluster.

    Args:
        workers: the valid leases of workers.
        routers: the valid leases of routers. Without any, the demand is unknown.
        gpus: what one worker of each pool holds.
        roles: the last known pool of each worker whose pool is not that of its application.
        start_timeout_s: a worker that does not register for so long has no place.
    """

    apps: tuple[WorkerApp, ...]
    workers: tuple[WorkerRecord, ...]
    routers: tuple[RouterRecord, ...]
    gpus: Mapping[Pool, float]
    roles: Mapping[str, Pool]
    start_timeout_s: float


@dataclass(frozen=True, slots=True)
class Observation:
    """A snapshot, and what the next observation compares with."""

    snapshot: Snapshot
    phases: Mapping[str, tuple[Phase, float]] = field(default_factory=dict)  # with its start
    reports: Mapping[str, int] = field(default_factory=dict)  # latest number by router


def observe(facts: Facts, before: Observation | None, now_s: float) -> Observation:
    """Return the snapshot of a cluster at ``now_s``.

    Args:
        before: the last observation; None after a start.
    """
    by_app = {record.application: record for record in facts.workers}
    shares = _shares(facts.routers)
    phases: dict[str, tuple[Phase, float]] = {}
    views = []
    for app in facts.apps:
        record = by_app.get(app.name)
        phase = _phase(app, record)
        was = before.phases.get(app.name) if before is not None else None
        # Not in the future, in case the clock was set back.
        since_s = min(was[1], now_s) if was is not None and was[0] is phase else now_s
        phases[app.name] = phase, since_s
        view = WorkerView(
            app.name,
            facts.roles.get(app.name, app.pool),
            phase,
            since_s,
            # The process was started for ``app.pool``, so that decides what it holds.
            gpus=facts.gpus[app.pool],
            problem=app.message if phase is Phase.PENDING else "",
        )
        if record is None and phase is Phase.STARTING and now_s - since_s > facts.start_timeout_s:
            problem = f"it has not registered for {now_s - since_s:.0f} s"
            view = replace(view, phase=Phase.PENDING, problem=problem)
        views.append(view if record is None else _with_record(view, record, shares))
    reports = {record.id: record.renewals for record in facts.routers}
    is_new = before is None or any(
        before.reports.get(router) != number for router, number in reports.items()
    )
    measured_s = now_s if is_new or before is None else before.snapshot.measured_s
    demand = (
        {pool: demand_of(pool, facts.routers, LATENCY_WINDOW_S) for pool in Pool}
        if facts.routers
        else None
    )
    snapshot = Snapshot(tuple(views), demand, measured_s, gpus_per_worker=facts.gpus)
    return Observation(snapshot, phases, reports)


def _phase(app: WorkerApp, record: WorkerRecord | None) -> Phase:
    if app.state in (AppState.LEAVING, AppState.FAILED):
        return Phase.LEAVING
    if record is None:
        return Phase.PENDING if app.state is AppState.UNPLACED else Phase.STARTING
    # A worker that drains although its application stays is being replaced: Serve starts another
    # process in its place.
    return Phase.READY if record.state is WorkerState.READY else Phase.STARTING


def _with_record(
    view: WorkerView,
    record: WorkerRecord,
    shares: Mapping[tuple[str, str], list[WorkerShare]],
) -> WorkerView:
    # A router may still have a share from before a change of role.
    own = [share for share in shares.get(record.key, []) if share.pool is record.pool]
    load = record.load
    used = load.kv_blocks_total - load.kv_blocks_free
    return replace(
        view,
        requests=max(sum(share.requests for share in own), load.running + load.queue_depth),
        kv_tokens_used=used * load.kv_block_tokens,
        kv_tokens_total=load.kv_blocks_total * load.kv_block_tokens,
        tokens_per_s=_rate(own),
        can_change_role=record.can_change_role,
    )


def _rate(shares: list[WorkerShare]) -> float:
    """The rate of one worker, from what each router measured for its own requests.

    Routers whose requests run at the same time share the worker, so their rates add up. A router
    that has the worker for itself measures its whole rate.
    """
    together = [share.tokens_per_s for share in shares if share.requests]
    if together:
        return sum(together)
    return max((share.tokens_per_s for share in shares), default=0.0)


def _shares(routers: Iterable[RouterRecord]) -> dict[tuple[str, str], list[WorkerShare]]:
    found: dict[tuple[str, str], list[WorkerShare]] = {}
    for router in routers:
        for share in router.shares:
            found.setdefault((share.worker_id, share.incarnation), []).append(share)
    return found
