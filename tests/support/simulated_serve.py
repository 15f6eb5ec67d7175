"""Ray Serve and the autoscaler in virtual time: one application for each worker of a cluster.

The autoscaler is the real ``cluster.autoscale.loop.AutoscaleLoop``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.autoscale.apps import AppState, WorkerApp, new_name
from cluster.autoscale.loop import AutoscaleLoop
from core.errors import UnavailableError
from core.state.autoscale import Kept
from core.types import Pool
from tests.support.scaled_cluster import ScaledCluster
from tests.support.simulated_replica import SimReplica, SlowStore
from tests.support.virtual_time import elapse

EPOCH_S = 1_000_000.0  # the autoscaler's clock at the start
CHECK_S = 1.0  # time until Serve notices that a worker has died


@dataclass
class Troubles:
    """What goes wrong with Serve. Each probability is that of one new worker or one call."""

    unplaced: float = 0.0  # no node has room, for ``unplaced_s``
    unplaced_s: float = 0.0
    failed: float = 0.0  # the worker cannot start
    lost_answer: float = 0.0  # the call has an effect and raises UnavailableError
    available: bool = True  # whether Serve answers


@dataclass(eq=False)
class _App:
    name: str
    pool: Pool
    slot: int
    state: AppState = AppState.STARTING
    worker: SimReplica | None = None
    leaving: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class SimServe:
    """Implements ``WorkerApps``. A worker that dies is replaced in its application.

    Args:
        gpus: what one worker of each pool holds, from ``add`` until its process has ended.
        budget: most GPUs; None: no bound.
        load_s: how long workers load their model; one of these is chosen for each.
    """

    def __init__(
        self,
        cluster: ScaledCluster,
        gpus: Mapping[Pool, float],
        budget: float | None,
        load_s: tuple[float, ...],
        grace_s: float,
    ) -> None:
        self.troubles = Troubles()
        self.counts: Counter[str] = Counter()  # what happened, so that a test can require it
        self.defects: list[str] = []  # of the autoscaler, or of this object
        self._cluster = cluster
        self._gpus = gpus
        self._budget = budget
        self._load_s = load_s
        self._grace_s = grace_s
        self._apps: dict[str, _App] = {}

    # The autoscaler calls these.

    async def list(self) -> tuple[WorkerApp, ...]:
        await self._link()
        return tuple(
            WorkerApp(each.name, each.pool, each.slot, each.state, "trouble")
            for each in self._apps.values()
        )

    async def add(self, pool: Pool, slot: int) -> str:
        await self._link()
        same = [each for each in self._apps.values() if (each.pool, each.slot) == (pool, slot)]
        if same:
            self.defects.append(f"slot {slot} of {pool} was taken")
        app = _App(new_name("sim", pool, slot), pool, slot)
        self._apps[app.name] = app
        self.counts["add"] += 1
        held = sum(self._gpus[each.pool] for each in self._apps.values())
        if self._budget is not None and held > self._budget:
            self.defects.append(f"{held} GPUs of {self._budget}")
        self._begin(app, self._run(app), app.name)
        self._lose_answer()
        return app.name

    async def remove(self, name: str) -> None:
        await self._link()
        app = self._apps.get(name)
        if app is not None and not app.leaving:
            app.leaving = True
            self.counts["remove"] += 1
            self._begin(app, self._end(app), f"end of {name}")
        self._lose_answer()

    # Tests call these.

    def present(self) -> Sequence[tuple[Pool, SimReplica | None]]:
        """Return the workers that were added and do not leave, each with the pool that it joins."""
        return [
            (each.pool if each.worker is None else each.worker.joins, each.worker)
            for each in self._apps.values()
            if not each.leaving and each.state is not AppState.FAILED
        ]

    def count(self, pool: Pool) -> int:
        return sum(joins is pool for joins, _ in self.present())

    @property
    def is_settled(self) -> bool:
        """Whether all workers are ready, and none leaves."""
        return all(
            each.state is AppState.RUNNING
            and not each.leaving
            and each.worker is not None
            and each.worker.stays
            and each.worker.joins is each.worker.pool
            for each in self._apps.values()
        )

    def tasks(self) -> set[asyncio.Task[Any]]:
        return {task for app in self._apps.values() for task in app.tasks}

    async def stop(self) -> None:
        for task in (tasks := self.tasks()):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not self.defects

    def _begin(self, app: _App, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_failure)
        app.tasks.append(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.defects.append(f"{task.get_name()}: {error!r}")

    async def _run(self, app: _App) -> None:
        rng, troubles = self._cluster.rng, self.troubles
        if rng.random() < troubles.unplaced:
            app.state = AppState.UNPLACED
            await elapse(troubles.unplaced_s)
        app.state = AppState.STARTING
        if rng.random() < troubles.failed:
            await elapse(1.0)
            app.state = AppState.FAILED
            self.counts["failed"] += 1
            return
        while not app.leaving:
            worker = self._cluster.add(
                app.pool, load_s=rng.choice(self._load_s), application=app.name
            )
            app.worker = worker
            await asyncio.wait([worker.starting])
            app.state = AppState.RUNNING
            while worker.alive and worker.replica._stopped is None:
                await elapse(CHECK_S)
            if not app.leaving:
                await worker.leave(self._grace_s)  # if it drains by itself
                self.counts["replace"] += 1

    async def _end(self, app: _App) -> None:
        app.state = AppState.LEAVING
        app.tasks[0].cancel()
        if app.worker is not None:
            await app.worker.leave(self._grace_s)
            assert not app.worker.alive
        await elapse(self._cluster.rng.choice((0.0, 0.5)))
        del self._apps[app.name]

    async def _link(self) -> None:
        await elapse(self._cluster.rng.choice((0.0, 0.0, 0.01, 0.2)))
        if not self.troubles.available:
            raise UnavailableError("Serve does not answer")

    def _lose_answer(self) -> None:
        if self._cluster.rng.random() < self.troubles.lost_answer:
            raise UnavailableError("Serve does not answer")


@dataclass
class SimStore:
    """Takes the place of ``Store`` for the autoscaler."""

    cluster: ScaledCluster
    policy: str
    state: bytes | None = None
    view: bytes | None = None

    def registry(self) -> Any:
        return SlowStore(self.cluster.registry, self._link)

    def orders(self) -> Any:
        return self

    def autoscale(self) -> Any:
        return self

    async def take_scale(self) -> dict[Pool, int]:
        await self._reach()
        return {}

    async def read(self) -> Kept:
        await self._reach()
        return Kept(self.policy, self.state)

    async def write(self, state: bytes, view: bytes) -> None:
        await self._reach()
        self.state, self.view = state, view

    async def write_state(self, state: bytes) -> None:
        await self._reach()
        self.state = state

    async def restore_policy(self, found: str | None, text: str) -> None:
        await self._reach()
        if self.policy == found:
            self.policy = text

    async def close(self) -> None:
        """Nothing is open."""

    async def _link(self) -> None:
        slow = self.cluster.store_slow
        await elapse(self.cluster.rng.choice((0.0, 0.001, 0.3 if slow else 0.01)))

    async def _reach(self) -> None:
        await self._link()
        if not self.cluster.registry.available:
            raise UnavailableError("the store does not answer")


class SimAutoscaler:
    """Runs ``AutoscaleLoop``. After ``restart``, another one goes on with what the store holds."""

    def __init__(
        self, cluster: ScaledCluster, serve: SimServe, store: SimStore, gpus: Mapping[Pool, float]
    ) -> None:
        self._cluster = cluster
        self._serve = serve
        self._store = store
        self._gpus = gpus
        self._loop: AutoscaleLoop | None = None

    def start(self) -> None:
        store: Any = self._store
        self._loop = AutoscaleLoop(
            self._cluster.config,
            self._serve,
            store,
            gpus=self._gpus,
            clock=lambda: EPOCH_S + self._cluster.clock(),
        )
        self._loop.start()

    async def stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            await loop.stop()

    async def restart(self, after_s: float) -> None:
        await self.stop()
        await elapse(after_s)
        if self._loop is None:  # else another restart was faster
            self.start()

    def check(self) -> None:
        """Check that the loop has not failed."""
        if self._loop is not None:
            assert not self._loop._supervisor.failing, "the autoscaler has failed"

    def tasks(self) -> set[asyncio.Task[Any]]:
        return set() if self._loop is None else {*self._loop._supervisor._tasks}
