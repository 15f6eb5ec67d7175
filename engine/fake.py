"""A deterministic engine with a latency model, for tests of everything around an engine.

Each token is a pure function of all tokens before it. So every worker continues a request in the
same way, and a test can compute the expected answer. The engine spends time only in the ``sleep``
that it is given. It counts KV blocks but computes no KV.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import InvalidArgumentError, WorkerLostError
from core.types import Pool, WorkerLoad
from engine.protocol import (
    EngineFacts,
    EngineOutput,
    EngineRequest,
    KvReceive,
    KvSend,
    check_prompt,
)

VOCAB_SIZE = 1024  # any size works
MAX_MODEL_LEN = 8192  # tokens; used if the configuration sets no length
MAX_LOGPROBS = 20  # vLLM's default
_FIRST_TOKEN_ID = 3  # lower ids are special in most vocabularies
_HASH_PRIME = (1 << 61) - 1  # a Mersenne prime, so that states rarely collide


@dataclass(frozen=True, slots=True)
class FakeLatency:
    """The latency model. The defaults are about ten times as fast as a small model on one core."""

    prefill_ms_per_token: float = 0.2
    decode_step_ms: float = 3.0
    transfer_ms: float = 5.0  # also how long a prefill engine holds blocks after its token


@dataclass(frozen=True, slots=True)
class FakeSize:
    """The size of the engine's KV cache."""

    kv_blocks: int = 4096
    kv_block_tokens: int = 16
    kv_bytes_per_token: int = 1024  # only used in reports


