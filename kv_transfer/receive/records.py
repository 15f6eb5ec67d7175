"""What the decode side knows of reservations, transfers, their legs, results and peers.

``ReceiveTransfers.lock`` guards all fields that change, with exceptions in ``Peer``: its receiver
thread sets and reads ``pair`` and reads ``closing`` without the lock, and ``outbox`` needs no lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kv_transfer import wire
from kv_transfer.geometry import PairPlan
from kv_transfer.outbox import Outbox
from kv_transfer.pair import Pair
from kv_transfer.session import ReceiveSession


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that the engine holds for tokens ``[token_start, token_end)`` of a request."""

    transfer_id: str
    request_id: str  # the engine's
    addresses: tuple[str, ...]  # control addresses of the prefill worker, by rank
    incarnation: str  # of the prefill worker
    block_ids: tuple[int, ...]  # all blocks of the request from token 0 on
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a reservation ended on this rank; reported once, after the last write to its blocks."""

    transfer_id: str
    request_id: str
    complete: bool
    first_token_id: int | None  # None if this engine samples the first token itself
    backend: str
    num_bytes: int
    messages: int
    tokens: int
    transfer_ms: float  # first header -> last manifest
    hidden_bytes: int = 0  # share of num_bytes sent while the prefill was still computing
    tail_ms: float = 0.0  # the prefill's last layer -> last byte sent
    stall_ms: float = 0.0  # the prefill waited for the link: all buffers were in flight
    retries: int = 0  # reservations repeated over a new pair


@dataclass(slots=True)
class Leg:
    """The share of a transfer that comes from one prefill rank."""

    session: ReceiveSession
    peer: Peer
    progress_at_s: float
    first_header_at_s: float | None = None
    scattering: bool = False  # the peer's receiver is writing to the blocks
    retries: int = 0


@dataclass(slots=True)
class Transfer:
    reservation: Reservation
    block_ids: torch.Tensor
    legs: dict[str, Leg] = field(default_factory=dict)  # by control address

    @property
    def ended(self) -> bool:
        return all(leg.session.ended for leg in self.legs.values())


@dataclass(slots=True, eq=False)
class Peer:
    """A prefill rank, and this rank's pair with it."""

    address: str  # of its control server
    incarnation: str  # of its worker
    last_used_s: float
    plan: PairPlan | None = None  # set when the pair is up
    pair: Pair | None = None  # stays None if the plan carries nothing
    closing: bool = False
    outbox: Outbox[wire.ToPrefill] = field(default_factory=Outbox)

    def post(self, message: wire.ToPrefill) -> None:
        """Send a control message, by way of the receiver thread. Does not need the lock."""
        self.outbox.post(message)

    def reserve(self, leg: Leg) -> None:
        """Post the RESERVE of a leg. The caller holds the lock."""
        session = leg.session
        if self.plan is not None:
            session.set_plan(self.plan)
        self.post(wire.Reserve(session.transfer_id, session.token_start, session.token_end))

    def close(self) -> None:
        """Close the pair after all posted messages have been sent."""
        self.closing = True
        self.outbox.wake()

    def abort(self) -> None:
        """Abort the process group, which also ends a wait for an announced message."""
        if self.pair is not None:
            self.pair.abort()
