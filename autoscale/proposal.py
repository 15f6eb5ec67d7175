"""What one pool would get if it were alone: signals, bounds, windows, scaling policies. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autoscale.behavior import limit_down, limit_up, stabilise
from autoscale.policy import MAX_WORKERS, PoolPolicy, ScaleDown, Spec
from autoscale.schedule import is_active
from autoscale.signals import Measured, Vote, ceil, evaluate
from autoscale.snapshot import PoolDemand, Reason
from autoscale.state import Average, PoolState, TooFew, highest, lowest
from autoscale.workers import PoolWorkers
from core.types import Pool

# A load is remembered in steps of 5%, so that a window of loads is bounded.
_LOAD_STEP = math.log(1.05)
# After shrinking, each worker must have less than 90% of the load at which there were too few.
_TOO_FEW_FRACTION = 0.9
# That is remembered for this many windows of scaleDown. If it comes again soon, it is remembered
# for longer: prompts and outputs may have become shorter.
_TOO_FEW_WINDOWS = 12
_TOO_FEW_WINDOW_S = 5.0  # shorter windows count as this long
_TOO_FEW_AGAIN = 8.0
_TOO_FEW_LONGEST_S = 3600.0  # HPA and others remember nothing; an hour bounds the cost of an error


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one pool would get if it were alone.

    Args:
        wanted: its target, by its own rules.
        least, most: its bounds now.
        enough: the count that it can shrink to by its N−1 check.
        votes: what the signals ask for, the largest number first.
        steps: the later rules that changed the number, in order.
        state: for the next decision; its target is still the old one.
    """

    pool: Pool
    wanted: int
    least: int
    most: int
    enough: int
    votes: tuple[Reason, ...]
    steps: tuple[Reason, ...]
    state: PoolState


@dataclass(slots=True)
class _Draft:
    """A number, and the rules that changed it."""

    workers: int
    steps: list[Reason] = field(default_factory=list)

    def become(self, workers: int, rule: str, text: str) -> None:
        if workers != self.workers:
            self.workers = workers
            self.steps.append(Reason(rule, workers, text))

    def bound(self, least: int, most: int, schedules: str) -> None:
        text = f"{least} to {most} workers{schedules}"
        rule = "minReplicas" if self.workers < least else "maxReplicas"
        self.become(min(max(self.workers, least), most), rule, text)


def propose(
    spec: Spec,
    workers: PoolWorkers,
    state: PoolState,
    demand: PoolDemand | None,
    hold: str,
    now_s: float,
) -> Proposal:
    """Return what a pool would get if it were alone.

    Args:
        demand: None if it is unknown.
        hold: why the signals must not change the number; "": they may.
    """
    policy = spec.pool(workers.pool)
    least, most, schedules = _bounds(spec, workers.pool, now_s)
    base = state.target
    if demand is not None:
        state, demand = _averaged(state, policy, demand, hold, now_s)
    votes = [] if demand is None else _votes(spec, policy, workers, state, demand, now_s)
    if demand is None:  # to stay is what unknown numbers recommend, also to the windows
        state, _ = _remember(state, policy, base, base, 0.0, now_s)
    if hold or demand is None:
        why = hold or "the demand of this pool is unknown"
        draft, enough = _Draft(base, [Reason("hold", base, why)]), base
    else:
        draft = _Draft(max(base if vote.wanted is None else vote.wanted for vote in votes))
        settled = len(workers.ready_since(now_s - demand.latency_window_s))
        more, load = draft.workers > base, demand.arrival_tokens_per_s
        state = _note_too_few(state, policy, settled, more, load, now_s)
        draft.bound(least, most, schedules)
        state, enough = _follow(draft, policy, votes, workers.pool, state, demand, now_s)
    draft.bound(least, most, schedules)
    return Proposal(
        workers.pool,
        draft.workers,
        least,
        most,
        max(enough, least),
        _as_reasons(votes, base),
        tuple(draft.steps),
        state,
    )


