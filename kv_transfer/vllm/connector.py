"""The hooks that vLLM calls. The only module of this package that knows vLLM.

vLLM makes one scheduler-side object in the engine core and one worker-side object per
tensor-parallel rank; this class is a shell around ``_SchedulerSide`` or ``_WorkerSide``. A request
takes part if ``sampling_params.extra_args["kv_transfer_params"]`` is one of

    {"baton": "send",    "key", "first_token"}
    {"baton": "receive", "key", "first_token", "incarnation", "addresses"}

Life of a send                              Life of a receive
  schedule   chunks of this step ▸ worker     schedule   blocks reserved ▸ worker ▸ RESERVE
  forward    save_kv_layer ▸ layer_done       each step  get_transfer_results: complete or failed
  finished   blocks stay (True) until         complete   P's first token joins the prompt, so one
             take_released names them                    token is computed; failed: recomputed
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from kv_transfer.doorbell import Doorbell, DoorbellButton
from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvPages
from kv_transfer.options import TransferOptions
from kv_transfer.rank_reports import RankReport, report
from kv_transfer.receive.client import DecodeClient, Reservation, TransferResult
from kv_transfer.send.server import PrefillServer, StepChunk
from kv_transfer.vllm.cpu_packing import packed_positions
from kv_transfer.vllm.metrics import ConnectorMetrics, ConnectorStats, ReceiveReport

# Of an engine core that only waits for KV; a new request may have to wait for the rest of it.
_NAP_S = 0.005


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):
    """What the scheduler side tells every rank for one engine step."""

    # prefill
    chunks: list[StepChunk] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    sampled: list[tuple[str, int | None]] = field(default_factory=list)  # key, first token
    aborted: list[str] = field(default_factory=list)
    # decode
    reservations: list[Reservation] = field(default_factory=list)
    cancelled: list[tuple[str, tuple[str, ...], str]] = field(default_factory=list)


@dataclass(slots=True)
class RankResults(KVConnectorWorkerMetadata):
    """Transfers that ended on some ranks since the last step."""

    results: list[TransferResult]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankResults:
        assert isinstance(other, RankResults)
        return RankResults(self.results + other.results)


class RankCalls:
    """What the front end may call on each rank, through vLLM's ``collective_rpc``."""

    def kv_prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """Begin to make the pairs with a prefill worker; returns at once."""
        self._kv_rank().prewarm(tuple(addresses), incarnation)

    def kv_paired_with(self) -> list[str]:
        """Incarnations of the other pool's workers with which all pairs of this rank are up."""
        return sorted(self._kv_rank().paired_with())

    def _kv_rank(self) -> _WorkerSide:
        connector = get_kv_transfer_group()
        assert isinstance(connector, BatonConnector)
        return connector._rank


