"""One attempt at a request: a Decode stream and a Prefill call, started together.

Two readers put the workers' answers into one bounded queue. ``run`` takes them out, orders
the tokens by position and emits them. When ``run`` ends, for any reason, it ends both calls.

    prefill reader --+
                     +--> events (bounded) --> run --> Assembler --> emit
    decode reader  --+

Tokens from position 1 on are held back until token 0 is there. Their number is bounded: after
``buffer_responses`` responses the decode reader waits for token 0, and gRPC flow control makes the
decode worker wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from baton.v1 import inference_pb2
from core.errors import (
    BatonError,
    InternalError,
    UnavailableError,
    WorkerLostError,
    WorkerUnreachableError,
)
from core.messages import worker_pb2
from core.rpc.status import from_rpc_error
from core.types import WorkerRecord
from router.dispatch.assemble import (
    Assembler,
    FirstTokenDiffersError,
    ProtocolViolationError,
)
from router.errors import RETRY_AFTER_S
from router.placement.policy import Placement
from router.request import UNFINISHED, TokenBatch
from router.workers.client import DecodeCall, PrefillCall, WorkerClient

logger = logging.getLogger(__name__)

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH

# Hands tokens to the client. Returns False if the request needs no more.
Emit = Callable[[TokenBatch], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """One attempt: which workers do what."""

    transfer_key: worker_pb2.TransferKey
    token_ids: tuple[int, ...]  # the prompt, then the output of earlier attempts
    tokens_so_far: int  # how many ids at the end of token_ids are that output
    sampling: inference_pb2.SamplingParams  # max_tokens counts only what is still to come
    placement: Placement
    forwards_first_token: bool  # the prefill worker's token goes to the client
    timeout_s: float
    buffer_responses: int
    lost_after_s: float  # silence after which a worker without a lease counts as lost


class AttemptFailedError(Exception):
    """The attempt failed, and another one may succeed.

    Args:
        error: what the client sees if there is no other attempt.
        failed: the worker to avoid; None if no worker is at fault.
    """

    def __init__(self, error: BatonError, failed: WorkerRecord | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.failed = failed


@dataclass(frozen=True, slots=True)
class _Failed:
    worker: WorkerRecord
    error: BatonError


_Event = worker_pb2.PrefillResponse | worker_pb2.DecodeResponse | _Failed


class Attempt:
    """Runs one plan once.

    Args:
        clock: monotonic time, seconds.
        on_prefill_ended: called when the prefill call has ended, with True if it was answered.
    """

    def __init__(
        self,
        plan: AttemptPlan,
        clock: Callable[[], float],
        on_prefill_ended: Callable[[bool], None],
    ) -> None:
        self._plan = plan
        self._clock = clock
        self._on_prefill_ended = on_prefill_ended
        self._prefill = plan.placement.prefill
        self._decode = plan.placement.decode
        self._assembler = Assembler(
            forwards_first_token=plan.forwards_first_token, limit_tokens=plan.sampling.max_tokens
        )
        self._events: asyncio.Queue[_Event] = asyncio.Queue(plan.buffer_responses)
        self._heard_s = {record.id: clock() for record in (self._prefill, self._decode) if record}
        self._first_token_known = asyncio.Event()
        if not plan.forwards_first_token:
            self._first_token_known.set()  # no wait: the decode stream brings token 0
        self._decode_held_back = False  # the decode reader waits, so silence proves nothing
        self._sent = False  # a call was sent to a worker
        self._failed_ids: set[str] = set()
        self._prefill_answer: worker_pb2.PrefillResponse | None = None
        self.kv: inference_pb2.KvReport | None = None  # from the decode worker's first response

    @property
    def cached_tokens(self) -> int:
        """How many of ``plan.token_ids`` the prefilling worker found in its prefix cache."""
        if self._prefill_answer is not None:
            return self._prefill_answer.cached_tokens
        if self._prefill is None and self.kv is not None:
            return self.kv.cached_tokens
        return 0

    @property
    def holds_kv(self) -> bool:
        """Whether the prefill worker may hold KV that the decode worker will not fetch."""
        if self._decode is None or self._prefill is None or not self._sent:
            return False
        if self._prefill.id in self._failed_ids:
            return False
        # True for a cancelled call, too: the worker may have answered before the cancel arrived.
        return self.kv is None or self.kv.outcome != inference_pb2.KV_OUTCOME_TRANSFERRED

    def worker_lost(self, worker: WorkerRecord) -> None:
        """Note that a worker's lease is gone.

        If the worker has been silent for ``plan.lost_after_s``, too, the attempt fails.
        """
        if worker is self._prefill and self._prefill_answer is not None:
            return  # it has answered; the decode worker notices if the transfer breaks
        if worker is self._decode and self._decode_held_back:
            return  # it is silent because this router reads nothing from it
        silent_s = self._clock() - self._heard_s[worker.id]
        silent = silent_s >= self._plan.lost_after_s and self._events.empty()
        if silent and worker.id not in self._failed_ids:
            message = f"worker {worker.id} lost its lease and has been silent for {silent_s:.1f} s"
            self._events.put_nowait(_Failed(worker, WorkerLostError(message)))

    async def run(
        self, prefill: WorkerClient | None, decode: WorkerClient | None, emit: Emit
    ) -> None:
        """Return when the request has ended.

        Raises:
            AttemptFailedError: it has not ended, and another attempt may help.
            BatonError: it has not ended, and another attempt would not help.
        """
        # Connect before the first call. If a worker cannot be reached, nothing has been sent, so
        # the attempt cannot have killed a worker, and it does not count against max_attempts.
        await self._connect(prefill, decode)
        self._sent = True
        calls: list[PrefillCall | DecodeCall] = []
        readers: list[asyncio.Task[None]] = []
        if prefill is not None and self._prefill is not None:
            call = prefill.prefill(self._prefill_request(), self._plan.timeout_s)
            calls.append(call)
            readers.append(asyncio.create_task(self._read_prefill(call, self._prefill)))
        if decode is not None and self._decode is not None:
            stream = decode.decode(self._decode_request(), self._plan.timeout_s)
            calls.append(stream)
            readers.append(asyncio.create_task(self._read_decode(stream, self._decode)))
        try:
            while not await self._step(await self._events.get(), emit):
                pass
        finally:
            # Cancel the calls, too: a reader that is cancelled before it starts cannot end a call.
            for each in (*calls, *readers):
                each.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _connect(self, prefill: WorkerClient | None, decode: WorkerClient | None) -> None:
        """Connect to both workers at the same time. Fail as soon as one cannot be reached."""

        async def reach(client: WorkerClient, worker: WorkerRecord) -> None:
            if not await client.connected():
                error = WorkerUnreachableError(f"worker {worker.id} cannot be reached")
                raise AttemptFailedError(error, worker)

        tasks = [
            asyncio.create_task(reach(client, worker))
            for client, worker in ((prefill, self._prefill), (decode, self._decode))
            if client is not None and worker is not None
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(self, event: _Event, emit: Emit) -> bool:
        """Handle one event. Returns True when the request has ended."""
        batches = self._batches(event)
        if self._assembler.started:
            self._first_token_known.set()
        for batch in batches:
            if not await emit(batch) or batch.finish_reason != UNFINISHED:
                return True
        return False

    def _batches(self, event: _Event) -> tuple[TokenBatch, ...]:
        if isinstance(event, _Failed):
            return self._on_failure(event)
        if isinstance(event, worker_pb2.PrefillResponse):
            return self._on_prefill(event)
        return self._on_decode(event)

    def _on_prefill(self, answer: worker_pb2.PrefillResponse) -> tuple[TokenBatch, ...]:
        self._prefill_answer = answer
        logprobs = (answer.logprobs,) if answer.HasField("logprobs") else ()
        finish = STOP if answer.finish_reason == STOP else UNFINISHED
        if self._decode is None:
            return (TokenBatch((answer.token_id,), logprobs, finish or LENGTH),)
        if not self._plan.forwards_first_token:
            return ()
        return self._assembler.prefill(TokenBatch((answer.token_id,), logprobs, finish))

    def _on_decode(self, response: worker_pb2.DecodeResponse) -> tuple[TokenBatch, ...]:
        if response.HasField("kv"):
            self.kv = response.kv
        batch = TokenBatch(
            tuple(response.token_ids), tuple(response.logprobs), response.finish_reason
        )
        try:
            return self._assembler.decode(response.first_index, batch)
        except FirstTokenDiffersError as err:
            # No worker is at fault. The next attempt prefers this decode worker, which
            # has computed the prompt's KV and likely keeps the KV in its prefix cache.
            error: BatonError = UnavailableError(
                f"worker {self._decode_id} computed another first token: {err}",
                reason="FIRST_TOKEN_DIFFERS",
                retry_after_s=RETRY_AFTER_S,
            )
            raise AttemptFailedError(error, None) from err
        except ProtocolViolationError as err:
            error = InternalError(f"worker {self._decode_id} broke the protocol: {err}")
            raise AttemptFailedError(error, self._decode) from err

    def _on_failure(self, event: _Failed) -> tuple[TokenBatch, ...]:
        self._failed_ids.add(event.worker.id)
        if event.worker is self._prefill and self._decode is not None and self._assembler.started:
            # If the decode worker does not have the KV, it recomputes the prompt by itself.
            logger.warning("%s: prefill failed after token 0: %s", self._name, event.error.message)
            return ()
        raise AttemptFailedError(event.error, event.worker)

    async def _read_prefill(self, call: PrefillCall, worker: WorkerRecord) -> None:
        done = False
        try:
            event: _Event = await call
            done = True
        except grpc.aio.AioRpcError as err:
            event = _Failed(worker, from_rpc_error(err, worker.id))
        except Exception as err:  # noqa: BLE001 - without an event, the request would hang
            event = _Failed(worker, self._defect(worker, err))
        finally:
            self._on_prefill_ended(done)
        await self._events.put(event)

    async def _read_decode(self, call: DecodeCall, worker: WorkerRecord) -> None:
        try:
            responses = 0
            async for response in call:
                responses += 1
                if responses > self._plan.buffer_responses:
                    await self._wait_for_first_token()
                self._heard_s[worker.id] = self._clock()
                await self._events.put(response)
                if response.finish_reason != UNFINISHED:
                    return
            error: BatonError = WorkerLostError(f"worker {worker.id} ended its stream too early")
        except grpc.aio.AioRpcError as err:
            error = from_rpc_error(err, worker.id)
        except Exception as err:  # noqa: BLE001 - without an event, the request would hang
            error = self._defect(worker, err)
        await self._events.put(_Failed(worker, error))

    async def _wait_for_first_token(self) -> None:
        self._decode_held_back = True
        try:
            await self._first_token_known.wait()
        finally:
            self._decode_held_back = False

    def _defect(self, worker: WorkerRecord, err: Exception) -> InternalError:
        logger.error("%s: reading from %s failed", self._name, worker.id, exc_info=err)
        return InternalError(f"the answer of worker {worker.id} could not be read")

    def _prefill_request(self) -> worker_pb2.PrefillRequest:
        return worker_pb2.PrefillRequest(
            key=self._plan.transfer_key,
            token_ids=self._plan.token_ids,
            sampling=self._plan.sampling,
            transfer=self._decode is not None,
            forwards_first_token=self._plan.forwards_first_token,
            tokens_so_far=self._plan.tokens_so_far,
        )

    def _decode_request(self) -> worker_pb2.DecodeRequest:
        source = None
        if self._prefill is not None:
            source = worker_pb2.KvSource(
                worker_id=self._prefill.id,
                incarnation=self._prefill.incarnation,
                forwards_first_token=self._plan.forwards_first_token,
            )
        return worker_pb2.DecodeRequest(
            key=self._plan.transfer_key,
            token_ids=self._plan.token_ids,
            sampling=self._plan.sampling,
            kv_source=source,
            tokens_so_far=self._plan.tokens_so_far,
        )

    @property
    def _decode_id(self) -> str:
        return self._decode.id if self._decode is not None else ""

    @property
    def _name(self) -> str:
        return f"{self._plan.transfer_key.request_id} attempt {self._plan.transfer_key.attempt}"
