"""The connector in vLLM's scheduler. It chooses the requests and blocks that send or receive KV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from kv_transfer.doorbell import Doorbell
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk
from kv_transfer.vllm.metadata import RankResults, StepPlan
from kv_transfer.vllm.metrics import ConnectorStats, ReceiveReport

# Longest sleep of an idle engine core that waits for KV. A new request may have to wait that long.
_IDLE_SLEEP_S = 0.005


def _params(request: Request, kind: str) -> dict[str, Any] | None:
    params = request.kv_transfer_params
    return params if params is not None and params.get("baton") == kind else None


@dataclass(slots=True)
class _Receive:
    request: Request
    reserved_tokens: int
    cached_tokens: int
    pending: bool = True
    failed: bool = False
    rank_results: list[TransferResult] = field(default_factory=list)
    computed_tokens: int = 0


class SchedulerSide:
    """Used by the engine core's thread only.

    ``doorbell`` is None if the engine cannot receive KV.
    """

    def __init__(self, doorbell: Doorbell | None) -> None:
        self._doorbell = doorbell
        self._idle = False  # nothing was computed in the last step
        self._plan = StepPlan()
        # By request id:
        self._sends: dict[str, Request] = {}  # scheduled at least once
        self._receives: dict[str, _Receive] = {}  # until the first step that samples
        self._reports: list[ReceiveReport] = []

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return the number of tokens to receive, and whether there are any."""
        # A transfer is used once. After a failure or preemption, this engine computes the prompt.
        if _params(request, "receive") is None or request.request_id in self._receives:
            return 0, False
        if request.num_preemptions or request.num_output_tokens:
            return 0, False
        tokens = request.num_prompt_tokens - num_computed_tokens
        return tokens, tokens > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Plan what the request needs now that it has blocks.

        If the request receives and ``num_external`` is not 0, reserve the KV of the last
        ``num_external`` tokens of the prompt. If the request sends, add it to ``_sends``.
        """
        if _params(request, "send") is not None:
            self._sends[request.request_id] = request
        params = _params(request, "receive")
        if params is None or num_external == 0:
            return
        start = request.num_prompt_tokens - num_external
        self._receives[request.request_id] = _Receive(request, num_external, start)
        self._plan.reservations.append(
            Reservation(
                transfer_id=params["transfer_id"],
                request_id=request.request_id,
                addresses=tuple(params["addresses"]),
                incarnation=params["incarnation"],
                block_ids=tuple(blocks.get_block_ids()[0]),
                token_start=start,
                token_end=request.num_prompt_tokens,
            )
        )

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """Return what the ranks must know for this step.

        If the engine core only waits for KV, this call may sleep. If the step samples the first
        token of a request that receives, this call makes the request's report.
        """
        self._sleep_until_kv_arrives(busy=output.total_num_scheduled_tokens > 0)
        for new in output.scheduled_new_reqs:
            self._scheduled(output, new.req_id, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for req_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._scheduled(output, req_id, num_computed)
        for request in self._sends.values():
            if request.num_preemptions:
                self._plan.preempted.append(request.kv_transfer_params["transfer_id"])
        plan, self._plan = self._plan, StepPlan()
        return plan

    def _sleep_until_kv_arrives(self, *, busy: bool) -> None:
        """Sleep until a rank rings if KV is pending and this step and the previous one are empty.

        After one empty step, the engine core has delivered the tokens of all earlier steps.
        """
        if (
            self._doorbell is not None
            and self._idle
            and not busy
            and self._plan == StepPlan()  # nothing for the ranks
            and any(receive.pending for receive in self._receives.values())
        ):
            self._doorbell.wait(_IDLE_SLEEP_S)
        self._idle = not busy

    def _scheduled(self, output: SchedulerOutput, req_id: str, num_computed: int) -> None:
        scheduled = output.num_scheduled_tokens[req_id]
        receive = self._receives.get(req_id)
        if receive is not None:
            receive.computed_tokens += scheduled
            if num_computed + scheduled >= receive.request.num_tokens:
                self._reports.append(_report_of(receive))
                del self._receives[req_id]
            return
        request = self._sends.get(req_id)
        if request is not None and not request.num_preemptions:
            (block_ids,) = output.kv_connector_block_state.resolve_block_ids(req_id)
            end = min(num_computed + scheduled, request.num_prompt_tokens)
            if num_computed < end:
                self._plan.chunks.append(
                    StepChunk(
                        transfer_id=request.kv_transfer_params["transfer_id"],
                        request_id=req_id,
                        block_ids=tuple(block_ids),
                        token_start=num_computed,
                        token_end=end,
                        num_tokens=request.num_prompt_tokens,
                    )
                )

    def step_done(self, output: KVConnectorOutput) -> None:
        """Take the ranks' results. If a receive is complete, append P's first token."""
        meta = output.kv_connector_worker_meta
        if meta is not None:
            assert isinstance(meta, RankResults)
            for result in meta.results:
                self._receives[result.request_id].rank_results.append(result)
        for req_id in output.finished_recving or ():
            receive = self._receives[req_id]
            receive.pending = False
            receive.failed = not all(result.complete for result in receive.rank_results)
            if receive.request.is_finished():  # aborted meanwhile; vLLM now frees its blocks
                del self._receives[req_id]
            elif not receive.failed:
                _append_first_token(receive)

    def request_finished(self, request: Request) -> bool:
        """Return True if the blocks must stay until all ranks have released them."""
        req_id = request.request_id
        if (params := _params(request, "receive")) is not None:
            receive = self._receives.get(req_id)
            if receive is not None and not receive.pending:
                del self._receives[req_id]
            elif receive is not None or not request.num_output_tokens:
                # vLLM itself keeps the blocks until the pending receive is reported.
                self._plan.cancelled.append(
                    (params["transfer_id"], tuple(params["addresses"]), params["incarnation"])
                )
            return False
        if (params := _params(request, "send")) is None:
            return False
        scheduled = self._sends.pop(req_id, None) is not None
        if request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        ):
            first_token_id = request.output_token_ids[0] if params["forwards_first_token"] else None
            self._plan.sampled.append((params["transfer_id"], first_token_id))
        else:
            self._plan.aborted.append(params["transfer_id"])
        return scheduled

    def take_stats(self) -> ConnectorStats | None:
        """Return the reports since the last call, or None if there are none."""
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return ConnectorStats({"receives": [msgspec.to_builtins(report) for report in reports]})

    def stop(self) -> None:
        if self._doorbell is not None:
            self._doorbell.close()
            self._doorbell = None


def _append_first_token(receive: _Receive) -> None:
    """Append P's first token, if forwarded, to the prompt. This engine computes the token's KV.

    These are the steps of vLLM's own ``Scheduler._update_request_as_session``. Only the scheduler
    knows the request yet, because the request waits for remote KV.
    """
    token_ids = {result.first_token_id for result in receive.rank_results}
    if token_ids == {None}:
        return  # vLLM recomputes the last prompt token and samples
    (token_id,) = token_ids
    request = receive.request
    request.prompt_token_ids.append(token_id)
    request._all_token_ids.append(token_id)
    request.num_prompt_tokens += 1
    request.max_tokens -= 1
    request.update_block_hashes()


def _report_of(receive: _Receive) -> ReceiveReport:
    results, request = receive.rank_results, receive.request
    joined = not receive.failed and results[0].first_token_id is not None
    return ReceiveReport(
        transfer_id=request.kv_transfer_params["transfer_id"],
        complete=not receive.failed,
        first_index=1 if joined else 0,
        backend=results[0].backend,
        num_bytes=sum(result.num_bytes for result in results),
        messages=sum(result.messages for result in results),
        tokens=0 if receive.failed else receive.reserved_tokens,
        transfer_ms=max(result.transfer_ms for result in results),
        hidden_bytes=sum(result.hidden_bytes for result in results),
        tail_ms=max(result.tail_ms for result in results),
        stall_ms=max(result.stall_ms for result in results),
        retries=sum(result.retries for result in results),
        cached_tokens=receive.cached_tokens,
        computed_tokens=receive.computed_tokens,
    )