class BatonConnector(KVConnectorBase_V1):
    """vLLM's connector interface, forwarded to the side that this process is."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        self._scheduler = _SchedulerSide(
            Doorbell(config.kv_connector_extra_config["incarnation"])
            if role is KVConnectorRole.SCHEDULER and config.is_kv_consumer
            else None
        )
        self._worker = (
            _WorkerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        )

    @property
    def _rank(self) -> _WorkerSide:
        assert self._worker is not None, "a worker-side hook on the scheduler side"
        return self._worker

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # save_kv_layer must run between the layers, also with CUDA graphs

    # scheduler side

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.step_done(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request), None

    # worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._rank.start(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepPlan)
        self._rank.preempt(kv_connector_metadata.preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        # Before the forward pass (start_load_kv comes after it): a reservation need not wait
        # for a decode step, nor the first token for another prompt's chunk.
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepPlan)
        self._rank.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._rank.layer_done(layer_name)

    def wait_for_save(self) -> None:
        self._rank.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._rank.take_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._rank.take_rank_results()

    def shutdown(self) -> None:
        self._scheduler.stop()
        if self._worker is not None:
            self._worker.stop()

    # statistics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return None if self._worker is not None else self._scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return ConnectorStats(data if data is not None else {"receives": []})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVConnectorPromMetrics:
        return ConnectorMetrics(*args)


def full_attention(config: KVCacheConfig) -> FullAttentionSpec:
    """The one kind of cache that all layers have.

    Layers of sliding attention have it, too, where a model mixes them with full attention: vLLM
    keeps all their tokens if a connector does not ask for anything else.

    Raises:
        IncompatibleError: with the sentence that refuses this model.
    """
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    if [type(spec) for spec in specs] != [FullAttentionSpec]:
        names = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise IncompatibleError(
            f"this model's KV cache ({names}) cannot be streamed yet, only one FullAttentionSpec "
            "for all layers"
        )
    (spec,) = specs
    assert isinstance(spec, FullAttentionSpec)
    return spec


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
    ranks: list[TransferResult] = field(default_factory=list)
    computed_tokens: int = 0


class _SchedulerSide:
    def __init__(self, doorbell: Doorbell | None) -> None:
        self._doorbell = doorbell
        self._idle = False  # nothing was computed in the last step
        self._plan = StepPlan()
        self._sends: dict[str, Request] = {}  # scheduled at least once
        self._receives: dict[str, _Receive] = {}  # until the first step that samples
        self._reports: list[ReceiveReport] = []

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        # A transfer is used once: after a failure or a preemption the tokens are recomputed.
        if _params(request, "receive") is None or request.request_id in self._receives:
            return 0, False
        if request.num_preemptions or request.num_output_tokens:
            return 0, False
        tokens = request.num_prompt_tokens - num_computed_tokens
        return tokens, tokens > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        if _params(request, "send") is not None:
            self._sends[request.request_id] = request
        params = _params(request, "receive")
        if params is None or num_external == 0:
            return
        start = request.num_prompt_tokens - num_external
        self._receives[request.request_id] = _Receive(request, num_external, start)
        self._plan.reservations.append(
            Reservation(
                params["key"],
                request.request_id,
                tuple(params["addresses"]),
                params["incarnation"],
                tuple(blocks.get_block_ids()[0]),
                start,
                request.num_prompt_tokens,
            )
        )

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
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
        """Wait for KV in the second empty step in a row: the results of the last full one have
        been handed out by then."""
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
                        request.kv_transfer_params["key"],
                        req_id,
                        tuple(block_ids),
                        num_computed,
                        end,
                        request.num_prompt_tokens,
                    )
                )

    def step_done(self, output: KVConnectorOutput) -> None:
        meta = output.kv_connector_worker_meta
        if meta is not None:
            assert isinstance(meta, RankResults)
            for result in meta.results:
                self._receives[result.request_id].ranks.append(result)
        for req_id in output.finished_recving or ():
            receive = self._receives[req_id]
            receive.pending = False
            receive.failed = not all(result.complete for result in receive.ranks)
            if receive.request.is_finished():  # aborted meanwhile; vLLM now frees its blocks
                del self._receives[req_id]
            elif not receive.failed:
                self._join_first_token(receive)

    def _join_first_token(self, receive: _Receive) -> None:
        """Continue after P's token: it becomes part of the prompt, without KV as yet.

        The same steps as vLLM's own ``Scheduler._update_request_as_session``. The request waits
        for remote KV, so nothing of it was handed to a model runner.
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
                request.kv_transfer_params["key"],
                not receive.failed,
                1 if joined else 0,
                ranks[0].backend,
                sum(result.num_bytes for result in ranks),
                sum(result.messages for result in ranks),
                0 if receive.failed else receive.reserved_tokens,
                max(result.transfer_ms for result in ranks),
                sum(result.hidden_bytes for result in ranks),
                max(result.tail_ms for result in ranks),
                max(result.stall_ms for result in ranks),
                sum(result.retries for result in ranks),
                receive.cached_tokens,
                receive.computed_tokens,
            )
        )

    def finished(self, request: Request) -> bool:
        """True if the blocks must stay until a rank releases them."""
        req_id = request.request_id
        if (params := _params(request, "receive")) is not None:
            receive = self._receives.get(req_id)
            if receive is not None and not receive.pending:
                del self._receives[req_id]
            elif receive is not None or not request.num_output_tokens:
                # vLLM itself keeps the blocks until the pending receive is reported.
                self._plan.cancelled.append(
                    (params["key"], tuple(params["addresses"]), params["incarnation"])
                )
            return False
        if (params := _params(request, "send")) is None:
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
        if self._doorbell is not None:
            self._doorbell.close()
            self._doorbell = None

    def take_stats(self) -> ConnectorStats | None:
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return ConnectorStats({"receives": [msgspec.to_builtins(report) for report in reports]})


