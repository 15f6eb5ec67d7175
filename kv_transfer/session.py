"""The state machines of one transfer. This module uses no sockets, threads or clocks.

A *leg* is the share of a transfer between one prefill rank and one decode rank. The *manifest* of
a leg is its END message, which says what the prefill rank has sent.

    Prefill rank: a transfer

    OFFERED ──reserve──▸ SENDING (more reserves) ──all legs sent──▸ COMPLETE
       └────────────────────┴──cancel, fail──▸ CANCELLED, FAILED

    Decode rank: one leg of a transfer

       ┌──────────────manifest of a leg without messages──────────────────▾
    RESERVED ──header──▸ RECEIVING (more headers) ──manifest matches──▸ COMPLETE
       └────────────────────┴──cancel, fail──▸ CANCELLED, FAILED

A prefill rank sends one leg to each decode rank that reserves from it. A decode rank receives one
leg from each prefill rank from which it reserves. If both sides have the same tensor parallelism,
each rank has one leg.

A session that is COMPLETE, CANCELLED or FAILED has ended. It ignores later cancels and failures,
because both sides may end a transfer at the same time. An event that SEND_TABLE or RECEIVE_TABLE
does not allow in the current state raises ProtocolError and changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import LayerBlockRange, PairPlan, split_into_messages
from kv_transfer.wire import End


class SendState(enum.Enum):
    OFFERED = "offered"
    SENDING = "sending"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SendEvent(enum.Enum):
    RESERVE = "reserve"
    COMPLETE = "complete"
    CANCEL = "cancel"
    FAIL = "fail"


class ReceiveState(enum.Enum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"


class ReceiveEvent(enum.Enum):
    HEADER = "header"
    COMPLETE = "complete"
    CANCEL = "cancel"
    FAIL = "fail"


_S, _SE = SendState, SendEvent
SEND_TABLE: dict[tuple[SendState, SendEvent], SendState] = {
    (_S.OFFERED, _SE.RESERVE): _S.SENDING,
    (_S.OFFERED, _SE.CANCEL): _S.CANCELLED,
    (_S.OFFERED, _SE.FAIL): _S.FAILED,
    (_S.SENDING, _SE.RESERVE): _S.SENDING,
    (_S.SENDING, _SE.COMPLETE): _S.COMPLETE,
    (_S.SENDING, _SE.CANCEL): _S.CANCELLED,
    (_S.SENDING, _SE.FAIL): _S.FAILED,
} | {
    (state, event): state
    for state in (_S.COMPLETE, _S.CANCELLED, _S.FAILED)
    for event in (_SE.CANCEL, _SE.FAIL)
}

_R, _RE = ReceiveState, ReceiveEvent
RECEIVE_TABLE: dict[tuple[ReceiveState, ReceiveEvent], ReceiveState] = {
    (_R.RESERVED, _RE.HEADER): _R.RECEIVING,
    (_R.RESERVED, _RE.COMPLETE): _R.COMPLETE,  # a leg without messages
    (_R.RESERVED, _RE.CANCEL): _R.CANCELLED,
    (_R.RESERVED, _RE.FAIL): _R.FAILED,
    (_R.RECEIVING, _RE.HEADER): _R.RECEIVING,
    (_R.RECEIVING, _RE.COMPLETE): _R.COMPLETE,
    (_R.RECEIVING, _RE.CANCEL): _R.CANCELLED,
    (_R.RECEIVING, _RE.FAIL): _R.FAILED,
} | {
    (state, event): state
    for state in (_R.COMPLETE, _R.CANCELLED, _R.FAILED)
    for event in (_RE.CANCEL, _RE.FAIL)
}

SEND_ENDED = frozenset({_S.COMPLETE, _S.CANCELLED, _S.FAILED})
RECEIVE_ENDED = frozenset({_R.COMPLETE, _R.CANCELLED, _R.FAILED})


@dataclass(slots=True)
class _Chunk:
    """The tokens that one engine step computes. The first chunk also includes the prefix hits.

    Only the newest chunk may have layers that are not written yet.
    """

    token_start: int
    token_end: int
    layers_done: int = 0


@dataclass(slots=True)
class _Leg:
    """What one decode rank gets, and how much of it was sent."""

    plan: PairPlan
    max_units: int  # largest number of units in one message, over all layers
    token_start: int
    messages: deque[LayerBlockRange] = field(default_factory=deque)  # the next ones, of one chunk
    chunks_planned: int = 0  # chunks that have been cut into messages
    in_flight: int = 0  # number of messages
    messages_sent: int = 0
    bytes_sent: int = 0
    hidden_bytes_sent: int = 0  # part of bytes_sent, sent before all layers were computed
    end_sent: bool = False


class SendSession:
    """One transfer on a prefill rank: what was computed, and what was sent to which decode rank.

    Chunks arrive in token order and accumulate. For each decode rank that has reserved, the session
    cuts the tokens that the rank lacks into messages.
    """

    def __init__(self, transfer_id: str, num_tokens: int, num_layers: int) -> None:
        self.transfer_id = transfer_id
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.state = SendState.OFFERED
        self._chunks: list[_Chunk] = []
        self._legs: dict[int, _Leg] = {}  # by decode rank
        self._request_finished = False
        self._first_token_id: int | None = None

    @property
    def ended(self) -> bool:
        return self.state in SEND_ENDED

    def _apply(self, event: SendEvent) -> None:
        try:
            self.state = SEND_TABLE[self.state, event]
        except KeyError:
            raise ProtocolError(
                f"transfer {self.transfer_id}: {event.value} in state {self.state.value}"
            ) from None

    def reserve(
        self, rank: int, plan: PairPlan, message_bytes: int, token_start: int, token_end: int
    ) -> None:
        """Add the leg of decode rank ``rank``, which holds blocks for these tokens."""
        if (
            not 0 <= token_start < token_end == self.num_tokens
            or token_start % plan.unit_tokens
            or rank in self._legs
        ):
            raise ProtocolError(
                f"transfer {self.transfer_id}: reservation of [{token_start}, {token_end}) "
                f"by rank {rank} of a prompt of {self.num_tokens} tokens"
            )
        self._apply(SendEvent.RESERVE)
        self._legs[rank] = _Leg(plan, plan.max_units(message_bytes), token_start)

    @property
    def awaits_reservation(self) -> bool:
        """Whether some decode rank that needs a leg has not reserved it."""
        missing = all(len(self._legs) < leg.plan.num_decode_ranks for leg in self._legs.values())
        return not self.ended and missing

    def add_chunk(self, token_start: int, token_end: int) -> None:
        """The engine starts to write the KV of these tokens, layer by layer; see ``advance``."""
        expected = self._chunks[-1].token_end if self._chunks else 0
        if token_start != expected or not token_start < token_end <= self.num_tokens:
            raise ProtocolError(
                f"transfer {self.transfer_id}: chunk [{token_start}, {token_end}) after "
                f"{expected} of {self.num_tokens} tokens"
            )
        self._chunks.append(_Chunk(token_start, token_end))

    def advance(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the newest chunk have been written."""
        self._chunks[-1].layers_done = layers_done

    def request_finished(self, first_token_id: int | None) -> None:
        """The engine has sampled the first token and computes nothing more for this request."""
        self._request_finished = True
        self._first_token_id = first_token_id

    def cancel(self) -> None:
        self._apply(SendEvent.CANCEL)

    def fail(self) -> None:
        self._apply(SendEvent.FAIL)

    def ready_ranks(self) -> list[int]:
        """Return the decode ranks for which ``next_message`` has a message."""
        if self.state is not SendState.SENDING:
            return []
        return [rank for rank, leg in self._legs.items() if self._next_ready(leg) is not None]

    def next_message(self, rank: int) -> LayerBlockRange | None:
        """Return a rank's next message if all of its layers are written, and count it in flight."""
        if self.state is not SendState.SENDING or self._next_ready(self._legs[rank]) is None:
            return None
        leg = self._legs[rank]
        leg.in_flight += 1
        return leg.messages.popleft()

    def message_sent(self, rank: int, block_range: LayerBlockRange, *, hidden: bool) -> None:
        """The message has left.

        Args:
            hidden: whether the engine was still computing this prompt when the last byte left.
        """
        leg = self._legs[rank]
        num_bytes = block_range.num_units * leg.plan.unit_bytes
        leg.in_flight -= 1
        leg.messages_sent += 1
        leg.bytes_sent += num_bytes
        leg.hidden_bytes_sent += num_bytes * hidden

    @property
    def all_computed(self) -> bool:
        """Whether all layers of all tokens are written."""
        if not self._chunks:
            return False
        newest = self._chunks[-1]
        return newest.token_end == self.num_tokens and newest.layers_done == self.num_layers

    def take_manifest(self, rank: int) -> End | None:
        """Return a rank's manifest if its whole leg is sent and the request is finished.

        Each manifest is returned once. The last manifest completes the transfer.
        """
        leg = self._legs[rank]
        if (
            self.state is not SendState.SENDING
            or leg.end_sent
            or leg.in_flight
            or not (self._request_finished and self.all_computed)
            or self._next_planned(leg) is not None  # a message is not sent yet
        ):
            return None
        leg.end_sent = True
        if sum(leg.end_sent for leg in self._legs.values()) == leg.plan.num_decode_ranks:
            self._apply(SendEvent.COMPLETE)
        return End(
            transfer_id=self.transfer_id,
            token_start=leg.token_start,
            token_end=self.num_tokens,
            messages=leg.messages_sent,
            num_bytes=leg.bytes_sent,
            hidden_bytes=leg.hidden_bytes_sent,
            first_token_id=self._first_token_id,
        )

    def _next_planned(self, leg: _Leg) -> LayerBlockRange | None:
        """Return the next message, whether its layers are written or not."""
        while not leg.messages:
            if leg.chunks_planned == len(self._chunks):
                return None
            leg.messages.extend(self._messages_of(leg, self._chunks[leg.chunks_planned]))
            leg.chunks_planned += 1
        return leg.messages[0]

    def _next_ready(self, leg: _Leg) -> LayerBlockRange | None:
        """Return the next message if all of its layers are written."""
        block_range = self._next_planned(leg)
        if block_range is None:
            return None
        if block_range.layer_end > self._chunks[leg.chunks_planned - 1].layers_done:
            return None
        return block_range

    def _messages_of(self, leg: _Leg, chunk: _Chunk) -> Iterator[LayerBlockRange]:
        """Cut the units that a chunk completes into messages.

        The messages of the prompt's last chunk include the last unit, even if it is partly full.
        """
        plan = leg.plan
        start = max(chunk.token_start, leg.token_start) // plan.unit_tokens
        last = chunk.token_end == self.num_tokens
        end = plan.units_of(chunk.token_end) if last else chunk.token_end // plan.unit_tokens
        if start < end and plan.heads:
            block_range = LayerBlockRange(0, plan.num_layers, start, end)
            yield from split_into_messages(block_range, leg.max_units)


