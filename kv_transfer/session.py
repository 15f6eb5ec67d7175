"""One transfer as a state machine on each side. No sockets, threads or clocks.

    one prefill rank                        one decode rank, for each prefill rank

    OFFERED ──reserve──▸ SENDING ──┐        RESERVED ──header──▸ RECEIVING ──┐header
       │                   │  ▲────┘reserve    │                   │   ▲─────┘
       │                   │ all parts ended   │                   │
       │ cancel, fail      ▾                   │ cancel, fail      │ end, manifest matches
       │                 ENDED                 ▾                   ▾
       └──▸ CANCELLED, FAILED ◂──┘          CANCELLED, FAILED   COMPLETE

A prefill rank sends one part to each decode rank that reserves from it, a decode rank receives one
part from each prefill rank; with the same tensor parallelism on both sides that is one part.

Terminal states absorb late cancels and failures: both sides may end a transfer at the same
time. Every other event that the table does not name raises ProtocolError and changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import PairPlan, Rectangle, split_into_messages
from kv_transfer.wire import End


class SendState(enum.Enum):
    OFFERED = "offered"
    SENDING = "sending"
    ENDED = "ended"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SendEvent(enum.Enum):
    RESERVE = "reserve"
    END = "end"
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
    END = "end"
    CANCEL = "cancel"
    FAIL = "fail"


_S, _SE = SendState, SendEvent
SEND_TABLE: dict[tuple[SendState, SendEvent], SendState] = {
    (_S.OFFERED, _SE.RESERVE): _S.SENDING,
    (_S.OFFERED, _SE.CANCEL): _S.CANCELLED,
    (_S.OFFERED, _SE.FAIL): _S.FAILED,
    (_S.SENDING, _SE.RESERVE): _S.SENDING,
    (_S.SENDING, _SE.END): _S.ENDED,
    (_S.SENDING, _SE.CANCEL): _S.CANCELLED,
    (_S.SENDING, _SE.FAIL): _S.FAILED,
} | {
    (state, event): state
    for state in (_S.ENDED, _S.CANCELLED, _S.FAILED)
    for event in (_SE.CANCEL, _SE.FAIL)
}

_R, _RE = ReceiveState, ReceiveEvent
RECEIVE_TABLE: dict[tuple[ReceiveState, ReceiveEvent], ReceiveState] = {
    (_R.RESERVED, _RE.HEADER): _R.RECEIVING,
    (_R.RESERVED, _RE.END): _R.COMPLETE,  # an empty part
    (_R.RESERVED, _RE.CANCEL): _R.CANCELLED,
    (_R.RESERVED, _RE.FAIL): _R.FAILED,
    (_R.RECEIVING, _RE.HEADER): _R.RECEIVING,
    (_R.RECEIVING, _RE.END): _R.COMPLETE,
    (_R.RECEIVING, _RE.CANCEL): _R.CANCELLED,
    (_R.RECEIVING, _RE.FAIL): _R.FAILED,
} | {
    (state, event): state
    for state in (_R.COMPLETE, _R.CANCELLED, _R.FAILED)
    for event in (_RE.CANCEL, _RE.FAIL)
}

SEND_TERMINAL = frozenset({_S.ENDED, _S.CANCELLED, _S.FAILED})
RECEIVE_TERMINAL = frozenset({_R.COMPLETE, _R.CANCELLED, _R.FAILED})


@dataclass(slots=True)
class _Chunk:
    """Tokens that one engine step computes, the newest one's layers not all as yet."""

    token_start: int
    token_end: int
    layers_done: int = 0


@dataclass(slots=True)
class _Part:
    """What one decode rank gets."""

    plan: PairPlan
    max_pages: int  # of one message
    token_start: int
    messages: deque[Rectangle] = field(default_factory=deque)  # of one chunk
    chunks_cut: int = 0  # into messages
    in_flight: int = 0
    messages_sent: int = 0
    bytes_sent: int = 0
    bytes_hidden: int = 0  # of those, sent before the last layer was computed
    ended: bool = False


