"""Journals each batch of tokens before the client gets it, so that another router can resume.

One write is in progress at a time. The next write carries everything that all requests have
produced meanwhile (group commit). So a token waits for one or two round trips to the store, however
many streams run. Unless the store is slow or fails, another router can send again every token that
the client has.

If a write takes longer than ``patience_s``, the request stops waiting for its writes until the
store has caught up. If the store fails, requests go on without it. When it answers again, their
entries are written again as a whole. If the journal is full, an entry is dropped, and its request
goes on. If the client has a token that the store lacks, no other router can resume the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from baton.v1 import inference_pb2
from core.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    NotFoundError,
    UnavailableError,
)
from core.messages import journal_pb2
from core.state.journal import TOKEN_CHARS, After, Change, JournalStore, Mode, Written
from core.tasks import Supervisor
from router.request import UNFINISHED, TokenBatch

logger = logging.getLogger(__name__)

REQUEST_IN_FLIGHT = "REQUEST_IN_FLIGHT"
NOT_RESUMABLE = "NOT_RESUMABLE"

_WARN_EVERY_S = 60.0  # while the journal is full


@dataclass(frozen=True, slots=True)
class JournalSettings:
    lease_s: float  # how long a silent router keeps the entries of its requests
    patience_s: float  # how long a batch waits for its write


@dataclass(slots=True)
class JournalCounters:
    """What happened since the start."""

    dropped: int = 0  # requests that cannot be resumed, because the journal was full
    restored: int = 0  # entries that were written again, because the store had failed


class Entry:
    """The journal's entry for one request, while this router serves the request.

    Attributes:
        writer: a random id, new each time that a router begins to serve a request.
        token: the secret that a client must show to resume the request.
        is_dropped: the journal was full, so nothing more is written.
        refusal: why the request must end at this router; None if it may go on.
        is_complete: the request has ended, so its entry is the first to make room.
        is_served: this router serves the request, and renews its lease.
        last_try: if the next write fails, too, the entry is given up.
    """

    def __init__(self, journal: Journal, request_id: str, token: str) -> None:
        self.request_id = request_id
        self.writer = uuid.uuid4().hex
        self.token = token
        self.is_dropped = False
        self.refusal: BatonError | None = None
        self._journal = journal
        self._content = bytearray()
        self._sent = 0  # bytes of the content that the store has, or that are being written
        self._mode = Mode.BEGIN
        self.is_complete = False
        self.is_served = True
        self.last_try = False
        self._was_sent = False  # since the latest call of ``is_idle``
        self._latest_write: asyncio.Future[None] | None = None

    @property
    def lagging(self) -> bool:
        """Whether the client has batches that the slow store has not written yet."""
        return self._latest_write is not None and not self._latest_write.done()

    @property
    def is_written(self) -> bool:
        """Whether changes to this entry still go to the store."""
        return not self.is_dropped and self.refusal is None

    async def add(self, batch: TokenBatch) -> None:
        """Write a batch; return when it is written, or when the store is slow or has failed.

        Raises:
            AlreadyExistsError: another router was still serving the request when this router began
                it.
            CancelledError: another router has resumed the request.
        """
        self.is_complete = batch.finish_reason != UNFINISHED
        record = journal_pb2.JournalBatch(
            token_ids=batch.token_ids, logprobs=batch.logprobs, finish_reason=batch.finish_reason
        )
        written = self.append(journal_pb2.JournalEntry(batches=[record]))
        if not (written.done() or self.lagging):
            await asyncio.wait([written], timeout=self._journal.patience_s)
        self._latest_write = written
        if self.refusal is not None:
            raise self.refusal

    def note_lost_attempts(self, count: int) -> None:
        """Write in the background how many attempts of the request ended with a lost worker."""
        self.append(journal_pb2.JournalEntry(lost_attempts=count))

    def append(self, record: journal_pb2.JournalEntry) -> asyncio.Future[None]:
        """Add a record. The result is done when the store has answered, or has failed."""
        if not self.is_dropped:
            self._content += record.SerializeToString()
        return self._journal.flush(self)

    def taken_over(self, content: bytes) -> None:
        """Note that the store holds this entry with ``content``, and this router is its writer."""
        self._content[:] = content
        self._sent = len(content)
        self._mode = Mode.APPEND

    def leave(self) -> asyncio.Future[None]:
        """Give the lease up, because this router no longer serves the request."""
        self.is_served = False
        return self._journal.flush(self)

    def is_idle(self) -> bool:
        """Return whether no change was sent since the previous call."""
        was_sent, self._was_sent = self._was_sent, False
        return not was_sent

    def next_change(self) -> Change:
        """Return everything that the store lacks. A change without data renews the lease."""
        offset, self._sent = self._sent, len(self._content)
        self._was_sent = True
        left = After.COMPLETE if self.is_complete else After.RELEASED
        return Change(
            self.request_id,
            self.writer,
            self.token,
            data=bytes(self._content[offset:]),
            offset=offset,
            mode=self._mode,
            after=After.SERVED if self.is_served else left,
        )

    def answered(self, change: Change, answer: Written) -> None:
        """Note what the store did with a change."""
        if answer is Written.DONE:
            self._mode = Mode.APPEND
        elif answer is Written.FULL:
            self.is_dropped = True
            self._content.clear()
        elif answer is Written.GONE and self._content:
            self.must_restore()
        elif answer is Written.GONE:  # there is no lease that could be given up
            self.is_dropped = True
        elif change.mode is Mode.BEGIN:
            self.refusal = _in_flight_error(self.request_id, self._journal.lease_s)
        else:
            self.refusal = CancelledError(
                f"the request {self.request_id!r} was resumed at another router"
            )

    def must_restore(self) -> None:
        """Write the whole content with the next change, because the store may have lost it.

        An entry without content was not read, so the store may still have its content.
        """
        self._sent = 0
        if self._mode is Mode.APPEND and self._content:
            self._mode = Mode.RESTORE


class Journal:
    """Writes the entries of all requests of one router. Belongs to one event loop.

    Args:
        store: ``close`` closes it.
    """

    def __init__(self, store: JournalStore, settings: JournalSettings) -> None:
        self._store = store
        self._settings = settings
        self._entries: set[Entry] = set()  # of the requests that this router serves
        self._changed: dict[Entry, None] = {}  # in order; written next
        self._written: asyncio.Future[None] | None = None  # the next write
        self._wake = asyncio.Event()
        self._store_failed = False
        self._warned_s = float("-inf")
        self.counters = JournalCounters()

    def start(self, supervisor: Supervisor) -> None:
        """Start to write in the background."""
        supervisor.start("journal", self._write_all)
        supervisor.start("journal leases", self._renew_leases)

    async def close(self) -> None:
        """Write what has changed and disconnect. Idempotent. Call after the supervisor's stop."""
        while self._changed:
            await self._write_changed()
        await self._store.close()

    @asynccontextmanager
    async def begin(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[Entry]:
        """Keep an entry for a new request during the block.

        Args:
            request: everything that another router needs to run it.
        """
        entry = Entry(self, request.request_id, secrets.token_hex(TOKEN_CHARS // 2))
        # The first batch waits for this write too.
        entry.append(journal_pb2.JournalEntry(request=request))
        with self._served(entry):
            yield entry

    @asynccontextmanager
    async def resume(
        self, request_id: str, token: str
    ) -> AsyncIterator[tuple[Entry, journal_pb2.JournalEntry]]:
        """Take over an entry during the block; yields the entry and its content.

        Raises:
            AlreadyExistsError: a router serves the request now; the error has a retry hint.
            NotFoundError: the store has no entry with this token.
            UnavailableError: the store does not answer.
        """
        if len(token) != TOKEN_CHARS:
            raise _not_resumable(request_id)
        entry = Entry(self, request_id, token)
        try:
            content = await self._store.take(request_id, entry.writer, token)
        except BaseException:  # the store may have given us the lease, but not the content
            entry.taken_over(b"")
            entry.leave()
            raise
        if content is Written.TAKEN:
            raise _in_flight_error(request_id, self._settings.lease_s)
        if isinstance(content, Written):
            raise _not_resumable(request_id)
        entry.taken_over(content)
        with self._served(entry):
            yield entry, journal_pb2.JournalEntry.FromString(content)

    @property
    def patience_s(self) -> float:
        """How long a batch waits for its write."""
        return self._settings.patience_s

    @property
    def lease_s(self) -> float:
        """How long a silent router keeps the entries of its requests."""
        return self._settings.lease_s

    def flush(self, entry: Entry) -> asyncio.Future[None]:
        """Write an entry soon. The result is done when the store has answered, or has failed."""
        loop = asyncio.get_running_loop()
        if not entry.is_written or (self._store_failed and entry.is_served):
            # While the store fails, only the renewal of leases tries to write. An entry that is
            # left gets one more try.
            done: asyncio.Future[None] = loop.create_future()
            done.set_result(None)
            return done
        self._changed[entry] = None
        self._wake.set()
        if self._written is None:
            self._written = loop.create_future()
        return self._written

    @contextlib.contextmanager
    def _served(self, entry: Entry) -> Iterator[None]:
        """Renew the entry's lease during the block, then give the lease up."""
        self._entries.add(entry)
        try:
            yield
        finally:
            self._entries.discard(entry)
            entry.leave()

    async def _renew_leases(self) -> None:
        """Also writes the entries that were not written because the store failed."""
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            for entry in self._entries:
                if entry.is_written and (entry.is_idle() or self._store_failed):
                    self._changed[entry] = None
            if self._changed:
                self._wake.set()

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._write_changed()

    async def _write_changed(self) -> None:
        entries = [entry for entry in self._changed if entry.is_written]
        self._changed = {}
        written, self._written = self._written, None
        try:
            if entries:
                await self._write(entries)
        except BaseException:  # also if this task is cancelled during the write
            for entry in entries:
                entry.must_restore()
                self._changed[entry] = None
            raise
        finally:
            if written is not None:
                written.set_result(None)

    async def _write(self, entries: list[Entry]) -> None:
        changes = [entry.next_change() for entry in entries]
        try:
            answers = await self._store.write(changes)
        except UnavailableError as error:
            if not self._store_failed:
                logger.warning("journal failed; requests go on without it: %s", error.message)
            self._store_failed = True
            for entry in {*self._entries, *entries, *self._changed}:
                entry.must_restore()
            for entry in entries:
                # The renewal of leases no longer writes an entry that was left: try once more.
                if not entry.is_served and not entry.last_try:
                    entry.last_try = True
                    self._changed[entry] = None
            return
        if self._store_failed:
            logger.warning("journal works again")
        self._store_failed = False
        for entry, change, answer in zip(entries, changes, answers, strict=True):
            entry.answered(change, answer)
            if answer is Written.DONE and change.mode is Mode.RESTORE:
                self.counters.restored += 1
            elif answer is Written.GONE:
                self.flush(entry)
            elif answer is Written.FULL:
                self._note_full()

    def _note_full(self) -> None:
        self.counters.dropped += 1
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._warned_s + _WARN_EVERY_S:
            self._warned_s = now_s
            logger.warning(
                "journal is full (router.journal_max_bytes); %d requests so far cannot be resumed",
                self.counters.dropped,
            )


def batches_of(content: journal_pb2.JournalEntry) -> list[TokenBatch]:
    """Return the batches of an entry's content."""
    return [
        TokenBatch(tuple(each.token_ids), tuple(each.logprobs), each.finish_reason)
        for each in content.batches
    ]


def _not_resumable(request_id: str) -> NotFoundError:
    return NotFoundError(
        f"the request {request_id!r} is not in the journal with this resume token, so it cannot be "
        "resumed",
        reason=NOT_RESUMABLE,
    )


def _in_flight_error(request_id: str, lease_s: float) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"the request {request_id!r} is being served",
        reason=REQUEST_IN_FLIGHT,
        retry_after_s=lease_s / 3,
    )
