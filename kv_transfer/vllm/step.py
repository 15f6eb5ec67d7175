"""What the two sides of the connector tell each other with each engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kv_transfer.receive import Reservation, TransferResult
from kv_transfer.send import StepChunk


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A request that ended before its KV had come."""

    key: str
    addresses: tuple[str, ...]  # control addresses of the prefill worker, by its ranks
    incarnation: str  # of the prefill worker


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):
    """What the scheduler side tells every rank for one engine step."""

    # On a prefill worker:
    chunks: list[StepChunk] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    sampled: list[tuple[str, int | None]] = field(default_factory=list)  # key, first token
    aborted: list[str] = field(default_factory=list)
    # On a decode worker:
    reservations: list[Reservation] = field(default_factory=list)
    cancelled: list[Cancellation] = field(default_factory=list)


@dataclass(slots=True)
class RankResults(KVConnectorWorkerMetadata):
    """The transfers that ended on some ranks since the last step."""

    results: list[TransferResult]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankResults:
        assert isinstance(other, RankResults)
        return RankResults(self.results + other.results)