class _WorkerSide:
    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = vllm_config.kv_transfer_config
        self._layer_index: dict[str, int] = {}
        self._layers_done = 0
        self._server: PrefillServer | None = None
        self._client: DecodeClient | None = None
        self._button: DoorbellButton | None = None
        self._results: list[TransferResult] = []
        self._tp_rank = 0

    def start(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Raises IncompatibleError, after the front end was told why."""
        extra = dict(self._config.kv_connector_extra_config)
        report_to: str = extra.pop("report_to")
        self._tp_rank = get_tensor_model_parallel_rank()
        try:
            self._start(kv_caches, report_to, **extra)
        except IncompatibleError as error:
            report(report_to, RankReport(extra["token"], self._tp_rank, fault=str(error)))
            raise

    def _start(
        self, kv_caches: dict[str, torch.Tensor], report_to: str, *, model: str, **extra: Any
    ) -> None:
        spec = full_attention(self._kv_cache_config)
        # Our parent is not bound to the cores that this rank computes on.
        options = TransferOptions(**extra, cores=frozenset(os.sched_getaffinity(os.getppid())))

        def on_stuck(reason: str) -> None:
            report(report_to, RankReport(options.token, self._tp_rank, fault=reason))

        names = sorted(kv_caches, key=extract_layer_index)
        self._layer_index = {name: index for index, name in enumerate(names)}
        cache = kv_caches[names[0]]
        isa = self._cpu_kernel(names[0]) if cache.device.type == "cpu" else None
        positions = None if isa is None else packed_positions(cache, isa)
        pages = KvPages([kv_caches[name] for name in names], positions)
        # A CPU kernel packs the keys of a block in an order of its own.
        by_token = isa is None or positions is not None
        geometry = self._geometry(model, spec, cache, len(names), isa, by_token)
        if self._config.is_kv_producer:
            self._server = PrefillServer(pages, geometry, options, on_stuck=on_stuck)
            address = self._server.address
            report(report_to, RankReport(options.token, self._tp_rank, address=address))
        else:
            self._button = DoorbellButton(options.incarnation)
            self._client = DecodeClient(
                pages, geometry, options, on_result=self._button.ring, on_stuck=on_stuck
            )

    def _cpu_kernel(self, layer_name: str) -> str:
        """The instruction set for which vLLM's CPU kernels lay out this layer's cache."""
        context = self._vllm_config.compilation_config.static_forward_context
        isa: str = context[layer_name].isa
        return isa

    def _geometry(
        self, model: str, spec: FullAttentionSpec, cache: torch.Tensor, num_layers: int,
        isa: str | None, by_token: bool,
    ) -> KvGeometry:  # fmt: skip
        _, kv_heads, block_tokens, content = cache.shape
        if block_tokens != spec.block_size or kv_heads != spec.num_kv_heads:
            raise IncompatibleError(
                f"KV cache of shape {tuple(cache.shape)} for blocks of {spec.block_size} tokens "
                f"and {spec.num_kv_heads} heads"
            )
        layout = self._vllm_config.cache_config.get_resolved_kv_cache_layout().name
        geometry = KvGeometry(
            model,
            str(cache.dtype).removeprefix("torch."),
            num_layers,
            self._vllm_config.model_config.get_total_num_kv_heads(),
            content,
            cache.element_size(),
            block_tokens,
            layout if isa is None else f"{layout}/{isa}",
            by_token,
            self._vllm_config.parallel_config.tensor_parallel_size,
            self._tp_rank,
        )
        if len(geometry.heads) != kv_heads:
            raise IncompatibleError(
                f"{kv_heads} KV heads on rank {self._tp_rank}, {len(geometry.heads)} expected"
            )
        return geometry

    def preempt(self, keys: Iterable[str]) -> None:
        if self._server is not None:
            self._server.preempt(keys)

    def begin_step(self, plan: StepPlan) -> None:
        if self._server is not None:
            for key, token in plan.sampled:
                self._server.finish(key, token, computed=True)
            for key in plan.aborted:
                self._server.finish(key, None, computed=False)
            self._layers_done = 0
            self._server.begin_step(plan.chunks)
        if self._client is not None:
            for reservation in plan.reservations:
                self._client.reserve(reservation)
            for key, addresses, incarnation in plan.cancelled:
                self._client.cancel(key, addresses, incarnation)

    def prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        assert self._client is not None, "a prefill worker opens no pair"
        self._client.prewarm(addresses, incarnation)

    def paired_with(self) -> set[str]:
        end = self._server if self._server is not None else self._client
        return set() if end is None else end.paired_with()

    def layer_done(self, layer_name: str) -> None:
        # Layers run in order; one that does not (a draft model's) waits for the step's end.
        if self._server is not None and self._layer_index[layer_name] == self._layers_done:
            self._layers_done += 1
            self._server.layer_done(self._layers_done)

    def end_step(self) -> None:
        if self._server is not None:
            self._server.end_step()

    def take_results(self) -> KVConnectorTransferResults:
        if self._server is not None:
            return KVConnectorTransferResults(finished_sending=self._server.take_released())
        assert self._client is not None
        self._results = self._client.take_results()
        return KVConnectorTransferResults(
            finished_recving={result.request_id for result in self._results},
            failed_recving={r.request_id for r in self._results if not r.complete},
        )

    def take_rank_results(self) -> RankResults | None:
        results, self._results = self._results, []
        return RankResults(results) if results else None

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        if self._client is not None:
            self._client.stop()
        if self._button is not None:
            self._button.close()
