"""Observes the cluster once a second, asks the policy, and carries out what it decides.

    read policy and orders ▸ list applications, workers, routers ▸ decide ▸ add, remove, change role
    ▸ keep memory, view and plan in the store

If the store or Serve does not answer, the step ends there. What it has done so far stays, and the
next step sees the cluster as it is then. A restart goes on with the memory in the store. Without
that memory, the number of workers that exist is the number to keep.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from autoscale.decide import Decision, decide
from autoscale.snapshot import Action, ActionKind, Phase, PoolDecision, Snapshot
from autoscale.state import State
from cluster.autoscale.apps import AppState, WorkerApp, WorkerApps, free_slot
from cluster.autoscale.observe import Facts, Observation, observe
from cluster.autoscale.policy_file import (
    PolicyFile,
    checked_policy,
    digest_of,
    first_workers,
    fixed_policy,
)
from cluster.autoscale.view import KEPT_CHANGES, AutoscaleView, Change, encode_view
from core.config.schema import Config
from core.errors import ConfigError, InternalError, UnavailableError, last_line
from core.state.autoscale import AutoscaleStore
from core.state.orders import Orders
from core.state.registry import Registry
from core.state.store import Store
from core.tasks import Supervisor
from core.types import Pool, PoolPlan, RouterRecord, WorkerRecord, WorkerState

_STEP_S = 1.0  # each step costs a listing of Serve's applications
# A worker that could not start is tried again after 1, 2, 4, … seconds.
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 60.0
_REFUSAL_SHOWN_S = 60.0  # so that whoever applied the policy sees it

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a restart goes on with."""

    fixed: Mapping[Pool, int]  # numbers of workers without a policy, and beside an advisory one
    has_started: bool = False  # whether the first workers were started
    fixed_state: State | None = None
    policy_state: State | None = None
    policy_text: str | None = None  # of the policy that was taken last
    roles: Mapping[str, Pool] = field(default_factory=dict)  # of workers that changed their role
    changes: tuple[Change, ...] = ()
    start_s: float | None = None  # see ``AutoscaleView``


@dataclass(slots=True)
class _Backoff:
    """When the next worker of a pool may start after some could not."""

    failures: int = 0
    until_s: float = -math.inf

    def failed(self, now_s: float) -> None:
        delay_s = min(_FIRST_BACKOFF_S * 2**self.failures, _MAX_BACKOFF_S)
        self.failures = min(self.failures + 1, 16)
        self.until_s = now_s + delay_s

    def waits(self, now_s: float) -> bool:
        """Whether it is too early for the next try. A clock that was set back delays it little."""
        self.until_s = min(self.until_s, now_s + _MAX_BACKOFF_S)
        return now_s < self.until_s


def _now_s() -> float:
    """Seconds since the epoch: schedules need the time of day, and a restart goes on with it."""
    return datetime.now(UTC).timestamp()


@dataclass(slots=True)
class _Parts:
    """The parts of the store that the loop uses."""

    registry: Registry
    orders: Orders
    autoscale: AutoscaleStore

    async def close(self) -> None:
        for part in (self.registry, self.orders, self.autoscale):
            await part.close()