def _averaged(
    state: PoolState, policy: PoolPolicy, demand: PoolDemand, hold: str, now_s: float
) -> tuple[PoolState, PoolDemand]:
    """Put the average of the arriving tokens in place of those of the latest seconds.

    An average never reaches 0. So that a pool without requests can go to zero, it has no load.
    """
    average, newest = state.arrival_tokens_per_s, demand.arrival_tokens_per_s
    if average is None:
        average = Average(now_s, newest)
    elif not hold:
        average = average.with_value(newest, policy.averaging_seconds, now_s)
    state = replace(state, arrival_tokens_per_s=average)
    load = 0.0 if demand.is_idle else average.value
    return state, replace(demand, arrival_tokens_per_s=load)


def _bounds(spec: Spec, pool: Pool, now_s: float) -> tuple[int, int, str]:
    """Return the fewest and most workers now, and the names of the schedules that say so."""
    policy = spec.pool(pool)
    active = [
        (schedule.name, bounds)
        for schedule in spec.schedules
        if (bounds := schedule.bounds(pool)) is not None
        and is_active(schedule.start, schedule.end, schedule.time_zone, now_s)
    ]
    if not active:
        return policy.min_replicas, policy.max_replicas, ""
    minimums = [b.min_replicas for _, b in active if b.min_replicas is not None]
    maximums = [b.max_replicas for _, b in active if b.max_replicas is not None]
    least = max(minimums, default=policy.min_replicas)
    most = min(maximums, default=policy.max_replicas)
    return least, max(least, most), f" (schedule {', '.join(name for name, _ in active)})"


def _votes(
    spec: Spec,
    policy: PoolPolicy,
    workers: PoolWorkers,
    state: PoolState,
    demand: PoolDemand,
    now_s: float,
) -> list[Vote]:
    behavior = policy.behavior
    settle_s = max(spec.warmup_seconds, demand.latency_window_s)
    measured = Measured(
        state.target,
        demand,
        state.tokens_per_s,
        state.kv_tokens_total,
        len(workers.ready_since(now_s - settle_s)),
        behavior.scale_up.tolerance,
        behavior.scale_down.tolerance,
        margin=behavior.scale_down.tolerance if workers.pool is Pool.DECODE else 0.0,
    )
    votes = [evaluate(index, signal, measured) for index, signal in enumerate(policy.signals)]
    if not measured.is_idle:
        votes.append(Vote("signals", 1, 1, "there are requests"))
    return votes


def _as_reasons(votes: Iterable[Vote], base: int) -> tuple[Reason, ...]:
    reasons = [
        Reason(vote.rule, base if vote.wanted is None else vote.wanted, vote.text) for vote in votes
    ]
    return tuple(sorted(reasons, key=lambda reason: -reason.workers))


def _follow(
    draft: _Draft,
    policy: PoolPolicy,
    votes: list[Vote],
    pool: Pool,
    state: PoolState,
    demand: PoolDemand,
    now_s: float,
) -> tuple[PoolState, int]:
    """Apply a pool's windows and scaling policies to what its signals ask for.

    Returns the state, and the count that the pool can shrink to.
    """
    base, behavior, asked = state.target, policy.behavior, draft.workers
    needed = max(base if vote.needed is None else vote.needed for vote in votes)
    needed = max(needed, _below_max_utilization(pool, behavior.scale_down, state, demand))
    state, seen = _remember(state, policy, asked, needed, demand.arrival_tokens_per_s, now_s)
    enough = max(seen.needed, _more_than_too_few(state, seen.load, now_s))
    if base == 0 and demand.waiting_requests:
        text = f"{demand.waiting_requests} requests wait and there is no worker"
        draft.become(max(stabilise(base, seen.smallest, seen.largest), 1), "minReplicas", text)
        limit = max(limit_up(base, state.changes, behavior, now_s), 1)
        draft.become(min(draft.workers, limit), "behavior.scaleUp.policies", f"from {base}")
        return state, enough
    stable = stabilise(base, seen.smallest, seen.largest)
    direction = "scaleUp" if stable < asked else "scaleDown"
    rule = f"behavior.{direction}.stabilizationWindowSeconds"
    draft.become(stable, rule, f"{seen.smallest} to {seen.largest} were asked for in the windows")
    if stable > base:
        limit = limit_up(base, state.changes, behavior, now_s)
        draft.become(min(stable, limit), "behavior.scaleUp.policies", f"from {base}")
    elif stable < base:
        limit = limit_down(base, state.changes, behavior, now_s)
        draft.become(max(stable, limit), "behavior.scaleDown.policies", f"from {base}")
        text = f"the peak of the window needs {seen.needed} workers"
        if enough > seen.needed:
            text = f"fewer than {enough} workers were too few for the load of the window"
        draft.become(max(draft.workers, min(enough, base)), "behavior.scaleDown", text)
    return state, enough


