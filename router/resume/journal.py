"""Writes what a request's application gets into the journal before the application gets it.

One write is on its way at a time and takes along all that came up meanwhile, of all requests
(group commit). So a token waits for one or two answers of the store, however many streams run,
and the client never has what another router could not give again.

A slow store holds nobody up: the request goes on, ahead of its journal until all is written. If the
store is away it goes on as well, and cannot be resumed any more from beyond what was written.
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
    lease_s: float  # renewed at a third of it
    patience_s: float  # for one write


class Entry:
    """One request's place in the journal, while this router serves it."""

    def __init__(self, journal: Journal, request_id: str) -> None:
        self.request_id = request_id
        self.writer = uuid.uuid4().hex
        self.lost = False  # it is not written any more
        self.refusal: BatonError | None = None  # why the request must end here
        self._journal = journal
        self._newest: asyncio.Future[None] | None = None  # write that nobody waits for any more
        self.batches = 0  # written, or on their way

    @property
    def behind(self) -> bool:
        """Whether the stream goes on ahead of its journal, for the store is slow."""
        return self._newest is not None and not self._newest.done()

    async def add(self, batch: TokenBatch) -> None:
        """Return when the batch is written, or cannot be for now.

        Raises:
            AlreadyExistsError, CancelledError: another router serves the request.
        """
        if not self.lost:
            change = Change(
                self.request_id, self.writer, batches={self.batches: _encode_batch(batch)}
            )
            self.batches += 1
            written = self._journal.put(self, change)
            if not self.behind:
                await asyncio.wait([written], timeout=self._journal.patience_s)
            self._newest = written
        if self.refusal is not None:
            raise self.refusal


class Journal:
    """Belongs to one event loop; ``start`` and ``close`` it.

    Args:
        store: closed with this.
    """

    def __init__(self, store: JournalStore, settings: JournalSettings) -> None:
        self._store = store
        self._settings = settings
        self._entries: set[Entry] = set()
        self._pending: list[tuple[Entry, Change, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._away = False

    def start(self) -> None:
        self._writer = asyncio.create_task(self._write(), name="journal")

    async def close(self) -> None:
        """Write what is pending, and disconnect. Idempotent."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._wake.set()
            await writer
        await self._store.close()

    @asynccontextmanager
    async def begin(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[Entry]:
        """An entry for a new request, which holds all that is needed to run it, for the block."""
        entry = Entry(self, request.request_id)
        change = Change(entry.request_id, entry.writer, request=request.SerializeToString())
        self.put(entry, change)  # its answer comes with that of the first batch
        async with self._serving(entry):
            yield entry

    @asynccontextmanager
    async def resume(
        self, request_id: str
    ) -> AsyncIterator[tuple[Entry, inference_pb2.GenerateRequest, list[TokenBatch]]]:
        """Take over an entry for the block.

        Raises:
            AlreadyExistsError: a router serves the request; with a retry hint.
            NotFoundError: there is no such entry.
            UnavailableError: the store does not answer.
        """
        entry = Entry(self, request_id)
        stored = await self._store.take(request_id, entry.writer)
        if stored is Written.TAKEN:
            raise _busy(request_id, self._settings.lease_s)
        if not isinstance(stored, Stored):
            raise NotFoundError(
                f"nothing is known of the request {request_id!r} that could be resumed",
                reason=NOT_RESUMABLE,
            )
        entry.batches = len(stored.batches)
        request = inference_pb2.GenerateRequest.FromString(stored.request)
        async with self._serving(entry):
            yield entry, request, [_decode_batch(batch) for batch in stored.batches]

    @property
    def patience_s(self) -> float:
        """How long a batch waits to be written."""
        return self._settings.patience_s

    def put(self, entry: Entry, change: Change) -> asyncio.Future[None]:
        """Have the change written after all that was put before; done when it is answered."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((entry, change, done))
        self._wake.set()
        return done

    @asynccontextmanager
    async def _serving(self, entry: Entry) -> AsyncIterator[None]:
        self._entries.add(entry)
        try:
            yield
        finally:
            self._entries.discard(entry)
            if not entry.lost and entry.refusal is None:
                self.put(entry, Change(entry.request_id, entry.writer, ends=True))

    async def _write(self) -> None:
        while self._writer is not None or self._pending:
            try:
                async with asyncio.timeout(self._settings.lease_s / 3):
                    await self._wake.wait()
            except TimeoutError:
                for entry in self._entries:
                    if not entry.lost:  # else the id's entry may be an older request's
                        self.put(entry, Change(entry.request_id, entry.writer))
            self._wake.clear()
            pending, self._pending = self._pending, []
            if pending:
                await self._write_all(pending)

    async def _write_all(
        self, pending: Sequence[tuple[Entry, Change, asyncio.Future[None]]]
    ) -> None:
        try:
            answers = await self._store.write([change for _, change, _ in pending])
        except UnavailableError as error:
            if not self._away:
                logger.warning("no journal, requests go on without: %s", error.message)
            self._away = True
            for entry, _, _ in pending:
                entry.lost = True
        else:
            if self._away:
                logger.warning("the journal is back")
            self._away = False
            for (entry, change, _), answer in zip(pending, answers, strict=True):
                self._note(entry, change, answer)
        for *_, done in pending:
            done.set_result(None)

    def _note(self, entry: Entry, change: Change, answer: Written) -> None:
        if answer is Written.GONE:
            entry.lost = True
        elif answer is Written.TAKEN:
            if change.request is not None:
                entry.refusal = _busy(entry.request_id, self._settings.lease_s)
            elif entry.refusal is None:
                entry.refusal = CancelledError(
                    f"the request {entry.request_id!r} was resumed at another router"
                )


def _busy(request_id: str, lease_s: float) -> AlreadyExistsError:
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
