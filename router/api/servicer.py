"""Serves the public protocol over gRPC: translates the deadline, responses and error of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from core.errors import BatonError, CancelledError
from core.rpc.status import abort, accept
from router.api.handler import RequestHandler

Context = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True)
class _CallSink:
    """A call's stream as a ``ResponseSink``."""

    context: Context

    async def accept(self) -> None:
        await accept(self.context)

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        try:
            await self.context.write(response)
        except grpc.aio.InternalError as err:  # the call ended; this task is about to be cancelled
            raise CancelledError("the caller went away") from err


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Passes each call to the handler. Every error reaches the client with a typed detail.

    Args:
        clock: the handler's clock.
    """

    def __init__(self, handler: RequestHandler, clock: Callable[[], float]) -> None:
        self._handler = handler
        self._clock = clock

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """See inference.proto."""
        try:
            await self._handler.generate(request, self._deadline_s(context), _CallSink(context))
        except BatonError as err:
            await abort(context, err)

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:
        """See inference.proto."""
        try:
            await self._handler.resume(request, self._deadline_s(context), _CallSink(context))
        except BatonError as err:
            await abort(context, err)

    def _deadline_s(self, context: Context) -> float | None:
        # None if the call has no deadline, although the type stubs say float.
        remaining_s = cast("float | None", context.time_remaining())
        return None if remaining_s is None else self._clock() + remaining_s
