"""The connector class that vLLM loads.

vLLM makes one connector in the scheduler (in the engine core's process), and one in each
tensor-parallel rank. This class forwards each hook to ``SchedulerSide`` or ``WorkerSide``. A
request takes part if ``sampling_params.extra_args["kv_transfer_params"]`` is one of

    {"baton": "send",    "transfer_id", "forwards_first_token"}
    {"baton": "receive", "transfer_id", "forwards_first_token", "incarnation", "addresses"}

Life of a send                              Life of a receive
  schedule   chunks of this step ▸ ranks      schedule   blocks reserved ▸ ranks ▸ RESERVE
  forward    save_kv_layer ▸ layer_done       each step  get_transfer_results: complete or failed
  finished   request_finished returns True:   complete   P's first token, if forwarded, joins the
             blocks stay until all ranks                 prompt; one position is computed
             have released them               failed     the prompt is recomputed
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
from kv_transfer.vllm.metadata import StepPlan
from kv_transfer.vllm.metrics import ConnectorMetrics, ConnectorStats
from kv_transfer.vllm.scheduler_side import SchedulerSide
from kv_transfer.vllm.worker_side import Role, WorkerSide


class RankCalls:
    """Methods that the front end calls on each rank through vLLM's ``collective_rpc``."""

    def drop_unused_memory(self) -> None:
        """Give the memory back that the engine's start has used."""
        self._worker_side().drop_unused_memory()

    def kv_prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """Start to make the pairs with a prefill worker, and return before they are open."""
        self._worker_side().prewarm(tuple(addresses), incarnation)

    def kv_paired_with(self, role: Role) -> list[str]:
        """Return the incarnations of the workers with which all pairs of this rank are open.

        Args:
            role: in which the pairs are used.
        """
        return sorted(self._worker_side().paired_with(role))

    def _worker_side(self) -> WorkerSide:
        connector = get_kv_transfer_group()
        assert isinstance(connector, BatonConnector)
        return connector.worker_side


class BatonConnector(KVConnectorBase_V1):
    """Implements vLLM's connector interface. ``role`` is scheduler or worker (a rank)."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """The scheduler and each rank make one connector when the engine starts."""
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        self.scheduler_side = SchedulerSide(
            Doorbell(config.kv_connector_extra_config["incarnation"])
            if role is KVConnectorRole.SCHEDULER and config.is_kv_consumer
            else None
        )
        self._worker_side = (
            WorkerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        )

    @property
    def worker_side(self) -> WorkerSide:
        assert self._worker_side is not None, "a worker-side hook on the scheduler side"
        return self._worker_side

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Return True: a full CUDA graph would not call ``save_kv_layer`` between the layers."""
        return True

    # ---- scheduler side: called by the scheduler, in the engine core's thread ----------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """The scheduler calls this when it tries to start a request that has no computed tokens.

        Returns:
            How many tokens the prefill worker supplies, and whether they arrive asynchronously.
        """
        return self.scheduler_side.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The scheduler calls this when it has allocated blocks for a waiting request.

        A request that receives gets two calls: the first with the number of tokens to receive, and
        the second with 0 when the request starts to run.
        """
        self.scheduler_side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The scheduler calls this when it has scheduled a step, even if the step is empty."""
        return self.scheduler_side.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """The scheduler calls this after each step, with the combined output of all ranks."""
        self.scheduler_side.step_done(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The scheduler calls this once for each request, when it is finished or aborted.

        Returns:
            Whether the blocks must stay until all ranks have released them, and always None: the
            request's output carries no parameters.
        """
        return self.scheduler_side.request_finished(request), None

    # ---- worker side: called by the model runner, in the thread that computes ----------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The model runner calls this once, when it has allocated the caches."""
        self.worker_side.start(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The model runner calls this first in each step, before blocks are overwritten."""
        assert isinstance(kv_connector_metadata, StepPlan)
        self.worker_side.preempt(kv_connector_metadata.preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The model runner calls this in each step, before the forward pass.

        The worker side begins the step here, because ``start_load_kv`` runs only after the forward
        pass. By then, a reservation has waited for a whole decode step, and the END of a finished
        prefill has waited for a chunk of another prompt.
        """
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepPlan)
        self.worker_side.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Does nothing, because other threads load the KV."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing, because no request runs before its KV is complete."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Each attention layer calls this in each forward pass, after it has written its KV."""
        self.worker_side.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """The model runner calls this in each step, after the forward pass."""
        self.worker_side.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The model runner calls this in each step, after ``wait_for_save``."""
        return self.worker_side.take_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The model runner calls this in each step, after ``get_transfer_results``."""
        return self.worker_side.take_rank_results()

    def shutdown(self) -> None:
        """The scheduler and each rank call this once, when the engine ends."""
        self.scheduler_side.stop()
        if self._worker_side is not None:
            self._worker_side.stop()

    # ---- statistics ---------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """vLLM calls this on both sides after each step. Only the scheduler side has statistics."""
        return None if self._worker_side is not None else self.scheduler_side.take_stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """vLLM's logger in the front end calls this to restore the statistics of each step."""
        return ConnectorStats(data if data is not None else {"receives": []})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVConnectorPromMetrics:
        """vLLM's Prometheus logger in the front end calls this once."""
        return ConnectorMetrics(*args)
