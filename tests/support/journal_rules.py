"""Checks that every journal store must pass: the one in memory and the one in Redis.

The budget of the store must have room for ``ENTRIES`` entries of ``ENTRY_BYTES`` of content.
"""

from __future__ import annotations

from dataclasses import replace

from core.state.journal import (
    TOKEN_CHARS,
    WRITER_CHARS,
    After,
    Change,
    JournalStore,
    Mode,
    Written,
    memory_bytes,
)

DONE, TAKEN, GONE, FULL = Written.DONE, Written.TAKEN, Written.GONE, Written.FULL
ENTRIES = 4
ENTRY_BYTES = 10_000
BUDGET_BYTES = ENTRIES * memory_bytes(ENTRY_BYTES)

A, B, C = (letter * WRITER_CHARS for letter in "abc")
TOKEN, ANOTHER_TOKEN = "t" * TOKEN_CHARS, "u" * TOKEN_CHARS


def begin(writer: str, request: bytes = b"asked", request_id: str = "r") -> Change:
    return Change(request_id, writer, TOKEN, request, mode=Mode.BEGIN)


def append(writer: str, offset: int, data: bytes, after: After = After.SERVED) -> Change:
    return Change("r", writer, TOKEN, data, offset, after=after)


def release(writer: str, offset: int) -> Change:
    return append(writer, offset, b"", After.RELEASED)


async def check_content_comes_back_in_order(store: JournalStore) -> None:
    assert await store.write([begin(A), append(A, 5, b"\0\xff")]) == [DONE, DONE]
    late = append(A, 7, b"more")
    assert await store.write([late]) == [DONE]
    assert await store.write([late]) == [DONE]  # repeated, because an answer may be lost
    assert await store.write([release(A, 11)]) == [DONE]
    assert await store.take("r", B, TOKEN) == b"asked\0\xffmore"


async def check_one_router_serves_a_request(store: JournalStore) -> None:
    await store.write([begin(A)])
    assert await store.take("r", B, TOKEN) is TAKEN
    assert await store.write([begin(B)]) == [TAKEN]
    assert await store.write([begin(A)]) == [DONE]  # the same write again
    await store.write([release(A, 5)])
    anew = replace(begin(B, b"anew"), token=ANOTHER_TOKEN)
    assert await store.write([anew]) == [DONE]
    assert await store.write([replace(release(B, 4), token=ANOTHER_TOKEN)]) == [DONE]
    assert await store.take("r", C, ANOTHER_TOKEN) == b"anew"


async def check_a_late_begin_does_not_replace_the_resumed_request(store: JournalStore) -> None:
    """Its first answer was lost, so the router repeats it after a pause."""
    await store.write([begin(A), release(A, 5)])
    assert await store.take("r", B, TOKEN) == b"asked"
    await store.write([append(B, 5, b"more", After.RELEASED)])
    assert await store.write([begin(A, b"asked")]) == [TAKEN]
    assert await store.take("r", C, TOKEN) == b"askedmore"


async def check_a_late_repetition_does_not_shorten_the_content(store: JournalStore) -> None:
    await store.write([begin(A), append(A, 5, b"more")])
    again = [begin(A), replace(begin(A), mode=Mode.RESTORE)]
    assert await store.write(again) == [DONE, DONE]
    await store.write([release(A, 9)])
    assert await store.take("r", B, TOKEN) == b"askedmore"


async def check_a_replaced_writer_writes_nothing(store: JournalStore) -> None:
    await store.write([begin(A), append(A, 5, b"zero", After.RELEASED)])
    assert await store.take("r", B, TOKEN) == b"askedzero"
    late = [append(A, 9, b"late"), release(A, 9), replace(begin(A, b"late"), mode=Mode.RESTORE)]
    assert await store.write(late) == [TAKEN] * 3
    assert await store.take("r", C, TOKEN) is TAKEN, "b still serves the request"
    await store.write([release(B, 9)])
    assert await store.take("r", C, TOKEN) == b"askedzero"


async def check_an_unknown_request_is_gone(store: JournalStore) -> None:
    assert await store.take("r", A, TOKEN) is GONE
    assert await store.write([append(A, 0, b"zero")]) == [GONE]
    assert await store.take("r", A, TOKEN) is GONE


async def check_content_has_no_holes(store: JournalStore) -> None:
    """After a failed write, the next one may still be on its way."""
    await store.write([begin(A)])
    assert await store.write([append(A, 9, b"late")]) == [GONE]
    assert await store.write([replace(begin(A, b"askedonce"), mode=Mode.RESTORE)]) == [DONE]
    assert await store.write([append(A, 9, b"more", After.RELEASED)]) == [DONE]
    assert await store.take("r", B, TOKEN) == b"askedoncemore"


async def check_the_token_is_needed(store: JournalStore) -> None:
    """Neither a wrong token nor none tells whether there is such a request."""
    await store.write([begin(A)])
    for token in ("w" * TOKEN_CHARS, ""):
        assert await store.take("r", B, token) is GONE
    await store.write([release(A, 5)])
    for token in ("w" * TOKEN_CHARS, "", "t"):
        assert await store.take("r", B, token) is GONE
    assert await store.take("r", B, TOKEN) == b"asked"


async def check_a_lost_entry_is_restored(store: JournalStore) -> None:
    whole = replace(begin(A, b"asked and answered"), mode=Mode.RESTORE)
    assert await store.write([whole]) == [DONE]
    assert await store.take("r", B, TOKEN) is TAKEN
    assert await store.write([release(A, 18)]) == [DONE]
    assert await store.take("r", B, TOKEN) == b"asked and answered"


async def check_complete_entries_make_room(store: JournalStore) -> None:
    """The oldest complete one is dropped first. A released one is not complete."""
    content = bytes(ENTRY_BYTES)
    afters = [After.SERVED, After.COMPLETE, After.RELEASED, After.COMPLETE]
    for number, after in enumerate(afters):
        change = replace(begin(A, content, f"r{number}"), after=after)
        assert await store.write([change]) == [DONE]
    for number, dropped in ((4, "r1"), (5, "r3")):
        assert await store.write([begin(A, content, f"r{number}")]) == [DONE]
        assert await store.take(dropped, B, TOKEN) is GONE
    assert await store.write([begin(A, content, "r6")]) == [FULL]
    assert await store.take("r6", B, TOKEN) is GONE
    assert await store.take("r2", B, TOKEN) == content
    assert await store.take("r5", B, TOKEN) is TAKEN


async def check_an_entry_that_outgrows_the_budget_is_dropped(store: JournalStore) -> None:
    await store.write([begin(A, bytes(ENTRY_BYTES), f"r{n}") for n in range(ENTRIES - 1)])
    await store.write([begin(A)])
    assert await store.write([append(A, 5, bytes(ENTRY_BYTES - 5))]) == [DONE]
    assert await store.write([append(A, ENTRY_BYTES, b"x")]) == [FULL]
    assert await store.take("r", B, TOKEN) is GONE
    # Its memory is free again.
    assert await store.write([begin(A, bytes(ENTRY_BYTES))]) == [DONE]


RULES = (
    check_content_comes_back_in_order,
    check_one_router_serves_a_request,
    check_a_late_begin_does_not_replace_the_resumed_request,
    check_a_late_repetition_does_not_shorten_the_content,
    check_a_replaced_writer_writes_nothing,
    check_an_unknown_request_is_gone,
    check_content_has_no_holes,
    check_the_token_is_needed,
    check_a_lost_entry_is_restored,
    check_complete_entries_make_room,
    check_an_entry_that_outgrows_the_budget_is_dropped,
)
