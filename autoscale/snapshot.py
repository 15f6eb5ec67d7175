"""What the autoscaling policy sees of a cluster, and what it decides.

All times are seconds since the epoch on one clock, that of ``Snapshot.now_s``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.histogram import Histogram
from core.types import Pool


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """What the requests of all routers need of one pool.

    A request that waits at a router counts as waiting in each pool that has no room for it. A
    request that a router has sent to a worker counts as running. So no request counts twice in one
    pool.

    Tokens are, for prefill, prompt tokens that are not computed yet. For decode, they are the
    tokens that will need KV when the request ends.
    """

    waiting_requests: int = 0
    waiting_tokens: int = 0
    oldest_wait_s: float = 0.0
    running_requests: int = 0
    running_tokens: int = 0
    # New requests in the latest seconds: for prefill, requests and their prompt tokens; for decode,
    # requests and the output tokens that the decode workers produce.
    arrival_requests_per_s: float = 0.0
    arrival_tokens_per_s: float = 0.0
    # Prefill: TTFT at the client's edge. Decode: time between two tokens. Seconds.
    latency_s: Histogram = field(default_factory=Histogram)
    # The latencies are those of this many latest seconds. There is no default that could be wrong.
    latency_window_s: float = field(kw_only=True)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits, runs or has arrived lately."""
        requests = self.waiting_requests + self.running_requests
        return requests == 0 and self.arrival_requests_per_s <= 0


class Phase(enum.StrEnum):
    """The phase of a worker's life, as the autoscaler sees it."""

    PENDING = "pending"  # Ray has found no place for it yet
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"  # it drains and ends; it still holds its GPUs


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker, from the order to start it until its processes have ended."""

    id: str  # the name of its Serve application
    pool: Pool
    phase: Phase
    phase_since_s: float
    gpus: float = 0.0  # what it holds, in each phase
    requests: int = 0  # of all routers, running on it
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0  # 0 while unknown
    # Measured by the routers while the worker was busy; 0 while unknown. Prefill: prompt tokens per
    # second. Decode: output tokens per second, of all its streams together.
    tokens_per_s: float = 0.0
    can_change_role: bool = False
    problem: str = ""  # why it is PENDING, in Ray's words


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of a cluster at one time.

    ``demand`` is None if the numbers are missing or older than the lease of a router. ``workers``
    shows what all earlier actions have led to: a worker that was ordered is there, at least as
    PENDING, and one that was removed is LEAVING or gone. Otherwise it would be ordered twice.
    """

    workers: tuple[WorkerView, ...]
    demand: Mapping[Pool, PoolDemand] | None
    measured_s: float  # when ``demand`` was measured; equal to the last one: nothing new
    # What a new worker will hold. Without it, a pool that never had a worker gets none under a
    # budget, because nobody knows whether the worker fits.
    gpus_per_worker: Mapping[Pool, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a number was chosen. ``rule`` names a field of the policy file."""

    rule: str  # such as "signals[0] QueueSeconds", "behavior.scaleDown", "budget"
    workers: int  # the number that this rule leads to
    text: str  # a sentence with the numbers


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """The number of workers that a pool should have, and why."""

    pool: Pool
    current: int  # PENDING, STARTING and READY
    target: int
    reasons: tuple[Reason, ...]  # the one that decided is the first


class ActionKind(enum.StrEnum):
    ADD = "add"
    REMOVE = "remove"
    CHANGE_ROLE = "change role"


@dataclass(frozen=True, slots=True)
class Action:
    """One change that brings a pool nearer to its target."""

    kind: ActionKind
    pool: Pool  # ADD: the new worker's; REMOVE: the leaving worker's; CHANGE_ROLE: the new role
    worker: str | None  # None: a new worker
    text: str  # why this one