class ReceiveSession:
    """One leg on a decode rank. It is complete only when every layer of every unit has arrived.

    ``set_plan`` is called when the pair is open, which may be after the reservation.
    """

    def __init__(self, transfer_id: str, token_start: int, token_end: int) -> None:
        self.transfer_id = transfer_id
        self.token_start = token_start
        self.token_end = token_end
        self.state = ReceiveState.RESERVED
        self.messages = 0
        self.num_bytes = 0
        self.manifest: End | None = None
        self._plan: PairPlan | None = None
        self._end_unit = 0
        # For each layer, the first unit that has not arrived. The units of a layer arrive in
        # order, so one number per layer is enough to accept each unit exactly once.
        self._arrived: list[int] = []

    @property
    def ended(self) -> bool:
        return self.state in RECEIVE_ENDED

    def _apply(self, event: ReceiveEvent) -> None:
        try:
            self.state = RECEIVE_TABLE[self.state, event]
        except KeyError:
            raise ProtocolError(
                f"transfer {self.transfer_id}: {event.value} in state {self.state.value}"
            ) from None

    def set_plan(self, plan: PairPlan) -> None:
        """Set the plan, which says what will arrive."""
        self._plan = plan
        self._end_unit = plan.units_of(self.token_end)
        first_unit = self.token_start // plan.unit_tokens if plan.heads else self._end_unit
        self._arrived = [first_unit] * plan.num_layers

    def accept_header(self, block_range: LayerBlockRange, num_bytes: int) -> None:
        """Raise ProtocolError if a message has a wrong size or range, or does not come next."""
        plan, name = self._plan, f"transfer {self.transfer_id}"
        if plan is None or num_bytes != block_range.num_units * plan.unit_bytes:
            raise ProtocolError(f"{name}: {num_bytes} bytes announced for {block_range}")
        if block_range.layer_end > plan.num_layers or block_range.unit_end > self._end_unit:
            raise ProtocolError(f"{name}: {block_range} is outside the reservation")
        if any(
            self._arrived[layer] != block_range.unit_start
            for layer in range(block_range.layer_start, block_range.layer_end)
        ):
            raise ProtocolError(f"{name}: {block_range} is out of order or repeated")
        self._apply(ReceiveEvent.HEADER)

    def received(self, block_range: LayerBlockRange, num_bytes: int) -> None:
        """The announced bytes are in the reserved blocks."""
        for layer in range(block_range.layer_start, block_range.layer_end):
            self._arrived[layer] = block_range.unit_end
        self.messages += 1
        self.num_bytes += num_bytes

    def complete(self, manifest: End) -> None:
        """Become COMPLETE if the manifest matches what arrived; raise ProtocolError otherwise."""
        said = (manifest.token_start, manifest.token_end, manifest.messages, manifest.num_bytes)
        seen = (self.token_start, self.token_end, self.messages, self.num_bytes)
        missing = [layer for layer, unit in enumerate(self._arrived) if unit != self._end_unit]
        if said != seen or missing or self._plan is None:
            raise ProtocolError(
                f"transfer {self.transfer_id}: manifest {said}, received {seen}, "
                f"{len(missing)} layers incomplete"
            )
        self._apply(ReceiveEvent.COMPLETE)
        self.manifest = manifest

    def cancel(self) -> None:
        self._apply(ReceiveEvent.CANCEL)

    def fail(self) -> None:
        self._apply(ReceiveEvent.FAIL)
