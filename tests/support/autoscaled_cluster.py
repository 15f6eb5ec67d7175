"""A small cluster in virtual time: workers start, serve, drain and end as the policy says.

It is not accurate. It has what makes autoscalers oscillate: workers take time to start, latencies
grow steeply under overload, and requests stay longer if there are fewer workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from autoscale.decide import Decision
from autoscale.snapshot import (
    Action,
    ActionKind,
    Phase,
    PoolDemand,
    Snapshot,
    WorkerView,
)
from autoscale.state import State
from core.histogram import Histogram, bucket_of
from core.types import Pool
from tests.support.autoscale_views import stored

PREFILL_TOKENS_PER_S = 8000.0
KV_TOKENS = 50_000
WINDOW_S = 30  # of arrivals and latencies

Decide = Callable[[Snapshot, State | None, float], Decision]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that all look the same, evenly spaced."""

    requests_per_s: float
    prompt_tokens: int = 1000
    output_tokens: int = 200


@dataclass(slots=True)
class Request:
    arrived_s: float
    prompt_left: float
    output_left: float
    kv_tokens: int


@dataclass(slots=True)
class Worker:
    id: str
    pool: Pool
    phase: Phase
    since_s: float
    requests: list[Request] = field(default_factory=list)

    @property
    def backlog(self) -> float:
        if self.pool is Pool.DECODE:
            return len(self.requests)
        return sum(each.prompt_left for each in self.requests)


