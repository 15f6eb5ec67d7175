"""Every event in every state of both state machines. No leg completes while KV is missing.

A leg is the part of a transfer between one pair of ranks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.errors import ProtocolError
from kv_transfer.geometry import HeadRange, LayerBlockRange, PairPlan
from kv_transfer.session import (
    RECEIVE_TABLE,
    SEND_TABLE,
    ReceiveEvent,
    ReceiveSession,
    ReceiveState,
    SendEvent,
    SendSession,
    SendState,
)
from kv_transfer.wire import End

LAYERS = 3
BLOCK = 4  # tokens
PLAN = PairPlan(
    heads=HeadRange(0, 1),
    unit_tokens=BLOCK,
    whole_blocks=True,
    unit_bytes=BLOCK * 2 * 4,
    num_layers=LAYERS,
    num_decode_ranks=1,
)
TOKENS = 10  # two whole blocks and half of a third


def reserve(
    session: SendSession, start: int = 0, end: int | None = None, max_units: int = 2, rank: int = 0
) -> None:
    end = session.num_tokens if end is None else end
    session.reserve(rank, PLAN, max_units * PLAN.unit_bytes, start, end)


def send_in(state: SendState) -> SendSession:
    session = SendSession("r#1", TOKENS, LAYERS)
    session.add_chunk(0, TOKENS)
    session.advance(LAYERS)
    session.request_finished(7)
    if state in (SendState.SENDING, SendState.COMPLETE):
        reserve(session)
    if state is SendState.COMPLETE:
        while (block_range := session.next_message(0)) is not None:
            session.message_sent(0, block_range, hidden=True)
        assert session.take_manifest(0) is not None
    if state is SendState.CANCELLED:
        session.cancel()
    if state is SendState.FAILED:
        session.fail()
    assert session.state is state
    return session


def send_event(session: SendSession, event: SendEvent) -> None:
    if event is SendEvent.RESERVE:
        reserve(session, rank=1)
    else:
        session._apply(event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SendState, SendEvent)))
def test_every_send_event_in_every_state(state: SendState, event: SendEvent) -> None:
    session = send_in(state)
    if (state, event) in SEND_TABLE:
        send_event(session, event)
        assert session.state is SEND_TABLE[state, event]
    else:
        with pytest.raises(ProtocolError, match=rf"{event.value} in state {state.value}"):
            send_event(session, event)
        assert session.state is state


def end_of(
    messages: int, num_bytes: int, *, hidden_bytes: int = 0, start: int = 0, tokens: int = 4,
    first_token_id: int | None = 7,
) -> End:  # fmt: skip
    return End(
        transfer_id="r#1",
        token_start=start,
        token_end=tokens,
        messages=messages,
        num_bytes=num_bytes,
        hidden_bytes=hidden_bytes,
        first_token_id=first_token_id,
    )


def manifest(session: ReceiveSession) -> End:
    """Return the manifest that matches what has arrived."""
    return end_of(
        session.messages,
        session.num_bytes,
        start=session.token_start,
        tokens=session.token_end,
        first_token_id=None,
    )


def arrive(session: ReceiveSession, block_range: LayerBlockRange) -> None:
    num_bytes = block_range.num_units * PLAN.unit_bytes
    session.accept_header(block_range, num_bytes)
    session.received(block_range, num_bytes)


def receive_session(start: int = 0, tokens: int = TOKENS) -> ReceiveSession:
    session = ReceiveSession("r#1", start, tokens)
    session.set_plan(PLAN)
    return session


def receive_in(state: ReceiveState) -> ReceiveSession:
    session = receive_session()
    if state in (ReceiveState.RECEIVING, ReceiveState.COMPLETE):
        arrive(session, LayerBlockRange(0, LAYERS, 0, 3))
    if state is ReceiveState.COMPLETE:
        session.complete(manifest(session))
    if state is ReceiveState.CANCELLED:
        session.cancel()
    if state is ReceiveState.FAILED:
        session.fail()
    assert session.state is state
    return session


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ReceiveState, ReceiveEvent)))
def test_every_receive_event_in_every_state(state: ReceiveState, event: ReceiveEvent) -> None:
    session = receive_in(state)
    if (state, event) in RECEIVE_TABLE:
        session._apply(event)
        assert session.state is RECEIVE_TABLE[state, event]
    else:
        with pytest.raises(ProtocolError, match=rf"{event.value} in state {state.value}"):
            session._apply(event)
        assert session.state is state


def test_no_message_is_sent_before_its_layers_were_computed() -> None:
    session = SendSession("r#1", 8, LAYERS)
    reserve(session)
    session.add_chunk(0, 8)
    assert session.next_message(0) is None
    assert session.ready_ranks() == []
    session.advance(1)
    assert session.ready_ranks() == [0]
    assert session.next_message(0) == LayerBlockRange(0, 1, 0, 2)
    assert session.next_message(0) is None
    session.advance(3)
    assert session.next_message(0) == LayerBlockRange(1, 2, 0, 2)


def test_a_block_waits_for_the_chunk_that_completes_it() -> None:
    session = SendSession("r#1", TOKENS, LAYERS)
    reserve(session, max_units=100)
    session.add_chunk(0, 6)  # block 1 has tokens 4 and 5 only
    session.advance(LAYERS)
    assert session.next_message(0) == LayerBlockRange(0, LAYERS, 0, 1)
    assert session.next_message(0) is None
    session.add_chunk(6, TOKENS)
    session.advance(LAYERS)
    assert session.next_message(0) == LayerBlockRange(0, LAYERS, 1, 3)


def test_no_manifest_while_a_message_is_in_flight_or_the_engine_computes() -> None:
    session = SendSession("r#1", 4, LAYERS)
    reserve(session, max_units=100)
    session.add_chunk(0, 4)
    session.advance(LAYERS)
    block_range = session.next_message(0)
    assert block_range is not None
    session.request_finished(7)
    assert session.take_manifest(0) is None, "the message has not been sent"
    session.message_sent(0, block_range, hidden=True)
    end = session.take_manifest(0)
    assert end == end_of(1, 3 * PLAN.unit_bytes, hidden_bytes=3 * PLAN.unit_bytes)
    assert session.take_manifest(0) is None, "a manifest is sent once"


def test_a_reservation_must_name_the_prompt_and_begin_at_a_block() -> None:
    for start, end in [(0, 9), (0, 11), (3, 10), (10, 10), (-4, 10)]:
        session = SendSession("r#1", TOKENS, LAYERS)
        with pytest.raises(ProtocolError, match="reservation"):
            reserve(session, start, end)
        assert session.state is SendState.OFFERED


def test_a_manifest_that_disagrees_is_refused() -> None:
    wrong: list[Callable[[End], End]] = [
        lambda end: msgspec.structs.replace(end, token_start=4),
        lambda end: msgspec.structs.replace(end, token_end=9),
        lambda end: msgspec.structs.replace(end, messages=end.messages + 1),
        lambda end: msgspec.structs.replace(end, num_bytes=end.num_bytes - 1),
    ]
    for change in wrong:
        session = receive_in(ReceiveState.RECEIVING)
        with pytest.raises(ProtocolError, match="manifest"):
            session.complete(change(manifest(session)))
        assert session.state is ReceiveState.RECEIVING


def test_a_missing_layer_is_not_complete() -> None:
    session = receive_session()
    arrive(session, LayerBlockRange(0, LAYERS - 1, 0, 3))
    with pytest.raises(ProtocolError, match="1 layers incomplete"):
        session.complete(manifest(session))


@pytest.mark.parametrize(
    "block_range",
    [
        LayerBlockRange(0, 1, 1, 2),  # skips a block
        LayerBlockRange(0, LAYERS + 1, 0, 1),  # a layer that does not exist
        LayerBlockRange(0, 1, 0, 4),  # beyond the reservation
    ],
)
def test_a_message_outside_what_was_reserved_is_refused(block_range: LayerBlockRange) -> None:
    session = receive_session()
    with pytest.raises(ProtocolError):
        session.accept_header(block_range, block_range.num_units * PLAN.unit_bytes)
    assert session.state is ReceiveState.RESERVED


def test_a_repeated_message_is_refused() -> None:
    session = receive_session()
    arrive(session, LayerBlockRange(0, 1, 0, 1))
    with pytest.raises(ProtocolError, match="repeated"):
        arrive(session, LayerBlockRange(0, 1, 0, 1))


def test_a_chunk_whose_layers_are_not_all_written_holds_the_manifest_back() -> None:
    """The engine has already computed the next chunk and finished the request."""
    session = SendSession("r#1", 2 * BLOCK, LAYERS)
    reserve(session, max_units=100)
    session.add_chunk(0, BLOCK)
    session.advance(LAYERS - 1)
    with contextlib.suppress(ProtocolError):  # refusing the chunk would be correct, too
        session.add_chunk(BLOCK, 2 * BLOCK)
        session.advance(LAYERS)
    session.request_finished(7)
    assert session.take_manifest(0) is None


def test_each_decode_rank_gets_its_leg_and_the_last_one_completes_the_transfer() -> None:
    plan = replace(PLAN, num_decode_ranks=2)
    idle = replace(plan, heads=HeadRange(0, 0), unit_bytes=0)
    session = SendSession("r#1", 4, LAYERS)
    session.reserve(1, plan, 1000, 0, 4)
    session.reserve(0, idle, 1000, 0, 4)
    with pytest.raises(ProtocolError, match="by rank 1"):
        session.reserve(1, plan, 1000, 0, 4)
    session.add_chunk(0, 4)
    session.advance(LAYERS)
    session.request_finished(7)
    assert session.take_manifest(0) == end_of(0, 0)
    assert not session.ended, "rank 1 has received nothing yet"
    assert session.ready_ranks() == [1]
    block_range = session.next_message(1)
    assert block_range is not None
    session.message_sent(1, block_range, hidden=False)
    assert session.take_manifest(1) == end_of(1, LAYERS * PLAN.unit_bytes)
    assert session.state is SendState.COMPLETE


def test_an_empty_leg_is_complete_with_its_manifest_and_no_other_is() -> None:
    for plan, complete in (
        (replace(PLAN, heads=HeadRange(0, 0), unit_bytes=0), True),
        (PLAN, False),
    ):
        session = ReceiveSession("r#1", 0, TOKENS)
        session.set_plan(plan)
        if complete:
            session.complete(manifest(session))
            assert session.state is ReceiveState.COMPLETE
        else:
            with pytest.raises(ProtocolError, match=f"{LAYERS} layers incomplete"):
                session.complete(manifest(session))
            assert session.state is ReceiveState.RESERVED


@given(data=st.data(), max_units=st.integers(1, 12), tokens=st.integers(1, 40))
def test_for_all_chunks_d_gets_each_block_it_lacks_once(
    data: st.DataObject, max_units: int, tokens: int
) -> None:
    """Chunks, prefix hits on both sides and the time of the reservation are arbitrary."""
    last_block = (tokens - 1) // BLOCK
    reserved_from = BLOCK * data.draw(st.integers(0, last_block), label="D's prefix blocks")
    cached = BLOCK * data.draw(st.integers(0, last_block), label="P's prefix blocks")
    cuts = data.draw(st.sets(st.integers(cached + 1, tokens)), label="chunk ends") | {tokens}
    reserve_at = data.draw(st.integers(0, len(cuts)), label="reserved before chunk")

    send = SendSession("r#1", tokens, LAYERS)
    receive = receive_session(reserved_from, tokens)

    def pump() -> None:
        for rank in send.ready_ranks():
            while (block_range := send.next_message(rank)) is not None:
                arrive(receive, block_range)
                send.message_sent(rank, block_range, hidden=True)

    start = 0  # what P has cached is sent with the first chunk
    for index, end in enumerate(sorted(cuts)):
        if index == reserve_at:
            reserve(send, reserved_from, max_units=max_units)
        send.add_chunk(start, end)
        for layer in range(1, LAYERS + 1):
            send.advance(layer)
            pump()
            if send.state is SendState.SENDING:
                assert send.take_manifest(0) is None, "no manifest before the engine has finished"
        start = end
    if reserve_at == len(cuts):
        reserve(send, reserved_from, max_units=max_units)
        pump()
    send.request_finished(7)
    last = send.take_manifest(0)
    assert last is not None
    receive.complete(last)
    assert receive.state is ReceiveState.COMPLETE
    units = PLAN.units_of(tokens) - reserved_from // BLOCK
    assert receive.num_bytes == units * LAYERS * PLAN.unit_bytes
