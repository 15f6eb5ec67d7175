"""Runs vLLM's own scheduler with the scheduler side of Baton's connector. The model is simulated.

There is no engine and no other process. Each call of ``SchedulerBench.step`` is one engine step. A
test passes what the ranks report at this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from core.config.schema import ModelConfig
from core.model.resolve import resolve_model
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.vllm.connector import BatonConnector
from kv_transfer.vllm.metadata import RankResults, StepPlan

BLOCK_TOKENS = 16
SAMPLED = 7  # the token that the model always samples
_HASH = get_hash_fn_by_name("sha256")


@dataclass
class Step:
    """One engine step: its plan, what the model computed, and the reports to the front end."""

    output: SchedulerOutput
    plan: StepPlan  # for the ranks
    computed: dict[str, int]  # number of tokens, by request id
    tokens: dict[str, list[int]] = field(default_factory=dict)  # sampled ids, by request id
    reports: list[dict[str, Any]] = field(default_factory=list)  # one for each KV receive


class SchedulerBench:
    """A scheduler with its connector.

    Args:
        pool: "kv_producer" (prefill) or "kv_consumer" (decode).
        blocks: number of the engine's KV blocks, including the null block.
        step_tokens: maximum number of tokens that one step computes.
    """

    def __init__(self, pool: str, *, blocks: int = 64, step_tokens: int = 256) -> None:
        config = AsyncEngineArgs(
            model=resolve_model(ModelConfig(), print).path,
            dtype="float32",
            max_model_len=1024,
            max_num_batched_tokens=step_tokens,
            max_num_seqs=8,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector="BatonConnector",
                kv_connector_module_path="kv_transfer.vllm.connector",
                kv_role=pool,
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"incarnation": uuid4().hex},
            ),
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        caches = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer.0"], spec)])
        self.scheduler = Scheduler(
            config, caches, StructuredOutputManager(config), block_size=BLOCK_TOKENS, log_stats=True
        )
        connector = self.scheduler.connector
        assert isinstance(connector, BatonConnector)
        self.connector = connector
        init_none_hash(_HASH)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, _HASH)

    def close(self) -> None:
        self.scheduler.shutdown()

    @property
    def blocks_used(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def add(
        self,
        name: str,
        tokens: list[int],
        kind: str,
        *,
        max_tokens: int = 4,
        forwards_first_token: bool = True,
    ) -> Request:
        params = {
            "baton": kind,
            "transfer_id": f"{name}#1",
            "forwards_first_token": forwards_first_token,
        }
        if kind == "receive":
            params |= {"incarnation": "p1", "addresses": ["tcp://127.0.0.1:1"]}
        request = Request(
            name,
            list(tokens),
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args={"kv_transfer_params": params},
            ),
            None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self, *, sent: set[str] | None = None, received: list[TransferResult] | None = None
             ) -> Step:  # fmt: skip
        """Do what vLLM's engine core does: schedule, compute, and pass on the ranks' reports."""
        output = self.scheduler.schedule()
        plan = output.kv_connector_metadata
        assert isinstance(plan, StepPlan)
        step = Step(output, plan, dict(output.num_scheduled_tokens))
        names = list(output.num_scheduled_tokens)
        for name in names:
            request = self.scheduler.requests[name]
            whole = request.num_computed_tokens >= request.num_tokens
            step.tokens[name] = [SAMPLED] if whole else []
        results = received or []
        report = KVConnectorOutput(
            finished_sending=sent or set(),
            finished_recving={result.request_id for result in results},
            failed_recving={result.request_id for result in results if not result.complete},
            kv_connector_worker_meta=RankResults(results) if results else None,
        )
        to_front = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                names,
                {name: index for index, name in enumerate(names)},
                [step.tokens[name] for name in names],
                kv_connector_output=report,
            ),
        )
        for outputs in to_front.values():
            stats = outputs.scheduler_stats
            if stats is not None and stats.kv_connector_stats is not None:
                step.reports += stats.kv_connector_stats["receives"]
        return step


def result_of(
    step: Step, *, complete: bool = True, first_token_id: int | None = 99
) -> TransferResult:
    """Return a result for the only reservation of a step."""
    (reservation,) = step.plan.reservations
    return result_for(reservation, complete=complete, first_token_id=first_token_id)


def result_for(
    reservation: Reservation, *, complete: bool, first_token_id: int | None = 99
) -> TransferResult:
    return TransferResult(
        transfer_id=reservation.transfer_id,
        request_id=reservation.request_id,
        complete=complete,
        first_token_id=first_token_id if complete else None,
        backend="gloo",
        num_bytes=1000,
        messages=2,
        tokens=reservation.token_end - reservation.token_start,
        transfer_ms=3.0,
    )
