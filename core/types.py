"""Values shared by the workers, the router and the registry."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from core.histogram import Histogram


class Pool(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Pool:
        return Pool.DECODE if self is Pool.PREFILL else Pool.PREFILL


class WorkerState(enum.StrEnum):
    STARTING = "starting"  # the engine runs; KV pairs with the other pool are being set up
    READY = "ready"
    DRAINING = "draining"


class WorkerOrder(enum.StrEnum):
    """What a worker was asked to do through the registry."""

    DRAIN = "drain"  # drain and stop
    PREFILL = Pool.PREFILL.value  # change to this pool
    DECODE = Pool.DECODE.value


WorkerKey = tuple[str, str]  # id and incarnation, so that a restarted worker has a new key


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The load that a worker reports with each lease renewal."""

    queue_depth: int  # requests waiting in the engine
    running: int  # requests in the engine's batch
    queued_tokens: int  # prompt tokens accepted and not yet computed
    kv_blocks_free: int
    kv_blocks_total: int
    kv_block_tokens: int = 16  # tokens per KV block


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One worker's lease in the registry.

    ``incarnation`` is new at each process start. It distinguishes a restarted worker from the
    earlier process at the same address, which held other requests. ``pool`` may change while the
    process runs, see ``worker.replica``.
    """

    id: str
    pool: Pool
    state: WorkerState
    incarnation: str
    address: str  # gRPC, "host:port"
    kv_addresses: tuple[str, ...]  # KV control, "tcp://host:port" per prefill rank
    model: str  # served name of the model
    load: WorkerLoad
    metrics: str = ""  # Prometheus, "http://host:port/metrics"
    application: str = ""  # the Serve application that runs it; empty in tests
    can_change_role: bool = False  # whether its engine can serve the other pool, too
    changes_to: Pool | None = None  # the pool that it will join when it has drained; None: it stays

    @property
    def key(self) -> WorkerKey:
        """Identifies this process of the worker."""
        return self.id, self.incarnation


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What the autoscaler plans for a pool. It writes this for the routers."""

    pool: Pool
    max_workers: int  # that it may have; 0: none will come


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """What routers read in the registry."""

    workers: tuple[WorkerRecord, ...]  # with valid leases, ordered by id
    plans: tuple[PoolPlan, ...] = ()  # empty if no autoscaler has written any lately

    @property
    def coming(self) -> frozenset[Pool]:
        """The pools for which the autoscaler may start workers."""
        return frozenset(plan.pool for plan in self.plans if plan.max_workers > 0)


class Need(enum.StrEnum):
    """What a request waits for at its router."""

    PREFILL = "prefill"  # room on a prefill worker
    DECODE = "decode"  # room for its KV on a decode worker
    BOTH = "both"
    ROUTER = "router"  # the router runs ``router.max_concurrent`` requests


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """The requests of one class that wait at one router for the same thing."""

    service_class: str
    need: Need
    requests: int
    prompt_tokens: int
    kv_tokens: int  # that will need KV when the requests end, as estimated
    oldest_wait_s: float


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """One router's requests on one worker. Tokens are as in ``autoscale.snapshot.PoolDemand``."""

    worker_id: str
    incarnation: str
    pool: Pool
    requests: int
    tokens: int
    tokens_per_s: float  # while busy with this router's requests; 0 while unknown


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """One router's lease in the registry, with what it measures.

    A request is either in ``queues`` or in ``shares``. So the sums over all routers are the load of
    the cluster. ``queues`` may hold several entries with the same class and need.
    """

    id: str
    address: str  # gRPC, "host:port"
    renewals: int = 0  # grows with each renewal, so that a reader knows what is new
    queues: tuple[QueueLoad, ...] = ()
    shares: tuple[WorkerShare, ...] = ()
    # Over the latest ``window_s`` seconds. Requests that were refused count, too.
    window_s: float = 0.0
    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    output_tokens: int = 0  # from decode workers
    # Over a longer window (router/signals.py). TTFT is from the request's arrival at the router to
    # its first token there.
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
