"""Checks that every journal store must pass: the one in memory and the one in Redis."""

from __future__ import annotations

from core.state.journal import Change, JournalStore, Stored, Written

DONE, TAKEN, GONE = Written.DONE, Written.TAKEN, Written.GONE


def begin(writer: str, request: bytes = b"asked") -> Change:
    return Change("r", writer, request=request)


async def check_batches_come_back_in_order(store: JournalStore) -> None:
    changes = [begin("a"), Change("r", "a", batches={0: b"zero", 1: b"\0\xff"})]
    assert await store.write(changes) == [DONE, DONE]
    numbers = {number: b"%d" % number for number in range(2, 12)}
    assert await store.write([Change("r", "a", batches=numbers)]) == [DONE]
    # A writer repeats a write if the store's answer is lost.
    assert await store.write([Change("r", "a", batches=numbers)]) == [DONE]
    assert await store.write([Change("r", "a", ends=True)]) == [DONE]
    assert await store.take("r", "b") == Stored(b"asked", (b"zero", b"\0\xff", *numbers.values()))


async def check_one_router_serves_a_request(store: JournalStore) -> None:
    await store.write([begin("a")])
    assert await store.take("r", "b") is TAKEN
    assert await store.write([begin("b")]) == [TAKEN]
    assert await store.write([begin("a")]) == [DONE]  # the same write again
    await store.write([Change("r", "a", ends=True)])
    assert await store.write([begin("b", b"anew")]) == [DONE]
    assert await store.write([Change("r", "b", ends=True)]) == [DONE]
    assert await store.take("r", "c") == Stored(b"anew", ())


async def check_a_replaced_writer_writes_nothing(store: JournalStore) -> None:
    await store.write([begin("a"), Change("r", "a", batches={0: b"zero"}, ends=True)])
    assert isinstance(await store.take("r", "b"), Stored)
    late = [Change("r", "a", batches={1: b"late"}), Change("r", "a", ends=True)]
    assert await store.write(late) == [TAKEN, TAKEN]
    assert await store.take("r", "c") is TAKEN, "b still serves the request"
    await store.write([Change("r", "b", ends=True)])
    assert await store.take("r", "c") == Stored(b"asked", (b"zero",))


async def check_an_unknown_request_is_gone(store: JournalStore) -> None:
    assert await store.take("r", "a") is GONE
    assert await store.write([Change("r", "a", batches={0: b"zero"})]) == [GONE]
    assert await store.take("r", "a") is GONE


RULES = (
    check_batches_come_back_in_order,
    check_one_router_serves_a_request,
    check_a_replaced_writer_writes_nothing,
    check_an_unknown_request_is_gone,
)
