"""Serves one request from its message to its last response, over any transport.

    validate ▸ render and tokenise ▸ admit ▸ place ▸ dispatch ▸ journal ▸ text ▸ sink

A transport (``servicer`` is the one for gRPC) calls ``generate`` or ``resume`` with a deadline and
a sink for the responses. If the call raises a ``BatonError``, the transport translates the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from baton.v1 import inference_pb2
from core.errors import (
    ROUTER_DRAINING,
    AlreadyExistsError,
    BatonError,
    CapacityError,
    DeadlineError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from core.messages import journal_pb2
from core.rpc.in_flight import InFlight
from router.admission.gate import AdmissionGate
from router.admission.policy import FULL, MIN_RETRY_AFTER_S, AdmissionRequest
from router.api.answer import Answer
from router.api.validate import (
    MAX_REQUEST_ID_CHARS,
    ChatTurns,
    CheckedRequest,
    PromptText,
    check_request,
    check_request_id,
    with_prompt,
)
from router.dispatch.attempt import Emit
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.progress import Progress
from router.errors import RETRY_AFTER_S
from router.phases import PhaseClock
from router.request import TokenBatch, TokenRequest
from router.resume.journal import NOT_RESUMABLE, Entry, Journal, batches_of
from router.signals import Signals
from router.text.codec import TextCodec
from router.text.output import TextOutput

logger = logging.getLogger(__name__)


class ResponseSink(Protocol):
    """Sends the responses of one request to the client. Each transport implements it."""

    async def accept(self) -> None:
        """Tell the client that the request begins to run. Called once, before the first ``write``.

        Raises:
            core.errors.CancelledError: the client is gone.
        """

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        """Hand over one response; wait while the client is slow.

        Raises:
            core.errors.CancelledError: the client is gone.
        """


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """From the section ``router`` of the configuration."""

    default_deadline_s: float
    max_deadline_s: float
    client_stall_s: float


@dataclass(frozen=True, slots=True)
class _Call:
    """One request and its client."""

    request_id: str
    deadline_s: float  # on the handler's clock
    client_stall_s: float
    sink: ResponseSink
    phases: PhaseClock

    def progress(self, request: TokenRequest, service_class: str) -> Progress:
        # A client may use an id again. The random suffix makes the id that workers see unique.
        worker_request_id = f"{self.request_id}~{uuid.uuid4().hex[:12]}"
        return Progress(request, worker_request_id, self.deadline_s, self.phases, service_class)

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self.client_stall_s):
                await self.sink.write(response)
        except TimeoutError:
            raise CapacityError(
                f"the client has read nothing for {self.client_stall_s:g} s",
                reason="CLIENT_TOO_SLOW",
            ) from None


class RequestHandler:
    """Runs the requests of one router. Belongs to one event loop.

    Args:
        clock: the event loop's time, seconds. Deadlines are times of this clock.
        journal: None if requests cannot be resumed.
        phase_clock: measures durations, seconds. The event loop's clock may be too coarse (1 ms).
        signals: get arrivals, TTFT and the time between tokens; None: nobody does.
    """

    def __init__(
        self,
        text: TextCodec,
        dispatcher: Dispatcher,
        admission: AdmissionGate,
        bounds: RequestBounds,
        clock: Callable[[], float],
        journal: Journal | None = None,
        phase_clock: Callable[[], float] = time.perf_counter,
        signals: Signals | None = None,
    ) -> None:
        self._signals = signals or Signals(clock)
        self._text = text
        self._dispatcher = dispatcher
        self.admission = admission
        self._bounds = bounds
        self._clock = clock
        self._phase_clock = phase_clock
        self._journal = journal
        self._in_flight = InFlight(_draining)
        self._open = True

    async def generate(
        self,
        request: inference_pb2.GenerateRequest,
        deadline_s: float | None,
        sink: ResponseSink,
    ) -> None:
        """Serve a new request to its end.

        Args:
            deadline_s: on the handler's clock; None means the configured default.

        Raises:
            BatonError: why the request ended without a finish reason; it carries the request's id.
        """
        request.DiscardUnknownFields()  # the journal and the workers would get them
        request_id = request.request_id or f"req-{uuid.uuid4().hex}"
        await self._serve(request_id, deadline_s, sink, lambda call: self._generate(request, call))

    async def resume(
        self, request: inference_pb2.ResumeRequest, deadline_s: float | None, sink: ResponseSink
    ) -> None:
        """Serve the rest of a request whose stream broke. See ``generate`` for the arguments."""
        # The journal's lease decides whether the request is being served. Its id must not: it may
        # be guessed, and the token has not been checked yet.
        key = f"{request.request_id}~{uuid.uuid4().hex}"
        await self._serve(
            request.request_id, deadline_s, sink, lambda call: self._resume(request, call), key
        )

    def close(self) -> None:
        """Refuse all further requests."""
        self._open = False

    async def drained(self) -> None:
        """Return when no request is in flight."""
        await self._in_flight.drained()

    def send_away(self) -> None:
        """End the requests in flight. If there is a journal, their clients can resume them at
        another router."""
        self._in_flight.send_away()

    async def _serve(
        self,
        request_id: str,
        deadline_s: float | None,
        sink: ResponseSink,
        work: Callable[[_Call], Awaitable[None]],
        key: str | None = None,
    ) -> None:
        """Do the work by the deadline. Every failure becomes a BatonError with the request's id."""
        try:
            check_request_id(request_id)
            with self._tracked(request_id, key or request_id):
                call = self._call(request_id, deadline_s, sink)
                try:
                    async with asyncio.timeout_at(call.deadline_s):
                        await work(call)
                except TimeoutError:
                    raise DeadlineError("not done by the deadline") from None
        except BatonError as error:
            # Cut, because an id that is too long would not fit into the metadata of the answer.
            error.request_id = request_id[:MAX_REQUEST_ID_CHARS]
            raise
        except Exception as defect:
            # The log gets the details. The client must not see them.
            shown_id = request_id[:MAX_REQUEST_ID_CHARS]
            logger.exception("request %s failed", shown_id)
            raise InternalError(
                "the router failed; its log says why", request_id=shown_id
            ) from defect

    def _call(self, request_id: str, deadline_s: float | None, sink: ResponseSink) -> _Call:
        now_s, bounds = self._clock(), self._bounds
        if deadline_s is None:
            deadline_s = now_s + bounds.default_deadline_s
        return _Call(
            request_id,
            min(deadline_s, now_s + bounds.max_deadline_s),
            bounds.client_stall_s,
            sink,
            PhaseClock(self._phase_clock, self._signals),
        )

    async def _generate(self, request: inference_pb2.GenerateRequest, call: _Call) -> None:
        wanted = AdmissionRequest(self.admission.class_of(request.service_class), call.deadline_s)
        checked = check_request(request, call.request_id, self._text.model)
        try:
            self.admission.check(wanted)  # before tokenising, to save the work for a refusal
        except BatonError:
            self._signals.arrived(_known_tokens(checked))
            raise
        token_ids = await self._tokenise(checked)
        ready = with_prompt(checked, token_ids, self._text.model)
        self._signals.arrived(len(ready.prompt))
        wanted = replace(
            wanted,
            service_s=self._dispatcher.service_s(ready),
            cost=len(ready.prompt),
            prompt_tokens=len(ready.prompt),
            kv_tokens=self._dispatcher.kv_tokens(ready),
        )
        async with self.admission.admit(wanted, lambda: self._dispatcher.place(ready)) as permit:
            await call.sink.accept()
            progress = call.progress(ready, wanted.service_class)
            answer = Answer(progress, self._output(ready), call.write)
            if self._journal is None:
                await self._dispatcher.run(progress, answer.emit, permit)
                return
            async with self._journal.begin(_journaled_request(request, ready)) as entry:
                progress.on_lost_attempt = entry.note_lost_attempts
                answer.resume_token = entry.token
                await self._dispatcher.run(progress, _journaled(entry, answer), permit)

    async def _resume(self, request: inference_pb2.ResumeRequest, call: _Call) -> None:
        if self._journal is None:
            raise NotFoundError("this cluster keeps no journal of requests", reason=NOT_RESUMABLE)
        first = request.last_sequence + 1 if request.HasField("last_sequence") else 0
        token = request.resume_token
        async with self._journal.resume(call.request_id, token) as (entry, journaled):
            checked = check_request(journaled.request, call.request_id, self._text.model)
            ready = with_prompt(checked, journaled.request.token_ids.ids, self._text.model)
            wanted = AdmissionRequest(
                self.admission.class_of(journaled.request.service_class),
                call.deadline_s,
                cost=len(ready.prompt),
                prompt_tokens=len(ready.prompt),
                kv_tokens=self._dispatcher.kv_tokens(ready),
            )
            # The request has been admitted before, so it takes no permit for room on the workers,
            # and passes those that wait for room.
            no_permit = contextlib.ExitStack[None]
            async with self.admission.admit(wanted, no_permit, needs_room=False):
                progress = call.progress(ready, wanted.service_class)
                await self._continue(entry, journaled, progress, call, first)

    async def _continue(
        self,
        entry: Entry,
        journaled: journal_pb2.JournalEntry,
        progress: Progress,
        call: _Call,
        first: int,
    ) -> None:
        """Send the responses from number ``first`` on, and run the rest of the request."""
        await call.sink.accept()
        call.phases.resumed()
        progress.lost_attempts = journaled.lost_attempts
        progress.on_lost_attempt = entry.note_lost_attempts
        answer = Answer(progress, self._output(progress.request), call.write, first)
        answer.resume_token = entry.token
        more = True
        for batch in batches_of(journaled):
            progress.token_ids.extend(batch.token_ids)
            more = await answer.emit(batch)
        entry.is_complete = not more
        if answer.next_sequence < first:
            raise NotFoundError(
                f"response {first - 1} of {call.request_id!r} is not in the journal",
                reason=NOT_RESUMABLE,
            )
        if more:
            await self._dispatcher.run(progress, _journaled(entry, answer))

    def _output(self, request: TokenRequest) -> TextOutput:
        return TextOutput(self._text.decoder, request.stops, request.sampling.min_tokens)

    async def _tokenise(self, checked: CheckedRequest) -> tuple[int, ...]:
        if isinstance(checked.prompt, PromptText):
            return await self._text.encode_prompt(checked.prompt.text)
        if isinstance(checked.prompt, ChatTurns):
            return await self._text.encode_chat(
                checked.prompt.turns, parse_special=checked.prompt.parse_special
            )
        return checked.prompt.token_ids

    @contextlib.contextmanager
    def _tracked(self, request_id: str, key: str) -> Iterator[None]:
        """Count the request as in flight during the block.

        The number of requests in flight is bounded. Requests that are being tokenised count, too.
        """
        if not self._open:
            raise _draining()
        if key in self._in_flight:
            raise AlreadyExistsError(
                f"request_id {request_id!r} is in flight", retry_after_s=MIN_RETRY_AFTER_S
            )
        if len(self._in_flight) >= self.admission.max_requests:
            raise CapacityError(
                f"the router is full: {len(self._in_flight)} requests are in flight",
                reason=FULL,
                retry_after_s=MIN_RETRY_AFTER_S,
            )
        with self._in_flight.track(key):
            yield


def _known_tokens(checked: CheckedRequest) -> int | None:
    """The number of prompt tokens; None if the prompt must be tokenised first."""
    prompt = checked.prompt
    return None if isinstance(prompt, PromptText | ChatTurns) else len(prompt.token_ids)


def _draining() -> UnavailableError:
    return UnavailableError(
        "this router is shutting down; resume the request",
        reason=ROUTER_DRAINING,
        retry_after_s=RETRY_AFTER_S,
    )


def _journaled_request(
    request: inference_pb2.GenerateRequest, ready: TokenRequest
) -> inference_pb2.GenerateRequest:
    """The request for the journal. It has token ids, so no router tokenises the prompt again."""
    return inference_pb2.GenerateRequest(
        request_id=ready.request_id,
        model=request.model,
        token_ids=inference_pb2.TokenIds(ids=ready.prompt),
        sampling=request.sampling,
        service_class=request.service_class,
    )


def _journaled(entry: Entry, answer: Answer) -> Emit:
    async def emit(batch: TokenBatch) -> bool:
        await entry.add(batch)
        more = await answer.emit(batch)
        entry.is_complete = not more  # also at a stop string, which only the router knows
        return more

    return emit
