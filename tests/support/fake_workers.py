"""Prefill and decode workers as real gRPC servers with scripted behaviour.

The workers compute each token from all tokens before it. So every worker continues an answer in the
same way, as with greedy sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from baton.v1 import inference_pb2
from core.errors import BatonError
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.options import server_options
from core.rpc.status import abort
from core.types import Pool, WorkerLoad, WorkerRecord, WorkerState

PrefillScript = Callable[[worker_pb2.PrefillRequest], Awaitable[worker_pb2.PrefillResponse]]
DecodeScript = Callable[[worker_pb2.DecodeRequest], AsyncGenerator[worker_pb2.DecodeResponse, None]]

VOCAB = 256  # the fakes produce token ids below this
MODEL = "tiny"
IDLE = WorkerLoad(
    queue_depth=0, running=0, queued_tokens=0, kv_blocks_free=10_000, kv_blocks_total=10_000
)
WAIT_S = 10.0  # longest wait for a condition

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
UNFINISHED = inference_pb2.FINISH_REASON_UNSPECIFIED


def next_token(token_ids: Sequence[int]) -> int:
    """Return the token that the fakes produce after ``token_ids``."""
    value = 7
    for token_id in token_ids:
        value = (value * 31 + token_id + 1) % 65521
    return value % VOCAB


def answer_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Return the first ``count`` tokens of the answer to ``prompt``."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


async def prefill_answer(request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
    """Answer as a healthy prefill worker does."""
    return worker_pb2.PrefillResponse(token_id=next_token(request.token_ids), cached_tokens=1)


async def decode_answer(
    request: worker_pb2.DecodeRequest,
    *,
    first_index: int | None = None,
    outcome: inference_pb2.KvOutcome | None = None,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    """Answer as a healthy decode worker does, with one token per response.

    Args:
        first_index: index of the first token to send. None: 1 if the router gets token 0 from the
            prefill worker, else 0.
        outcome: outcome of the KV transfer. None: TRANSFERRED if the request names a KV source,
            else LOCAL.
    """
    skipped = int(request.kv_source.forwards_first_token) if first_index is None else first_index
    if outcome is None:
        transferred = request.HasField("kv_source")
        outcome = (
            inference_pb2.KV_OUTCOME_TRANSFERRED if transferred else inference_pb2.KV_OUTCOME_LOCAL
        )
    tokens = answer_tokens(request.token_ids, request.sampling.max_tokens)
    for index in range(skipped, len(tokens)):
        last = index == len(tokens) - 1
        response = worker_pb2.DecodeResponse(
            first_index=index,
            token_ids=[tokens[index]],
            finish_reason=LENGTH if last else UNFINISHED,
        )
        if index == skipped:
            response.kv.outcome = outcome
            response.kv.backend = "gloo"
        yield response


def until_cancelled() -> asyncio.Future[Any]:
    """Return a future that only cancellation ends."""
    return asyncio.get_running_loop().create_future()


async def decode_hangs_after_one(
    request: worker_pb2.DecodeRequest,
) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
    """Send one token, and then hang."""
    async for response in decode_answer(request):
        yield response
        await until_cancelled()


class _FakeWorker:
    """One gRPC server on loopback. It records the calls that it receives.

    ``running``, ``cancelled`` and ``released`` name a call by its (request id, attempt).
    """

    _numbers = itertools.count()

    def __init__(self, pool: Pool, worker_id: str) -> None:
        self.record = WorkerRecord(
            id=worker_id,
            pool=pool,
            state=WorkerState.READY,
            incarnation=f"incarnation-{next(self._numbers)}",
            address="",
            kv_addresses=("tcp://127.0.0.1:1",),
            model=MODEL,
            load=IDLE,
        )
        self.requests: list[Any] = []
        self.remaining_s: list[float] = []  # time to the deadline when each call starts
        self.running: set[tuple[str, int]] = set()
        self.cancelled: list[tuple[str, int]] = []
        self.released: list[tuple[str, int]] = []
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=server_options(2**22, silence_s=60))
        self._add_to(self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.record = replace(self.record, address=f"127.0.0.1:{port}")
        await self._server.start()

    async def stop(self) -> None:
        """End immediately, as a killed process does. All running calls break."""
        if self._server is not None:
            await self._server.stop(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true. It is checked after each change of the records."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def note(self) -> None:
        """Make ``until`` check its condition."""
        self._changed.set()

    @contextlib.asynccontextmanager
    async def _serving(self, request: Any, context: Any) -> AsyncIterator[None]:
        key = (request.key.request_id, request.key.attempt)
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining())
        self.running.add(key)
        self.note()
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        except BatonError as err:
            err.request_id = request.key.request_id
            await abort(context, err)
        finally:
            self.running.discard(key)
            self.note()


class FakePrefill(_FakeWorker, worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker_id: str = "prefill-1", script: PrefillScript = prefill_answer):
        super().__init__(Pool.PREFILL, worker_id)
        self.script = script

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> Any:
        async with self._serving(request, context):
            return await self.script(request)

    async def Release(self, request: worker_pb2.ReleaseRequest, context: Any) -> Any:
        self.released.append((request.key.request_id, request.key.attempt))
        self.note()
        return worker_pb2.ReleaseResponse()


class FakeDecode(_FakeWorker, worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, worker_id: str = "decode-1", script: DecodeScript = decode_answer):
        super().__init__(Pool.DECODE, worker_id)
        self.script = script

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> None:
        async with self._serving(request, context), contextlib.AsyncExitStack() as stack:
            stream = await stack.enter_async_context(contextlib.aclosing(self.script(request)))
            async for response in stream:
                await context.write(response)
