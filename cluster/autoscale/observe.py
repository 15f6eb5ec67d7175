"""Joins what Serve, the workers and the routers report into the policy's snapshot. Pure.

Two clocks are kept apart: the reports carry no times, so nothing depends on the clocks of other
machines. What is new, and since when, is seen by comparing with the last observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autoscale.snapshot import Phase, PoolDemand, Snapshot, WorkerView
from cluster.autoscale.apps import AppState, WorkerApp
from core.histogram import Histogram
from core.types import Need, Pool, RouterRecord, WorkerRecord, WorkerShare, WorkerState
from router.signals import LATENCY_WINDOW_S

# A request that waits for one of these waits for the pool.
_NEEDS = {Pool.PREFILL: (Need.PREFILL, Need.BOTH), Pool.DECODE: (Need.DECODE, Need.BOTH)}


@dataclass(frozen=True, slots=True)
class Observation:
    """A snapshot, and what the next observation compares with."""

    snapshot: Snapshot
    phases: Mapping[str, tuple[Phase, float]] = field(default_factory=dict)  # with its start
    reports: Mapping[str, int] = field(default_factory=dict)  # latest number by router


def observe(
    apps: tuple[WorkerApp, ...],
    workers: tuple[WorkerRecord, ...],
    routers: tuple[RouterRecord, ...],
    gpus: Mapping[Pool, float],
    before: Observation | None,
    now_s: float,
) -> Observation:
    """Return the snapshot of a cluster at ``now_s``.

    Args:
        workers: the valid leases of workers.
        routers: the valid leases of routers. Without any, the demand is unknown.
        gpus: what one worker of each pool holds.
        before: the last observation; None after a start.
    """
    by_app = {record.application: record for record in workers}
    shares = _shares(routers)
    phases: dict[str, tuple[Phase, float]] = {}
    views = []
    for app in apps:
        record = by_app.get(app.name)
        phase = _phase(app, record)
        was = before.phases.get(app.name) if before is not None else None
        since_s = was[1] if was is not None and was[0] is phase else now_s
        phases[app.name] = phase, since_s
        views.append(_view(app, record, phase, since_s, gpus, shares))
    reports = {record.id: record.renewals for record in routers}
    is_new = before is None or any(
        before.reports.get(router) != number for router, number in reports.items()
    )
    measured_s = now_s if is_new or before is None else before.snapshot.measured_s
    demand = {pool: _demand(pool, routers) for pool in Pool} if routers else None
    snapshot = Snapshot(tuple(views), demand, measured_s, gpus_per_worker=gpus)
    return Observation(snapshot, phases, reports)


def _phase(app: WorkerApp, record: WorkerRecord | None) -> Phase:
    if app.state in (AppState.LEAVING, AppState.FAILED):
        return Phase.LEAVING
    if record is None:
        return Phase.PENDING if app.state is AppState.UNPLACED else Phase.STARTING
    # A worker that drains although its application stays is being replaced: Serve starts another
    # process in its place.
    return Phase.READY if record.state is WorkerState.READY else Phase.STARTING


def _view(
    app: WorkerApp,
    record: WorkerRecord | None,
    phase: Phase,
    since_s: float,
    gpus: Mapping[Pool, float],
    shares: Mapping[tuple[str, str], list[WorkerShare]],
) -> WorkerView:
    # The process was started for ``app.pool``, so that decides what it holds. The registry knows
    # the role that it has now.
    held = gpus[app.pool]
    problem = app.message if phase is Phase.PENDING else ""
    if record is None:
        return WorkerView(app.name, app.pool, phase, since_s, gpus=held, problem=problem)
    own = shares.get(record.key, [])
    load = record.load
    used = load.kv_blocks_total - load.kv_blocks_free
    return WorkerView(
        id=app.name,
        pool=record.pool,
        phase=phase,
        phase_since_s=since_s,
        gpus=held,
        requests=max(sum(share.requests for share in own), load.running + load.queue_depth),
        kv_tokens_used=used * load.kv_block_tokens,
        kv_tokens_total=load.kv_blocks_total * load.kv_block_tokens,
        tokens_per_s=_rate(own),
        can_change_role=record.can_change_role,
        problem=problem,
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


def _demand(pool: Pool, routers: tuple[RouterRecord, ...]) -> PoolDemand:
    """Add up what all routers need of one pool. Each request is at one router only."""
    queues = [q for router in routers for q in router.queues if q.need in _NEEDS[pool]]
    shares = [s for router in routers for s in router.shares if s.pool is pool]
    is_prefill = pool is Pool.PREFILL
    windows = [router for router in routers if router.window_s > 0]
    requests = sum(router.arrived_requests / router.window_s for router in windows)
    tokens = sum(
        (router.arrived_prompt_tokens if is_prefill else router.output_tokens) / router.window_s
        for router in windows
    )
    latencies = [router.ttft_s if is_prefill else router.itl_s for router in routers]
    return PoolDemand(
        waiting_requests=sum(queue.requests for queue in queues),
        waiting_tokens=sum(q.prompt_tokens if is_prefill else q.kv_tokens for q in queues),
        oldest_wait_s=max((queue.oldest_wait_s for queue in queues), default=0.0),
        running_requests=sum(share.requests for share in shares),
        running_tokens=sum(share.tokens for share in shares),
        arrival_requests_per_s=requests,
        arrival_tokens_per_s=tokens,
        latency_s=sum(latencies, Histogram()),
        latency_window_s=LATENCY_WINDOW_S,
    )
