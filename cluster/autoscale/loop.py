"""Observes the cluster once a second, asks the policy, and carries out what it decides.

    read policy and orders ▸ list applications, workers, routers ▸ decide ▸ add, remove, change role
    ▸ keep memory, view and plan in the store

If the store or Serve does not answer, the step ends there and nothing changes: the next step sees
the cluster as it is then. A restart goes on with the memory in the store. Without that memory, the
number of workers that exist is the number to keep.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from autoscale.decide import Decision, decide
from autoscale.snapshot import Action, ActionKind, Phase, PoolDecision, Snapshot
from autoscale.state import State
from cluster.autoscale.apps import AppState, WorkerApp, WorkerApps, free_slot
from cluster.autoscale.observe import Observation, observe
from cluster.autoscale.policy_file import (
    PolicyFile,
    checked_policy,
    digest_of,
    first_workers,
    fixed_policy,
)
from cluster.autoscale.view import KEPT_CHANGES, AutoscaleView, Change, encode_view
from core.config.schema import Config
from core.errors import ConfigError, InternalError, UnavailableError
from core.state.autoscale import AutoscaleStore
from core.state.orders import Orders
from core.state.registry import Registry
from core.state.store import Store
from core.tasks import Supervisor
from core.types import Pool, PoolPlan, WorkerRecord, WorkerState

_STEP_S = 1.0  # each step costs a listing of Serve's applications
# A worker that could not start is tried again after 1, 2, 4, … seconds.
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a restart goes on with."""

    fixed: Mapping[Pool, int]  # numbers of workers without a policy, and beside an advisory one
    has_started: bool = False  # whether the first workers were started
    fixed_state: State | None = None
    policy_state: State | None = None
    policy_digest: str = ""  # of the policy that ``policy_state`` belongs to
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
        self._observation: Observation | None = None
        self._backoff = {pool: _Backoff() for pool in Pool}
        self._is_away = False
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
            self._memory = _restored(kept.state) or self._first_memory(apps)
        self._take_policy(kept.policy, now_s)
        await self._take_orders(now_s)
        if not self._memory.has_started:
            apps = await self._start_workers(apps)
        workers = await self._store.registry.list()
        routers = await self._store.registry.list_routers()
        observation = observe(apps, workers, routers, self._gpus, self._observation, now_s)
        self._note_start(observation, now_s)
        self._observation = observation
        await self._remove_failed(apps, now_s)
        decision, advice = self._decide(observation.snapshot, now_s)
        for action in decision.actions:
            await self._carry_out(action, decision, apps, now_s)
            if action.kind is ActionKind.ADD:  # so that the next one gets another slot
                apps = await self._apps.list()
        await self._order_role_change(decision, workers)
        await self._publish(decision, advice, now_s)

    def _note_start(self, observation: Observation, now_s: float) -> None:
        """Remember how long a worker took to start, and that its pool can start workers."""
        before = self._observation.phases if self._observation is not None else {}
        for worker in observation.snapshot.workers:
            phase, since_s = before.get(worker.id, (Phase.READY, now_s))
            if worker.phase is Phase.READY and phase is not Phase.READY:
                self._remember(start_s=now_s - since_s)
                self._backoff[worker.pool].failures = 0

    async def _run(self) -> None:
        while True:
            try:
                await self.step()
                if self._is_away:
                    logger.warning("the autoscaler goes on")
                self._is_away = False
            except UnavailableError as error:
                if not self._is_away:
                    logger.warning("%s; the numbers of workers stay", error)
                self._is_away = True
            await asyncio.sleep(_STEP_S)

    def _first_memory(self, apps: tuple[WorkerApp, ...]) -> Memory:
        """Without a memory, the workers that exist are wanted. Without workers, it is a start."""
        if not apps:
            return Memory(fixed={pool: self._config.pool(pool).replicas for pool in Pool})
        stay = [app for app in apps if app.state is not AppState.LEAVING]
        counts = {pool: sum(app.pool is pool for app in stay) for pool in Pool}
        return Memory(fixed=counts, has_started=True)

    async def _start_workers(self, apps: tuple[WorkerApp, ...]) -> tuple[WorkerApp, ...]:
        """Start the workers that a new cluster begins with, and return all applications."""
        first = first_workers(self._config, self._policy, self._gpus)
        for pool in Pool:
            # Some may be there already, if an earlier try was interrupted.
            for _ in range(first[pool] - sum(app.pool is pool for app in apps)):
                await self._apps.add(pool, free_slot(apps, pool))
                apps = await self._apps.list()
        self._remember(has_started=True)
        return apps

    def _take_policy(self, text: str | None, now_s: float) -> None:
        """Take a policy that was applied or removed. A wrong one is refused, and the last stays."""
        if text is None:
            if self._policy is not None:
                self._policy = None
                self._refused = "", ""
                self._remember(fixed=self._counts())
                self._note(now_s, None, "no policy any more; each pool keeps its number of workers")
            return
        digest = digest_of(text)
        if digest == self._refused[0] or (self._policy and self._policy.digest == digest):
            return
        try:
            policy = checked_policy(text, "policy", self._config, self._gpus)
        except ConfigError as error:
            self._refused = digest, str(error)
            self._note(now_s, None, f"a policy was refused: {error}")
            return
        self._refused = "", ""
        self._policy = policy
        if self._remembered().policy_digest != digest:
            self._remember(policy_digest=digest)
            self._note(now_s, None, f"policy {policy.name!r} applies")

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
        fixed = decide(snapshot, memory.fixed_state, now_s, fixed_policy(memory.fixed))
        self._remember(fixed_state=fixed.state)
        return fixed, advice

    async def _remove_failed(self, apps: tuple[WorkerApp, ...], now_s: float) -> None:
        for app in apps:
            if app.state is AppState.FAILED:
                self._backoff[app.pool].failed(now_s)
                self._note(now_s, app.pool, f"{app.name} could not start: {app.message}")
                await self._apps.remove(app.name)

    async def _carry_out(
        self, action: Action, decision: Decision, apps: tuple[WorkerApp, ...], now_s: float
    ) -> None:
        pool = next(each for each in decision.pools if each.pool is action.pool)
        why = _why(pool) if self._follows_policy else f"{pool.current} to {pool.target}, as ordered"
        if action.kind is ActionKind.ADD:
            if now_s < self._backoff[action.pool].until_s:
                return
            await self._apps.add(action.pool, free_slot(apps, action.pool))
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
        return tuple(
            PoolPlan(each.pool, each.target, pools(each.pool).max_replicas)
            for each in decision.pools
        )

    @property
    def _follows_policy(self) -> bool:
        return self._policy is not None and not self._policy.is_advisory

    def _counts(self) -> dict[Pool, int]:
        """The workers of each pool that run or start, as last observed."""
        views = self._observation.snapshot.workers if self._observation is not None else ()
        return {
            pool: sum(view.pool is pool and view.phase is not Phase.LEAVING for view in views)
            for pool in Pool
        }

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


def _restored(state: bytes | None) -> Memory | None:
    """Return the memory, or None if there is none that this version can read."""
    if state is None:
        return None
    try:
        return msgspec.json.decode(state, type=Memory)
    except msgspec.MsgspecError as error:
        logger.warning("the autoscaler's memory cannot be read, and starts anew: %s", error)
        return None
