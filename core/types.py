"""Values shared by the workers, the router and the registry."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Pool(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(enum.StrEnum):
    STARTING = "starting"  # its engine runs; the KV pairs with the other pool are being made
    READY = "ready"
    DRAINING = "draining"


WorkerKey = tuple[str, str]  # id, incarnation: a restarted worker is another one


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker says about itself with each lease renewal."""

    queue_depth: int  # requests waiting in the engine
    running: int  # requests in the engine's batch
    queued_tokens: int  # prompt tokens accepted and not yet computed
    kv_blocks_free: int
    kv_blocks_total: int
    kv_block_tokens: int = 16


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One worker's lease in the registry.

    ``incarnation`` is new at each process start, so a restarted worker under the same
    address is never taken for the one that held a request.
    """

    id: str
    pool: Pool
    state: WorkerState
    incarnation: str
    address: str  # gRPC, "host:port"
    kv_addresses: tuple[str, ...]  # KV control, "tcp://host:port", one per TP rank
    model: str  # served name
    load: WorkerLoad
    metrics: str = ""  # Prometheus, "http://host:port/metrics"

    @property
    def key(self) -> WorkerKey:
        """Names this process of the worker."""
        return self.id, self.incarnation
