"""The connector in one rank. It starts the KV stream and tells it about the engine's steps."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from core.memory import trim_heap
from kv_transfer.doorbell import DoorbellButton
from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.options import TransferOptions
from kv_transfer.rank_reports import RankReport, send_report
from kv_transfer.receive.client import DecodeClient
from kv_transfer.receive.records import TransferResult
from kv_transfer.send.server import PrefillServer
from kv_transfer.vllm.cpu_packing import packed_positions
from kv_transfer.vllm.metadata import RankResults, StepPlan

Role = Literal["prefill", "decode"]  # the values of ``core.types.Pool``


class WorkerSide:
    """Used only by the rank's thread that runs the model.

    A prefill rank (``kv_producer``) has a ``PrefillServer``. A decode rank (``kv_consumer``) has a
    ``DecodeClient``. A rank whose worker can change its pool (``kv_both``) has both. They share
    only the caches. vLLM lets no other request use a block while a receive writes to it.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = vllm_config.kv_transfer_config
        self._layer_index: dict[str, int] = {}
        self._layers_done = 0
        self._caches: KvCaches | None = None
        self._server: PrefillServer | None = None
        self._client: DecodeClient | None = None
        self._button: DoorbellButton | None = None
        self._results: list[TransferResult] = []
        self._tp_rank = 0

    def start(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start this rank's side of the KV stream.

        A rank that can send KV reports its control address to the front end.

        Raises:
            IncompatibleError: the caches cannot be streamed. The front end gets the reason, too.
        """
        extra = dict(self._config.kv_connector_extra_config)
        report_to: str = extra.pop("report_to")
        self._tp_rank = get_tensor_model_parallel_rank()
        try:
            self._start(kv_caches, report_to, **extra)
        except IncompatibleError as error:
            report = RankReport(self._tp_rank, fault=str(error))
            send_report(report_to, extra["secret"], report)
            raise

    def _start(
        self, kv_caches: dict[str, torch.Tensor], report_to: str, *, model: str, **extra: Any
    ) -> None:
        spec = full_attention(self._kv_cache_config)
        # The stream's threads run on the parent process's cores, because the parent is not bound
        # to the cores on which this rank computes.
        options = TransferOptions(**extra, cores=frozenset(os.sched_getaffinity(os.getppid())))

        def on_stuck(reason: str) -> None:
            send_report(report_to, options.secret, RankReport(self._tp_rank, fault=reason))

        names = sorted(kv_caches, key=extract_layer_index)
        self._layer_index = {name: index for index, name in enumerate(names)}
        cache = kv_caches[names[0]]
        isa = self._cpu_kernel(names[0]) if cache.device.type == "cpu" else None
        positions = None if isa is None else packed_positions(cache, isa)
        caches = self._caches = KvCaches([kv_caches[name] for name in names], positions)
        # On CPUs the strides do not show the order of a block's elements: the kernel packs them.
        positions_known = isa is None or positions is not None
        geometry = self._geometry(model, spec, cache, len(names), isa, positions_known)
        if self._config.is_kv_producer:
            self._server = PrefillServer(caches, geometry, options, on_stuck=on_stuck)
            address = self._server.address
            send_report(report_to, options.secret, RankReport(self._tp_rank, address=address))
        if self._config.is_kv_consumer:
            self._button = DoorbellButton(options.incarnation)
            self._client = DecodeClient(
                caches, geometry, options, on_result=self._button.ring, on_stuck=on_stuck
            )

    def _cpu_kernel(self, layer_name: str) -> str:
        """Return the instruction set for which vLLM's CPU kernels lay out this layer's cache."""
        context = self._vllm_config.compilation_config.static_forward_context
        isa: str = context[layer_name].isa
        return isa

    def _geometry(
        self, model: str, spec: FullAttentionSpec, cache: torch.Tensor, num_layers: int,
        isa: str | None, positions_known: bool,
    ) -> KvGeometry:  # fmt: skip
        _, kv_heads, block_tokens, content = cache.shape
        if block_tokens != spec.block_size or kv_heads != spec.num_kv_heads:
            raise IncompatibleError(
                f"vLLM allocated a KV cache of shape {tuple(cache.shape)} for blocks of "
                f"{spec.block_size} tokens and {spec.num_kv_heads} heads"
            )
        layout = self._vllm_config.cache_config.get_resolved_kv_cache_layout().name
        geometry = KvGeometry(
            model=model,
            dtype=str(cache.dtype).removeprefix("torch."),
            num_layers=num_layers,
            total_kv_heads=self._vllm_config.model_config.get_total_num_kv_heads(),
            content=content,
            item_bytes=cache.element_size(),
            block_tokens=block_tokens,
            layout=layout if isa is None else f"{layout}/{isa}",
            positions_known=positions_known,
            tp_size=self._vllm_config.parallel_config.tensor_parallel_size,
            tp_rank=self._tp_rank,
        )
        if len(geometry.heads) != kv_heads:
            raise IncompatibleError(
                f"rank {self._tp_rank} has {kv_heads} KV heads, {len(geometry.heads)} expected"
            )
        return geometry

    def preempt(self, transfer_ids: Iterable[str]) -> None:
        """Fail these transfers, and return when no sender reads their blocks."""
        if self._server is not None:
            self._server.preempt(transfer_ids)

    def begin_step(self, plan: StepPlan) -> None:
        if self._server is not None:
            for transfer_id, first_token_id in plan.sampled:
                self._server.request_finished(transfer_id, first_token_id, computed=True)
            for transfer_id in plan.aborted:
                self._server.request_finished(transfer_id, None, computed=False)
            self._layers_done = 0
            self._server.begin_step(plan.chunks)
        if self._client is not None:
            for reservation in plan.reservations:
                self._client.reserve(reservation)
            for transfer_id, addresses, incarnation in plan.cancelled:
                self._client.cancel(transfer_id, addresses, incarnation)

    def drop_unused_memory(self) -> None:
        """Give the memory back that the engine's start has used. Call before the first request."""
        if self._caches is not None:
            self._caches.drop_zeros()
        trim_heap()

    def prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """See ``DecodeClient.prewarm``."""
        assert self._client is not None, "this rank cannot receive KV, so it opens no pair"
        self._client.prewarm(addresses, incarnation)

    def paired_with(self, role: Role) -> set[str]:
        """Return the incarnations of the workers with which all pairs of this rank are open.

        Args:
            role: of this worker now. As a prefill worker, its server's pairs count; as a decode
                worker, its client's.
        """
        end = self._server if role == "prefill" else self._client
        return set() if end is None else end.paired_with()

    def layer_done(self, layer_name: str) -> None:
        # ``end_step`` counts a layer that runs out of order, such as a draft model's.
        if self._server is not None and self._layer_index[layer_name] == self._layers_done:
            self._layers_done += 1
            self._server.layer_done(self._layers_done)

    def end_step(self) -> None:
        if self._server is not None:
            self._server.end_step()

    def take_results(self) -> KVConnectorTransferResults:
        """Return sends whose blocks may be freed, and receives that are over."""
        if self._client is not None:
            self._results = self._client.take_results()
        return KVConnectorTransferResults(
            finished_sending=self._server.take_released() if self._server is not None else set(),
            finished_recving={result.request_id for result in self._results},
            failed_recving={r.request_id for r in self._results if not r.complete},
        )

    def take_rank_results(self) -> RankResults | None:
        """Return the details of the receives that the last ``take_results`` returned."""
        results, self._results = self._results, []
        return RankResults(results) if results else None

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        if self._client is not None:
            self._client.stop()
        if self._button is not None:
            self._button.close()


def full_attention(config: KVCacheConfig) -> FullAttentionSpec:
    """Return the cache specification that all layers share.

    If a model mixes sliding-window and full attention, vLLM gives all layers this specification
    and keeps all tokens, because the connector does not declare ``SupportsHMA``.

    Raises:
        IncompatibleError: some layers have another kind of cache.
    """
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    if [type(spec) for spec in specs] != [FullAttentionSpec]:
        names = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise IncompatibleError(
            f"this model's KV cache ({names}) cannot be streamed yet: all layers must share one "
            "FullAttentionSpec"
        )
    (spec,) = specs
    assert isinstance(spec, FullAttentionSpec)
    return spec
