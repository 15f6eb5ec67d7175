"""The class that vLLM loads, and the calls that an engine's front end makes on each rank.

vLLM makes one connector in the engine core (the scheduler side) and one in each tensor-parallel
rank (the worker side). Each hook is forwarded to the side that this process has. A request takes
part if ``sampling_params.extra_args["kv_transfer_params"]`` is one of

    {"baton": "send",    "key", "first_token"}
    {"baton": "receive", "key", "first_token", "incarnation", "addresses"}

Life of a send                              Life of a receive
  schedule   chunks of this step ▸ worker     schedule   blocks reserved ▸ worker ▸ RESERVE
  forward    save_kv_layer ▸ layer_done       each step  get_transfer_results: complete or failed
  finished   blocks stay (True) until         complete   the first token joins the prompt, so one
             a rank releases them                        token is computed; failed: recomputed
"""

from __future__ import annotations

from typing import Any

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
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kv_transfer.doorbell import Doorbell
from kv_transfer.vllm.metrics import ConnectorMetrics, ConnectorStats
from kv_transfer.vllm.scheduler_side import SchedulerSide
from kv_transfer.vllm.step import StepPlan
from kv_transfer.vllm.worker_side import WorkerSide


class RankCalls:
    """What the front end may call on each rank, through vLLM's ``collective_rpc``."""

    def kv_prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """Begin to make the pairs with a prefill worker; returns at once."""
        self._kv_rank().prewarm(tuple(addresses), incarnation)

    def kv_paired_with(self) -> list[str]:
        """Incarnations of the other pool's workers with which all pairs of this rank are up."""
        return sorted(self._kv_rank().paired_with())

    def _kv_rank(self) -> WorkerSide:
        connector = get_kv_transfer_group()
        assert isinstance(connector, BatonConnector)
        return connector.worker_side


class BatonConnector(KVConnectorBase_V1):
    """vLLM's connector interface, forwarded to the side that this process has."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Called by vLLM while the engine starts: once in the engine core, once in each rank."""
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        self._scheduler = SchedulerSide(
            Doorbell(config.kv_connector_extra_config["incarnation"])
            if role is KVConnectorRole.SCHEDULER and config.is_kv_consumer
            else None
        )
        self._worker = (
            WorkerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        )

    @property
    def worker_side(self) -> WorkerSide:
        """This rank's end of the stream. Only in a rank."""
        assert self._worker is not None, "a worker-side hook was called on the scheduler side"
        return self._worker

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Called by vLLM's configuration, once, before the engine starts.

        ``save_kv_layer`` must run between the layers, also with CUDA graphs.
        """
        return True

    # Hooks of the scheduler side, called from the engine core's thread.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Called by the scheduler for a waiting request, each time that it tries to schedule it."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Called by the scheduler, once each time that a waiting request has got its blocks."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Called by the scheduler, once a step, after it has scheduled; empty steps included."""
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Called by the scheduler with what all ranks reported, after each step."""
        self._scheduler.step_done(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Called by the scheduler, once a request, before its blocks are freed.

        True keeps the blocks until ``get_transfer_results`` names the request.
        """
        return self._scheduler.finished(request), None

    # Hooks of the worker side, called from the rank's engine thread.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Called by the model runner, once, when the caches are allocated."""
        self.worker_side.start(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Called by the model runner, once a step, before preempted blocks are overwritten."""
        assert isinstance(kv_connector_metadata, StepPlan)
        self.worker_side.preempt(kv_connector_metadata.preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called by the model runner, once a step, before the forward pass.

        The step begins here and not in ``start_load_kv``, which vLLM may call after the forward
        pass. So a reservation does not wait for a decode step, nor a first token for the chunk of
        another prompt.
        """
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepPlan)
        self.worker_side.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Called by the model runner, once a step. Nothing to do: threads of our own receive."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called by each attention layer before it runs. A request that runs has all its KV."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Called by each attention layer after it has written its KV, once a step."""
        self.worker_side.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """Called by the model runner, once a step, after the forward pass. Does not wait."""
        self.worker_side.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Called by the model runner, once a step, after ``wait_for_save``; also in empty steps."""
        return self.worker_side.take_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Called by the model runner, once a step, after ``get_transfer_results``."""
        return self.worker_side.take_rank_results()

    # Hooks of both sides.

    def shutdown(self) -> None:
        """Called by vLLM when the process ends in good order."""
        self._scheduler.stop()
        if self._worker is not None:
            self._worker.stop()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called on both sides, once a step. Only the scheduler side reports."""
        return None if self._worker is not None else self._scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Called by the front end, to rebuild the statistics that it received."""
        return ConnectorStats(data if data is not None else {"receives": []})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVConnectorPromMetrics:
        """Called by the front end, once, if it serves Prometheus metrics."""
        return ConnectorMetrics(*args)
