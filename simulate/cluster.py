"""Replays a trace on a simulated cluster, with a policy that scales it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from autoscale.snapshot import Action, ActionKind, Phase, Snapshot
from core.config.schema import Config
from core.errors import ConfigError
from core.types import Pool
from router.admission.policy import AdmissionLimits, ClassLimits
from router.dispatch.retry import RetryLimits
from router.placement.policy import PlacementLimits
from simulate.engines import DecodeEngine
from simulate.fleet import Fleet
from simulate.front import Active, Front, FrontSettings
from simulate.latency import LatencyModel
from simulate.observe import Observer
from simulate.timeline import VirtualTimeline
from simulate.trace import Trace

MONDAY_S = 1_704_067_200.0  # 1 January 2024, 0:00 UTC: schedules of policies need a date
# The one router stands for several, so ``router.max_concurrent`` does not bound it.
MAX_RUNNING_REQUESTS = 100_000
_LOADED = (Phase.READY, Phase.LEAVING)


class Decided(Protocol):
    """What a policy returns; ``autoscale.decide.Decision`` is one."""

    @property
    def state(self) -> Any:
        """For the next decision."""

    @property
    def actions(self) -> Sequence[Action]:
        """What to do now."""


# Gets the snapshot, the state of its last decision (None at first), and the time.
Scaler = Callable[[Snapshot, Any, float], Decided]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """The simulated cluster.

    Args:
        front: the router's limits.
        poll_s: between two reads of the registry.
        drain_s: a decode worker that drains for so long moves its streams.
        gpus: of the cluster; workers beyond them wait until GPUs are free.
        start_s: the date at which the trace begins, seconds since the epoch.
    """

    front: FrontSettings
    poll_s: float
    drain_s: float
    gpus: float = math.inf
    tick_s: float = 1.0
    start_s: float = MONDAY_S


def default_settings(config: Config | None = None) -> ClusterSettings:
    """Return the settings of a cluster with this configuration; None: the default one."""
    config = config or Config()
    router = config.router
    classes = {
        name: ClassLimits(each.weight, each.max_queue, each.queue_timeout_s)
        for name, each in router.classes.items()
    }
    front = FrontSettings(
        admission=AdmissionLimits(MAX_RUNNING_REQUESTS, classes, router.cold_start_timeout_s),
        placement=PlacementLimits(
            {pool: config.pool(pool).max_concurrent for pool in Pool}, router.prefill_backlog_s
        ),
        deadline_s=router.default_deadline_s,
        report_snapshots=math.ceil(config.redis.renew_s / router.registry_poll_s),
        retries=RetryLimits(router.max_attempts, router.failover_timeout_s, router.avoid_worker_s),
    )
    return ClusterSettings(front, router.registry_poll_s, config.decode.shutdown_grace_s)


@dataclass(frozen=True, slots=True)
class Sample:
    """The cluster at one second. Counts by pool are in the order of ``Pool``."""

    time_s: float
    waiting: int
    running: tuple[int, int]  # requests
    ready: tuple[int, int]  # workers
    ordered: tuple[int, int]  # workers in all phases
    kv_used: float  # share of the decode workers' room


@dataclass(frozen=True, slots=True)
class Run:
    """What has happened.

    ``stints`` are (pool, from, to) of all workers, in seconds since the start; workers that were
    not gone end at infinity. ``changes`` and ``decisions`` are the actions that changed something.
    ``cold_starts`` are the workers that were ordered and became ready.
    """

    trace: Trace
    ended: tuple[Active, ...]  # in the order of the trace
    stints: tuple[tuple[Pool, float, float], ...]
    samples: tuple[Sample, ...]
    changes: Mapping[ActionKind, int]
    cold_starts: int
    moved: int
    preemptions: int
    decisions: tuple[tuple[float, Action], ...] = field(default=())


def run(
    trace: Trace,
    model: LatencyModel,
    workers: Mapping[Pool, int],
    scaler: Scaler | None = None,
    settings: ClusterSettings | None = None,
) -> Run:
    """Replay a trace.

    Args:
        workers: ready at the start.
        scaler: changes the number of workers; None keeps it.

    Raises:
        ConfigError: the trace names a class that the cluster does not know.
    """
    settings = settings or default_settings()
    classes = settings.front.admission.classes
    if unknown := {each.service_class for each in trace.requests} - {"", *classes}:
        raise ConfigError(
            f"unknown service class {min(unknown)!r}; this cluster knows {', '.join(classes)}"
        )
    return _Cluster(trace, model, workers, scaler, settings).run()


class _Cluster:
    def __init__(
        self,
        trace: Trace,
        model: LatencyModel,
        workers: Mapping[Pool, int],
        scaler: Scaler | None,
        settings: ClusterSettings,
    ) -> None:
        self._trace = trace
        self._model = model
        self._scaler = scaler
        self._settings = settings
        self._timeline = VirtualTimeline()
        self._ended: dict[int, Active] = {}
        self._samples: list[Sample] = []
        self._decisions: list[tuple[float, Action]] = []
        self._state: Any = None
        self._idle_polls = 0
        self._engines: list[DecodeEngine] = []
        self._front = Front(
            model,
            self._timeline,
            settings.front,
            on_end=self._end,
        )
        self._observer = Observer(self._front, model.gpus, settings.start_s)
        self._fleet = self._front.fleet = Fleet(
            model,
            self._timeline,
            self._new_engine,
            gpus=settings.gpus,
            drain_s=settings.drain_s,
            report_polls=settings.front.report_snapshots,
            on_change=self._front.workers_changed,
            on_drain_timeout=self._front.move_all,
        )
        for pool in Pool:
            for _ in range(workers.get(pool, 0)):
                self._fleet.add(pool, is_warm=True)

    def run(self) -> Run:
        self._arrive_from(0)
        self._timeline.every(self._settings.poll_s, self._poll)
        self._timeline.every(self._settings.tick_s, self._tick)
        self._timeline.run()
        self._check()
        workers = [*self._fleet.gone, *self._fleet]
        return Run(
            trace=self._trace,
            ended=tuple(self._ended[index] for index in range(len(self._trace.requests))),
            stints=tuple(
                (pool, from_s, math.inf if to_s is None else to_s)
                for worker in workers
                for pool, from_s, to_s in worker.stints
            ),
            samples=tuple(self._samples),
            changes={
                kind: sum(action.kind is kind for _, action in self._decisions)
                for kind in ActionKind
            },
            cold_starts=self._fleet.cold_starts,
            moved=self._front.moved,
            preemptions=sum(engine.preemptions for engine in self._engines),
            decisions=tuple(self._decisions),
        )

    def _new_engine(self) -> DecodeEngine:
        self._engines.append(DecodeEngine(self._model, self._timeline, self._front.gaps))
        return self._engines[-1]

    def _arrive_from(self, index: int) -> None:
        """Plan the arrival of this request, which then plans the next one."""
        if index == len(self._trace.requests):
            return
        request = self._trace.requests[index]

        def arrive() -> None:
            self._front.arrive(index, request)
            self._arrive_from(index + 1)

        at_s = request.arrival_s + self._model.request_s
        self._timeline.at(max(at_s, self._timeline.now_s), arrive)

    def _end(self, active: Active) -> None:
        assert active.index not in self._ended, "a request ends once"
        self._ended[active.index] = active

    @property
    def _is_done(self) -> bool:
        all_ended = len(self._ended) == len(self._trace.requests)
        return all_ended and self._timeline.now_s >= self._trace.duration_s

    def _poll(self) -> bool:
        is_idle = not self._front.running and not self._front.waiting
        self._idle_polls = self._idle_polls + 1 if is_idle else 0
        # After some polls of an idle cluster, all reports say the same.
        if self._idle_polls <= 2 * self._settings.front.report_snapshots:
            self._fleet.poll()
            self._front.new_snapshot()
        return not self._is_done

    def _tick(self) -> bool:
        for worker in list(self._fleet):
            if worker.decode is not None:
                worker.decode.update()
        self._front.count_tokens()
        self._samples.append(self._sample())
        if self._scaler is not None:
            self._scale(self._scaler)
        self._front.settle()
        return not self._is_done

    def _scale(self, scaler: Scaler) -> None:
        now_s = self._settings.start_s + self._timeline.now_s
        decision = scaler(self._observer.snapshot(), self._state, now_s)
        self._state = decision.state
        for action in decision.actions:
            if self._apply(action):
                self._decisions.append((self._timeline.now_s, action))

    def _apply(self, action: Action) -> bool:
        """Carry out an action. Return False if there is nothing to do."""
        if action.kind is ActionKind.ADD:
            self._fleet.add(action.pool)
            return True
        worker = self._fleet.workers.get(action.worker or "")
        if worker is None:
            return False
        if action.kind is ActionKind.REMOVE:
            return self._fleet.remove(worker)
        return self._fleet.change_role(worker, action.pool)

    def _sample(self) -> Sample:
        fleet = self._fleet
        decodes = [each.decode for each in fleet if each.decode is not None]
        room = len(decodes) * self._model.kv.decode_tokens
        used = sum(each.kv_used_tokens for each in decodes)
        return Sample(
            self._timeline.now_s,
            waiting=self._front.turns.waiting,
            running=(
                sum(not each.is_prefilled for each in self._front.running.values()),
                sum(each.streams for each in decodes),
            ),
            ready=_pair(lambda pool: fleet.count(pool, Phase.READY)),
            ordered=_pair(lambda pool: fleet.count(pool, *Phase)),
            kv_used=used / room if room else 0.0,
        )

    def _check(self) -> None:
        """Every request has ended once, and has left nothing behind."""
        assert len(self._ended) == len(self._trace.requests), "every request ends"
        assert not self._front.running
        assert not self._front.waiting
        assert self._front.turns.running == 0
        for worker in self._fleet:
            assert worker.phase not in _LOADED or worker.is_idle, worker.id
            if worker.decode is not None:
                assert worker.decode.kv_used_tokens == 0, worker.id
            if worker.record is not None:
                assert self._front.ledger.own_load(worker.record.key).requests == 0, worker.id


def _pair(count: Callable[[Pool], int]) -> tuple[int, int]:
    return count(Pool.PREFILL), count(Pool.DECODE)


def worker_seconds(run: Run, pool: Pool, horizon_s: float) -> float:
    """Return how long workers were part of a pool, from the order to start them until gone."""
    return sum(
        max(0.0, min(to_s, horizon_s) - from_s) for each, from_s, to_s in run.stints if each is pool
    )


def with_max_tokens(settings: ClusterSettings, max_tokens: int | None) -> ClusterSettings:
    """Return settings in which clients allow this many output tokens."""
    return replace(settings, front=replace(settings.front, max_tokens=max_tokens))
