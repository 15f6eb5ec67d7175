"""Journals each batch of tokens before the client gets it, so that another router can resume.

One write is in progress at a time. The next write carries everything that all requests have
produced meanwhile (group commit). So a token waits for one or two round trips to the store, however
many streams run. Unless the store is slow or fails, another router can send again every token that
the client has.

If a write takes longer than ``patience_s``, the request stops waiting for its writes until the
store has caught up. If the store fails, the request continues too, but its later tokens are not
written. If the client has a token that was not written, no other router can resume the request.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from baton.v1 import inference_pb2, worker_pb2
from core.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    NotFoundError,
    UnavailableError,
)
from core.state.journal import Change, JournalStore, Stored, Written
from router.request import TokenBatch

logger = logging.getLogger(__name__)

REQUEST_IN_FLIGHT = "REQUEST_IN_FLIGHT"
NOT_RESUMABLE = "NOT_RESUMABLE"


@dataclass(frozen=True, slots=True)
class JournalSettings:
    lease_s: float  # of an entry in the store; an idle journal renews it every lease_s / 3
    patience_s: float  # how long a batch waits for its write


class Entry:
    """The journal's entry for one request, while this router serves the request.

    Attributes:
        writer: unique for each time that a router serves a request.
        abandoned: the store failed or lost the entry, so nothing more is written to it.
        refusal: why the request must end at this router; None if it may go on.
        batches: how many batches were written or are being written.
    """

    def __init__(self, journal: Journal, request_id: str) -> None:
        self.request_id = request_id
        self.writer = uuid.uuid4().hex
        self.abandoned = False
        self.refusal: BatonError | None = None
        self.batches = 0
        self._journal = journal
        self._latest_write: asyncio.Future[None] | None = None

    @property
    def lagging(self) -> bool:
        """Whether the client has batches that the slow store has not written yet."""
        return self._latest_write is not None and not self._latest_write.done()

    async def add(self, batch: TokenBatch) -> None:
        """Write a batch; return when it is written, or when the store is slow or has failed.

        Raises:
            AlreadyExistsError: another router already served the request when this router got it.
            CancelledError: another router has resumed the request.
        """
        if not self.abandoned:
            change = Change(
                self.request_id, self.writer, batches={self.batches: _encode_batch(batch)}
            )
            self.batches += 1
            written = self._journal.enqueue(self, change)
            if not self.lagging:
                await asyncio.wait([written], timeout=self._journal.patience_s)
            self._latest_write = written
        if self.refusal is not None:
            raise self.refusal


class Journal:
    """Writes the entries of all requests of one router. Belongs to one event loop.

    Args:
        store: ``close`` closes it.
    """

    def __init__(self, store: JournalStore, settings: JournalSettings) -> None:
        self._store = store
        self._settings = settings
        self._entries: set[Entry] = set()
        self._pending: list[tuple[Entry, Change, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._store_failed = False

    def start(self) -> None:
        """Start to write in the background."""
        self._writer = asyncio.create_task(self._write_all(), name="journal")

    async def close(self) -> None:
        """Write the pending changes and disconnect. Idempotent."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._wake.set()
            await writer
        await self._store.close()

    @asynccontextmanager
    async def begin(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[Entry]:
        """Keep an entry for a new request during the block.

        Args:
            request: everything that another router needs to run it.
        """
        entry = Entry(self, request.request_id)
        change = Change(entry.request_id, entry.writer, request=request.SerializeToString())
        self.enqueue(entry, change)  # the first batch waits for this write too
        async with self._leased(entry):
            yield entry

    @asynccontextmanager
    async def resume(
        self, request_id: str
    ) -> AsyncIterator[tuple[Entry, inference_pb2.GenerateRequest, list[TokenBatch]]]:
        """Take over an entry during the block; yields the entry, its request and its batches.

        Raises:
            AlreadyExistsError: a router serves the request now; the error has a retry hint.
            NotFoundError: the store has no such entry.
            UnavailableError: the store does not answer.
        """
        entry = Entry(self, request_id)
        stored = await self._store.take(request_id, entry.writer)
        if stored is Written.TAKEN:
            raise _in_flight_error(request_id, self._settings.lease_s)
        if not isinstance(stored, Stored):
            raise NotFoundError(
                f"the request {request_id!r} is not in the journal, so it cannot be resumed",
                reason=NOT_RESUMABLE,
            )
        entry.batches = len(stored.batches)
        request = inference_pb2.GenerateRequest.FromString(stored.request)
        async with self._leased(entry):
            yield entry, request, [_decode_batch(batch) for batch in stored.batches]

    @property
    def patience_s(self) -> float:
        """How long a batch waits for its write."""
        return self._settings.patience_s

    def enqueue(self, entry: Entry, change: Change) -> asyncio.Future[None]:
        """Queue a change. Changes are written in the order in which they are queued.

        The returned future is done when the store has answered or failed.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((entry, change, done))
        self._wake.set()
        return done

    @asynccontextmanager
    async def _leased(self, entry: Entry) -> AsyncIterator[None]:
        """Renew the entry's lease during the block, then give the lease up."""
        self._entries.add(entry)
        try:
            yield
        finally:
            self._entries.discard(entry)
            if not entry.abandoned and entry.refusal is None:
                self.enqueue(entry, Change(entry.request_id, entry.writer, ends=True))

    async def _write_all(self) -> None:
        while self._writer is not None or self._pending:
            try:
                async with asyncio.timeout(self._settings.lease_s / 3):
                    await self._wake.wait()
            except TimeoutError:
                for entry in self._entries:
                    # An abandoned entry may be missing in the store, while an older request's entry
                    # has the same id. The store would answer TAKEN, which ends the request.
                    if not entry.abandoned:
                        self.enqueue(entry, Change(entry.request_id, entry.writer))
            self._wake.clear()
            pending, self._pending = self._pending, []
            if pending:
                await self._write_group(pending)

    async def _write_group(
        self, pending: Sequence[tuple[Entry, Change, asyncio.Future[None]]]
    ) -> None:
        try:
            answers = await self._store.write([change for _, change, _ in pending])
        except UnavailableError as error:
            if not self._store_failed:
                logger.warning("journal failed; requests go on without it: %s", error.message)
            self._store_failed = True
            for entry, _, _ in pending:
                entry.abandoned = True
        else:
            if self._store_failed:
                logger.warning("journal works again")
            self._store_failed = False
            for (entry, change, _), answer in zip(pending, answers, strict=True):
                self._handle(entry, change, answer)
        for *_, done in pending:
            done.set_result(None)

    def _handle(self, entry: Entry, change: Change, answer: Written) -> None:
        if answer is Written.GONE:
            entry.abandoned = True
        elif answer is Written.TAKEN:
            if change.request is not None:
                entry.refusal = _in_flight_error(entry.request_id, self._settings.lease_s)
            elif entry.refusal is None:
                entry.refusal = CancelledError(
                    f"the request {entry.request_id!r} was resumed at another router"
                )


def _in_flight_error(request_id: str, lease_s: float) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"the request {request_id!r} is being served",
        reason=REQUEST_IN_FLIGHT,
        retry_after_s=lease_s / 3,
    )


def _encode_batch(batch: TokenBatch) -> bytes:
    return worker_pb2.DecodeResponse(
        token_ids=batch.token_ids, logprobs=batch.logprobs, finish_reason=batch.finish_reason
    ).SerializeToString()


def _decode_batch(data: bytes) -> TokenBatch:
    batch = worker_pb2.DecodeResponse.FromString(data)
    return TokenBatch(tuple(batch.token_ids), tuple(batch.logprobs), batch.finish_reason)
