"""What a router writes before its client reads it, and how another one goes on from there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import pytest

from baton.v1 import inference_pb2
from core.errors import AlreadyExistsError, CancelledError, NotFoundError
from core.state.journal import Change, JournalStore, MemoryJournal, Written
from router.request import UNFINISHED, TokenBatch
from router.resume.journal import Journal, JournalSettings
from tests.support import journal_rules
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio

LEASE_S = 3600.0
FIRST, SECOND = (TokenBatch((token,), (), UNFINISHED) for token in (7, 8))
REQUEST = inference_pb2.GenerateRequest(request_id="r", token_ids={"ids": [1, 2]})


class Store(MemoryJournal):
    """Answers when the test lets it, and remembers what was written together."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(lease_s=LEASE_S, clock=lambda: self.now_s)
        self.writes: list[list[Change]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        self.writes.append(list(changes))
        await self.open.wait()
        return await super().write(changes)


@pytest.fixture
async def store() -> Store:
    return Store()


class Open(Protocol):
    def __call__(self, patience_s: float = 60, lease_s: float = LEASE_S) -> Journal: ...


@pytest.fixture
async def router(store: Store) -> AsyncIterator[Open]:
    """Makes the journal of one more router."""
    journals: list[Journal] = []

    def open_(patience_s: float = 60, lease_s: float = LEASE_S) -> Journal:
        journals.append(Journal(store, JournalSettings(lease_s, patience_s)))
        journals[-1].start()
        return journals[-1]

    yield open_
    store.open.set()
    for journal in journals:
        await journal.close()


@pytest.mark.parametrize("check", journal_rules.RULES)
async def test_rules(check: Callable[[JournalStore], Awaitable[None]]) -> None:
    await check(MemoryJournal(lease_s=LEASE_S))


async def test_another_router_goes_on_with_what_was_written(router: Open) -> None:
    one, two, three = router(), router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        with pytest.raises(AlreadyExistsError) as busy:
            async with two.resume("r"):
                pass
        assert busy.value.retry_after_s
    await one.close()
    async with two.resume("r") as (entry, request, batches):
        assert request == REQUEST
        assert batches == [FIRST]
        await entry.add(SECOND)
    await two.close()
    async with three.resume("r") as (_, _, batches):
        assert batches == [FIRST, SECOND]


async def test_a_batch_waits_for_the_store_and_all_that_wait_go_together(
    router: Open, store: Store
) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.open.clear()
        adding = [asyncio.create_task(entry.add(FIRST))]
        await until(
            lambda: len(store.writes[-1]) == 1 and bool(store.writes[-1][0].batches), what="one"
        )
        before = len(store.writes)
        adding += [asyncio.create_task(entry.add(SECOND)) for _ in range(5)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in adding)
        store.open.set()
        await asyncio.gather(*adding)
        assert [len(write) for write in store.writes[before:]] == [5]


async def test_a_slow_store_holds_nobody_up_and_gets_all_in_the_end(
    router: Open, store: Store
) -> None:
    journal = router(0.01)
    async with journal.begin(REQUEST) as entry:
        store.open.clear()
        await entry.add(FIRST)
        assert entry.lagging
        with pytest.raises(StopIteration):  # it returns without waiting for anything
            entry.add(SECOND).send(None)
        store.open.set()
        await until(lambda: not entry.lagging, what="the store has all")
        store.open.clear()
        await entry.add(FIRST)
        assert entry.lagging, "it waits again"
        store.open.set()
    await journal.close()
    async with router().resume("r") as (_, _, batches):
        assert batches == [FIRST, SECOND, FIRST]


async def test_a_store_that_is_away_ends_no_request(router: Open, store: Store) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry:
        store.available = False
        await entry.add(FIRST)
        store.available = True
        await entry.add(SECOND)
    await journal.close()
    with pytest.raises(NotFoundError):
        async with router().resume("r"):
            pass


async def test_an_id_that_another_router_serves_is_refused(router: Open) -> None:
    one, two = router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        async with two.begin(REQUEST) as double:
            with pytest.raises(AlreadyExistsError):
                await double.add(FIRST)
        await entry.add(SECOND)


async def test_a_router_that_was_replaced_ends_its_stream(router: Open, store: Store) -> None:
    """It was paused for longer than its lease."""
    one, two = router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.now_s += LEASE_S
        async with two.resume("r") as (newer, _, _):
            with pytest.raises(CancelledError, match="resumed"):
                await entry.add(SECOND)
            await newer.add(SECOND)


async def test_a_request_without_tokens_keeps_its_lease(router: Open, store: Store) -> None:
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST):
        await until(lambda: len(store.writes) > 3, what="it renews")
        assert all(not change.batches for write in store.writes for change in write)


async def test_an_older_entry_of_its_id_does_not_end_a_request_that_is_not_written(
    router: Open, store: Store
) -> None:
    """It was refused, and came again while the store was away."""
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST):
        pass
    await until(lambda: store.writes and store.writes[-1][-1].ends, what="the refused one ends")
    store.available = False
    async with journal.begin(REQUEST) as entry:
        await until(lambda: entry.abandoned, what="the store is missed")
        store.available = True
        async with journal.begin(inference_pb2.GenerateRequest(request_id="other")):
            before = len(store.writes)
            await until(lambda: len(store.writes) > before + 2, what="leases are renewed")
        await entry.add(FIRST)