@dataclass(frozen=True, slots=True)
class _Seen:
    """The extremes of the windows."""

    smallest: int
    largest: int
    needed: int
    load: float


def _remember(
    state: PoolState, policy: PoolPolicy, asked: int, needed: int, load: float, now_s: float
) -> tuple[PoolState, _Seen]:
    up_s = policy.behavior.scale_up.stabilization_window_seconds
    down_s = policy.behavior.scale_down.stabilization_window_seconds
    smallest, least_asked = lowest(state.smallest, now_s, up_s, asked)
    largest, most_asked = highest(state.largest, now_s, down_s, asked)
    needs, most_needed = highest(state.needed, now_s, down_s, min(needed, policy.max_replicas + 1))
    loads, step = highest(state.load, now_s, down_s, _load_step(load))
    state = replace(state, smallest=smallest, largest=largest, needed=needs, load=loads)
    return state, _Seen(least_asked, most_asked, most_needed, _load_of(step))


def _below_max_utilization(
    pool: Pool, rules: ScaleDown, state: PoolState, demand: PoolDemand
) -> int:
    """Return the prefill workers that would be busy for at most ``maxUtilization``."""
    if pool is not Pool.PREFILL or not state.tokens_per_s:
        return 0
    return ceil(demand.arrival_tokens_per_s / (state.tokens_per_s * rules.max_utilization))


def _note_too_few(
    state: PoolState,
    policy: PoolPolicy,
    settled: int,
    asks_for_more: bool,
    load: float,
    now_s: float,
) -> PoolState:
    """Note the load of each worker while the signals ask for more of them, or more of them start.

    The load is measured over some seconds, so it follows the queue late. Therefore the note keeps
    the largest load until the new workers have been ready for that long.

    Args:
        settled: workers that have been ready for as long as the load was measured.
        load: the unit is that of ``PoolDemand.arrival_tokens_per_s``.
    """
    window_s = policy.behavior.scale_down.stabilization_window_seconds
    known = state.too_few
    goes_on = state.grew_s is not None and now_s - state.grew_s < window_s
    if asks_for_more:
        state = replace(state, grew_s=now_s)
    elif not goes_on or settled >= state.target:
        return state
    _, step = highest(state.load, now_s, window_s, _load_step(load))
    if not settled or not step:
        return state
    per_worker = _load_of(step) / settled
    if known is not None and goes_on:
        largest = max(known.load_per_worker, per_worker)
        return replace(state, too_few=TooFew(now_s, largest, known.memory_s))
    memory_s = _TOO_FEW_WINDOWS * max(window_s, _TOO_FEW_WINDOW_S)
    if known is not None and now_s - known.at_s <= 2 * known.memory_s:
        memory_s = _TOO_FEW_AGAIN * known.memory_s
    return replace(state, too_few=TooFew(now_s, per_worker, min(memory_s, _TOO_FEW_LONGEST_S)))


def _load_step(load: float) -> int:
    return math.ceil(math.log1p(load) / _LOAD_STEP)


def _load_of(step: int) -> float:
    return math.expm1(step * _LOAD_STEP)


def _more_than_too_few(state: PoolState, load: float, now_s: float) -> int:
    """Return the fewest workers with clearly less load each than when there were too few.

    The other numbers of the N−1 check assume that fewer workers have the same work. But requests
    then stay longer, so the work grows. This number was measured.
    """
    known = state.too_few
    if known is None or not load or not known.load_per_worker:
        return 0
    if now_s - known.at_s >= known.memory_s:
        return 0
    return math.floor(min(load / (_TOO_FEW_FRACTION * known.load_per_worker), MAX_WORKERS)) + 1