class Cluster:
    """Serves a load, one second after the other."""

    def __init__(self, prefill: int, decode: int, *, start_s: float = 30.0) -> None:
        self.start_s = start_s
        self.now_s = 1_000_000.0
        self.made = 0
        self.workers: list[Worker] = []
        self.queues: dict[Pool, list[Request]] = {pool: [] for pool in Pool}
        self.due = 0.0
        self.seconds: list[dict[Pool, list[float]]] = []  # latencies, of the latest WINDOW_S
        self.flow: list[tuple[int, float, float]] = []  # requests, prompt tokens, output tokens
        self.state: State | None = None
        self.places = 1000  # for workers, of both pools together
        for pool, count in ((Pool.PREFILL, prefill), (Pool.DECODE, decode)):
            for _ in range(count):
                self._make(pool, Phase.READY)

    def count(self, pool: Pool, *phases: Phase) -> int:
        wanted = phases or (Phase.PENDING, Phase.STARTING, Phase.READY)
        return sum(each.pool is pool and each.phase in wanted for each in self.workers)

    def run(
        self, load: Load, seconds: int, decide: Decide, *, every_s: int = 5
    ) -> Iterator[Decision]:
        """Serve for some seconds, and decide and carry out every ``every_s``."""
        for second in range(seconds):
            self.now_s += 1.0
            self._age()
            self._serve(load)
            if second % every_s == 0:
                decision = decide(self.snapshot(), self.state, self.now_s)
                self.state = stored(decision.state)
                for action in decision.actions:
                    self._do(action)
                yield decision

    def snapshot(self) -> Snapshot:
        views = tuple(
            WorkerView(
                each.id,
                each.pool,
                each.phase,
                each.since_s,
                gpus=1.0,
                requests=len(each.requests),
                kv_tokens_used=sum(r.kv_tokens for r in each.requests),
                kv_tokens_total=KV_TOKENS,
                tokens_per_s=PREFILL_TOKENS_PER_S if each.pool is Pool.PREFILL else 1000.0,
                can_change_role=True,
                problem="no node fits" if each.phase is Phase.PENDING else "",
            )
            for each in self.workers
        )
        demand = {pool: self._demand(pool) for pool in Pool}
        return Snapshot(views, demand, self.now_s, dict.fromkeys(Pool, 1.0))

    def _demand(self, pool: Pool) -> PoolDemand:
        running = [r for w in self.workers if w.pool is pool for r in w.requests]
        waiting = self.queues[pool]

        def tokens(requests: list[Request]) -> int:
            return round(
                sum(r.prompt_left if pool is Pool.PREFILL else r.kv_tokens for r in requests)
            )

        counts: dict[int, int] = {}
        for second in self.seconds:
            for latency_s in second[pool]:
                bucket = bucket_of(latency_s)
                counts[bucket] = counts.get(bucket, 0) + 1
        seconds = max(len(self.flow), 1)
        return PoolDemand(
            len(waiting),
            tokens(waiting),
            self.now_s - waiting[0].arrived_s if waiting else 0.0,
            len(running),
            tokens(running),
            sum(each[0] for each in self.flow) / seconds,
            sum(each[1 if pool is Pool.PREFILL else 2] for each in self.flow) / seconds,
            Histogram(counts),
            latency_window_s=WINDOW_S,
        )

    def _make(self, pool: Pool, phase: Phase) -> None:
        self.made += 1
        self.workers.append(Worker(f"{pool}-{self.made}", pool, phase, self.now_s))

    def _age(self) -> None:
        for each in self.workers:
            if each.phase is Phase.PENDING and self._placed() < self.places:
                each.phase, each.since_s = Phase.STARTING, self.now_s
            elif each.phase is Phase.STARTING and self.now_s - each.since_s >= self.start_s:
                each.phase, each.since_s = Phase.READY, self.now_s
        self.workers = [w for w in self.workers if w.phase is not Phase.LEAVING or w.requests]

    def _placed(self) -> int:
        return sum(each.phase is not Phase.PENDING for each in self.workers)

    def _serve(self, load: Load) -> None:
        self.due += load.requests_per_s
        arrived, self.due = int(self.due), self.due - int(self.due)
        size = load.prompt_tokens + load.output_tokens
        self.queues[Pool.PREFILL] += [
            Request(self.now_s, load.prompt_tokens, load.output_tokens, size)
            for _ in range(arrived)
        ]
        latencies: dict[Pool, list[float]] = {pool: [] for pool in Pool}
        for pool in Pool:
            ready = [w for w in self.workers if w.pool is pool and w.phase is Phase.READY]
            queue = self.queues[pool]
            while queue and ready:
                worker = min(ready, key=lambda each: each.backlog)
                request = queue[0]
                used = sum(r.kv_tokens for r in worker.requests)
                if pool is Pool.DECODE and used + request.kv_tokens > KV_TOKENS:
                    break
                worker.requests.append(queue.pop(0))
        produced = 0.0
        for worker in self.workers:
            if worker.pool is Pool.PREFILL:
                self._prefill(worker, latencies[Pool.PREFILL])
            else:
                produced += self._decode(worker, latencies[Pool.DECODE])
        self.seconds = [*self.seconds, latencies][-WINDOW_S:]
        self.flow = [*self.flow, (arrived, arrived * load.prompt_tokens, produced)][-WINDOW_S:]

    def _prefill(self, worker: Worker, latencies: list[float]) -> None:
        room = PREFILL_TOKENS_PER_S
        while worker.requests and room > 0:
            request = worker.requests[0]
            done = min(room, request.prompt_left)
            request.prompt_left -= done
            room -= done
            if request.prompt_left <= 0:
                spent_s = 1 - room / PREFILL_TOKENS_PER_S
                latencies.append(self.now_s - request.arrived_s + spent_s)
                self.queues[Pool.DECODE].append(worker.requests.pop(0))

    def _decode(self, worker: Worker, latencies: list[float]) -> float:
        streams = len(worker.requests)
        if not streams:
            return 0.0
        itl_s = 0.015 + 0.0016 * streams
        latencies.extend([itl_s] * min(streams, 50))
        produced = 0.0
        for request in worker.requests:
            tokens = min(1 / itl_s, request.output_left)
            request.output_left -= tokens
            produced += tokens
        worker.requests = [each for each in worker.requests if each.output_left > 0]
        return produced

    def _do(self, action: Action) -> None:
        if action.kind is ActionKind.ADD:
            self._make(action.pool, Phase.PENDING)
            return
        (worker,) = [each for each in self.workers if each.id == action.worker]
        if action.kind is ActionKind.CHANGE_ROLE:  # its requests go to the queues
            self.queues[worker.pool] += worker.requests
            worker.requests = []
            worker.pool, worker.phase, worker.since_s = action.pool, Phase.STARTING, self.now_s
        else:
            worker.phase, worker.since_s = Phase.LEAVING, self.now_s
