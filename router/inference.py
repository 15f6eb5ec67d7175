"""One Generate call from its message to its last response."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import cast

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from cluster.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InternalError,
)
from cluster.grpc_status import abort
from router.admission import AdmissionLimits, retry_after_s
from router.answer import Answer
from router.dispatch import Dispatcher, Progress
from router.gate import Admission
from router.output import TextOutput
from router.phases import PhaseClock
from router.text import TextCodec
from router.validate import (
    MAX_REQUEST_ID_CHARS,
    ChatTurns,
    CheckedRequest,
    PromptText,
    check_request,
    check_request_id,
    with_prompt,
)

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Validate, tokenise, admit, dispatch; every error leaves as a typed one.

    Args:
        clock: monotonic time, seconds; the event loop's.
    """

    def __init__(
        self,
        text: TextCodec,
        dispatcher: Dispatcher,
        limits: AdmissionLimits,
        default_deadline_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._text = text
        self._dispatcher = dispatcher
        self._limits = limits
        self._admission = Admission(limits, clock)
        self._default_deadline_s = default_deadline_s
        self._clock = clock
        self._in_flight: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """See inference.proto."""
        request_id = request.request_id or f"req-{uuid.uuid4().hex}"
        # One that is refused for its length would not fit into the metadata that says so.
        shown_id = request_id[:MAX_REQUEST_ID_CHARS]
        try:
            await self._generate(request, request_id, context)
        except BatonError as err:
            await abort(context, err, shown_id)
        except Exception:
            # A defect of ours: all of it into the log, nothing of it to the caller.
            logger.exception("request %s failed", shown_id)
            error = InternalError("the router failed; its log says why")
            await abort(context, error, shown_id)

    async def _generate(
        self, request: inference_pb2.GenerateRequest, request_id: str, context: Context
    ) -> None:
        phases = PhaseClock(time.perf_counter)  # uvloop's time has milliseconds only
        # None without a deadline, although the stubs say otherwise.
        remaining_s = cast("float | None", context.time_remaining())
        if remaining_s is None:
            remaining_s = self._default_deadline_s
        deadline_s = self._clock() + remaining_s
        check_request_id(request_id)
        with self._hold_id(request_id):
            try:
                async with asyncio.timeout(remaining_s):
                    await self._serve(request, request_id, context, phases, deadline_s)
            except TimeoutError:
                raise DeadlineError(f"not done within {remaining_s:.3f} s") from None

    async def _serve(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        context: Context,
        phases: PhaseClock,
        deadline_s: float,
    ) -> None:
        checked = check_request(request, request_id, self._text.model)
        token_ids = await self._tokenise(checked)
        ready = with_prompt(checked, token_ids, self._text.model)
        async with self._admission.slot(deadline_s):
            # "~" is in no client's id: the workers never see the same id twice.
            transfer_id = f"{request_id}~{uuid.uuid4().hex[:12]}"
            progress = Progress(ready, transfer_id, deadline_s, phases)
            output = TextOutput(self._text.decoder, ready.stops, ready.sampling.min_tokens)

            async def write(response: inference_pb2.GenerateResponse) -> None:
                try:
                    await context.write(response)
                except grpc.aio.InternalError as err:  # before its cancel reached this task
                    raise CancelledError("the caller went away") from err

            await self._dispatcher.run(progress, Answer(progress, output, write).emit)

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
        if len(self._in_flight) >= self._limits.max_concurrent + self._limits.max_queue:
            raise CapacityError(
                f"the router is full: {len(self._in_flight)} requests are in flight",
                reason="QUEUE_FULL",
                retry_after_s=retry_after_s(self._limits, self._admission.state),
            )
        self._in_flight.add(request_id)
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight.discard(request_id)
            if not self._in_flight:
                self._idle.set()
