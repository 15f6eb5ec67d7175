"""What the scheduler side and the worker side of the connector tell each other in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):
    """What the scheduler side tells every rank for one engine step.

    ``preempted`` and ``aborted`` are transfer ids.
    """

    # For requests that send:
    chunks: list[StepChunk] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    # Requests that have finished with a token: the transfer id, and the token's id or, if the
    # token is not forwarded, None.
    sampled: list[tuple[str, int | None]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    # For requests that receive:
    reservations: list[Reservation] = field(default_factory=list)
    # For each transfer: its id, and the prefill worker's control addresses and incarnation.
    cancelled: list[tuple[str, tuple[str, ...], str]] = field(default_factory=list)


@dataclass(slots=True)
class RankResults(KVConnectorWorkerMetadata):
    """The results of receives that one or more ranks report in one step."""

    results: list[TransferResult]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankResults:
        assert isinstance(other, RankResults)
        return RankResults(self.results + other.results)
