"""Both sides of a transfer over a network that reorders, loses, repeats, delays and lies.

The sessions are real and so are the bytes: each KV element is a number that names its attempt,
layer, token and head. What may happen is drawn; what must follow is computed here a second time,
from sets of pages, and compared.
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
from kv_transfer.geometry import HeadRange, PairPlan, Rectangle
from kv_transfer.session import ReceiveSession, ReceiveState, SendSession, SendState
from kv_transfer.wire import Cancel, End, Fail, Header, Reserve

LAYERS = 3
PAGE = 2  # tokens
Message = Reserve | Cancel | Header | End | Fail
Element = tuple[str, int, int, int]  # key, layer, token, head
Cell = tuple[int, int]  # layer and page


def plan_of(rank: int, ranks: int, *, idle: bool) -> PairPlan:
    """Each decode rank has one head of its own, or none."""
    heads = HeadRange(0, 0) if idle else HeadRange(rank, rank + 1)
    return PairPlan(heads, PAGE, True, PAGE * 4 * len(heads), LAYERS, ranks)


@dataclass(slots=True)
class Receiver:
    """What should be so in one decode rank's session."""

    session: ReceiveSession
    arrived: set[Cell] = field(default_factory=set)
    messages: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class Attempt:
    """One key: P's session, a receiver for each decode rank, and what should be so in them."""

    key: str
    num_tokens: int
    starts: list[int]  # by decode rank: the first token that it lacks
    plans: list[PairPlan]
    max_pages: int
    send: SendSession
    receivers: list[Receiver]
    written: set[tuple[int, int]] = field(default_factory=set)  # layer and token
    chunk: range = range(0)
    chunk_layers: int = LAYERS
    finished: bool = False
    reserved: set[int] = field(default_factory=set)
    sent: dict[int, list[Cell]] = field(default_factory=dict)
    bytes_hidden: dict[int, int] = field(default_factory=dict)
    in_flight: list[tuple[int, Rectangle]] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)

    @property
    def computed(self) -> bool:
        return len(self.written) == LAYERS * self.num_tokens

    def lacking(self, rank: int) -> set[Cell]:
        """All that a decode rank is to receive."""
        first, end = self.starts[rank] // PAGE, -(-self.num_tokens // PAGE)
        return set(product(range(LAYERS), range(first, end))) if self.plans[rank].heads else set()

    def page(self, rank: int, cell: Cell) -> list[Element]:
        tokens = range(cell[1] * PAGE, min(cell[1] * PAGE + PAGE, self.num_tokens))
        return [(self.key, cell[0], token, self.plans[rank].heads.start) for token in tokens]


def cells_of(area: Rectangle) -> list[Cell]:
    layers = range(area.layer_start, area.layer_end)
    return list(product(layers, range(area.page_start, area.page_end)))


def event(session: SendSession | ReceiveSession, call: Callable[[], None], allowed: bool) -> bool:
    """An event is accepted if it is allowed; else it is refused and changes nothing."""
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
    rank: int  # of the decode side
    message: Message


which = st.sampled_from([-1, -1, -1, -2])  # an attempt: the newest, sometimes the one before
ranks = st.integers(0, 2)
small = st.integers(-1, 6)


