"""One transfer as a state machine on each side. No sockets, threads or clocks.

    prefill side                            decode side

    OFFERED ──reserve──▸ SENDING            RESERVED ──header──▸ RECEIVING ──┐header
       │                   │ end               │                   │   ▲─────┘
       │ cancel, fail      ▾                   │ cancel, fail      │ end, manifest matches
       │                 ENDED                 ▾                   ▾
       └──▸ CANCELLED, FAILED ◂──┘          CANCELLED, FAILED   COMPLETE

Terminal states absorb late cancels and failures: both sides may end a transfer at the same
time. Every other event that the table does not name raises ProtocolError and changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import KvGeometry, Rectangle, split_into_messages
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


class _Chunk:
    """Tokens that one engine step computes, and what it found cached, cut into messages."""

    __slots__ = ("layers_done", "messages")

    def __init__(self, messages: deque[Rectangle]) -> None:
        self.messages = messages
        self.layers_done = 0


class SendSession:
    """The prefill side of one attempt: what was computed, what was sent.

    Chunks are offered in token order. Before the reservation they only accumulate; with it, the
    part that the decode side lacks is cut into messages.
    """

    def __init__(self, key: str, num_tokens: int, geometry: KvGeometry, max_blocks: int) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.state = SendState.OFFERED
        self.messages_sent = 0
        self.bytes_sent = 0
        self._geometry = geometry
        self._max_blocks = max_blocks  # of one message
        self._computed: list[list[int]] = []  # [token_start, token_end, layers_done]
        self._chunks: deque[_Chunk] = deque()
        self._reserved = (0, 0)
        self._in_flight = 0
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

    def reserve(self, token_start: int, token_end: int) -> None:
        """D lacks ``[token_start, token_end)`` and holds blocks for it."""
        if (
            not 0 <= token_start < token_end == self.num_tokens
            or token_start % self._geometry.block_tokens
        ):
            raise ProtocolError(
                f"transfer {self.key}: reservation [{token_start}, {token_end}) "
                f"of a prompt of {self.num_tokens} tokens"
            )
        self._apply(SendEvent.RESERVE)
        self._reserved = (token_start, token_end)
        for start, end, layers_done in self._computed:
            self._queue_chunk(start, end, layers_done)

    def add_chunk(self, token_start: int, token_end: int) -> None:
        """Tokens whose KV is written from now on, layer by layer; see ``advance``."""
        expected = self._computed[-1][1] if self._computed else 0
        if token_start != expected or not token_start < token_end <= self.num_tokens:
            raise ProtocolError(
                f"transfer {self.key}: chunk [{token_start}, {token_end}) after {expected} "
                f"of {self.num_tokens} tokens"
            )
        self._computed.append([token_start, token_end, 0])
        if self.state is SendState.SENDING:
            self._queue_chunk(token_start, token_end, 0)

    def advance(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the newest chunk have been written."""
        self._computed[-1][2] = layers_done
        if self._chunks:
            self._chunks[-1].layers_done = layers_done

    def finish(self, first_token: int | None) -> None:
        """The engine has sampled; nothing more will be computed."""
        self._finished = True
        self._first_token = first_token

    def cancel(self) -> None:
        self._apply(SendEvent.CANCEL)

    def fail(self) -> None:
        self._apply(SendEvent.FAIL)

    def next_message(self) -> Rectangle | None:
        """Take the next message whose layers are all written; it is now in flight."""
        if self.state is not SendState.SENDING:
            return None
        while self._chunks and not self._chunks[0].messages:
            # The newest chunk stays: advance() still refers to it.
            if len(self._chunks) == 1:
                return None
            self._chunks.popleft()
        if not self._chunks or self._chunks[0].messages[0].layer_end > self._chunks[0].layers_done:
            return None
        self._in_flight += 1
        return self._chunks[0].messages.popleft()

    def message_sent(self, area: Rectangle) -> None:
        self._in_flight -= 1
        self.messages_sent += 1
        self.bytes_sent += area.num_blocks * self._geometry.block_bytes

    def take_end(self) -> End | None:
        """The manifest, once, when everything reserved was sent and the engine has finished."""
        if (
            self.state is not SendState.SENDING
            or not self._finished
            or self._in_flight
            or any(chunk.messages for chunk in self._chunks)
            or not self._computed
            or self._computed[-1][1] != self.num_tokens
        ):
            return None
        self._apply(SendEvent.END)
        return End(
            self.key, *self._reserved, self.messages_sent, self.bytes_sent, self._first_token
        )

    def _queue_chunk(self, token_start: int, token_end: int, layers_done: int) -> None:
        """Queue the blocks that this chunk completes (and the prompt's last one in any case)."""
        block_tokens = self._geometry.block_tokens
        start = max(token_start, self._reserved[0]) // block_tokens
        end = token_end // block_tokens
        if token_end == self.num_tokens:
            end = self._geometry.blocks_of(token_end)
        chunk = _Chunk(deque())
        if start < end:
            area = Rectangle(0, self._geometry.num_layers, start, end)
            chunk.messages.extend(split_into_messages(area, self._max_blocks))
        chunk.layers_done = layers_done
        self._chunks.append(chunk)


class ReceiveSession:
    """The decode side of one attempt: ready only when every layer of every block has arrived."""

    def __init__(self, key: str, token_start: int, token_end: int, geometry: KvGeometry) -> None:
        self.key = key
        self.token_start = token_start
        self.token_end = token_end
        self.state = ReceiveState.RESERVED
        self.messages = 0
        self.num_bytes = 0
        self.first_token: int | None = None
        self._geometry = geometry
        self._end_block = geometry.blocks_of(token_end)
        # Per layer, the first block that has not arrived. Blocks of a layer come in order, so
        # this is enough to accept each exactly once.
        self._arrived = [token_start // geometry.block_tokens] * geometry.num_layers

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

    def header(self, area: Rectangle, num_bytes: int) -> None:
        """Check an announced message: the right size, in range, and not received before."""
        if num_bytes != area.num_blocks * self._geometry.block_bytes:
            raise ProtocolError(f"transfer {self.key}: {num_bytes} bytes announced for {area}")
        if area.layer_end > self._geometry.num_layers or area.block_end > self._end_block:
            raise ProtocolError(f"transfer {self.key}: {area} is outside the reservation")
        if any(
            self._arrived[layer] != area.block_start
            for layer in range(area.layer_start, area.layer_end)
        ):
            raise ProtocolError(f"transfer {self.key}: {area} is out of order or repeated")
        self._apply(ReceiveEvent.HEADER)

    def received(self, area: Rectangle) -> None:
        """The announced bytes are in the reserved blocks."""
        for layer in range(area.layer_start, area.layer_end):
            self._arrived[layer] = area.block_end
        self.messages += 1
        self.num_bytes += area.num_blocks * self._geometry.block_bytes

    def end(self, manifest: End) -> None:
        """Become COMPLETE if the manifest and what arrived agree; ProtocolError otherwise."""
        said = (manifest.token_start, manifest.token_end, manifest.messages, manifest.num_bytes)
        seen = (self.token_start, self.token_end, self.messages, self.num_bytes)
        missing = [layer for layer, at in enumerate(self._arrived) if at != self._end_block]
        if said != seen or missing:
            raise ProtocolError(
                f"transfer {self.key}: manifest {said}, received {seen}, "
                f"{len(missing)} layers incomplete"
            )
        self._apply(ReceiveEvent.END)
        self.first_token = manifest.first_token

    def cancel(self) -> None:
        self._apply(ReceiveEvent.CANCEL)

    def fail(self) -> None:
        self._apply(ReceiveEvent.FAIL)