class SendSession:
    """One attempt on a prefill rank: what was computed, and what was sent to which decode rank.

    Chunks are offered in token order. They accumulate; with a reservation, the part that its rank
    lacks is cut into messages.
    """

    def __init__(self, key: str, num_tokens: int, num_layers: int) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.state = SendState.OFFERED
        self._chunks: list[_Chunk] = []
        self._parts: dict[int, _Part] = {}  # by decode rank
        self._finished = False
        self._first_token: int | None = None

    @property
    def terminal(self) -> bool:
        return self.state in SEND_TERMINAL

    def _apply(self, event: SendEvent) -> None:
        try:
            self.state = SEND_TABLE[self.state, event]
        except KeyError:
            raise ProtocolError(
                f"transfer {self.key}: {event.value} in state {self.state.value}"
            ) from None

    def reserve(
        self, rank: int, plan: PairPlan, message_bytes: int, token_start: int, token_end: int
    ) -> None:
        """Decode rank ``rank`` lacks ``[token_start, token_end)`` and holds blocks for it."""
        if (
            not 0 <= token_start < token_end == self.num_tokens
            or token_start % plan.page_tokens
            or rank in self._parts
        ):
            raise ProtocolError(
                f"transfer {self.key}: reservation of [{token_start}, {token_end}) by rank {rank} "
                f"of a prompt of {self.num_tokens} tokens"
            )
        self._apply(SendEvent.RESERVE)
        self._parts[rank] = _Part(plan, plan.max_pages(message_bytes), token_start)

    @property
    def unreserved(self) -> bool:
        """Whether some decode rank that needs a part has not reserved it."""
        missing = all(len(self._parts) < part.plan.decode_ranks for part in self._parts.values())
        return not self.terminal and missing

    def add_chunk(self, token_start: int, token_end: int) -> None:
        """Tokens whose KV is written from now on, layer by layer; see ``advance``."""
        expected = self._chunks[-1].token_end if self._chunks else 0
        if token_start != expected or not token_start < token_end <= self.num_tokens:
            raise ProtocolError(
                f"transfer {self.key}: chunk [{token_start}, {token_end}) after {expected} "
                f"of {self.num_tokens} tokens"
            )
        self._chunks.append(_Chunk(token_start, token_end))

    def advance(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the newest chunk have been written."""
        self._chunks[-1].layers_done = layers_done

    def finish(self, first_token: int | None) -> None:
        """The engine has sampled; nothing more will be computed."""
        self._finished = True
        self._first_token = first_token

    def cancel(self) -> None:
        self._apply(SendEvent.CANCEL)

    def fail(self) -> None:
        self._apply(SendEvent.FAIL)

    def ready_ranks(self) -> list[int]:
        """Decode ranks for which ``next_message`` has one."""
        if self.state is not SendState.SENDING:
            return []
        return [rank for rank, part in self._parts.items() if self._peek(part) is not None]

    def next_message(self, rank: int) -> Rectangle | None:
        """Take a rank's next message whose layers are all written; it is now in flight."""
        if self.state is not SendState.SENDING or self._peek(self._parts[rank]) is None:
            return None
        part = self._parts[rank]
        part.in_flight += 1
        return part.messages.popleft()

    def message_sent(self, rank: int, area: Rectangle, *, hidden: bool) -> None:
        """``hidden``: the engine was still computing this prompt when its last byte left."""
        part = self._parts[rank]
        num_bytes = area.num_pages * part.plan.page_bytes
        part.in_flight -= 1
        part.messages_sent += 1
        part.bytes_sent += num_bytes
        part.bytes_hidden += num_bytes * hidden

    @property
    def all_computed(self) -> bool:
        """Whether all layers of all tokens are written."""
        if not self._chunks:
            return False
        newest = self._chunks[-1]
        return newest.token_end == self.num_tokens and newest.layers_done == self.num_layers

    def take_end(self, rank: int) -> End | None:
        """A rank's manifest, once, when it was sent everything and the engine has finished."""
        part = self._parts[rank]
        if (
            self.state is not SendState.SENDING
            or part.ended
            or part.in_flight
            or not (self._finished and self.all_computed)
            or self._next(part) is not None  # also of a chunk whose layers are not all written
        ):
            return None
        part.ended = True
        if sum(part.ended for part in self._parts.values()) == part.plan.decode_ranks:
            self._apply(SendEvent.END)
        return End(
            self.key,
            part.token_start,
            self.num_tokens,
            part.messages_sent,
            part.bytes_sent,
            part.bytes_hidden,
            self._first_token,
        )

    def _next(self, part: _Part) -> Rectangle | None:
        """The next message, written or not."""
        while not part.messages:
            if part.chunks_cut == len(self._chunks):
                return None
            part.messages.extend(self._cut(part, self._chunks[part.chunks_cut]))
            part.chunks_cut += 1
        return part.messages[0]

    def _peek(self, part: _Part) -> Rectangle | None:
        """The next message, if its layers are all written."""
        area = self._next(part)
        if area is None or area.layer_end > self._chunks[part.chunks_cut - 1].layers_done:
            return None
        return area

    def _cut(self, part: _Part, chunk: _Chunk) -> Iterator[Rectangle]:
        """The pages that a chunk completes (and the prompt's last one in any case)."""
        plan = part.plan
        start = max(chunk.token_start, part.token_start) // plan.page_tokens
        last = chunk.token_end == self.num_tokens
        end = plan.pages_of(chunk.token_end) if last else chunk.token_end // plan.page_tokens
        if start < end and plan.heads:
            area = Rectangle(0, plan.num_layers, start, end)
            yield from split_into_messages(area, part.max_pages)


class ReceiveSession:
    """One part of an attempt on a decode rank: ready only when every layer of every page arrived.

    The plan is known when the pair is up, which may be after the reservation.
    """

    def __init__(self, key: str, token_start: int, token_end: int) -> None:
        self.key = key
        self.token_start = token_start
        self.token_end = token_end
        self.state = ReceiveState.RESERVED
        self.messages = 0
        self.num_bytes = 0
        self.end_message: End | None = None
        self._plan: PairPlan | None = None
        self._end_page = 0
        # Per layer, the first page that has not arrived. Pages of a layer come in order, so this
        # is enough to accept each exactly once.
        self._arrived: list[int] = []

    @property
    def terminal(self) -> bool:
        return self.state in RECEIVE_TERMINAL

    def _apply(self, event: ReceiveEvent) -> None:
        try:
            self.state = RECEIVE_TABLE[self.state, event]
        except KeyError:
            raise ProtocolError(
                f"transfer {self.key}: {event.value} in state {self.state.value}"
            ) from None

    def follow(self, plan: PairPlan) -> None:
        """The pair is up: what will arrive."""
        self._plan = plan
        self._end_page = plan.pages_of(self.token_end)
        first_page = self.token_start // plan.page_tokens if plan.heads else self._end_page
        self._arrived = [first_page] * plan.num_layers

    def header(self, area: Rectangle, num_bytes: int) -> None:
        """Check an announced message: the right size, in range, and not received before."""
        plan = self._plan
        if plan is None or num_bytes != area.num_pages * plan.page_bytes:
            raise ProtocolError(f"transfer {self.key}: {num_bytes} bytes announced for {area}")
        if area.layer_end > plan.num_layers or area.page_end > self._end_page:
            raise ProtocolError(f"transfer {self.key}: {area} is outside the reservation")
        if any(
            self._arrived[layer] != area.page_start
            for layer in range(area.layer_start, area.layer_end)
        ):
            raise ProtocolError(f"transfer {self.key}: {area} is out of order or repeated")
        self._apply(ReceiveEvent.HEADER)

    def received(self, area: Rectangle, num_bytes: int) -> None:
        """The announced bytes are in the reserved blocks."""
        for layer in range(area.layer_start, area.layer_end):
            self._arrived[layer] = area.page_end
        self.messages += 1
        self.num_bytes += num_bytes

    def end(self, manifest: End) -> None:
        """Become COMPLETE if the manifest and what arrived agree; ProtocolError otherwise."""
        said = (manifest.token_start, manifest.token_end, manifest.messages, manifest.num_bytes)
        seen = (self.token_start, self.token_end, self.messages, self.num_bytes)
        missing = [layer for layer, at in enumerate(self._arrived) if at != self._end_page]
        if said != seen or missing or self._plan is None:
            raise ProtocolError(
                f"transfer {self.key}: manifest {said}, received {seen}, "
                f"{len(missing)} layers incomplete"
            )
        self._apply(ReceiveEvent.END)
        self.end_message = manifest

    def cancel(self) -> None:
        self._apply(ReceiveEvent.CANCEL)

    def fail(self) -> None:
        self._apply(ReceiveEvent.FAIL)
