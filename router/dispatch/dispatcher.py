"""Runs a request on the workers: starts attempts, fails over, and releases unused KV.

Every attempt sends the prompt, the tokens so far, and the number of these tokens. So a first try, a
retry and a failover are the same operation. docs/failure.md says which results are exactly the same
as without a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace

import grpc

from baton.v1 import inference_pb2
from core.errors import (
    BatonError,
    CapacityError,
    DeadlineError,
    InternalError,
    UnavailableError,
)
from core.messages import worker_pb2
from core.types import Need, QueueLoad, WorkerKey, WorkerRecord
from router.admission.expectation import Expectation
from router.dispatch.attempt import Attempt, AttemptFailedError, AttemptPlan, Emit
from router.dispatch.first_token import first_token_rule
from router.dispatch.progress import Progress
from router.dispatch.retry import Retries, RetryLimits
from router.errors import RETRY_AFTER_S
from router.placement.ledger import PlacementLedger, PlacementPermit
from router.placement.policy import (
    LOCAL_PREFILL,
    LocalPrefill,
    Placement,
    PlacementFacts,
)
from router.request import TokenBatch, TokenRequest
from router.room import NoRoom
from router.signals import Signals
from router.workers.client import WorkerClient
from router.workers.membership import Workers

logger = logging.getLogger(__name__)

RETRYABLE = (UnavailableError, CapacityError, InternalError)


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    model: str
    local_prefill: LocalPrefill
    retries: RetryLimits
    buffer_responses: int
    release_timeout_s: float
    # The most releases in progress at a time. Further releases are dropped: the prefill worker
    # frees the KV after its own timeout.
    max_releases: int


@dataclass(slots=True)
class DispatchCounters:
    """What happened since the start; for metrics and tests."""

    placements: Counter[str] = field(default_factory=Counter)  # by the reason of the placement
    failovers: int = 0
    first_tokens_forwarded: int = 0
    first_tokens_differed: int = 0
    kv_recomputed: int = 0
    releases_dropped: int = 0

    @property
    def local_prefills(self) -> int:
        """Attempts that were placed without a prefill worker."""
        return self.placements[LOCAL_PREFILL]


@dataclass(frozen=True, slots=True)
class _Stranded:
    """A request that has lost its workers and finds no others."""

    service_class: str
    facts: PlacementFacts
    since_s: float


class Dispatcher:
    """Runs requests on the workers; shared by all requests.

    Args:
        clock: monotonic time, seconds; the clock of ``Progress.deadline_s``.
        signals: get the number of tokens from decode workers; None: nobody does.
    """

    def __init__(
        self,
        workers: Workers,
        ledger: PlacementLedger,
        settings: DispatchSettings,
        clock: Callable[[], float],
        signals: Signals | None = None,
    ) -> None:
        self._signals = signals or Signals(clock)
        self._workers = workers
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._releases: set[asyncio.Task[None]] = set()
        self._expectation = Expectation()
        self._stranded: dict[str, _Stranded] = {}  # by worker_request_id
        self.counters = DispatchCounters()

    def place(self, request: TokenRequest) -> PlacementPermit | NoRoom:
        """Reserve workers for a new request; NoRoom if a needed pool has no room now.

        Raises:
            UnavailableError: a pool that the request needs has no usable worker, and the autoscaler
                may start none.
        """
        facts = replace(
            self._facts_of(len(request.prompt), request.sampling.max_tokens),
            may_wait=True,
            coming=self._workers.coming,
        )
        return self._ledger.place(self._workers.snapshot, facts)

    def service_s(self, request: TokenRequest) -> float:
        """How long a request will likely run; 0 if unknown."""
        return self._expectation.service_s(request.sampling.max_tokens)

    def stranded_loads(self) -> tuple[QueueLoad, ...]:
        """The running requests that wait, because they have lost a worker and no other is usable.

        They need a decode worker, which would also prefill. They are on no worker.
        """
        now_s = self._clock()
        return tuple(
            QueueLoad(
                each.service_class,
                Need.DECODE,
                requests=1,
                prompt_tokens=each.facts.prompt_tokens,
                kv_tokens=each.facts.prompt_tokens + each.facts.growth_tokens,
                oldest_wait_s=now_s - each.since_s,
            )
            for each in self._stranded.values()
        )

    def kv_tokens(self, request: TokenRequest) -> int:
        """How many tokens of a request will likely need KV when it ends."""
        growth_tokens = self._expectation.growth_tokens(request.sampling.max_tokens)
        return len(request.prompt) + growth_tokens

    async def run(
        self, progress: Progress, emit: Emit, permit: PlacementPermit | None = None
    ) -> None:
        """Dispatch until the request has ended; its tokens go to ``emit`` in order.

        Cancelling this call cancels the work on both workers.

        Args:
            permit: the workers of the first attempt. If it is None, the least loaded workers are
                chosen. The caller must close the permit, even though this call closes it too.

        Raises:
            BatonError: the request ended without a finish reason.
        """
        done = False
        try:
            await self._run(progress, emit, permit)
            done = True
        finally:
            self._expectation.note(progress.phases, len(progress.token_ids) if done else None)

    async def _run(self, progress: Progress, emit: Emit, permit: PlacementPermit | None) -> None:
        retries = Retries(self._settings.retries, progress.lost_attempts)
        facts: PlacementFacts | None = None
        while progress.remaining_tokens > 0:
            if retries.is_over:  # at another router, before a resume
                raise UnavailableError(
                    f"{retries.lost_attempts} attempts at this request have failed "
                    "(router.max_attempts)",
                    reason="TOO_MANY_ATTEMPTS",
                )
            permit = permit or await self._place(progress, facts or self._facts(progress), retries)
            progress.attempts += 1
            try:
                with contextlib.closing(permit):
                    await self._attempt(progress, permit, emit)
                return
            except AttemptFailedError as err:
                if progress.remaining_tokens > 0:
                    facts = self._note_failure(progress, permit.placement, err, retries)
            permit = None
        # All tokens are there. Only the finish reason was lost with a worker or a router.
        await emit(TokenBatch((), (), inference_pb2.FINISH_REASON_LENGTH))

    async def _place(
        self, progress: Progress, facts: PlacementFacts, retries: Retries
    ) -> PlacementPermit:
        """Choose workers. If none is usable, a retry waits.

        A resumed request has no permit for its first attempt. It waits only if the autoscaler may
        start a worker. A refusal would hide its demand, and no worker would start.
        """
        is_first = retries.last is None
        stranded = _Stranded(progress.service_class, facts, self._clock())
        try:
            while True:
                facts = replace(facts, excluded=retries.excluded(self._clock()))
                try:
                    permit = self._ledger.place(self._workers.snapshot, facts)
                    assert not isinstance(permit, NoRoom), "only for requests that may wait"
                    return permit
                except UnavailableError as error:
                    if is_first:
                        self._check_may_come(facts)
                    if retries.last is None:
                        retries.begin_wait(error, self._clock())
                        facts = replace(facts, local_prefill="fallback")  # as for a retry
                        continue
                self._stranded[progress.worker_request_id] = stranded
                await asyncio.sleep(retries.wait_s(self._clock()))
        finally:
            self._stranded.pop(progress.worker_request_id, None)

    def _check_may_come(self, facts: PlacementFacts) -> None:
        """Raise UnavailableError if the autoscaler will not start the workers that are missing."""
        facts = replace(facts, may_wait=True, coming=self._workers.coming)
        answer = self._ledger.place(self._workers.snapshot, facts)
        assert isinstance(answer, NoRoom), "a needed pool has no usable worker"

    def _facts(self, progress: Progress) -> PlacementFacts:
        """What placement must know about the next attempt."""
        prompt_tokens = len(progress.request.prompt) + len(progress.token_ids)
        return self._facts_of(prompt_tokens, progress.remaining_tokens)

    def _facts_of(self, prompt_tokens: int, max_tokens: int) -> PlacementFacts:
        return PlacementFacts(
            model=self._settings.model,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            growth_tokens=self._expectation.growth_tokens(max_tokens),
            local_prefill=self._settings.local_prefill,
        )

    async def close(self) -> None:
        """Wait for the releases in progress; each is bounded by its timeout."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _attempt(self, progress: Progress, permit: PlacementPermit, emit: Emit) -> None:
        placement = permit.placement
        plan = self._plan(progress, placement)
        self._count_start(plan)

        prefilled = int(plan.forwards_first_token)  # tokens that the prefill worker may still send

        async def emit_and_note(batch: TokenBatch) -> bool:
            nonlocal prefilled
            count = len(batch.token_ids)
            progress.token_ids.extend(batch.token_ids)
            progress.phases.tokens_arrived(count)
            if decoded := count - min(prefilled, count):
                permit.decoded(decoded)
                self._signals.decoded(decoded)
            prefilled -= min(prefilled, count)
            return await emit(batch)

        async with contextlib.AsyncExitStack() as stack:
            attempt = Attempt(plan, self._clock, on_prefill_ended=permit.prefill_ended)
            progress.attempt = attempt
            prefill = await self._connect(stack, attempt, placement.prefill)
            decode = await self._connect(stack, attempt, placement.decode)
            progress.phases.dispatched()
            try:
                await attempt.run(prefill, decode, emit_and_note)
            finally:
                self._count_end(attempt)
                if attempt.holds_kv and placement.prefill is not None:
                    self._release(placement.prefill, plan.transfer_key)

    async def _connect(
        self, stack: contextlib.AsyncExitStack, attempt: Attempt, worker: WorkerRecord | None
    ) -> WorkerClient | None:
        """Use the channel to a worker until ``stack`` closes; None if ``worker`` is None."""
        if worker is None:
            return None
        return await stack.enter_async_context(
            self._workers.connection(worker, lambda: attempt.worker_lost(worker))
        )

    def _plan(self, progress: Progress, placement: Placement) -> AttemptPlan:
        timeout_s = progress.deadline_s - self._clock()
        if timeout_s <= 0:
            raise DeadlineError("the deadline passed before the request was dispatched")
        progress.prefill_id = placement.prefill.id if placement.prefill else ""
        progress.decode_id = placement.decode.id if placement.decode else ""
        sampling = progress.sampling()
        # Without a decode worker, no later token follows that could depend on the first one.
        forwards_first_token = placement.prefill is not None and (
            placement.decode is None or first_token_rule(sampling).forward
        )
        return AttemptPlan(
            transfer_key=worker_pb2.TransferKey(
                request_id=progress.worker_request_id, attempt=progress.attempts
            ),
            token_ids=(*progress.request.prompt, *progress.token_ids),
            tokens_so_far=len(progress.token_ids),
            sampling=sampling,
            placement=placement,
            forwards_first_token=forwards_first_token,
            timeout_s=timeout_s,
            buffer_responses=self._settings.buffer_responses,
            lost_after_s=self._workers.lost_after_s,
        )

    def _note_failure(
        self,
        progress: Progress,
        placement: Placement,
        failed: AttemptFailedError,
        retries: Retries,
    ) -> PlacementFacts:
        """Note that an attempt failed, and return the facts for the next one.

        If no prefill worker is left, the decode worker may prefill in the next attempt, even if
        ``local_prefill`` is "never": a slow answer is better than an error.

        Raises:
            BatonError: there is no next attempt.
        """
        error = _with_retry_hint(failed.error)
        if not isinstance(error, RETRYABLE):
            raise error from failed
        worker = failed.failed.key if failed.failed is not None else None
        try:
            retries.failed(error, worker, tokens=len(progress.token_ids), now_s=self._clock())
        finally:
            if progress.lost_attempts != retries.lost_attempts:
                progress.lost_attempts = retries.lost_attempts
                progress.on_lost_attempt(retries.lost_attempts)
        self.counters.failovers += 1
        local_prefill: LocalPrefill = "fallback"
        preferred: WorkerKey | None = None
        if worker is not None:
            if isinstance(error, UnavailableError):
                self._ledger.suspect(worker)
        elif placement.decode is not None:
            self.counters.first_tokens_differed += 1
            local_prefill = "always"
            preferred = placement.decode.key
        logger.warning(
            "request %s: attempt %d failed after %d tokens: %s",
            progress.request.request_id,
            progress.attempts,
            len(progress.token_ids),
            error.message,
        )
        return replace(
            self._facts(progress), local_prefill=local_prefill, preferred_decode=preferred
        )

    def _count_start(self, plan: AttemptPlan) -> None:
        placement = plan.placement
        self.counters.placements[placement.reason] += 1
        logger.debug(
            "%s attempt %d: %s, prefill on %s, decode on %s",
            plan.transfer_key.request_id,
            plan.transfer_key.attempt,
            placement.reason,
            placement.prefill.id if placement.prefill else "-",
            placement.decode.id if placement.decode else "-",
        )
        self.counters.first_tokens_forwarded += plan.forwards_first_token
        if placement.prefill is None:
            logger.warning("request %s: the decode worker prefills", plan.transfer_key.request_id)

    def _count_end(self, attempt: Attempt) -> None:
        kv = attempt.kv
        if kv is not None and kv.outcome == inference_pb2.KV_OUTCOME_RECOMPUTED:
            self.counters.kv_recomputed += 1
            logger.warning("a KV transfer failed; the decode worker recomputed the prompt")

    def _release(self, worker: WorkerRecord, key: worker_pb2.TransferKey) -> None:
        """Tell the prefill worker, in the background, to drop KV that nobody will fetch."""
        if len(self._releases) >= self._settings.max_releases:
            self.counters.releases_dropped += 1
            return
        self._spawn(self._call_release(worker, key))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work, name="release")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _call_release(self, worker: WorkerRecord, key: worker_pb2.TransferKey) -> None:
        async with self._workers.connection(worker, lambda: None) as client:
            try:
                await client.release(key, self._settings.release_timeout_s)
            except grpc.aio.AioRpcError as err:
                logger.warning("release on %s failed: %s", worker.id, err.details())


def _with_retry_hint(error: BatonError) -> BatonError:
    """Add a retry hint to an UnavailableError: workers come and go, so another try may help."""
    if isinstance(error, UnavailableError) and error.retry_after_s is None:
        error.retry_after_s = RETRY_AFTER_S
    return error
