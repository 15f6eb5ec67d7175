"""A router journals tokens before the client gets them. Another router can resume the request."""

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
    """A store whose writes wait until ``open`` is set. It records each group of changes."""

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


class JournalFactory(Protocol):
    def __call__(self, patience_s: float = 60, lease_s: float = LEASE_S) -> Journal: ...


@pytest.fixture
async def router(store: Store) -> AsyncIterator[JournalFactory]:
    """Yields a function that opens the journal of a new router."""
    journals: list[Journal] = []

    def open_journal(patience_s: float = 60, lease_s: float = LEASE_S) -> Journal:
        journals.append(Journal(store, JournalSettings(lease_s, patience_s)))
        journals[-1].start()
        return journals[-1]

    yield open_journal
    store.open.set()
    for journal in journals:
        await journal.close()


@pytest.mark.parametrize("check", journal_rules.RULES)
async def test_rules(check: Callable[[JournalStore], Awaitable[None]]) -> None:
    await check(MemoryJournal(lease_s=LEASE_S))


async def test_another_router_resumes_from_what_was_written(router: JournalFactory) -> None:
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


async def test_batches_wait_for_the_store_and_are_written_together(
    router: JournalFactory, store: Store
) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.open.clear()
        adding = [asyncio.create_task(entry.add(FIRST))]
        await until(
            lambda: len(store.writes[-1]) == 1 and bool(store.writes[-1][0].batches),
            what="one batch is being written",
        )
        before = len(store.writes)
        adding += [asyncio.create_task(entry.add(SECOND)) for _ in range(5)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in adding)
        store.open.set()
        await asyncio.gather(*adding)
        assert [len(write) for write in store.writes[before:]] == [5]


async def test_a_slow_store_does_not_delay_requests_and_gets_everything_later(
    router: JournalFactory, store: Store
) -> None:
    journal = router(0.01)
    async with journal.begin(REQUEST) as entry:
        store.open.clear()
        await entry.add(FIRST)
        assert entry.lagging
        with pytest.raises(StopIteration):  # add returns without waiting
            entry.add(SECOND).send(None)
        store.open.set()
        await until(lambda: not entry.lagging, what="the store has every batch")
        store.open.clear()
        await entry.add(FIRST)
        assert entry.lagging, "the store is slow again"
        store.open.set()
    await journal.close()
    async with router().resume("r") as (_, _, batches):
        assert batches == [FIRST, SECOND, FIRST]


async def test_a_failed_store_ends_no_request(router: JournalFactory, store: Store) -> None:
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


async def test_an_id_that_another_router_serves_is_refused(router: JournalFactory) -> None:
    one, two = router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        async with two.begin(REQUEST) as double:
            with pytest.raises(AlreadyExistsError):
                await double.add(FIRST)
        await entry.add(SECOND)


async def test_a_router_whose_request_was_resumed_elsewhere_ends_its_stream(
    router: JournalFactory, store: Store
) -> None:
    """The first router was paused for longer than its lease."""
    one, two = router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.now_s += LEASE_S
        async with two.resume("r") as (newer, _, _):
            with pytest.raises(CancelledError, match="resumed"):
                await entry.add(SECOND)
            await newer.add(SECOND)


async def test_a_request_without_tokens_keeps_its_lease(
    router: JournalFactory, store: Store
) -> None:
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST):
        await until(lambda: len(store.writes) > 3, what="the lease is renewed")
        assert all(not change.batches for write in store.writes for change in write)


async def test_an_older_entry_does_not_end_a_request_that_is_not_journaled(
    router: JournalFactory, store: Store
) -> None:
    """A request has ended. A second one with the same id begins while the store is unavailable."""
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST):
        pass
    await until(lambda: store.writes and store.writes[-1][-1].ends, what="the first request ends")
    store.available = False
    async with journal.begin(REQUEST) as entry:
        await until(lambda: entry.abandoned, what="the entry is abandoned")
        store.available = True
        async with journal.begin(inference_pb2.GenerateRequest(request_id="other")):
            before = len(store.writes)
            await until(lambda: len(store.writes) > before + 2, what="leases are renewed")
        await entry.add(FIRST)
