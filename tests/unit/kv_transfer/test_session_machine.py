"""Tests transfers from a prefill rank (P) to decode ranks (D) over a network that is unreliable.

The network reorders, loses, repeats, delays and forges messages. The sessions are real. Each KV
element is a tuple that names its transfer, layer, token and head. Hypothesis draws the events. The
test tracks the expected state separately, and compares the sessions with this state.

* leg: the part of a transfer between P and one decode rank
* unit: ``UNIT_TOKENS`` consecutive tokens; the last unit of a prompt may have fewer tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import HeadRange, LayerBlockRange, PairPlan
from kv_transfer.session import ReceiveSession, ReceiveState, SendSession, SendState
from kv_transfer.wire import Cancel, End, Fail, Header, Reserve

LAYERS = 3
UNIT_TOKENS = 2
Message = Reserve | Cancel | Header | End | Fail
Element = tuple[str, int, int, int]  # transfer id, layer, token, head
Cell = tuple[int, int]  # layer and unit


def plan_of(rank: int, ranks: int, *, idle: bool) -> PairPlan:
    """Return a pair's plan. The decode rank has one head of its own, or none if it is idle."""
    heads = HeadRange(0, 0) if idle else HeadRange(rank, rank + 1)
    return PairPlan(
        heads=heads,
        unit_tokens=UNIT_TOKENS,
        whole_blocks=True,
        unit_bytes=UNIT_TOKENS * 4 * len(heads),
        num_layers=LAYERS,
        num_decode_ranks=ranks,
    )


@dataclass(slots=True)
class Receiver:
    """One decode rank's session, and its expected state."""

    session: ReceiveSession
    arrived: set[Cell] = field(default_factory=set)
    messages: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class Attempt:
    """One transfer: P's session, a receiver for each decode rank, and the expected state."""

    transfer_id: str
    num_tokens: int
    starts: list[int]  # by decode rank: the first token that it lacks
    plans: list[PairPlan]
    max_units: int
    send: SendSession
    receivers: list[Receiver]
    written: set[tuple[int, int]] = field(default_factory=set)  # layer and token
    chunk: range = range(0)
    chunk_layers: int = LAYERS
    request_finished: bool = False
    reserved: set[int] = field(default_factory=set)
    sent: dict[int, list[Cell]] = field(default_factory=dict)
    hidden_bytes: dict[int, int] = field(default_factory=dict)
    in_flight: list[tuple[int, LayerBlockRange]] = field(default_factory=list)
    end_sent: set[int] = field(default_factory=set)  # decode ranks

    @property
    def computed(self) -> bool:
        return len(self.written) == LAYERS * self.num_tokens

    def lacking(self, rank: int) -> set[Cell]:
        """Return everything that a decode rank must receive."""
        first, end = self.starts[rank] // UNIT_TOKENS, -(-self.num_tokens // UNIT_TOKENS)
        return set(product(range(LAYERS), range(first, end))) if self.plans[rank].heads else set()

    def elements(self, rank: int, cell: Cell) -> list[Element]:
        """Return the content of a unit in one layer."""
        tokens = range(
            cell[1] * UNIT_TOKENS, min(cell[1] * UNIT_TOKENS + UNIT_TOKENS, self.num_tokens)
        )
        return [
            (self.transfer_id, cell[0], token, self.plans[rank].heads.start) for token in tokens
        ]


def cells_of(block_range: LayerBlockRange) -> list[Cell]:
    layers = range(block_range.layer_start, block_range.layer_end)
    return list(product(layers, range(block_range.unit_start, block_range.unit_end)))


def event(session: SendSession | ReceiveSession, call: Callable[[], None], allowed: bool) -> bool:
    """Check that an event is accepted if it is allowed, and otherwise refused without effect."""
    before = copy.deepcopy(vars(session))
    if allowed:
        call()
    else:
        with pytest.raises(ProtocolError):
            call()
        assert vars(session) == before
    return allowed


@dataclass(slots=True)
class Mail:
    rank: int  # the decode rank that sends or receives the message
    message: Message


