"""A router journals tokens before the client gets them. Another router can resume the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import pytest

from baton.v1 import inference_pb2
from core.errors import AlreadyExistsError, CancelledError, NotFoundError, UnavailableError
from core.state.journal import After, Change, JournalStore, MemoryJournal, Written
from core.tasks import Supervisor
from router.request import UNFINISHED, TokenBatch
from router.resume.journal import Journal, JournalSettings, batches_of
from tests.support import journal_rules
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio

LEASE_S = 3600.0
FIRST, SECOND = (TokenBatch((token,), (), UNFINISHED) for token in (7, 8))
REQUEST = inference_pb2.GenerateRequest(request_id="r", token_ids={"ids": [1, 2]})
OTHER = inference_pb2.GenerateRequest(request_id="other")


class Store(MemoryJournal):
    """A store whose writes wait until ``open`` is set. It records each group of changes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(
            lease_s=LEASE_S, budget_bytes=journal_rules.BUDGET_BYTES, clock=lambda: self.now_s
        )
        self.writes: list[list[Change]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.failures = 0  # how many of the next writes fail
        self.loses_takes = False  # the answer to a take is lost

    def token(self) -> str:
        """The resume token of the request "r"."""
        return self.entries["r"].token

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        self.writes.append(list(changes))
        await self.open.wait()
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the journal does not answer")
        return await super().write(changes)

    async def take(self, request_id: str, writer: str, token: str) -> bytes | Written:
        answer = await super().take(request_id, writer, token)
        if self.loses_takes:
            raise UnavailableError("the journal does not answer")
        return answer

    def is_released(self, request_id: str) -> bool:
        return self._serving(request_id) is None


@pytest.fixture
async def store() -> Store:
    return Store()


class RunningJournal(Journal):
    """A journal and the supervisor of its tasks."""

    def __init__(self, store: JournalStore, settings: JournalSettings) -> None:
        super().__init__(store, settings)
        self.supervisor = Supervisor()
        self.start(self.supervisor)

    async def close(self) -> None:
        await self.supervisor.stop()
        await super().close()


class JournalFactory(Protocol):
    def __call__(self, patience_s: float = 60, lease_s: float = LEASE_S) -> RunningJournal: ...


@pytest.fixture
async def router(store: Store) -> AsyncIterator[JournalFactory]:
    """Yields a function that opens the journal of a new router."""
    journals: list[RunningJournal] = []

    def open_journal(patience_s: float = 60, lease_s: float = LEASE_S) -> RunningJournal:
        journals.append(RunningJournal(store, JournalSettings(lease_s, patience_s)))
        return journals[-1]

    yield open_journal
    store.open.set()
    for journal in journals:
        await journal.close()


@pytest.mark.parametrize("check", journal_rules.RULES)
async def test_rules(check: Callable[[JournalStore], Awaitable[None]]) -> None:
    await check(MemoryJournal(lease_s=LEASE_S, budget_bytes=journal_rules.BUDGET_BYTES))


async def test_another_router_resumes_from_what_was_written(
    router: JournalFactory, store: Store
) -> None:
    one, two, three = router(), router(), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        entry.note_lost_attempts(1)
        entry.note_lost_attempts(2)
        with pytest.raises(AlreadyExistsError) as busy:
            async with two.resume("r", store.token()):
                pass
        assert busy.value.retry_after_s
    await one.close()
    async with two.resume("r", store.token()) as (entry, content):
        assert content.request == REQUEST
        assert content.lost_attempts == 2
        assert batches_of(content) == [FIRST]
        await entry.add(SECOND)
    await two.close()
    async with three.resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, SECOND]
        assert content.lost_attempts == 2


