"""The decode side's records: reservations, transfers and their legs, results, and peers.

``ReceiveTransfers.lock`` guards all fields that change, except these fields of ``Peer``:

* ``pair``: the receiver thread sets and reads it without the lock.
* ``closing``: the receiver thread reads it without the lock.
* ``outbox`` needs no lock.
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
    first_token_id: int | None  # None without END, or if this engine samples the first token itself
    backend: str
    num_bytes: int
    messages: int
    tokens: int
    transfer_ms: float  # from the first HEADER to this result
    hidden_bytes: int = 0  # share of num_bytes sent while the prefill was still computing
    tail_ms: float = 0.0  # from the prefill's last layer to the last byte sent
    stall_ms: float = 0.0  # how long the prefill waited because all buffers were in flight
    retries: int = 0  # number of reservations repeated over a new pair


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
    plan: PairPlan | None = None  # None until the pair is open
    pair: Pair | None = None  # stays None if no KV moves between the two ranks
    closing: bool = False
    outbox: Outbox[wire.ToPrefill] = field(default_factory=Outbox)

    def post(self, message: wire.ToPrefill) -> None:
        """Queue a control message for the receiver thread to send. Does not need the lock."""
        self.outbox.post(message)

    def reserve(self, leg: Leg) -> None:
        """Post the RESERVE of a leg. The caller holds the lock."""
        session = leg.session
        if self.plan is not None:
            session.set_plan(self.plan)
        self.post(wire.Reserve(session.transfer_id, session.token_start, session.token_end))

    def close(self) -> None:
        """Make the receiver thread close the pair after it has sent all posted messages."""
        self.closing = True
        self.outbox.wake()

    def abort(self) -> None:
        """Abort the process group, which also ends a wait for an announced message."""
        if self.pair is not None:
            self.pair.abort()
