"""One call of an application from its message to its last response."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from core.errors import (
    ROUTER_DRAINING,
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from core.rpc.in_flight import InFlight
from core.rpc.status import abort, accept
from router.admission.gate import Admission
from router.admission.policy import FULL, MIN_RETRY_AFTER_S, Ask
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
from router.dispatch.dispatcher import Dispatcher, Progress
from router.phases import PhaseClock
from router.placement.policy import (
    RETRY_AFTER_S,
)
from router.request import TokenBatch, TokenRequest
from router.resume.journal import NOT_RESUMABLE, Entry, Journal
from router.text.codec import TextCodec
from router.text.output import TextOutput

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True)
class CallBounds:
    """From the configuration (``router.default_deadline_s`` and so on)."""

    default_deadline_s: float
    client_stall_s: float


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an application."""

    request_id: str
    context: Context
    deadline_s: float  # on the event loop's clock
    stall_s: float  # that the client may not read
    phases: PhaseClock

    def progress(self, request: TokenRequest) -> Progress:
        # "~" is in no client's id: the workers never see the same id twice.
        transfer_id = f"{self.request_id}~{uuid.uuid4().hex[:12]}"
        return Progress(request, transfer_id, self.deadline_s, self.phases)

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self.stall_s):
                await self.context.write(response)
        except TimeoutError:
            raise CapacityError(
                f"the client has read nothing for {self.stall_s:g} s",
                reason="CLIENT_TOO_SLOW",
            ) from None
        except grpc.aio.InternalError as err:  # before its cancel reached this task
            raise CancelledError("the caller went away") from err


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Validate, tokenise, admit, dispatch; every error leaves as a typed one.

    Args:
        clock: monotonic time, seconds; the event loop's.
        journal: None: requests cannot be resumed.
        phase_clock: of durations; uvloop's time has milliseconds only.
    """

    def __init__(
        self,
        text: TextCodec,
        dispatcher: Dispatcher,
        admission: Admission,
        bounds: CallBounds,
        clock: Callable[[], float],
        journal: Journal | None = None,
        phase_clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._text = text
        self._dispatcher = dispatcher
        self.admission = admission
        self._bounds = bounds
        self._clock = clock
        self._phase_clock = phase_clock
        self._journal = journal
        self._in_flight = InFlight(_leaves)

    async def drained(self) -> None:
        """Return when no request is in flight."""
        await self._in_flight.drained()

    def send_away(self) -> None:
        """End what is in flight, for the clients to go on at another router."""
        self._in_flight.send_away()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """See inference.proto."""
        request_id = request.request_id or f"req-{uuid.uuid4().hex}"
        await self._run(request_id, context, lambda call: self._generate(request, call))

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:
        """See inference.proto."""
        await self._run(request.request_id, context, lambda call: self._resume(request, call))

    async def _run(
        self, request_id: str, context: Context, serve: Callable[[_Call], Awaitable[None]]
    ) -> None:
        """Serve one call until its deadline; every error leaves as a typed one."""
        # One that is refused for its length would not fit into the metadata that says so.
        shown_id = request_id[:MAX_REQUEST_ID_CHARS]
        try:
            check_request_id(request_id)
            with self._hold_id(request_id):
                call = self._call(request_id, context)
                try:
                    async with asyncio.timeout_at(call.deadline_s):
                        await serve(call)
                except TimeoutError:
                    raise DeadlineError("not done by the deadline") from None
        except BatonError as err:
            await abort(context, err, shown_id)
        except Exception:
            # A defect of ours: all of it into the log, nothing of it to the caller.
            logger.exception("request %s failed", shown_id)
            error = InternalError("the router failed; its log says why")
            await abort(context, error, shown_id)

    def _call(self, request_id: str, context: Context) -> _Call:
        # None without a deadline, although the stubs say otherwise.
        remaining_s = cast("float | None", context.time_remaining())
        if remaining_s is None:
            remaining_s = self._bounds.default_deadline_s
        phases = PhaseClock(self._phase_clock)
        deadline_s = self._clock() + remaining_s
        return _Call(request_id, context, deadline_s, self._bounds.client_stall_s, phases)

    async def _generate(self, request: inference_pb2.GenerateRequest, call: _Call) -> None:
        ask = Ask(self.admission.class_of(request.service_class), call.deadline_s)
        checked = check_request(request, call.request_id, self._text.model)
        self.admission.check(ask)  # a prompt that has no chance need not be tokenised
        token_ids = await self._tokenise(checked)
        ready = with_prompt(checked, token_ids, self._text.model)
        ask = replace(ask, service_s=self._dispatcher.service_s(ready), cost=len(ready.prompt))
        async with self.admission.slot(ask, lambda: self._dispatcher.place(ready)) as placed:
            await accept(call.context)
            progress = call.progress(ready)
            answer = Answer(progress, self._output(ready), call.write)
            if self._journal is None:
                await self._dispatcher.run(progress, answer.emit, placed)
                return
            async with self._journal.begin(_kept(request, ready)) as entry:
                await self._dispatcher.run(progress, _journaled(entry, answer), placed)

    async def _resume(self, request: inference_pb2.ResumeRequest, call: _Call) -> None:
        if self._journal is None:
            raise NotFoundError("this cluster keeps no journal of requests", reason=NOT_RESUMABLE)
        first = request.last_sequence + 1 if request.HasField("last_sequence") else 0
        # It was let in before: it needs no more room than it had, of the workers that are left.
        ask = Ask(self.admission.class_of(""), call.deadline_s)
        async with (
            self.admission.slot(ask, lambda: contextlib.ExitStack[None]()),
            self._journal.resume(call.request_id) as (entry, kept, batches),
        ):
            await accept(call.context)
            checked = check_request(kept, call.request_id, self._text.model)
            ready = with_prompt(checked, kept.token_ids.ids, self._text.model)
            progress = call.progress(ready)
            answer = Answer(progress, self._output(ready), call.write, first)
            more = True
            for batch in batches:
                progress.token_ids.extend(batch.token_ids)
                more = await answer.emit(batch)
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
            return await self._text.encode_chat(checked.prompt.turns)
        return checked.prompt.token_ids

    @contextlib.contextmanager
    def _hold_id(self, request_id: str) -> Iterator[None]:
        """Also bounds the requests that are in here at all, those being tokenised included."""
        if request_id in self._in_flight:
            raise AlreadyExistsError(f"request_id {request_id!r} is in flight")
        if len(self._in_flight) >= self.admission.most:
            raise CapacityError(
                f"the router is full: {len(self._in_flight)} requests are in flight",
                reason=FULL,
                retry_after_s=MIN_RETRY_AFTER_S,
            )
        with self._in_flight.hold(request_id):
            yield


def _leaves() -> UnavailableError:
    return UnavailableError(
        "this router is shutting down; resume the request",
        reason=ROUTER_DRAINING,
        retry_after_s=RETRY_AFTER_S,
    )


def _kept(
    request: inference_pb2.GenerateRequest, ready: TokenRequest
) -> inference_pb2.GenerateRequest:
    """The request as the journal keeps it: with its tokens, so that it is tokenised once."""
    return inference_pb2.GenerateRequest(
        request_id=ready.request_id,
        model=request.model,
        token_ids=inference_pb2.TokenIds(ids=ready.prompt),
        sampling=request.sampling,
    )


def _journaled(entry: Entry, answer: Answer) -> Emit:
    async def emit(batch: TokenBatch) -> bool:
        await entry.add(batch)
        return await answer.emit(batch)

    return emit
