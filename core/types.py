"""Values shared by the workers, the router and the registry."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Pool(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(enum.StrEnum):
    STARTING = "starting"  # the engine runs; KV pairs with the other pool are being set up
    READY = "ready"
    DRAINING = "draining"


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
    earlier process at the same address, which held other requests.
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

    @property
    def key(self) -> WorkerKey:
        """Identifies this process of the worker."""
        return self.id, self.incarnation