class SessionMachine(RuleBasedStateMachine):
    """P's sender, the decode ranks' receivers, and the mail between them."""

    @initialize(num_tokens=st.integers(1, 7), idle=st.lists(st.booleans(), min_size=1, max_size=3))
    def begin(self, num_tokens: int, idle: list[bool]) -> None:
        self.num_tokens = num_tokens
        self.plans = [plan_of(rank, len(idle), idle=idle[rank]) for rank in range(len(idle))]
        # Each attempt writes into the same blocks, so a late message of an old one would show.
        self.blocks: list[dict[Cell, list[Element]]] = [{} for _ in idle]
        self.mail: list[Mail] = []
        self.attempts: list[Attempt] = []
        self.last_words: dict[int, SendState | ReceiveState] = {}
        self.next_attempt([0, 0, 0], 4)

    @rule(
        first_pages=st.lists(st.integers(0, 3), min_size=3, max_size=3), max_pages=st.integers(1, 9)
    )
    def next_attempt(self, first_pages: list[int], max_pages: int) -> None:
        """D gives up, and the request is tried again; P may still be at the old attempt."""
        if self.attempts:
            for receiver in self.attempts[-1].receivers:
                receiver.session.cancel()
        last_page = (self.num_tokens - 1) // PAGE
        starts = [min(page, last_page) * PAGE for page in first_pages[: len(self.plans)]]
        key = f"r#{len(self.attempts)}"
        receivers = [Receiver(ReceiveSession(key, start, self.num_tokens)) for start in starts]
        for receiver, plan in zip(receivers, self.plans, strict=True):
            receiver.session.follow(plan)
        send = SendSession(key, self.num_tokens, LAYERS)
        self.attempts.append(
            Attempt(key, self.num_tokens, starts, self.plans, max_pages, send, receivers)
        )

    def attempt(self, index: int) -> Attempt:
        return self.attempts[max(index, -len(self.attempts))]

    def some(self, index: int, rank: int) -> tuple[Attempt, int]:
        """An attempt and a rank that it has."""
        return self.attempt(index), rank % len(self.plans)

    def post(self, rank: int, message: Message) -> None:
        self.mail.append(Mail(rank, message))

    # ---- the prefill side ----------------------------------------------------------------

    @rule(index=which, tokens=st.integers(1, 7), layers=st.integers(1, LAYERS))
    def compute(self, index: int, tokens: int, layers: int) -> None:
        """The next layers of a chunk, or the next chunk once all its layers are written."""
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
    def a_chunk_that_does_not_follow(self, index: int, start: int, tokens: int) -> None:
        attempt = self.attempt(index)
        end = start + tokens
        if start != attempt.chunk.stop or not start < end <= attempt.num_tokens:
            event(attempt.send, lambda: attempt.send.add_chunk(start, end), allowed=False)

    @rule(index=which)
    def finish(self, index: int) -> None:
        attempt = self.attempt(index)
        attempt.finished = True
        attempt.send.finish(7)

    @rule(index=which)
    def gather(self, index: int) -> None:
        """A message for each decode rank for which there is one."""
        attempt = self.attempt(index)
        ready = attempt.send.ready_ranks()
        for rank in attempt.reserved:
            area = attempt.send.next_message(rank)
            assert (area is not None) == (rank in ready)
            if area is not None:
                self.send(attempt, rank, area)

    def send(self, attempt: Attempt, rank: int, area: Rectangle) -> None:
        assert attempt.send.state is SendState.SENDING
        assert area.num_pages <= attempt.max_pages
        cells = cells_of(area)
        assert not set(cells) & set(attempt.sent[rank]), "a page is sent once"
        assert set(cells) <= attempt.lacking(rank), "only what was reserved is sent"
        tokens = {
            (layer, token) for cell in cells for _, layer, token, _ in attempt.page(rank, cell)
        }
        assert tokens <= attempt.written, "nothing is sent that was not computed"
        attempt.sent[rank] += cells
        attempt.in_flight.append((rank, area))
        self.post(
            rank, Header(0, attempt.key, area, area.num_pages * attempt.plans[rank].page_bytes)
        )

    @rule(index=which, which_message=st.integers(0, 3), hidden=st.booleans())
    def message_sent(self, index: int, which_message: int, hidden: bool) -> None:
        attempt = self.attempt(index)
        if attempt.in_flight:
            rank, area = attempt.in_flight.pop(which_message % len(attempt.in_flight))
            attempt.send.message_sent(rank, area, hidden=hidden)
            if hidden:
                num_bytes = area.num_pages * attempt.plans[rank].page_bytes
                attempt.bytes_hidden[rank] += num_bytes

    def end_is_due(self, attempt: Attempt, rank: int) -> bool:
        return (
            attempt.send.state is SendState.SENDING
            and rank not in attempt.ended
            and attempt.finished
            and attempt.computed
            and set(attempt.sent[rank]) == attempt.lacking(rank)
            and all(flying != rank for flying, _ in attempt.in_flight)
        )

    @rule(index=which, rank=ranks)
    def end(self, index: int, rank: int) -> None:
        attempt, rank = self.some(index, rank)
        if rank not in attempt.reserved or not self.end_is_due(attempt, rank):
            return
        manifest = attempt.send.take_end(rank)
        assert manifest is not None
        attempt.ended.add(rank)
        assert manifest.num_bytes == len(attempt.sent[rank]) * attempt.plans[rank].page_bytes
        assert manifest.hidden_bytes == attempt.bytes_hidden[rank]
        assert manifest.first_token == 7
        self.post(rank, manifest)
        all_ended = len(attempt.ended) == len(attempt.plans)
        assert (attempt.send.state is SendState.ENDED) == all_ended

    @invariant()
    def no_manifest_before_all_was_computed_and_sent_nor_twice(self) -> None:
        for attempt in self.attempts:
            for rank in attempt.reserved:
                if not self.end_is_due(attempt, rank):
                    assert attempt.send.take_end(rank) is None

    @rule(
        index=which,
        rank=ranks,
        who=st.sampled_from(["P", "D"]),
        cancel=st.booleans(),
        sure=st.booleans(),
    )
    def give_up(self, index: int, rank: int, who: str, cancel: bool, sure: bool) -> None:
        attempt, rank = self.some(index, rank)
        if not sure:
            return
        session = attempt.send if who == "P" else attempt.receivers[rank].session
        event(session, session.cancel if cancel else session.fail, allowed=True)
        if who == "D":
            self.post(rank, Cancel(attempt.key))
        for rank in attempt.reserved if who == "P" else ():
            self.post(rank, Fail(attempt.key, "given up"))

    # ---- the decode side -----------------------------------------------------------------

    @rule(index=which, rank=ranks, at_once=st.booleans())
    def reserve(self, index: int, rank: int, at_once: bool) -> None:
        attempt, rank = self.some(index, rank)
        self.post(rank, Reserve(attempt.key, attempt.starts[rank], attempt.num_tokens))
        if at_once:
            self.receive(self.mail.pop())

    # ---- both ----------------------------------------------------------------------------

    @rule(index=which, rank=ranks, stages=st.integers(1, 5))
    def all_goes_well(self, index: int, rank: int, stages: int) -> None:
        """Straight on to where things get interesting."""
        attempt, rank = self.some(index, rank)
        self.receive(Mail(rank, Reserve(attempt.key, attempt.starts[rank], attempt.num_tokens)))
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
        """Any message, the first one in half of all cases; one that comes again stays."""
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
        ahead=st.sampled_from([-1, 0, 0, 1]), pages=st.integers(1, 3),
        more=st.sampled_from([-1, 0, 0, 1]),
    )  # fmt: skip
    def forge_header(
        self, index: int, rank: int, layer: int, layers: int, ahead: int, pages: int, more: int
    ) -> None:
        """In its place, or beside it."""
        attempt, rank = self.some(index, rank)
        arrived = sum(cell[0] == layer for cell in attempt.receivers[rank].arrived)
        page = max(0, attempt.starts[rank] // PAGE + arrived + ahead)
        area = Rectangle(layer, layer + layers, page, page + pages)
        num_bytes = area.num_pages * attempt.plans[rank].page_bytes + more
        self.receive(Mail(rank, Header(0, attempt.key, area, num_bytes)))

    @rule(
        index=which, rank=ranks, more=st.sampled_from([-2, 0, 2]),
        name=st.sampled_from(["token_start", "token_end", "messages", "num_bytes"]),
    )  # fmt: skip
    def forge_end(self, index: int, rank: int, name: str, more: int) -> None:
        """It agrees with what has arrived, perhaps but for one field."""
        attempt, rank = self.some(index, rank)
        receiver, start = attempt.receivers[rank], attempt.starts[rank]
        messages, num_bytes = receiver.messages, receiver.num_bytes
        end = End(attempt.key, start, attempt.num_tokens, messages, num_bytes, 0, 7)
        end = msgspec.structs.replace(end, **{name: getattr(end, name) + more})
        self.receive(Mail(rank, end))

    @rule(index=which, rank=ranks, start=small, end=small)
    def forge_reserve(self, index: int, rank: int, start: int, end: int) -> None:
        attempt, rank = self.some(index, rank)
        if start % PAGE or not 0 <= start < end == attempt.num_tokens:
            self.receive(Mail(rank, Reserve(attempt.key, start, end)))

    def receive(self, mail: Mail) -> None:
        """Both sides find the session by the key, as the live ones do."""
        rank, message = mail.rank, mail.message
        (attempt,) = (attempt for attempt in self.attempts if attempt.key == message.key)
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
                    lambda: receiver.session.end(message),
                    allowed=not receiver.session.terminal
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
        message_bytes = attempt.max_pages * plan.page_bytes
        if event(
            attempt.send,
            lambda: attempt.send.reserve(rank, plan, message_bytes, start, end),
            allowed=attempt.send.state in (SendState.OFFERED, SendState.SENDING)
            and rank not in attempt.reserved
            and (start, end) == (attempt.starts[rank], attempt.num_tokens),
        ):
            attempt.reserved.add(rank)
            attempt.sent[rank], attempt.bytes_hidden[rank] = [], 0

    def announced(self, attempt: Attempt, rank: int, header: Header) -> None:
        receiver, area, cells = attempt.receivers[rank], header.area, cells_of(header.area)
        before = {
            (layer, page)
            for layer in range(area.layer_start, area.layer_end)
            for page in range(attempt.starts[rank] // PAGE, area.page_start)
        }
        if event(
            receiver.session,
            lambda: receiver.session.header(area, header.num_bytes),
            allowed=not receiver.session.terminal
            and header.num_bytes == len(cells) * attempt.plans[rank].page_bytes
            and set(cells) <= attempt.lacking(rank) - receiver.arrived
            and before <= receiver.arrived,
        ):
            self.blocks[rank] |= {cell: attempt.page(rank, cell) for cell in cells}
            receiver.session.received(area, header.num_bytes)
            receiver.arrived |= set(cells)
            receiver.messages += 1
            receiver.num_bytes += header.num_bytes

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def complete_means_every_page_is_there_and_right(self) -> None:
        attempt = self.attempts[-1]
        for rank, receiver in enumerate(attempt.receivers):
            if receiver.session.state is ReceiveState.COMPLETE:
                for cell in attempt.lacking(rank):
                    assert self.blocks[rank].get(cell) == attempt.page(rank, cell)

    @invariant()
    def terminal_is_terminal(self) -> None:
        for attempt in self.attempts:
            sessions: list[SendSession | ReceiveSession] = [attempt.send]
            sessions += [receiver.session for receiver in attempt.receivers]
            for session in sessions:
                if session.terminal:
                    assert self.last_words.setdefault(id(session), session.state) is session.state

    def teardown(self) -> None:
        """Whatever happened, what P did not give up can still be sent to its end."""
        for index in range(-len(self.attempts), 0):
            for rank in self.attempts[index].reserved:
                self.all_goes_well(index, rank, 4)
            if not self.attempts[index].send.terminal:
                assert self.attempts[index].ended == self.attempts[index].reserved


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(SessionMachine.TestCase.settings, max_examples=300)