class FakeEngine:
    """Implements ``engine.protocol.Engine``; the module's docstring says how.

    Args:
        sleep: waits for the given number of seconds.
        clock: returns seconds on any monotonic scale.
        fetch: waits for a request's KV. Returns False if the KV will not arrive; the engine then
            computes the prompt. By default, the KV arrives after ``transfer_ms``.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        *,
        latency: FakeLatency | None = None,
        size: FakeSize | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        fetch: Callable[[EngineRequest], Awaitable[bool]] | None = None,
    ) -> None:
        self._max_model_len = config.model.max_model_len or MAX_MODEL_LEN
        self._pool = pool
        self._latency = latency or FakeLatency()
        self._size = size or FakeSize()
        self._sleep = sleep
        self._clock = clock
        self._fetch = fetch or self._fetch_all
        self._kv = _KvBlocks(self._size.kv_blocks)
        self._prefill_turn = asyncio.Lock()  # one prompt at a time, in order of arrival
        # Prompts whose KV is held, by transfer id. When a future is done, the blocks are free.
        self._held: dict[str, asyncio.Future[None]] = {}
        self._queued_tokens = 0
        self._queued = 0
        self._running = 0
        self._failure: str | None = None

    async def start(self) -> EngineFacts:
        """See ``Engine``."""
        return EngineFacts(
            max_model_len=self._max_model_len,
            vocab_size=VOCAB_SIZE,
            kv_addresses=("tcp://127.0.0.1:1",),  # never used
        )

    async def pair_up(
        self,
        others: Mapping[str, tuple[str, ...]],  # noqa: ARG002
        pool: Pool,  # noqa: ARG002
    ) -> Set[str]:
        """See ``Engine``."""
        return set()

    def must_be_replaced(self) -> str | None:
        """See ``Engine``."""
        return None

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See ``Engine``."""
        length = len(request.token_ids)
        sampling = request.sampling
        check_prompt(request, self._max_model_len)
        _check_sampling(sampling)
        room = self._max_model_len - length
        wanted = min(sampling.max_tokens if sampling.HasField("max_tokens") else room, room)
        blocks = -(-(length + wanted) // self._size.kv_block_tokens)
        accepted_s = self._clock()
        await self._take_blocks(blocks, length)
        hold = False
        try:
            kv, first_s = await self._prompt(request)
            report: inference_pb2.KvReport | None = kv
            state = _hash(request.token_ids)
            received = kv.outcome == inference_pb2.KV_OUTCOME_TRANSFERRED
            seeded = (
                received and isinstance(request.kv, KvReceive) and request.kv.forwards_first_token
            )
            for index in range(wanted):
                self._check()
                token = _token(state)
                state = _extend(state, token)
                finish = _finish(token, index, wanted, sampling)
                if index == 0 and seeded and not finish:
                    continue  # this token came with the KV
                if index > 0:
                    await self._sleep(self._latency.decode_step_ms / 1000)
                    self._check()
                is_first = report is not None
                hold = bool(finish) and isinstance(request.kv, KvSend)
                yield EngineOutput(
                    first_index=index,
                    token_ids=(token,),
                    logprobs=_logprobs(token, sampling),
                    finish_reason=finish,
                    kv=report,
                    cached_tokens=0,
                    queue_ms=(first_s - accepted_s) * 1000 if is_first else 0.0,
                    prefill_ms=(self._clock() - first_s) * 1000 if is_first else 0.0,
                )
                report = None
                if finish:
                    return
        finally:
            self._running -= 1
            if hold:
                self._hold(request.transfer_id, blocks)
            else:
                self._kv.give_back(blocks)

    async def release(self, transfer_id: str) -> None:
        """See ``Engine``."""
        task = self._held.get(transfer_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def load(self) -> WorkerLoad:
        """See ``Engine``."""
        return WorkerLoad(
            queue_depth=self._queued,
            running=self._running,
            queued_tokens=self._queued_tokens,
            kv_blocks_free=self._kv.free,
            kv_blocks_total=self._size.kv_blocks,
            kv_block_tokens=self._size.kv_block_tokens,
        )

    async def check_health(self) -> None:
        """See ``Engine``."""
        self._check()

    async def ping(self) -> None:
        """See ``Engine``."""
        self._check()

    async def stop(self) -> None:
        """See ``Engine``."""
        self.fail("the engine was stopped")
        for transfer_id in list(self._held):
            await self.release(transfer_id)

    def fail(self, message: str = "the engine died") -> None:
        """Simulate a dead engine: all current and later requests raise WorkerLostError."""
        self._failure = message
        self._kv.wake()

    def _check(self) -> None:
        if self._failure is not None:
            raise WorkerLostError(self._failure)

    async def _take_blocks(self, blocks: int, tokens: int) -> None:
        """Wait in the queue until ``blocks`` are free, then count the request as running.

        ``tokens`` is the length of the prompt. It counts as queued during the wait.
        """
        self._queued += 1
        self._queued_tokens += tokens
        try:
            await self._kv.take(blocks, self._check)
        finally:
            self._queued -= 1
            self._queued_tokens -= tokens
        self._running += 1

    async def _prompt(self, request: EngineRequest) -> tuple[inference_pb2.KvReport, float]:
        """Compute or receive the prompt's KV. Return the report and when the first step began."""
        tokens = len(request.token_ids)
        began_s = self._clock()
        if isinstance(request.kv, KvReceive) and await self._fetch(request):
            received = tokens if request.kv.forwards_first_token else tokens - 1
            report = inference_pb2.KvReport(
                outcome=inference_pb2.KV_OUTCOME_TRANSFERRED,
                backend="fake",
                bytes=received * self._size.kv_bytes_per_token,
                hidden_bytes=received * self._size.kv_bytes_per_token,
                messages=1,
                tokens=received,
                transfer_ms=self._latency.transfer_ms,
                computed_tokens=1,
            )
            return report, began_s
        async with self._prefill_turn:
            first_s = self._clock()
            await self._sleep(tokens * self._latency.prefill_ms_per_token / 1000)
        report = inference_pb2.KvReport(
            outcome=inference_pb2.KV_OUTCOME_RECOMPUTED
            if isinstance(request.kv, KvReceive)
            else inference_pb2.KV_OUTCOME_LOCAL,
            computed_tokens=tokens,
        )
        return report, first_s

    async def _fetch_all(self, _request: EngineRequest) -> bool:
        await self._sleep(self._latency.transfer_ms / 1000)
        return True

    def _hold(self, transfer_id: str, blocks: int) -> None:
        """Keep blocks for the time of a transfer, or until ``release`` is called."""

        def free(_: object) -> None:
            self._kv.give_back(blocks)
            self._held.pop(transfer_id, None)

        task = asyncio.ensure_future(self._sleep(self._latency.transfer_ms / 1000))
        task.add_done_callback(free)
        self._held[transfer_id] = task


class _KvBlocks:
    """Counts the free blocks and grants them in order of arrival."""

    def __init__(self, total: int) -> None:
        self.free = total
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    async def take(self, blocks: int, check: Callable[[], None]) -> None:
        async with self._turn:
            check()
            while self.free < blocks:
                self._changed.clear()
                await self._changed.wait()
                check()
            self.free -= blocks

    def give_back(self, blocks: int) -> None:
        self.free += blocks
        self.wake()

    def wake(self) -> None:
        self._changed.set()


def next_tokens(token_ids: Iterable[int], count: int) -> tuple[int, ...]:
    """Return the ``count`` tokens that a fake engine generates after ``token_ids``.

    Stop tokens are ignored.
    """
    state = _hash(token_ids)
    tokens = []
    for _ in range(count):
        tokens.append(_token(state))
        state = _extend(state, tokens[-1])
    return tuple(tokens)


def _check_sampling(sampling: inference_pb2.SamplingParams) -> None:
    """Raise InvalidArgumentError for parameters that vLLM also refuses."""
    if sampling.HasField("max_tokens") and sampling.max_tokens < max(1, sampling.min_tokens):
        raise InvalidArgumentError(
            f"max_tokens is {sampling.max_tokens}, but must be at least 1 and at least min_tokens, "
            f"{sampling.min_tokens}"
        )
    if sampling.logprobs > MAX_LOGPROBS:
        raise InvalidArgumentError(
            f"logprobs is {sampling.logprobs}, but must be at most {MAX_LOGPROBS}"
        )


def _hash(token_ids: Iterable[int]) -> int:
    state = 1
    for token in token_ids:
        state = _extend(state, token)
    return state


def _extend(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) % _HASH_PRIME


def _token(state: int) -> int:
    return _FIRST_TOKEN_ID + state % (VOCAB_SIZE - _FIRST_TOKEN_ID)


def _finish(
    token: int, index: int, wanted: int, sampling: inference_pb2.SamplingParams
) -> inference_pb2.FinishReason:
    if token in sampling.stop_token_ids and index + 1 > sampling.min_tokens:
        return inference_pb2.FINISH_REASON_STOP
    if index + 1 == wanted:
        return inference_pb2.FINISH_REASON_LENGTH
    return inference_pb2.FINISH_REASON_UNSPECIFIED


def _logprobs(
    token: int, sampling: inference_pb2.SamplingParams
) -> tuple[inference_pb2.TokenLogprobs, ...]:
    """Return invented logprobs in which the chosen token is the most probable one."""
    if not sampling.HasField("logprobs"):
        return ()
    top = [
        inference_pb2.TopLogprob(token_id=(token + rank) % VOCAB_SIZE, logprob=-0.5 * (rank + 1))
        for rank in range(sampling.logprobs)
    ]
    return (inference_pb2.TokenLogprobs(logprob=-0.5, top=top),)
