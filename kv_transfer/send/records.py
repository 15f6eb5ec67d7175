"""The prefill side's records: chunks of an engine step, transfers, reservations and peers.

``SendTransfers.lock`` guards all fields that change. Sender threads read two of these fields
without the lock: ``Transfer.block_ids`` and ``Peer.pair``. ``Peer.published`` needs no lock.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import PairPlan
from kv_transfer.pair import Pair
from kv_transfer.session import SendSession


@dataclass(frozen=True, slots=True)
class StepChunk:
    """Tokens ``[token_start, token_end)`` of a request that one engine step computes."""

    transfer_id: str
    request_id: str  # the engine's
    block_ids: tuple[int, ...]  # all blocks of the request up to token_end
    token_start: int
    token_end: int
    num_tokens: int  # of the prompt


@dataclass(slots=True)
class Transfer:
    session: SendSession
    request_id: str
    block_ids: torch.Tensor
    since_s: float  # when the request finished; until then, when the transfer was opened
    peers: dict[int, Peer] = field(default_factory=dict)  # by decode rank
    gathering: int = 0  # number of senders that are reading its blocks
    request_finished: bool = False
    computed_at_s: float | None = None  # when all layers of all tokens were computed
    last_sent_s: float = 0.0  # when the last message to any decode rank was sent
    stall_s: float = 0.0  # how long senders waited because all buffers were in flight


@dataclass(slots=True)
class WaitingReservation:
    """A reservation whose prefill has not begun."""

    peer: Peer
    token_start: int
    token_end: int
    since_s: float


@dataclass(slots=True, eq=False)
class Peer:
    """A decode rank, and this rank's pair with it."""

    routing_id: bytes
    hello: wire.Hello
    plan: PairPlan
    wake: threading.Condition  # uses the lock; notified when the sender may have work
    last_heard_s: float
    last_used_s: float
    up: bool = False  # the sender has opened the pair
    closed: bool = False
    # Values for this rank's PairStore. None: the sender must end.
    published: SimpleQueue[wire.Publish | None] = field(default_factory=SimpleQueue)
    pair: Pair | None = None  # stays None if no KV moves between the two ranks
    transfer_ids: dict[str, None] = field(default_factory=dict)  # in order of reservation

    @property
    def rank(self) -> int:
        return self.hello.geometry.tp_rank

    def wake_sender(self) -> None:
        """End the sender's wait, except one for gloo's connection. The caller holds the lock."""
        self.wake.notify()
        self.published.put(None)
        if self.pair is not None:
            self.pair.abort()

    def wait_published(self, timeout_s: float) -> wire.Publish | None:
        """Return the next value, or None if none comes in time. Raises PairError if closed.

        The sender calls this without the lock.
        """
        try:
            value = self.published.get(timeout=timeout_s)
        except Empty:
            return None
        if value is None:
            raise PairError("the pair was closed while it was made")
        return value
