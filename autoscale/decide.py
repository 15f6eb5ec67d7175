"""Decides how many workers each pool should have, and which one comes or leaves next. Pure.

    per pool   signals ▸ largest ▸ bounds ▸ windows ▸ scaling policies
               ▸ N−1 check ▸ bounds                                       proposal.py
    both       places ▸ ratio and budget ▸ role change                     here, fit.py, actions.py
    then       actions: leave, change role, come                                      actions.py

The target of a pool is what HPA calls spec.replicas. The next decision starts from it, and the
actions bring the workers to it. So a worker that dies is replaced without asking the signals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoscale.actions import add, choose_role_change, gpus_of, remove
from autoscale.behavior import longest_period_s
from autoscale.fit import Claim, fit
from autoscale.policy import Policy, Spec
from autoscale.proposal import Proposal, propose
from autoscale.snapshot import Action, ActionKind, PoolDecision, Reason, Snapshot, WorkerView
from autoscale.state import PoolState, RoleChange, State
from autoscale.unplaced import describe, give_up, most_placeable
from autoscale.workers import PoolWorkers, follow_role_change, with_measured, workers_of
from core.types import Pool


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers each pool should have, why, and what to do now.

    Carry out all actions before the next decision, and keep ``state`` for it.
    """

    pools: tuple[PoolDecision, ...]  # prefill, decode
    actions: tuple[Action, ...]
    state: State


def decide(snapshot: Snapshot, state: State | None, now_s: float, policy: Policy) -> Decision:
    """Return what to do now.

    Args:
        state: that of the last decision. None: this is the first decision, so the current numbers
            of workers are the targets.
        now_s: the time, on the clock of the snapshot.
    """
    spec = policy.spec
    before = _begin(snapshot, state, spec, now_s)
    pools = {pool: workers_of(snapshot, pool, before.role_change) for pool in Pool}
    late: dict[Pool, list[WorkerView]] = {}
    proposals: dict[Pool, Proposal] = {}
    hold = _why_hold(snapshot, before)
    for pool in Pool:
        known = with_measured(
            before.pools[pool],
            pools[pool],
            now_s - spec.warmup_seconds,
            snapshot.gpus_per_worker.get(pool),
        )
        known, late[pool] = give_up(spec, pools[pool], known, now_s)
        pools[pool] = pools[pool].without(each.id for each in late[pool])
        demand = None if snapshot.demand is None else snapshot.demand.get(pool)
        proposal = propose(spec, pools[pool], known, demand, hold, now_s)
        proposals[pool] = _within_places(proposal, pools[pool], late[pool], now_s)
    return _carry_out(snapshot, before, spec, pools, proposals, late, now_s)


def _begin(snapshot: Snapshot, state: State | None, spec: Spec, now_s: float) -> State:
    """Return the state to start from.

    A pool that is new here, or whose decisions are not carried out, starts from its workers.
    """
    if state is not None:
        state = replace(state, pools={pool: state.pools[pool].not_after(now_s) for pool in Pool})
        state = follow_role_change(snapshot, state, spec.role_change_timeout_seconds, now_s)
        if spec.mode == "Active":
            return state
    changing = None if state is None else state.role_change
    counts = {pool: len(workers_of(snapshot, pool, changing)) for pool in Pool}
    if state is None:
        return State({pool: _first_state(count, now_s) for pool, count in counts.items()})
    pools = {pool: replace(state.pools[pool], target=counts[pool]) for pool in Pool}
    return replace(state, pools=pools)


def _first_state(count: int, now_s: float) -> PoolState:
    """Return a state that recommends the count that there is, so that nothing changes at once."""
    window = ((now_s, count),)
    return PoolState(count, smallest=window, largest=window, needed=window)


def _why_hold(snapshot: Snapshot, state: State) -> str:
    if snapshot.demand is None:
        return "the demand is unknown, because its numbers are missing or too old"
    if snapshot.measured_s == state.measured_s:
        return "nothing was measured since the last decision"
    return ""


def _within_places(
    proposal: Proposal, workers: PoolWorkers, late: list[WorkerView], now_s: float
) -> Proposal:
    """Bound a proposal by the places that the cluster has."""
    placeable = most_placeable(proposal.state, workers, now_s)
    if placeable is None or (placeable >= proposal.wanted and not late):
        return proposal
    wanted = min(proposal.wanted, placeable)
    reason = replace(describe(proposal.state, late, placeable, now_s), workers=wanted)
    return replace(
        proposal,
        wanted=wanted,
        least=min(proposal.least, placeable),
        most=min(proposal.most, placeable),
        steps=(*proposal.steps, reason),
    )


