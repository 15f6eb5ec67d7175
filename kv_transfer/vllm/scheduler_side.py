"""The connector in the engine core: which requests send or receive KV, and how each transfer ended.

Called by vLLM's scheduler, from the engine core's only thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from kv_transfer.doorbell import Doorbell
from kv_transfer.receive import Reservation, TransferResult
from kv_transfer.send import StepChunk
from kv_transfer.vllm.metrics import ConnectorStats, ReceiveReport
from kv_transfer.vllm.step import Cancellation, RankResults, StepPlan

# Longest sleep of an idle engine core that waits for KV. A new request may have to wait that long.
_NAP_S = 0.005


def kv_params(request: Request, kind: str) -> dict[str, Any] | None:
    """The request's transfer parameters if it is of this kind ("send" or "receive")."""
    params = request.kv_transfer_params
    return params if params is not None and params.get("baton") == kind else None


@dataclass(slots=True)
class _Receive:
    """One request on a decode worker whose KV is received."""

    request: Request
    reserved_tokens: int
    cached_tokens: int
    pending: bool = True
    failed: bool = False
    ranks: list[TransferResult] = field(default_factory=list)
    computed_tokens: int = 0


class SchedulerSide:
    """Knows each request's transfer, from its first schedule to its report.

    Args:
        doorbell: wakes an idle engine core; only on a decode worker.
    """

    def __init__(self, doorbell: Doorbell | None) -> None:
        self._doorbell = doorbell
        self._idle = False  # the last step computed nothing
        self._plan = StepPlan()
        self._sends: dict[str, Request] = {}  # from their first schedule on
        self._receives: dict[str, _Receive] = {}  # until the step that samples the first token
        self._reports: list[ReceiveReport] = []

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens will be received, and whether the engine should wait for them.

        A transfer is used once: after a failure or a preemption the engine recomputes the tokens.
        """
        if kv_params(request, "receive") is None or request.request_id in self._receives:
            return 0, False
        if request.num_preemptions or request.num_output_tokens:
            return 0, False
        tokens = request.num_prompt_tokens - num_computed_tokens
        return tokens, tokens > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Reserve the tokens that ``matched_tokens`` announced, now that they have blocks."""
        if kv_params(request, "send") is not None:
            self._sends[request.request_id] = request
        params = kv_params(request, "receive")
        if params is None or num_external == 0:
            return
        start = request.num_prompt_tokens - num_external
        self._receives[request.request_id] = _Receive(request, num_external, start)
        self._plan.reservations.append(
            Reservation(
                key=params["key"],
                request_id=request.request_id,
                addresses=tuple(params["addresses"]),
                incarnation=params["incarnation"],
                block_ids=tuple(blocks.get_block_ids()[0]),
                token_start=start,
                token_end=request.num_prompt_tokens,
            )
        )

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """The plan for the ranks; a new one begins."""
        self._nap(busy=output.total_num_scheduled_tokens > 0)
        for new in output.scheduled_new_reqs:
            self._scheduled(output, new.req_id, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for req_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._scheduled(output, req_id, num_computed)
        for request in self._sends.values():
            if request.num_preemptions:
                self._plan.preempted.append(request.kv_transfer_params["key"])
        plan, self._plan = self._plan, StepPlan()
        return plan

    def _nap(self, *, busy: bool) -> None:
        """Sleep in the second empty step in a row, while KV is on its way.

        Not in the first: the engine has not yet handed out the results of the last full step.
        """
        if (
            self._doorbell is not None
            and self._idle
            and not busy
            and not (self._plan.reservations or self._plan.cancelled)
            and any(receive.pending for receive in self._receives.values())
        ):
            self._doorbell.nap(_NAP_S)
        self._idle = not busy

    def _scheduled(self, output: SchedulerOutput, req_id: str, num_computed: int) -> None:
        scheduled = output.num_scheduled_tokens[req_id]
        receive = self._receives.get(req_id)
        if receive is not None:
            receive.computed_tokens += scheduled
            if num_computed + scheduled >= receive.request.num_tokens:
                self._report(receive)
                del self._receives[req_id]
            return
        request = self._sends.get(req_id)
        if request is not None and not request.num_preemptions:
            (block_ids,) = output.kv_connector_block_state.resolve_block_ids(req_id)
            end = min(num_computed + scheduled, request.num_prompt_tokens)
            if num_computed < end:
                self._plan.chunks.append(
                    StepChunk(
                        key=request.kv_transfer_params["key"],
                        request_id=req_id,
                        block_ids=tuple(block_ids),
                        token_start=num_computed,
                        token_end=end,
                        num_tokens=request.num_prompt_tokens,
                    )
                )

    def step_done(self, output: KVConnectorOutput) -> None:
        """Note what the ranks reported with a step."""
        meta = output.kv_connector_worker_meta
        if meta is not None:
            assert isinstance(meta, RankResults)
            for result in meta.results:
                self._receives[result.request_id].ranks.append(result)
        for req_id in output.finished_recving or ():
            receive = self._receives[req_id]
            receive.pending = False
            receive.failed = not all(result.complete for result in receive.ranks)
            if receive.request.is_finished():  # it was aborted; vLLM now frees its blocks
                del self._receives[req_id]
            elif not receive.failed:
                self._join_first_token(receive)

    def _join_first_token(self, receive: _Receive) -> None:
        """Append the prefill worker's first token to the prompt; its KV is still to be computed.

        These are the steps of vLLM's own ``Scheduler._update_request_as_session``. The request
        still waits for remote KV, so no model runner has seen it.
        """
        tokens = {result.first_token for result in receive.ranks}
        if tokens == {None}:
            return  # vLLM recomputes the last prompt token and samples
        (token,) = tokens
        request = receive.request
        request.prompt_token_ids.append(token)
        request._all_token_ids.append(token)
        request.num_prompt_tokens += 1
        request.max_tokens -= 1
        request.update_block_hashes()

    def _report(self, receive: _Receive) -> None:
        ranks, request = receive.ranks, receive.request
        joined = not receive.failed and ranks[0].first_token is not None
        self._reports.append(
            ReceiveReport(
                key=request.kv_transfer_params["key"],
                complete=not receive.failed,
                first_index=1 if joined else 0,
                backend=ranks[0].backend,
                num_bytes=sum(result.num_bytes for result in ranks),
                messages=sum(result.messages for result in ranks),
                tokens=0 if receive.failed else receive.reserved_tokens,
                transfer_ms=max(result.transfer_ms for result in ranks),
                hidden_bytes=sum(result.hidden_bytes for result in ranks),
                tail_ms=max(result.tail_ms for result in ranks),
                stall_ms=max(result.stall_ms for result in ranks),
                retries=sum(result.retries for result in ranks),
                cached_tokens=receive.cached_tokens,
                computed_tokens=receive.computed_tokens,
            )
        )

    def finished(self, request: Request) -> bool:
        """Note the end of a request; True if its blocks must stay until a rank releases them."""
        req_id = request.request_id
        if (params := kv_params(request, "receive")) is not None:
            receive = self._receives.get(req_id)
            if receive is not None and not receive.pending:
                del self._receives[req_id]
            elif receive is not None or not request.num_output_tokens:
                # vLLM itself keeps the blocks until the pending receive is reported.
                self._plan.cancelled.append(
                    Cancellation(params["key"], tuple(params["addresses"]), params["incarnation"])
                )
            return False
        if (params := kv_params(request, "send")) is None:
            return False
        scheduled = self._sends.pop(req_id, None) is not None
        if request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        ):
            token = request.output_token_ids[0] if params["first_token"] else None
            self._plan.sampled.append((params["key"], token))
        else:
            self._plan.aborted.append(params["key"])
        return scheduled

    def stop(self) -> None:
        """Close the doorbell. Idempotent."""
        if self._doorbell is not None:
            self._doorbell.close()
            self._doorbell = None

    def take_stats(self) -> ConnectorStats | None:
        """The reports of receives since the last call; None if there are none."""
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return ConnectorStats({"receives": [msgspec.to_builtins(report) for report in reports]})
