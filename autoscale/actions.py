"""The next steps from the current workers to the wanted numbers. Pure.

The GPUs of all workers in all phases count. A worker is added only if its GPUs are free now, so the
budget holds at each instant: workers leave first, and others come once they have left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from autoscale.policy import Spec, low_and_high
from autoscale.proposal import Proposal
from autoscale.snapshot import Action, ActionKind, Phase, Reason, Snapshot
from autoscale.state import RoleChange
from autoscale.workers import PoolWorkers
from core.types import Pool


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs under the budget."""

    budget: float  # infinite without one
    held: float  # by all workers
    leaving: float  # by those that leave
    per_worker: Mapping[Pool, float]  # 0 if unknown or none

    def free_for(self, pool: Pool, *, ordered: float = 0.0) -> bool:
        """Return whether a new worker of a pool fits, after ``ordered`` GPUs were given away."""
        return self.held + ordered + self.per_worker[pool] <= self.budget + 1e-9

    def soon_free_for(self, pool: Pool) -> bool:
        """Return whether it fits once the workers that leave have left."""
        return self.free_for(pool, ordered=-self.leaving)


def gpus_of(snapshot: Snapshot, spec: Spec, per_worker: Mapping[Pool, float]) -> Gpus:
    """Return what the workers hold."""
    leaving = [each.gpus for each in snapshot.workers if each.phase is Phase.LEAVING]
    return Gpus(
        float("inf") if spec.budget is None else spec.budget.gpus,
        sum(each.gpus for each in snapshot.workers),
        sum(leaving),
        per_worker,
    )


def choose_role_change(
    spec: Spec,
    proposals: Mapping[Pool, Proposal],
    targets: Mapping[Pool, int],
    pools: Mapping[Pool, PoolWorkers],
    gpus: Gpus,
) -> Action | None:
    """Return the change of role that gives a pool a worker for which no GPU is free."""
    if spec.role_change == "Never":
        return None
    for taker in Pool:
        giver = taker.other
        have, proposal = len(pools[taker]), proposals[taker]
        if min(proposal.wanted, proposal.most) <= have or gpus.soon_free_for(taker):
            continue
        if not _can_give(spec, proposals[giver], targets[giver], pools[giver]):
            continue
        after = {taker: have + 1, giver: len(pools[giver]) - 1}
        prefills = range(after[Pool.PREFILL], after[Pool.PREFILL] + 1)
        if not low_and_high(spec.ratio, after[Pool.DECODE], prefills):
            continue
        for worker in pools[giver].of(Phase.READY):  # the one with least to lose first
            if worker.can_change_role:
                text = (
                    f"{taker} needs a worker and no GPU is free; {worker.id} has least to lose "
                    f"in {giver}: {worker.requests} requests"
                )
                return Action(ActionKind.CHANGE_ROLE, taker, worker.id, text)
    return None


def _can_give(spec: Spec, proposal: Proposal, target: int, workers: PoolWorkers) -> bool:
    rules = spec.pool(workers.pool).behavior.scale_down
    have, ready = len(workers), len(workers.of(Phase.READY))
    if target < have:  # it shrinks anyway
        return ready > 1 or target == 0
    needed = max(proposal.enough, proposal.least, 1)
    return ready > 1 and have > needed and rules.select_policy != "Disabled"


def remove(workers: PoolWorkers, target: int, changing: RoleChange | None) -> list[Action]:
    """Order the workers that a pool has too many to leave, those with least to lose first."""
    surplus = max(len(workers) - target, 0)
    leavers = [each for each in workers.workers if changing is None or each.id != changing.worker]
    return [
        Action(
            ActionKind.REMOVE,
            workers.pool,
            each.id,
            f"it has least to lose: it is {each.phase}, with {each.requests} requests",
        )
        for each in leavers[:surplus]
    ]


def add(
    spec: Spec, missing: Mapping[Pool, int], empty: Collection[Pool], gpus: Gpus
) -> tuple[list[Action], dict[Pool, Reason]]:
    """Order the workers that pools lack, as far as their GPUs are free now.

    An empty pool comes first, then the one with priority, then the one that lacks more.

    Returns the actions, and why other workers have to wait.
    """
    priority = "Neither" if spec.budget is None else spec.budget.priority
    order = sorted(
        Pool,
        key=lambda pool: (pool not in empty, pool.value != priority.lower(), -missing[pool]),
    )
    actions: list[Action] = []
    waiting: dict[Pool, Reason] = {}
    ordered = 0.0
    for pool in order:
        for number in range(missing[pool]):
            if why := _why_wait(spec, pool, ordered, gpus):
                text = f"{number} of {missing[pool]} missing workers are added now: {why}"
                waiting[pool] = Reason("budget", number, text)
                break
            ordered += gpus.per_worker[pool]
            text = f"{missing[pool]} workers are missing"
            actions.append(Action(ActionKind.ADD, pool, None, text))
    return actions, waiting


def _why_wait(spec: Spec, pool: Pool, ordered: float, gpus: Gpus) -> str:
    if spec.budget is not None and not gpus.per_worker[pool]:
        return "it is not known yet how many GPUs one holds"
    if not gpus.free_for(pool, ordered=ordered):
        return (
            f"{gpus.held + ordered:g} of {gpus.budget:g} GPUs are held, {gpus.leaving:g} of them "
            "by workers that leave"
        )
    return ""
