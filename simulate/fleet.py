"""The workers of both pools, from the order to start one until it is gone.

    add ──▶ PENDING ──▶ STARTING ──▶ READY ──▶ LEAVING ──▶ gone
            no GPU is     cold        │  ▲      drains
            free          start       └──┘
                                    changes its role: drains, then serves the other pool

The router sees a change of a worker's state at once. It sees its load as of the latest renewal of
its lease, up to ``redis.renew_s`` ago, as in a live cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from autoscale.snapshot import Phase
from core.types import Pool, WorkerLoad, WorkerRecord, WorkerState
from simulate.engines import DecodeEngine, PrefillEngine, Timeline
from simulate.latency import LatencyModel

MODEL = "simulated"  # the served name of the only model


@dataclass(slots=True)
class Worker:
    """One worker. Only ``Fleet`` changes it."""

    id: str
    pool: Pool
    phase: Phase
    since_s: float  # in this phase
    prefill: PrefillEngine | None = None  # while it has this role
    decode: DecodeEngine | None = None
    incarnation: int = 0  # roles so far
    sends: int = 0  # KV transfers in progress from this prefill worker
    next_pool: Pool | None = None  # it drains to change its role
    record: WorkerRecord | None = None  # its lease, as the router sees it
    # (pool, from, to): when it was part of a pool. The last one is open.
    stints: list[tuple[Pool, float, float | None]] = field(default_factory=list)

    @property
    def role(self) -> Pool:
        """The pool to which the autoscaler counts it: the next one, while its role changes."""
        return self.next_pool or self.pool

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        if self.prefill is not None:
            return self.prefill.is_idle and self.sends == 0
        return self.decode is None or self.decode.is_idle

    def load(self) -> WorkerLoad:
        """What it reports."""
        engine = self.prefill or self.decode
        assert engine is not None
        return engine.load()


class Fleet:
    """Starts and ends workers.

    Args:
        make_decode: makes a decode engine.
        gpus: of all workers together; further workers are PENDING.
        report_polls: a worker renews its lease once in so many polls.
        on_change: called when a worker can take requests or no longer can.
        on_drain_timeout: called with a decode worker that still drains after ``drain_s``.
    """

    def __init__(
        self,
        model: LatencyModel,
        timeline: Timeline,
        make_decode: Callable[[], DecodeEngine],
        *,
        gpus: float,
        drain_s: float,
        report_polls: int,
        on_change: Callable[[], None],
        on_drain_timeout: Callable[[Worker], None],
    ) -> None:
        self._model = model
        self._timeline = timeline
        self._make_decode = make_decode
        self._gpus = gpus
        self._drain_s = drain_s
        self._report_polls = report_polls
        self._on_change = on_change
        self._on_drain_timeout = on_drain_timeout
        self._number = 0
        self._polls = 0
        self.workers: dict[str, Worker] = {}  # those that are not gone
        self.gone: list[Worker] = []
        self.records: tuple[WorkerRecord, ...] = ()  # what the router sees
        self.cold_starts = 0  # that ended with a ready worker

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def count(self, pool: Pool, *phases: Phase) -> int:
        """Return how many workers of a pool are in one of these phases."""
        return sum(each.role is pool and each.phase in phases for each in self)

    def add(self, pool: Pool, *, is_warm: bool = False) -> Worker:
        """Order a worker. ``is_warm``: it is ready at once, as at the start of a simulation."""
        self._number += 1
        now_s = self._timeline.now_s
        worker = Worker(f"{pool}-{self._number:03}", pool, Phase.PENDING, now_s)
        worker.stints.append((pool, now_s, None))
        self.workers[worker.id] = worker
        if is_warm:
            self._ready(worker)
        else:
            self._start_pending()
        return worker

    def remove(self, worker: Worker) -> bool:
        """Let a worker drain and leave. One that serves no pool now leaves at once.

        Returns False if it leaves already.
        """
        if worker.phase is Phase.LEAVING:
            return False
        # Between its drain and its new role it serves nothing, as before it was ready.
        was_serving = worker.record is not None
        self._set_phase(worker, Phase.LEAVING)
        self._switch(worker, worker.pool)
        worker.next_pool = None
        if was_serving:
            self._drain(worker)
        else:
            self._leave(worker)
        return True

    def change_role(self, worker: Worker, pool: Pool) -> bool:
        """Let a ready worker drain and then serve the other pool. Returns False if it cannot."""
        if worker.phase is not Phase.READY or worker.pool is pool:
            return False
        worker.next_pool = pool
        self._switch(worker, pool)
        self._set_phase(worker, Phase.STARTING)
        self._drain(worker)
        return True

    def check(self, worker: Worker) -> None:
        """Let a draining worker go if it has become idle."""
        if not worker.is_idle or worker.id not in self.workers:
            return
        if worker.phase is Phase.LEAVING:
            self._leave(worker)
        elif worker.next_pool is not None and worker.record is not None:
            worker.prefill = worker.decode = None
            self._publish(worker, None)
            self._timeline.at(
                self._timeline.now_s + self._model.role_change_s,
                lambda: self._take_role(worker),
            )

    def poll(self) -> None:
        """Renew the leases of the workers whose turn it is. The others' are some polls old."""
        self._polls += 1
        for index, worker in enumerate(self):
            is_due = (index + self._polls) % self._report_polls == 0
            if is_due and worker.record is not None:
                worker.record = replace(worker.record, load=worker.load())
        self._collect()

    def _set_phase(self, worker: Worker, phase: Phase) -> None:
        worker.phase, worker.since_s = phase, self._timeline.now_s

    def _start_pending(self) -> None:
        used = sum(self._model.gpus for each in self if each.phase is not Phase.PENDING)
        for worker in list(self):
            if worker.phase is Phase.PENDING and used + self._model.gpus <= self._gpus:
                used += self._model.gpus
                self._set_phase(worker, Phase.STARTING)
                self._timeline.at(
                    self._timeline.now_s + self._model.cold_start_s,
                    lambda worker=worker: self._started(worker),  # type: ignore[misc]
                )

    def _started(self, worker: Worker) -> None:
        if worker.phase is Phase.STARTING:
            self.cold_starts += 1
            self._ready(worker)

    def _take_role(self, worker: Worker) -> None:
        if worker.phase is Phase.STARTING and worker.next_pool is not None:
            worker.pool, worker.next_pool = worker.next_pool, None
            self._ready(worker)

    def _ready(self, worker: Worker) -> None:
        if worker.pool is Pool.PREFILL:
            worker.prefill = PrefillEngine(self._model, self._timeline)
        else:
            worker.decode = self._make_decode()
        worker.incarnation += 1
        self._set_phase(worker, Phase.READY)
        self._publish(worker, WorkerState.READY)

    def _drain(self, worker: Worker) -> None:
        self._publish(worker, WorkerState.DRAINING)
        incarnation = worker.incarnation

        def move() -> None:
            if worker.decode is not None and worker.incarnation == incarnation:
                self._on_drain_timeout(worker)

        if worker.is_idle:
            self.check(worker)
        elif worker.decode is not None:
            self._timeline.at(self._timeline.now_s + self._drain_s, move)

    def _leave(self, worker: Worker) -> None:
        del self.workers[worker.id]
        self.gone.append(worker)
        pool, from_s, _ = worker.stints[-1]
        worker.stints[-1] = (pool, from_s, self._timeline.now_s)
        worker.prefill = worker.decode = None
        self._publish(worker, None)
        self._start_pending()

    def _switch(self, worker: Worker, pool: Pool) -> None:
        """Count a worker's time to another pool from now on."""
        was, from_s, _ = worker.stints[-1]
        if was is not pool:
            now_s = self._timeline.now_s
            worker.stints[-1] = (was, from_s, now_s)
            worker.stints.append((pool, now_s, None))

    def _publish(self, worker: Worker, state: WorkerState | None) -> None:
        worker.record = None
        if state is not None:
            worker.record = WorkerRecord(
                id=worker.id,
                pool=worker.pool,
                state=state,
                incarnation=str(worker.incarnation),
                address="",
                kv_addresses=(),
                model=MODEL,
                load=worker.load(),
                application=worker.id,
                can_change_role=True,
            )
        self._collect()
        self._on_change()

    def _collect(self) -> None:
        self.records = tuple(each.record for each in self if each.record is not None)