def _carry_out(
    snapshot: Snapshot,
    before: State,
    spec: Spec,
    pools: Mapping[Pool, PoolWorkers],
    proposals: Mapping[Pool, Proposal],
    late: Mapping[Pool, list[WorkerView]],
    now_s: float,
) -> Decision:
    """Fit both proposals together, and say what to do."""
    gpus = gpus_of(snapshot, spec, {pool: proposals[pool].state.gpus for pool in Pool})
    targets, reasons = _fit(spec, proposals)
    actions = [_give_up(worker, now_s) for pool in Pool for worker in late[pool]]
    current = {pool: len(pools[pool]) for pool in Pool}
    changing = before.role_change
    change = None
    if changing is None and before.role_change_failed_s is None:
        change = choose_role_change(spec, proposals, targets, pools, gpus)
    if change is not None:
        actions.append(change)
        changing = RoleChange(str(change.worker), change.pool, now_s)
        pools = {pool: _moved(pools[pool], snapshot, changing) for pool in Pool}
        for pool in Pool:  # the new pool has one more now, and the old one has one less
            agreed = max if pool is change.pool else min
            targets[pool] = agreed(targets[pool], len(pools[pool]))
            reasons[pool].append(Reason("roleChange", targets[pool], change.text))
    for pool in Pool:
        if changing is None or changing.to is pool:  # else it has already a worker that leaves
            actions += remove(pools[pool], targets[pool], changing)
    missing = {pool: max(targets[pool] - len(pools[pool]), 0) for pool in Pool}
    added, waiting = add(spec, missing, {pool for pool in Pool if not pools[pool]}, gpus)
    return Decision(
        tuple(
            PoolDecision(
                pool,
                current[pool] + len(late[pool]),
                targets[pool],
                _ordered(reasons[pool], proposals[pool], waiting.get(pool)),
            )
            for pool in Pool
        ),
        (*actions, *added),
        _next_state(snapshot, before, spec, proposals, targets, changing, now_s),
    )


def _fit(
    spec: Spec, proposals: Mapping[Pool, Proposal]
) -> tuple[dict[Pool, int], dict[Pool, list[Reason]]]:
    claims = {
        pool: Claim(each.wanted, each.least, each.most, each.state.target, each.state.gpus)
        for pool, each in proposals.items()
    }
    budget = spec.budget
    fitted = fit(
        claims,
        None if budget is None else budget.gpus,
        "Neither" if budget is None else budget.priority,
        spec.ratio,
    )
    reasons: dict[Pool, list[Reason]] = {pool: [] for pool in Pool}
    for pool, claim in claims.items():
        if fitted.of(pool) != claim.wanted:
            reasons[pool].append(Reason(fitted.rule, fitted.of(pool), fitted.text))
    return {pool: fitted.of(pool) for pool in Pool}, reasons


def _give_up(worker: WorkerView, now_s: float) -> Action:
    problem = worker.problem or "no reason is known"
    text = f"it is given up after {now_s - worker.phase_since_s:.0f} s: {problem}"
    return Action(ActionKind.REMOVE, worker.pool, worker.id, text)


def _moved(workers: PoolWorkers, snapshot: Snapshot, changing: RoleChange) -> PoolWorkers:
    """Return a pool's workers after one got another role."""
    late = {each.id for each in workers_of(snapshot, workers.pool, None).workers}
    late -= {each.id for each in workers.workers}
    return workers_of(snapshot, workers.pool, changing).without(late)


def _ordered(
    reasons: list[Reason], proposal: Proposal, waiting: Reason | None
) -> tuple[Reason, ...]:
    """Return the reasons, the one that decided first; the signals are at the end."""
    rules = [*proposal.steps, *reasons]
    notes = () if waiting is None else (waiting,)
    return (*reversed(rules), *proposal.votes, *notes)


def _next_state(
    snapshot: Snapshot,
    before: State,
    spec: Spec,
    proposals: Mapping[Pool, Proposal],
    targets: Mapping[Pool, int],
    changing: RoleChange | None,
    now_s: float,
) -> State:
    measured_s = before.measured_s if snapshot.demand is None else snapshot.measured_s
    if spec.mode == "Advisory":  # nothing is carried out
        pools = {pool: each.state for pool, each in proposals.items()}
        return replace(before, pools=pools, measured_s=measured_s)
    pools = {
        pool: each.state.after_change(
            targets[pool], now_s, longest_period_s(spec.pool(pool).behavior)
        )
        for pool, each in proposals.items()
    }
    return replace(before, pools=pools, measured_s=measured_s, role_change=changing)