async def test_batches_wait_for_the_store_and_are_written_together(
    router: JournalFactory, store: Store
) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry, journal.begin(OTHER) as other:
        await entry.add(FIRST)
        store.open.clear()
        adding = [asyncio.create_task(entry.add(FIRST))]
        before = len(store.writes)
        await until(lambda: len(store.writes) > before, what="one batch is being written")
        adding += [asyncio.create_task(each.add(SECOND)) for each in (entry, entry, other)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in adding)
        store.open.set()
        await asyncio.gather(*adding)
        assert [len(write) for write in store.writes[before:]] == [1, 2]
    await journal.close()
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, FIRST, SECOND, SECOND]


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
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, SECOND, FIRST]


@pytest.mark.parametrize("fails_at_once", [True, False])
async def test_entries_are_restored_when_the_store_is_back(
    router: JournalFactory, store: Store, fails_at_once: bool
) -> None:
    """The store is away for a while. It may have lost everything meanwhile."""
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST) as entry:
        if not fails_at_once:
            await entry.add(FIRST)
        store.available = False
        if fails_at_once:
            await entry.add(FIRST)
        await entry.add(SECOND)
        store.forget()
        store.available = True
        await until(lambda: "r" in store.entries, what="the entry is written again")
        await entry.add(FIRST)
    await journal.close()
    assert journal.counters.restored == (not fails_at_once)
    async with router().resume("r", store.token()) as (_, content):
        assert content.request == REQUEST
        assert batches_of(content) == [FIRST, SECOND, FIRST]


async def test_a_store_that_lost_everything_gets_the_entry_again(
    router: JournalFactory, store: Store
) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.forget()
        await entry.add(SECOND)
    await journal.close()
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, SECOND]


async def test_no_token_is_missing_if_one_write_of_several_fails(
    router: JournalFactory, store: Store
) -> None:
    """The failed write is slow, so the next batch is queued before it fails."""
    journal = router(0.01, 0.03)
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.open.clear()
        await entry.add(SECOND)
        await entry.add(FIRST)
        store.available = False
        store.open.set()
        await until(lambda: not entry.lagging, what="the write has failed")
        store.available = True
    await journal.close()
    store.now_s += LEASE_S  # the router may have left without giving its lease up
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) in ([FIRST], [FIRST, SECOND, FIRST])


async def test_the_last_tokens_are_written_although_a_write_failed_meanwhile(
    router: JournalFactory, store: Store
) -> None:
    journal = router(0.01)
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.open.clear()
        await entry.add(SECOND)
        store.failures = 1
    store.open.set()  # the request has ended here; its last write fails and is repeated
    await journal.close()
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, SECOND]


async def test_a_request_that_ends_while_the_store_has_failed_gives_its_lease_up(
    router: JournalFactory, store: Store
) -> None:
    """So its client can resume at once at another router, when this one drains."""
    journal = router()
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.failures = 1
        await entry.add(SECOND)
    await journal.close()
    async with router().resume("r", store.token()) as (_, content):
        assert batches_of(content) == [FIRST, SECOND]


@pytest.mark.parametrize("is_emptied", [False, True])
async def test_a_resume_whose_answer_is_lost_leaves_the_content(
    router: JournalFactory, store: Store, is_emptied: bool
) -> None:
    """This router got the lease, but never read the content. It must not write an empty entry."""
    async with router().begin(REQUEST) as entry:
        await entry.add(FIRST)
    await until(lambda: store.is_released("r"), what="the first router has left")
    token, journal = store.token(), router()
    store.loses_takes, store.failures = True, 1
    with pytest.raises(UnavailableError):
        async with journal.resume("r", token):
            pass
    if is_emptied:
        store.forget()
    await journal.close()
    store.loses_takes = False
    if is_emptied:
        assert not store.entries
    else:
        async with router().resume("r", token) as (_, content):
            assert content.request == REQUEST
            assert batches_of(content) == [FIRST]


async def test_a_token_of_the_wrong_length_does_not_reach_the_store(
    router: JournalFactory, store: Store
) -> None:
    """Otherwise it would be part of a write that all requests share."""
    journal = router()
    for token in ("", "x" * 4_000_000):
        with pytest.raises(NotFoundError):
            async with journal.resume("r", token):
                pass
    await journal.close()
    assert not store.writes