class AutoscaleLoop:
    """Keeps the pools at the numbers of workers that the policy or the operator wants.

    Args:
        gpus: what one worker of each pool holds of the policy's budget.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        apps: WorkerApps,
        store: Store,
        *,
        gpus: Mapping[Pool, float],
        clock: Callable[[], float] = _now_s,
    ) -> None:
        self._config = config
        self._apps = apps
        self._store = _Parts(store.registry(), store.orders(), store.autoscale())
        self._gpus = gpus
        self._clock = clock
        self._memory: Memory | None = None
        self._policy: PolicyFile | None = None
        self._refused: tuple[str, str] = "", ""  # digest of a policy, and why it was not taken
        self._refused_s = -math.inf
        self._observation: Observation | None = None
        self._backoff = {pool: _Backoff() for pool in Pool}
        # When each worker was ordered; None: it has been ready, or nobody knows.
        self._ordered_s: dict[str, float | None] = {}
        self._failed: set[str] = set()  # workers that could not start and are not gone yet
        self._problem = ""  # why the last step ended early
        self._supervisor = Supervisor()

    def start(self) -> None:
        """Run a step each second in the background, until ``stop``."""
        self._supervisor.start("autoscaler", self._run)

    async def stop(self) -> None:
        """Stop. The workers stay."""
        await self._supervisor.stop()
        await self._store.close()

    def check_health(self) -> None:
        """Raise InternalError if the autoscaler should be replaced."""
        if self._supervisor.has_given_up:
            raise InternalError("the autoscaler failed again and again; its log says why")

    async def step(self) -> None:
        """Observe, decide and carry out once.

        Raises:
            UnavailableError: the store or Serve does not answer.
        """
        now_s = self._clock()
        kept = await self._store.autoscale.read()
        apps = await self._apps.list()
        if self._memory is None:
            self._restore(kept.state, apps, await self._store.registry.list())
        await self._take_policy(kept.policy, apps, now_s)
        await self._take_orders(now_s)
        if not self._remembered().has_started:
            apps = await self._start_workers(apps)
        workers = await self._store.registry.list()
        routers = await self._store.registry.list_routers()
        observation = observe(self._facts(apps, workers, routers), self._observation, now_s)
        self._observation = observation
        self._note_starts(observation, now_s)
        decision, advice = self._decide(observation.snapshot, now_s)
        try:
            await self._act(decision, apps, workers, now_s)
        except UnavailableError:
            await self._publish(decision, advice, now_s)  # routers need the plans all the same
            raise
        await self._publish(decision, advice, now_s)

    async def _act(
        self,
        decision: Decision,
        apps: tuple[WorkerApp, ...],
        workers: tuple[WorkerRecord, ...],
        now_s: float,
    ) -> None:
        await self._remove_failed(apps, now_s)
        for action in decision.actions:
            await self._carry_out(action, decision, apps, now_s)
            if action.kind is ActionKind.ADD:  # so that the next one gets another slot
                apps = await self._apps.list()
        await self._order_role_change(decision, workers)

    def _facts(
        self,
        apps: tuple[WorkerApp, ...],
        workers: tuple[WorkerRecord, ...],
        routers: tuple[RouterRecord, ...],
    ) -> Facts:
        by_app = {record.application: record.pool for record in workers}
        roles = {**self._remembered().roles, **by_app}
        changed = {
            app.name: role
            for app in apps
            if (role := roles.get(app.name, app.pool)) is not app.pool
        }
        self._remember(roles=changed)
        timeout_s = self._config.cluster.start_timeout_s
        return Facts(apps, workers, routers, self._gpus, changed, timeout_s)

    def _note_starts(self, observation: Observation, now_s: float) -> None:
        """Remember how long a worker took from its order until it was ready for the first time."""
        workers = observation.snapshot.workers
        self._ordered_s = {each.id: self._ordered_s.get(each.id) for each in workers}
        for worker in workers:
            ordered_s = self._ordered_s[worker.id]
            if worker.phase is Phase.READY and ordered_s is not None:
                self._ordered_s[worker.id] = None
                self._backoff[worker.pool].failures = 0
                self._remember(start_s=now_s - ordered_s)

    async def _add(self, pool: Pool, apps: tuple[WorkerApp, ...]) -> None:
        """Order a worker. Serve may take a second to answer, which belongs to the start."""
        ordered_s = self._clock()
        self._ordered_s[await self._apps.add(pool, free_slot(apps, pool))] = ordered_s

    async def _run(self) -> None:
        while True:
            try:
                await self.step()
                if self._problem:
                    logger.warning("the autoscaler goes on")
                self._problem = ""
            except UnavailableError as error:
                if str(error) != self._problem:
                    logger.warning("%s; the autoscaler tries again each second", error)
                self._problem = str(error)
            await asyncio.sleep(_STEP_S)

    def _restore(
        self, state: bytes | None, apps: tuple[WorkerApp, ...], workers: Iterable[WorkerRecord]
    ) -> None:
        """Go on with the memory in the store.

        Without one, the workers that exist are wanted. Without workers, it is a start.
        """
        restored = _restored(state)
        if restored is None and apps:
            roles = {record.application: record.pool for record in workers}
            self._memory = Memory(fixed=_counts(apps, roles), has_started=True)
        elif restored is None:
            replicas = {pool: self._config.pool(pool).replicas for pool in Pool}
            self._memory = Memory(fixed=replicas)
        else:
            self._memory = restored
        if (text := self._remembered().policy_text) is not None:
            try:
                self._policy = checked_policy(text, "policy", self._config, self._gpus)
            except ConfigError as error:  # the cluster's configuration is another one now
                logger.warning("the last policy does not suit this cluster: %s", error)

    async def _start_workers(self, apps: tuple[WorkerApp, ...]) -> tuple[WorkerApp, ...]:
        """Start the workers that a new cluster begins with, and return all applications."""
        # A process that takes over in the middle must know that it is a start.
        await self._store.autoscale.write_state(msgspec.json.encode(self._remembered()))
        first = first_workers(self._config, self._policy, self._gpus)
        for pool in Pool:
            # Some may be there already, if an earlier try was interrupted.
            for _ in range(first[pool] - sum(app.pool is pool for app in apps)):
                await self._add(pool, apps)
                apps = await self._apps.list()
        self._remember(has_started=True)
        return apps

    async def _take_policy(
        self, text: str | None, apps: tuple[WorkerApp, ...], now_s: float
    ) -> None:
        """Take a policy that was applied ("": removed). A wrong one is refused; the last stays."""
        own = self._remembered().policy_text
        if text is None:  # the store has lost it, or there was none
            if own is not None:
                await self._store.autoscale.restore_policy(None, own)
            return
        if text == (own or ""):
            if now_s - self._refused_s > _REFUSAL_SHOWN_S:
                self._refused = "", ""
            return
        if not text:
            self._leave_policy(None, apps)
            self._remember(policy_text=None, policy_state=None)
            self._note(now_s, None, "no policy any more; each pool keeps its number of workers")
            return
        try:
            policy = checked_policy(text, "policy", self._config, self._gpus)
        except ConfigError as error:
            self._refused, self._refused_s = (digest_of(text), str(error)), now_s
            self._note(now_s, None, f"a policy was refused: {last_line(str(error))}")
            await self._store.autoscale.restore_policy(text, own or "")
            return
        self._leave_policy(policy, apps)
        self._remember(policy_text=text)
        self._note(now_s, None, f"policy {policy.name!r} applies")

    def _leave_policy(self, successor: PolicyFile | None, apps: tuple[WorkerApp, ...]) -> None:
        """Replace the policy. If none decides any more, the workers that exist are wanted."""
        followed = self._follows_policy
        self._policy, self._refused = successor, ("", "")
        if followed and not self._follows_policy:
            roles, state = self._remembered().roles, self._remembered().policy_state
            if state is not None and (change := state.role_change) is not None:
                roles = {**roles, change.worker: change.to}  # it will arrive
            # The state goes on, so that a change of role is followed to its end.
            self._remember(fixed=_counts(apps, roles), fixed_state=state)

    async def _take_orders(self, now_s: float) -> None:
        for pool, workers in (await self._store.orders.take_scale()).items():
            if self._follows_policy:
                self._note(now_s, pool, "an order to scale was refused: the policy decides")
                continue
            fixed = self._remembered().fixed
            self._remember(fixed={**fixed, pool: workers})
            self._note(now_s, pool, f"scaling from {fixed[pool]} to {workers}, as ordered")

    def _decide(self, snapshot: Snapshot, now_s: float) -> tuple[Decision, Decision | None]:
        """Return the decision to carry out, and that of an advisory policy."""
        memory, advice = self._remembered(), None
        if self._policy is not None:
            decision = decide(snapshot, memory.policy_state, now_s, self._policy.policy)
            self._remember(policy_state=decision.state)
            if not self._policy.is_advisory:
                return decision, None
            advice = decision
        policy = fixed_policy(memory.fixed[Pool.PREFILL], memory.fixed[Pool.DECODE])
        fixed = decide(snapshot, memory.fixed_state, now_s, policy)
        self._remember(fixed_state=fixed.state)
        return fixed, advice

    async def _remove_failed(self, apps: tuple[WorkerApp, ...], now_s: float) -> None:
        failed = [app for app in apps if app.state is AppState.FAILED]
        new = [app for app in failed if app.name not in self._failed]
        self._failed = {app.name for app in failed}
        for pool in {app.pool for app in new}:  # those that fail together are one try
            self._backoff[pool].failed(now_s)
        for app in new:
            self._note(now_s, app.pool, f"{app.name} could not start: {last_line(app.message)}")
        for app in failed:
            await self._apps.remove(app.name)

    async def _carry_out(
        self, action: Action, decision: Decision, apps: tuple[WorkerApp, ...], now_s: float
    ) -> None:
        pool = next(each for each in decision.pools if each.pool is action.pool)
        why = _why(pool) if self._follows_policy else f"{pool.current} to {pool.target}, as ordered"
        if action.kind is ActionKind.ADD:
            if self._backoff[action.pool].waits(now_s):
                return
            await self._add(action.pool, apps)
            self._note(now_s, action.pool, f"a worker starts: {why}")
            return
        assert action.worker is not None, "only a new worker has no name"
        if action.kind is ActionKind.REMOVE:
            await self._apps.remove(action.worker)
            self._note(now_s, action.pool, f"{action.worker} leaves: {why}; {action.text}")
            return
        self._note(now_s, action.pool, f"{action.worker} comes from the other pool: {action.text}")

    async def _order_role_change(self, decision: Decision, workers: Iterable[WorkerRecord]) -> None:
        """Tell a worker its new role, again and again until it has begun to change."""
        change = decision.state.role_change
        for record in workers:
            if (
                change is not None
                and record.application == change.worker
                and record.pool is not change.to
                and record.state is WorkerState.READY
            ):
                await self._store.registry.ask_to_change_role(record.id, change.to)

    async def _publish(self, decision: Decision, advice: Decision | None, now_s: float) -> None:
        memory, observation, policy = self._remembered(), self._observation, self._policy
        assert observation is not None, "a step observes before it publishes"
        snapshot = observation.snapshot
        view = AutoscaleView(
            policy=policy.name if policy is not None else "",
            policy_digest=policy.digest if policy is not None else "",
            refused_digest=self._refused[0],
            refused_why=self._refused[1],
            advisory=policy is not None and policy.is_advisory,
            demand_age_s=None if snapshot.demand is None else now_s - snapshot.measured_s,
            pools=decision.pools,
            advice=advice.pools if advice is not None else (),
            workers=snapshot.workers,
            changes=memory.changes,
            start_s=memory.start_s,
        )
        await self._store.autoscale.write(msgspec.json.encode(memory), encode_view(view))
        await self._store.registry.put_plans(self._plans(decision))

    def _plans(self, decision: Decision) -> tuple[PoolPlan, ...]:
        """Return what routers should know: that an empty pool may get workers.

        Without a policy, no pool is empty on purpose, and routers are told nothing: they refuse
        requests at once if a pool has lost its workers.
        """
        policy = self._policy
        if policy is None or policy.is_advisory:
            return ()
        pools = policy.policy.spec.pool
        return tuple(PoolPlan(each.pool, pools(each.pool).max_replicas) for each in decision.pools)

    @property
    def _follows_policy(self) -> bool:
        return self._policy is not None and not self._policy.is_advisory

    def _remember(self, **fields: Any) -> None:
        """Change fields of the memory."""
        self._memory = replace(self._remembered(), **fields)

    def _remembered(self) -> Memory:
        assert self._memory is not None, "a step begins with the memory"
        return self._memory

    def _note(self, now_s: float, pool: Pool | None, text: str) -> None:
        """Log a change, and keep it among the latest ones."""
        changes = self._remembered().changes
        change = Change(changes[-1].number + 1 if changes else 1, now_s, pool, text)
        logger.info("%s", change.line)
        self._remember(changes=(*changes, change)[-KEPT_CHANGES:])


def _why(decision: PoolDecision) -> str:
    """Return a pool's target, the rule that decided it, and the strongest signal."""
    rule, *others = decision.reasons
    signal = next((each for each in others if each.rule.startswith("signals[")), None)
    told = "; ".join(f"{each.rule}: {each.text}" for each in (rule, signal) if each is not None)
    return f"{decision.current} to {decision.target}, {told}"


def _counts(apps: tuple[WorkerApp, ...], roles: Mapping[str, Pool]) -> dict[Pool, int]:
    """Return the workers of each pool that run or start, to be kept without a policy.

    They are at least one, because nothing would wake an empty pool.
    """
    gone = (AppState.LEAVING, AppState.FAILED)
    pools = [roles.get(app.name, app.pool) for app in apps if app.state not in gone]
    return {pool: max(pools.count(pool), 1) for pool in Pool}


def _restored(state: bytes | None) -> Memory | None:
    """Return the memory, or None if there is none that this version can read."""
    if state is None:
        return None
    try:
        memory = msgspec.json.decode(state, type=Memory)
    except msgspec.MsgspecError as error:
        logger.warning("the autoscaler's memory cannot be read, and starts anew: %s", error)
        return None
    states = [each for each in (memory.fixed_state, memory.policy_state) if each is not None]
    complete = all(set(pools) == set(Pool) for pools in (memory.fixed, *(s.pools for s in states)))
    return memory if complete else None
