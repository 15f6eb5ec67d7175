"""The workers of one pool: what they can do, and which of them has least to lose. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoscale.snapshot import Phase, Snapshot, WorkerView
from autoscale.state import PoolState, RoleChange, State
from core.types import Pool

_LEAVE_ORDER = (Phase.PENDING, Phase.STARTING, Phase.READY)


@dataclass(frozen=True, slots=True)
class PoolWorkers:
    """The workers of one pool that do not leave."""

    pool: Pool
    workers: tuple[WorkerView, ...]  # the one with least to lose first

    def __len__(self) -> int:
        return len(self.workers)

    def of(self, *phases: Phase) -> list[WorkerView]:
        return [each for each in self.workers if each.phase in phases]

    def ready_since(self, until_s: float) -> list[WorkerView]:
        """Return the workers that have been ready at ``until_s`` and since."""
        return [each for each in self.of(Phase.READY) if each.phase_since_s <= until_s]

    def without(self, gone: Iterable[str]) -> PoolWorkers:
        names = frozenset(gone)
        return replace(self, workers=tuple(w for w in self.workers if w.id not in names))


def workers_of(snapshot: Snapshot, pool: Pool, changing: RoleChange | None) -> PoolWorkers:
    """Return a pool's workers, sorted by what they have to lose.

    A worker that changes its role counts as one that starts in its new pool.
    """
    members = []
    for each in snapshot.workers:
        if changing is not None and each.id == changing.worker and each.pool is not changing.to:
            each = replace(each, pool=changing.to, phase=Phase.STARTING)
        if each.pool is pool and each.phase is not Phase.LEAVING:
            members.append(each)
    return PoolWorkers(pool, tuple(sorted(members, key=_least_to_lose)))


def _least_to_lose(worker: WorkerView) -> tuple[float | str, ...]:
    order = _LEAVE_ORDER.index(worker.phase)
    return order, worker.requests, worker.kv_tokens_used, -worker.phase_since_s, worker.id


def with_measured(
    state: PoolState, pool: PoolWorkers, warm_until_s: float, gpus: float | None
) -> PoolState:
    """Return the state with the pool's rates, as far as they are known.

    Only workers that have been ready since ``warm_until_s`` count, and of these the median. So
    neither the first samples of a worker nor one slow worker change the rate.

    Args:
        gpus: what a new worker holds, if the snapshot says so.
    """
    warm = pool.ready_since(warm_until_s)
    held = max((each.gpus for each in pool.workers), default=0.0)
    return replace(
        state,
        tokens_per_s=_median([each.tokens_per_s for each in warm], state.tokens_per_s),
        kv_tokens_total=_median(
            [each.kv_tokens_total for each in pool.workers], state.kv_tokens_total
        ),
        gpus=gpus if gpus is not None else held or state.gpus,
    )


def _median(values: Sequence[float], otherwise: float) -> float:
    known = [value for value in values if value > 0]
    return statistics.median(known) if known else otherwise


def follow_role_change(snapshot: Snapshot, state: State, timeout_s: float, now_s: float) -> State:
    """Forget a change of role that has ended: in success, with the worker's end, or by timeout.

    After a timeout, no role changes for as long again, so that a new worker is tried instead.
    """
    failed_s, changing = state.role_change_failed_s, state.role_change
    if failed_s is not None and now_s - min(failed_s, now_s) > timeout_s:
        state = replace(state, role_change_failed_s=None)
    if changing is None:
        return state
    since_s = min(changing.since_s, now_s)  # in case the clock was set back
    for each in snapshot.workers:
        arrived = each.pool is changing.to and each.phase in (Phase.READY, Phase.LEAVING)
        if each.id != changing.worker or arrived:
            continue
        if now_s - since_s <= timeout_s:
            return replace(state, role_change=replace(changing, since_s=since_s))
        return replace(state, role_change=None, role_change_failed_s=now_s)
    return replace(state, role_change=None)