which = st.sampled_from([-1, -1, -1, -2])  # mostly the newest attempt, sometimes the one before it
ranks = st.integers(0, 2)
small = st.integers(-1, 6)


class SessionMachine(RuleBasedStateMachine):
    """P's sender, the decode ranks' receivers, and the mail between them."""

    @initialize(num_tokens=st.integers(1, 7), idle=st.lists(st.booleans(), min_size=1, max_size=3))
    def begin(self, num_tokens: int, idle: list[bool]) -> None:
        self.num_tokens = num_tokens
        self.plans = [plan_of(rank, len(idle), idle=idle[rank]) for rank in range(len(idle))]
        # All attempts write into the same blocks. If a late message of an old attempt is accepted,
        # it overwrites the KV of the newest attempt.
        self.blocks: list[dict[Cell, list[Element]]] = [{} for _ in idle]
        self.mail: list[Mail] = []
        self.attempts: list[Attempt] = []
        self.end_states: dict[int, SendState | ReceiveState] = {}
        self.next_attempt([0, 0, 0], 4)

    @rule(
        first_units=st.lists(st.integers(0, 3), min_size=3, max_size=3), max_units=st.integers(1, 9)
    )
    def next_attempt(self, first_units: list[int], max_units: int) -> None:
        """Begin an attempt. D cancels the previous attempt, but P may still work on it."""
        if self.attempts:
            for receiver in self.attempts[-1].receivers:
                receiver.session.cancel()
        last_unit = (self.num_tokens - 1) // UNIT_TOKENS
        starts = [min(unit, last_unit) * UNIT_TOKENS for unit in first_units[: len(self.plans)]]
        transfer_id = f"r#{len(self.attempts)}"
        receivers = [
            Receiver(ReceiveSession(transfer_id, start, self.num_tokens)) for start in starts
        ]
        for receiver, plan in zip(receivers, self.plans, strict=True):
            receiver.session.set_plan(plan)
        self.attempts.append(
            Attempt(
                transfer_id=transfer_id,
                num_tokens=self.num_tokens,
                starts=starts,
                plans=self.plans,
                max_units=max_units,
                send=SendSession(transfer_id, self.num_tokens, LAYERS),
                receivers=receivers,
            )
        )

    def attempt(self, index: int) -> Attempt:
        return self.attempts[max(index, -len(self.attempts))]

    def some(self, index: int, rank: int) -> tuple[Attempt, int]:
        """Return an attempt, and a decode rank that exists."""
        return self.attempt(index), rank % len(self.plans)

    def post(self, rank: int, message: Message) -> None:
        self.mail.append(Mail(rank, message))

    # ---- the prefill side ----------------------------------------------------------------

    @rule(index=which, tokens=st.integers(1, 7), layers=st.integers(1, LAYERS))
    def compute(self, index: int, tokens: int, layers: int) -> None:
        """Write the next layers of a chunk, or begin the next chunk if all layers are written."""
        attempt = self.attempt(index)
        if attempt.chunk_layers < LAYERS:
            attempt.chunk_layers = min(attempt.chunk_layers + layers, LAYERS)
            attempt.written |= set(product(range(attempt.chunk_layers), attempt.chunk))
            attempt.send.advance(attempt.chunk_layers)
        elif attempt.chunk.stop < attempt.num_tokens:
            end = min(attempt.chunk.stop + tokens, attempt.num_tokens)
            attempt.chunk, attempt.chunk_layers = range(attempt.chunk.stop, end), 0
            attempt.send.add_chunk(attempt.chunk.start, end)

    @rule(index=which, start=small, tokens=small)
    def chunk_out_of_order(self, index: int, start: int, tokens: int) -> None:
        attempt = self.attempt(index)
        end = start + tokens
        if start != attempt.chunk.stop or not start < end <= attempt.num_tokens:
            event(attempt.send, lambda: attempt.send.add_chunk(start, end), allowed=False)

    @rule(index=which)
    def finish(self, index: int) -> None:
        attempt = self.attempt(index)
        attempt.request_finished = True
        attempt.send.request_finished(7)

    @rule(index=which)
    def gather(self, index: int) -> None:
        """Send one message to each decode rank for which a message is ready."""
        attempt = self.attempt(index)
        ready = attempt.send.ready_ranks()
        for rank in attempt.reserved:
            block_range = attempt.send.next_message(rank)
            assert (block_range is not None) == (rank in ready)
            if block_range is not None:
                self.send(attempt, rank, block_range)

    def send(self, attempt: Attempt, rank: int, block_range: LayerBlockRange) -> None:
        assert attempt.send.state is SendState.SENDING
        assert block_range.num_units <= attempt.max_units
        cells = cells_of(block_range)
        assert not set(cells) & set(attempt.sent[rank]), "a unit was sent twice"
        assert set(cells) <= attempt.lacking(rank), "a unit was sent that was not reserved"
        tokens = {
            (layer, token) for cell in cells for _, layer, token, _ in attempt.elements(rank, cell)
        }
        assert tokens <= attempt.written, "a unit was sent before it was computed"
        attempt.sent[rank] += cells
        attempt.in_flight.append((rank, block_range))
        self.post(
            rank,
            Header(
                0,
                attempt.transfer_id,
                block_range,
                block_range.num_units * attempt.plans[rank].unit_bytes,
            ),
        )

    @rule(index=which, which_message=st.integers(0, 3), hidden=st.booleans())
    def message_sent(self, index: int, which_message: int, hidden: bool) -> None:
        attempt = self.attempt(index)
        if attempt.in_flight:
            rank, block_range = attempt.in_flight.pop(which_message % len(attempt.in_flight))
            attempt.send.message_sent(rank, block_range, hidden=hidden)
            if hidden:
                num_bytes = block_range.num_units * attempt.plans[rank].unit_bytes
                attempt.hidden_bytes[rank] += num_bytes

    def end_is_due(self, attempt: Attempt, rank: int) -> bool:
        return (
            attempt.send.state is SendState.SENDING
            and rank not in attempt.end_sent
            and attempt.request_finished
            and attempt.computed
            and set(attempt.sent[rank]) == attempt.lacking(rank)
            and all(flying != rank for flying, _ in attempt.in_flight)
        )

    @rule(index=which, rank=ranks)
    def end(self, index: int, rank: int) -> None:
        attempt, rank = self.some(index, rank)
        if rank not in attempt.reserved or not self.end_is_due(attempt, rank):
            return
        manifest = attempt.send.take_manifest(rank)
        assert manifest is not None
        attempt.end_sent.add(rank)
        assert manifest.num_bytes == len(attempt.sent[rank]) * attempt.plans[rank].unit_bytes
        assert manifest.hidden_bytes == attempt.hidden_bytes[rank]
        assert manifest.first_token_id == 7
        self.post(rank, manifest)
        all_sent = len(attempt.end_sent) == len(attempt.plans)
        assert (attempt.send.state is SendState.COMPLETE) == all_sent

    @invariant()
    def no_manifest_before_all_was_computed_and_sent_nor_twice(self) -> None:
        for attempt in self.attempts:
            for rank in attempt.reserved:
                if not self.end_is_due(attempt, rank):
                    assert attempt.send.take_manifest(rank) is None

    @rule(
        index=which,
        rank=ranks,
        side=st.sampled_from(["P", "D"]),
        cancel=st.booleans(),
        sure=st.booleans(),
    )
    def end_early(self, index: int, rank: int, side: str, cancel: bool, sure: bool) -> None:
        attempt, rank = self.some(index, rank)
        if not sure:
            return
        session = attempt.send if side == "P" else attempt.receivers[rank].session
        event(session, session.cancel if cancel else session.fail, allowed=True)
        if side == "D":
            self.post(rank, Cancel(attempt.transfer_id))
        for rank in attempt.reserved if side == "P" else ():
            self.post(rank, Fail(attempt.transfer_id, "no longer wanted"))

    # ---- the decode side -----------------------------------------------------------------

    @rule(index=which, rank=ranks, at_once=st.booleans())
    def reserve(self, index: int, rank: int, at_once: bool) -> None:
        attempt, rank = self.some(index, rank)
        self.post(rank, Reserve(attempt.transfer_id, attempt.starts[rank], attempt.num_tokens))
        if at_once:
            self.receive(self.mail.pop())

    # ---- both ----------------------------------------------------------------------------

    @rule(index=which, rank=ranks, stages=st.integers(1, 5))
    def all_goes_well(self, index: int, rank: int, stages: int) -> None:
        """Run the first ``stages`` stages of a leg without faults."""
        attempt, rank = self.some(index, rank)
        self.receive(
            Mail(rank, Reserve(attempt.transfer_id, attempt.starts[rank], attempt.num_tokens))
        )
        if rank in attempt.reserved:
            while not attempt.computed:
                self.compute(index, 7, LAYERS)
            self.finish(index)
            while stages > 1 and attempt.send.ready_ranks():
                self.gather(index)
            while stages > 2 and attempt.in_flight:
                self.message_sent(index, 0, hidden=False)
            if stages > 3:
                self.end(index, rank)
        if stages > 4:
            self.deliver_all()

    # ---- the network ---------------------------------------------------------------------

    @rule(index=st.integers(0, 5), again=st.booleans())
    def deliver(self, index: int, again: bool) -> None:
        """Deliver one of the first three messages. If ``again``, leave it in the mail, too."""
        if self.mail:
            at = index // 2 % len(self.mail)
            self.receive(self.mail[at] if again else self.mail.pop(at))

    @rule()
    def deliver_all(self) -> None:
        while self.mail:
            self.receive(self.mail.pop(0))

    @rule(index=st.integers(0, 5))
    def lose(self, index: int) -> None:
        if self.mail:
            self.mail.pop(index % len(self.mail))

    @rule(
        index=which, rank=ranks, layer=st.integers(0, LAYERS), layers=st.integers(1, 2),
        ahead=st.sampled_from([-1, 0, 0, 1]), units=st.integers(1, 3),
        more=st.sampled_from([-1, 0, 0, 1]),
    )  # fmt: skip
    def forge_header(
        self, index: int, rank: int, layer: int, layers: int, ahead: int, units: int, more: int
    ) -> None:
        """Deliver a forged header near the expected position. By chance, it may be correct."""
        attempt, rank = self.some(index, rank)
        arrived = sum(cell[0] == layer for cell in attempt.receivers[rank].arrived)
        unit = max(0, attempt.starts[rank] // UNIT_TOKENS + arrived + ahead)
        block_range = LayerBlockRange(layer, layer + layers, unit, unit + units)
        num_bytes = block_range.num_units * attempt.plans[rank].unit_bytes + more
        self.receive(Mail(rank, Header(0, attempt.transfer_id, block_range, num_bytes)))

    @rule(
        index=which, rank=ranks, more=st.sampled_from([-2, 0, 2]),
        name=st.sampled_from(["token_start", "token_end", "messages", "num_bytes"]),
    )  # fmt: skip
    def forge_end(self, index: int, rank: int, name: str, more: int) -> None:
        """Deliver a manifest (END) for what has arrived, with at most one field changed."""
        attempt, rank = self.some(index, rank)
        receiver, start = attempt.receivers[rank], attempt.starts[rank]
        messages, num_bytes = receiver.messages, receiver.num_bytes
        end = End(
            transfer_id=attempt.transfer_id,
            token_start=start,
            token_end=attempt.num_tokens,
            messages=messages,
            num_bytes=num_bytes,
            hidden_bytes=0,
            first_token_id=7,
        )
        end = msgspec.structs.replace(end, **{name: getattr(end, name) + more})
        self.receive(Mail(rank, end))

    @rule(index=which, rank=ranks, start=small, end=small)
    def forge_reserve(self, index: int, rank: int, start: int, end: int) -> None:
        attempt, rank = self.some(index, rank)
        if start % UNIT_TOKENS or not 0 <= start < end == attempt.num_tokens:
            self.receive(Mail(rank, Reserve(attempt.transfer_id, start, end)))

    def receive(self, mail: Mail) -> None:
        """Deliver a message. The session is found by transfer id, as in a live worker."""
        rank, message = mail.rank, mail.message
        (attempt,) = (
            attempt for attempt in self.attempts if attempt.transfer_id == message.transfer_id
        )
        send, receiver = attempt.send, attempt.receivers[rank]
        match message:
            case Reserve():
                self.reserved(attempt, rank, message)
            case Cancel():
                event(send, send.cancel, allowed=True)
            case Header():
                self.announced(attempt, rank, message)
            case End():
                said = (message.token_start, message.token_end, message.messages, message.num_bytes)
                event(
                    receiver.session,
                    lambda: receiver.session.complete(message),
                    allowed=not receiver.session.ended
                    and receiver.arrived == attempt.lacking(rank)
                    and said
                    == (
                        attempt.starts[rank],
                        attempt.num_tokens,
                        receiver.messages,
                        receiver.num_bytes,
                    ),
                )
            case Fail():
                event(receiver.session, receiver.session.fail, allowed=True)

    def reserved(self, attempt: Attempt, rank: int, message: Reserve) -> None:
        start, end, plan = message.token_start, message.token_end, attempt.plans[rank]
        message_bytes = attempt.max_units * plan.unit_bytes
        if event(
            attempt.send,
            lambda: attempt.send.reserve(rank, plan, message_bytes, start, end),
            allowed=attempt.send.state in (SendState.OFFERED, SendState.SENDING)
            and rank not in attempt.reserved
            and (start, end) == (attempt.starts[rank], attempt.num_tokens),
        ):
            attempt.reserved.add(rank)
            attempt.sent[rank], attempt.hidden_bytes[rank] = [], 0

    def announced(self, attempt: Attempt, rank: int, header: Header) -> None:
        receiver, block_range = attempt.receivers[rank], header.block_range
        cells = cells_of(block_range)
        before = {
            (layer, unit)
            for layer in range(block_range.layer_start, block_range.layer_end)
            for unit in range(attempt.starts[rank] // UNIT_TOKENS, block_range.unit_start)
        }
        if event(
            receiver.session,
            lambda: receiver.session.accept_header(block_range, header.num_bytes),
            allowed=not receiver.session.ended
            and header.num_bytes == len(cells) * attempt.plans[rank].unit_bytes
            and set(cells) <= attempt.lacking(rank) - receiver.arrived
            and before <= receiver.arrived,
        ):
            self.blocks[rank] |= {cell: attempt.elements(rank, cell) for cell in cells}
            receiver.session.received(block_range, header.num_bytes)
            receiver.arrived |= set(cells)
            receiver.messages += 1
            receiver.num_bytes += header.num_bytes

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def complete_means_that_every_unit_has_arrived(self) -> None:
        attempt = self.attempts[-1]
        for rank, receiver in enumerate(attempt.receivers):
            if receiver.session.state is ReceiveState.COMPLETE:
                for cell in attempt.lacking(rank):
                    assert self.blocks[rank].get(cell) == attempt.elements(rank, cell)

    @invariant()
    def an_ended_session_stays_as_it_is(self) -> None:
        for attempt in self.attempts:
            sessions: list[SendSession | ReceiveSession] = [attempt.send]
            sessions += [receiver.session for receiver in attempt.receivers]
            for session in sessions:
                if session.ended:
                    assert self.end_states.setdefault(id(session), session.state) is session.state

    def teardown(self) -> None:
        """Check that P can still send each reserved leg of a transfer that has not ended on P."""
        for index in range(-len(self.attempts), 0):
            for rank in self.attempts[index].reserved:
                self.all_goes_well(index, rank, 4)
            if not self.attempts[index].send.ended:
                assert self.attempts[index].end_sent == self.attempts[index].reserved


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(SessionMachine.TestCase.settings, max_examples=300)