async def test_an_entry_that_was_dropped_is_not_written_again(
    router: JournalFactory, store: Store
) -> None:
    journal = router(0.01)
    long = TokenBatch(tuple(range(2000, 2000 + 4 * journal_rules.ENTRY_BYTES)), (), UNFINISHED)
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.open.clear()
        await entry.add(long)
        await entry.add(SECOND)  # waits while the store drops the entry
        store.open.set()
        await until(lambda: entry.is_dropped, what="the entry is dropped")
    await journal.close()
    assert not store.entries


async def test_a_store_that_fails_delays_no_token(router: JournalFactory, store: Store) -> None:
    journal = router()
    async with journal.begin(REQUEST) as entry:
        store.available = False
        await entry.add(FIRST)
        before = len(store.writes)
        for _ in range(100):
            with pytest.raises(StopIteration):
                entry.add(SECOND).send(None)
        await asyncio.sleep(0)
        assert len(store.writes) == before, "each batch tries the failed store"


async def test_a_full_journal_drops_entries_and_ends_no_request(
    router: JournalFactory, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A running request keeps its entry. Further ones run without one."""
    long = TokenBatch(tuple(range(2000, 2000 + journal_rules.ENTRY_BYTES // 2)), (), UNFINISHED)
    journal = router()
    async with AsyncExitStack() as stack:
        ids = [f"r{number}" for number in range(journal_rules.ENTRIES + 2)]
        for request_id in ids:
            request = inference_pb2.GenerateRequest(request_id=request_id)
            entry = await stack.enter_async_context(journal.begin(request))
            await entry.add(long)
            await entry.add(FIRST)
        assert journal.counters.dropped >= 2
        kept = set(store.entries)
        assert len(kept) == len(ids) - journal.counters.dropped > 0
        assert entry.is_dropped
    warnings = [each for each in caplog.records if "journal is full" in each.getMessage()]
    assert len(warnings) == 1
    assert "router.journal_max_bytes" in warnings[0].getMessage()


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
        async with two.resume("r", store.token()) as (newer, _):
            with pytest.raises(CancelledError, match="resumed"):
                await entry.add(SECOND)
            await newer.add(SECOND)


async def test_a_router_that_could_not_reach_the_store_does_not_take_a_request_back(
    router: JournalFactory, store: Store
) -> None:
    one, two = router(lease_s=0.03), router()
    async with one.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.available = False
        await entry.add(SECOND)
        store.available = True
        store.now_s += LEASE_S
        async with two.resume("r", store.token()):
            await until(lambda: entry.refusal is not None, what="the first router has noticed")
            assert isinstance(entry.refusal, CancelledError)


async def test_a_silent_request_keeps_its_lease_beside_a_busy_one(
    router: JournalFactory, store: Store
) -> None:
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST), journal.begin(OTHER) as busy:
        await busy.add(FIRST)

        def renewals() -> int:
            changes = [change for write in store.writes for change in write]
            return sum(change.request_id == "r" and not change.data for change in changes)

        async with asyncio.timeout(10):
            while renewals() < 3:
                await busy.add(SECOND)


async def test_an_older_entry_does_not_end_a_request_that_could_not_be_journaled(
    router: JournalFactory, store: Store
) -> None:
    """A request has ended. A second one with the same id begins while the store is unavailable."""
    journal = router(lease_s=0.03)
    async with journal.begin(REQUEST):
        pass
    await until(
        lambda: store.writes and store.writes[-1][-1].after is not After.SERVED,
        what="the first request ends",
    )
    store.available = False
    async with journal.begin(REQUEST) as entry:
        await entry.add(FIRST)
        store.available = True
        await until(lambda: store.entries["r"].writer == entry.writer, what="it is journaled")
        await entry.add(SECOND)
