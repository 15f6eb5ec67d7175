"""vLLM's AsyncLLM as an ``Engine``, with our KV connector for its role."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping, Set
from typing import Any
from uuid import uuid4

import msgspec
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import StatLoggerBase, StatLoggerFactory

from baton.v1 import inference_pb2 as pb
from core.config.schema import Config
from core.errors import ConfigError, InternalError, InvalidArgumentError, WorkerLostError
from core.model.resolve import ResolvedModel
from core.types import Pool, WorkerLoad
from engine.protocol import (
    EngineFacts,
    EngineOutput,
    EngineRequest,
    KvReceive,
    KvSend,
    check_prompt,
)
from engine.vllm.log_buffers import log_buffers_kept
from engine.vllm.sampling import LOGITS_PROCESSOR, continued
from kv_transfer.rank_reports import RankReports
from kv_transfer.releaser import Releaser
from kv_transfer.vllm.metrics import ReceiveReport
from worker.liveness import LivenessProbe

_FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    None: pb.FINISH_REASON_UNSPECIFIED,
}
# A report leaves the engine core in the same message as the first token, so this only bounds a
# defect.
_REPORT_TIMEOUT_S = 5.0
_LAST_WORDS_S = 0.5  # of an engine that has ended already


class VllmEngine:
    """One AsyncLLM: an engine core, in a process of its own with its rank if that is the only one.

    Args:
        cpu_binding: cores for vLLM's CPU backend (``VLLM_CPU_OMP_THREADS_BIND``), or None.
        kv_token: shared secret of the cluster's KV control channels.
        incarnation: of this worker; new at each process start.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        model: ResolvedModel,
        cpu_binding: str | None,
        kv_token: str,
        incarnation: str,
    ) -> None:
        self._config = config
        self._pool = pool
        self._pool_config = config.pool(pool)
        self._model = model
        self._cpu_binding = cpu_binding
        self._kv_token = kv_token
        self._incarnation = incarnation
        self._llm: AsyncLLM | None = None
        self._reports: RankReports | None = None
        self._releaser: Releaser | None = None
        self._prewarmed: set[str] = set()  # incarnations
        self._liveness = LivenessProbe(self._ask_core, self._pool_config.progress_timeout_s)
        self._stats = _Stats()
        self._queued_tokens: dict[str, int] = {}

    async def start(self) -> EngineFacts:
        self._set_environment()
        self._reports = RankReports(self._config.cluster.host, self._kv_token)
        llm = await asyncio.to_thread(self._make_llm, self._reports)
        self._llm = llm
        addresses: tuple[str, ...] = ()
        if self._pool is Pool.PREFILL:
            addresses = await asyncio.to_thread(
                self._reports.addresses,
                self._pool_config.tensor_parallel_size,
                self._config.kv_transfer.pair_timeout_s,
            )
        self._releaser = Releaser(addresses, self._kv_token)
        vllm_config = llm.vllm_config
        blocks = vllm_config.cache_config.num_gpu_blocks
        assert blocks is not None, "vLLM knows its number of blocks once it has started"
        self._stats.blocks_total = blocks - 1  # block 0 is vLLM's null block
        self._stats.block_tokens = vllm_config.cache_config.block_size
        model_config = vllm_config.model_config
        self._max_model_len: int = model_config.max_model_len
        return EngineFacts(self._max_model_len, model_config.get_vocab_size(), addresses)

    def _set_environment(self) -> None:
        """What vLLM only takes from the environment; this process runs one engine."""
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        if not torch.cuda.is_available():
            os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
            # enforce_eager leaves some of vLLM's helpers (logprobs) to torch.compile, which needs
            # a C++ compiler and takes half a minute at the first request that asks for them.
            if self._pool_config.engine.get("enforce_eager", True):
                os.environ["TORCHDYNAMO_DISABLE"] = "1"
            if self._cpu_binding is not None:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = self._cpu_binding

    def _make_llm(self, reports: RankReports) -> AsyncLLM:
        arguments = engine_arguments(self._config, self._pool, self._model)
        arguments["kv_transfer_config"] = self._kv_transfer_config(reports.endpoint)
        arguments["worker_extension_cls"] = "kv_transfer.vllm.connector.RankCalls"
        try:
            return start_llm(arguments, [self._stats.logger])
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"vLLM refuses the {self._pool} engine: {error}") from error
        except RuntimeError as error:
            reason = reports.fault(_LAST_WORDS_S) or f"{error}; its log says why"
            raise ConfigError(f"the {self._pool} engine did not start: {reason}") from error

    def _kv_transfer_config(self, report_to: str) -> KVTransferConfig:
        config = self._config.kv_transfer
        options = {  # of TransferOptions
            "host": self._config.cluster.host,
            "incarnation": self._incarnation,
            "token": self._kv_token,
            **config.model_dump(),
        }
        return KVTransferConfig(
            kv_connector="BatonConnector",
            kv_connector_module_path="kv_transfer.vllm.connector",
            kv_role="kv_producer" if self._pool is Pool.PREFILL else "kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=options
            | {"report_to": report_to, "model": self._model.served_name},
        )

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        llm = self._running()
        check_prompt(request, self._max_model_len)
        # vLLM refuses an id that it knows already; a key may come again after a cancel.
        engine_id = f"{request.key}-{uuid4().hex[:8]}"
        report: asyncio.Future[ReceiveReport] | None = None
        if isinstance(request.kv, KvReceive):
            report = self._stats.expect(request.key)
        self._queued_tokens[request.key] = len(request.token_ids)
        index = 0
        try:
            outputs = llm.generate(
                {"type": "token", "prompt_token_ids": list(request.token_ids)},
                _sampling_params(request),
                engine_id,
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    first = self._queued_tokens.pop(request.key, None) is not None
                    kv = None
                    if first:
                        received = await _await_report(report, request.key)
                        index = received.first_index if received is not None else 0
                        kv = _kv_report(request, received, output)
                    result = _engine_output(request, output, index, kv, first=first)
                    index += len(result.token_ids)
                    yield result
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error
        except (VLLMClientError, ValueError) as error:
            if request.key not in self._queued_tokens:
                raise  # it had accepted the request: a defect
            raise InvalidArgumentError(f"the engine refuses the request: {error}") from error
        finally:
            self._queued_tokens.pop(request.key, None)
            self._stats.forget(request.key)

    async def pair_up(self, others: Mapping[str, tuple[str, ...]]) -> Set[str]:
        if len(others) > self._config.kv_transfer.max_pairs:
            return set()  # they cannot all be up at a time
        llm = self._running()
        try:
            if self._pool is Pool.DECODE:
                for incarnation in others.keys() - self._prewarmed:
                    await llm.collective_rpc("kv_prewarm", args=(others[incarnation], incarnation))
                self._prewarmed = set(others)
            ranks = await llm.collective_rpc("kv_paired_with")
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error
        return others.keys() - set.intersection(*(set(paired) for paired in ranks))

    def must_be_replaced(self) -> str | None:
        return None if self._reports is None else self._reports.fault()

    async def release(self, key: str) -> None:
        assert self._releaser is not None, "release before start"
        self._releaser.release(key)

    def load(self) -> WorkerLoad:
        stats = self._stats
        return WorkerLoad(
            stats.waiting,
            stats.running,
            sum(self._queued_tokens.values()),
            stats.blocks_free,
            stats.blocks_total,
            stats.block_tokens,
        )

    async def check_health(self) -> None:
        try:
            await self._running().check_health()
            await self._liveness.check()
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error

    async def _ask_core(self) -> None:
        """Ask something cheap that the loop of the engine core answers, and no rank is asked."""
        await self._running().is_sleeping()

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        await self._liveness.close()
        if self._releaser is not None:
            self._releaser.close()
            self._releaser = None
        if self._reports is not None:
            self._reports.close()
            self._reports = None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end of the engine as a failure
            await asyncio.to_thread(llm.shutdown, self._pool_config.shutdown_grace_s)

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise WorkerLostError("the engine of this worker is not running")
        return self._llm


def engine_arguments(config: Config, pool: Pool, model: ResolvedModel) -> dict[str, Any]:
    """Arguments for ``AsyncEngineArgs``: the pool's own over ours, without the KV stream.

    Benchmarks and tests start the aggregated engine that they compare with from the same ones.
    """
    pool_config = config.pool(pool)
    arguments: dict[str, Any] = {
        "model": model.path,
        "served_model_name": model.served_name,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "tensor_parallel_size": pool_config.tensor_parallel_size,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if config.model.max_model_len is not None:
        arguments["max_model_len"] = config.model.max_model_len
    if not torch.cuda.is_available():
        arguments["kv_cache_memory_bytes"] = pool_config.kv_cache_gib * 2**30
        arguments["enforce_eager"] = True
        if pool_config.tensor_parallel_size == 1:
            # The class, for vLLM takes the word "uni" for "mp" on CPUs: an engine core and a rank
            # that spin for each other, on cores that the other pool computes on.
            arguments["distributed_executor_backend"] = UniProcExecutor
        arguments["logits_processors"] = [LOGITS_PROCESSOR]
        # About a second of CPU a step: a short prompt need not wait for a whole long one.
        arguments["long_prefill_token_threshold"] = 512
    return arguments | pool_config.engine


def start_llm(
    arguments: Mapping[str, Any], stat_loggers: list[StatLoggerFactory] | None = None
) -> AsyncLLM:
    """Start vLLM with ``engine_arguments``. Raises what vLLM raises."""
    args = AsyncEngineArgs(**arguments)
    with log_buffers_kept():
        config = args.create_engine_config()
    with contextlib.ExitStack() as stack:
        if args.distributed_executor_backend is UniProcExecutor:
            # vLLM binds the OpenMP threads of ranks that are processes; this one inherits it.
            stack.enter_context(OMPProcessManager(config).configure_omp_envs(0, 0))
        return AsyncLLM.from_vllm_config(
            config, stat_loggers=stat_loggers, disable_log_stats=args.disable_log_stats
        )


class _Stats:
    """What vLLM's statistics say: the load, and how receives ended."""

    def __init__(self) -> None:
        self.waiting = 0
        self.running = 0
        self.blocks_total = 0
        self.block_tokens = 0
        self._usage = 0.0
        self._reports: dict[str, asyncio.Future[ReceiveReport]] = {}

    @property
    def blocks_free(self) -> int:
        return round((1.0 - self._usage) * self.blocks_total)

    def expect(self, key: str) -> asyncio.Future[ReceiveReport]:
        report = self._reports[key] = asyncio.get_running_loop().create_future()
        return report

    def forget(self, key: str) -> None:
        self._reports.pop(key, None)

    def logger(self, _config: VllmConfig, _engine_index: int = 0) -> StatLoggerBase:
        stats = self

        class Recorder(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    stats.record(scheduler_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Recorder()

    def record(self, scheduler_stats: Any) -> None:
        self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.running = scheduler_stats.num_running_reqs
        self._usage = scheduler_stats.kv_cache_usage
        for receive in (scheduler_stats.kv_connector_stats or {}).get("receives", ()):
            report = msgspec.convert(receive, ReceiveReport)
            future = self._reports.get(report.transfer_id)
            if future is not None and not future.done():
                future.set_result(report)


async def _await_report(
    report: asyncio.Future[ReceiveReport] | None, key: str
) -> ReceiveReport | None:
    if report is None:
        return None
    try:
        return await asyncio.wait_for(report, _REPORT_TIMEOUT_S)
    except TimeoutError:
        raise InternalError(f"the engine did not report the KV transfer of {key}") from None


def _sampling_params(request: EngineRequest) -> SamplingParams:
    """The router's defaults and ranges hold; stop strings stay with the router."""
    given = {field.name: value for field, value in request.sampling.ListFields()}
    given.pop("stop", None)
    given["stop_token_ids"] = list(given.get("stop_token_ids", ()))
    given.setdefault("max_tokens", None)
    params = SamplingParams(
        **given,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": kv} if (kv := _kv_params(request)) else None,
    )
    if torch.cuda.is_available():
        return params  # vLLM's V2 model runner
    return continued(params, len(request.token_ids) - request.tokens_so_far, request.tokens_so_far)


def _kv_params(request: EngineRequest) -> dict[str, Any] | None:
    match request.kv:
        case KvSend(first_token):
            return {
                "baton": "send",
                "transfer_id": request.key,
                "forwards_first_token": first_token,
            }
        case KvReceive(incarnation, addresses, first_token):
            return {
                "baton": "receive",
                "transfer_id": request.key,
                "forwards_first_token": first_token,
                "incarnation": incarnation,
                "addresses": list(addresses),
            }
    return None


def _kv_report(
    request: EngineRequest, received: ReceiveReport | None, output: RequestOutput
) -> pb.KvReport:
    cached = output.num_cached_tokens or 0
    if received is None:
        return pb.KvReport(
            outcome=pb.KV_OUTCOME_LOCAL,
            cached_tokens=cached,
            computed_tokens=len(request.token_ids) - cached,
        )
    return pb.KvReport(
        outcome=pb.KV_OUTCOME_TRANSFERRED if received.complete else pb.KV_OUTCOME_RECOMPUTED,
        backend=received.backend,
        bytes=received.num_bytes,
        messages=received.messages,
        tokens=received.tokens,
        transfer_ms=received.transfer_ms,
        hidden_bytes=received.hidden_bytes,
        tail_ms=received.tail_ms,
        stall_ms=received.stall_ms,
        retries=received.retries,
        cached_tokens=received.cached_tokens,
        computed_tokens=received.computed_tokens,
    )


def _engine_output(
    request: EngineRequest,
    output: RequestOutput,
    index: int,
    kv: pb.KvReport | None,
    *,
    first: bool,
) -> EngineOutput:
    (completion,) = output.outputs
    if completion.finish_reason not in _FINISH:
        raise WorkerLostError(f"the engine ended {request.key}: {completion.finish_reason}")
    metrics = output.metrics
    timed = first and metrics is not None and metrics.scheduled_ts > 0
    return EngineOutput(
        index,
        tuple(completion.token_ids),
        _logprobs(completion, request.sampling.logprobs),
        _FINISH[completion.finish_reason],
        kv,
        (output.num_cached_tokens or 0) if first else 0,
        (metrics.scheduled_ts - metrics.queued_ts) * 1000 if timed else 0.0,
        (metrics.first_token_ts - metrics.scheduled_ts) * 1000 if timed else 0.0,
    )


def _logprobs(completion: CompletionOutput, wanted: int) -> tuple[pb.TokenLogprobs, ...]:
    if not completion.logprobs:
        return ()
    return tuple(
        _token_logprobs(token, alternatives, wanted)
        for token, alternatives in zip(completion.token_ids, completion.logprobs, strict=True)
    )


def _token_logprobs(token: int, alternatives: Mapping[int, Any], wanted: int) -> pb.TokenLogprobs:
    """vLLM also lists the chosen token where it is not among the top ones; ranks start at 1."""
    top = sorted(alternatives.items(), key=lambda item: item[1].rank or math.inf)
    return pb.TokenLogprobs(
        logprob=alternatives[token].logprob,
        top=[
            pb.TopLogprob(token_id=id_, logprob=entry.logprob)
            for id_, entry in top
            if (entry.rank or math.inf) <= wanted
        ],
    )
