"""The implementation of ``Engine`` on vLLM's AsyncLLM, with Baton's KV connector."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Set
from typing import Any
from uuid import uuid4

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import StatLoggerFactory

from core.config.schema import Config
from core.errors import ConfigError, InvalidArgumentError, WorkerLostError
from core.model.resolve import ResolvedModel
from core.net import is_loopback
from core.types import Pool, WorkerLoad
from engine.protocol import (
    EngineFacts,
    EngineOutput,
    EngineRequest,
    KvReceive,
    check_prompt,
)
from engine.vllm.convert import engine_output, kv_report, sampling_params
from engine.vllm.log_buffers import log_buffers_kept
from engine.vllm.sampling import LOGITS_PROCESSOR
from engine.vllm.stats import EngineStats, wait_for_report
from kv_transfer.rank_reports import RankReports
from kv_transfer.releaser import Releaser
from kv_transfer.vllm.metrics import ReceiveReport

_FAULT_WAIT_S = 0.5  # how long to wait for a rank's fault report if the engine does not start


class VllmEngine:
    """Runs one AsyncLLM.

    The engine core has a process of its own. A single rank runs in the engine core's process if
    ``engine_arguments`` selects the UniProcExecutor.

    Args:
        cpu_binding: cores for vLLM's CPU backend (``VLLM_CPU_OMP_THREADS_BIND``), or None.
        kv_secret: the cluster's secret for the KV control channels.
        incarnation: id of this start of the worker's process.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        model: ResolvedModel,
        cpu_binding: str | None,
        kv_secret: str,
        incarnation: str,
    ) -> None:
        self._config = config
        self._pool = pool
        self._sends_kv = pool is Pool.PREFILL or config.cluster.role_change
        self._pool_config = config.pool(pool)
        self._model = model
        self._cpu_binding = cpu_binding
        self._kv_secret = kv_secret
        self._incarnation = incarnation
        self._llm: AsyncLLM | None = None
        self._reports: RankReports | None = None
        self._releaser: Releaser | None = None
        self._prewarmed: set[str] = set()  # incarnations of prefill workers
        self._stats = EngineStats()
        self._queued_tokens: dict[str, int] = {}  # by transfer id, until the first output

    async def start(self) -> EngineFacts:
        """See ``Engine``."""
        self._set_environment()
        self._reports = RankReports(self._config.cluster.host, self._kv_secret)
        llm = await asyncio.to_thread(self._make_llm, self._reports)
        self._llm = llm
        addresses: tuple[str, ...] = ()
        if self._sends_kv:
            addresses = await asyncio.to_thread(
                self._reports.addresses,
                self._pool_config.tensor_parallel_size,
                self._config.kv_transfer.pair_timeout_s,
            )
        await llm.collective_rpc("drop_unused_memory")
        self._releaser = Releaser(addresses, self._kv_secret)
        vllm_config = llm.vllm_config
        blocks = vllm_config.cache_config.num_gpu_blocks
        assert blocks is not None, "vLLM knows its number of blocks once it has started"
        self._stats.blocks_total = blocks - 1  # block 0 is vLLM's null block
        self._stats.block_tokens = vllm_config.cache_config.block_size
        model_config = vllm_config.model_config
        self._max_model_len: int = model_config.max_model_len
        return EngineFacts(self._max_model_len, model_config.get_vocab_size(), addresses)

    def _set_environment(self) -> None:
        """Set the options that vLLM reads only from the environment.

        They apply to the whole process, which runs only this engine.
        """
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        if is_loopback(self._config.cluster.host):
            # vLLM's own gloo groups would listen at the address of the host's name.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if not torch.cuda.is_available():
            os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
            # Even with enforce_eager, vLLM runs some helpers (logprobs) through torch.compile.
            # torch.compile needs a C++ compiler, and delays the first request with logprobs by half
            # a minute.
            if self._pool_config.engine.get("enforce_eager", True):
                os.environ["TORCHDYNAMO_DISABLE"] = "1"
            if self._cpu_binding is not None:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = self._cpu_binding

    def _make_llm(self, reports: RankReports) -> AsyncLLM:
        """Start vLLM with the KV connector. Blocks. Raises ConfigError if vLLM does not start."""
        arguments = engine_arguments(self._config, self._pool, self._model)
        arguments["kv_transfer_config"] = self._kv_transfer_config(reports.endpoint)
        arguments["worker_extension_cls"] = "kv_transfer.vllm.connector.RankCalls"
        try:
            return start_llm(arguments, [self._stats.logger])
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(
                f"vLLM refuses the settings of the {self._pool} engine: {error}"
            ) from error
        except RuntimeError as error:
            reason = reports.fault(_FAULT_WAIT_S) or f"{error}; see the engine's log for the cause"
            raise ConfigError(f"the {self._pool} engine did not start: {reason}") from error

    def _kv_transfer_config(self, report_to: str) -> KVTransferConfig:
        """Return the connector's configuration. ``report_to`` is the ``RankReports`` endpoint."""
        config = self._config.kv_transfer
        options = {  # the fields of TransferOptions
            "host": self._config.cluster.host,
            "incarnation": self._incarnation,
            "secret": self._kv_secret,
            **config.model_dump(),
        }
        return KVTransferConfig(
            kv_connector="BatonConnector",
            kv_connector_module_path="kv_transfer.vllm.connector",
            kv_role=kv_role(self._config, self._pool),
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=options
            | {"report_to": report_to, "model": self._model.served_name},
        )

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See ``Engine``."""
        llm = self._running()
        check_prompt(request, self._max_model_len)
        # A later request may have the same transfer id while vLLM still knows the earlier one.
        # vLLM refuses an id that it still knows. The suffix makes the engine's id unique.
        engine_id = f"{request.transfer_id}-{uuid4().hex[:8]}"
        report: asyncio.Future[ReceiveReport] | None = None
        if isinstance(request.kv, KvReceive):
            report = self._stats.expect_report(request.transfer_id)
        self._queued_tokens[request.transfer_id] = len(request.token_ids)
        index = 0
        try:
            outputs = llm.generate(
                {"type": "token", "prompt_token_ids": list(request.token_ids)},
                sampling_params(request),
                engine_id,
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    # The first output ends the time in which the prompt counts as queued.
                    first = self._queued_tokens.pop(request.transfer_id, None) is not None
                    kv = None
                    if first:
                        received = await wait_for_report(report, request.transfer_id)
                        index = received.first_index if received is not None else 0
                        kv = kv_report(request, received, output)
                    result = engine_output(request, output, index, kv, first=first)
                    index += len(result.token_ids)
                    yield result
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error
        except (VLLMClientError, ValueError) as error:
            if request.transfer_id not in self._queued_tokens:
                raise  # the engine had accepted the request, so this error is a defect
            raise InvalidArgumentError(f"the engine refuses the request: {error}") from error
        finally:
            self._queued_tokens.pop(request.transfer_id, None)
            self._stats.forget_report(request.transfer_id)

    async def pair_up(self, others: Mapping[str, tuple[str, ...]], pool: Pool) -> Set[str]:
        """See ``Engine``."""
        if len(others) > self._config.kv_transfer.max_pairs:
            return set()  # not all of these pairs can exist at the same time
        llm = self._running()
        try:
            wanted = others if pool is Pool.DECODE else {}
            for incarnation in wanted.keys() - self._prewarmed:
                await llm.collective_rpc("kv_prewarm", args=(wanted[incarnation], incarnation))
            self._prewarmed = set(wanted)
            ranks = await llm.collective_rpc("kv_paired_with", args=(pool.value,))
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error
        return others.keys() - set.intersection(*(set(paired) for paired in ranks))

    def must_be_replaced(self) -> str | None:
        """See ``Engine``."""
        return None if self._reports is None else self._reports.fault()

    async def release(self, transfer_id: str) -> None:
        """See ``Engine``."""
        assert self._releaser is not None, "release() was called before start()"
        self._releaser.release(transfer_id)

    def load(self) -> WorkerLoad:
        """See ``Engine``."""
        stats = self._stats
        return WorkerLoad(
            queue_depth=stats.waiting,
            running=stats.running,
            queued_tokens=sum(self._queued_tokens.values()),
            kv_blocks_free=stats.blocks_free,
            kv_blocks_total=stats.blocks_total,
            kv_block_tokens=stats.block_tokens,
        )

    async def check_health(self) -> None:
        """See ``Engine``."""
        try:
            await self._running().check_health()
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error

    async def ping(self) -> None:
        """See ``Engine``."""
        # A cheap call: the engine core's loop answers it without asking a rank.
        try:
            await self._running().is_sleeping()
        except EngineDeadError as error:
            raise WorkerLostError("the engine of this worker died") from error

    async def stop(self) -> None:
        """See ``Engine``."""
        llm, self._llm = self._llm, None
        if self._releaser is not None:
            self._releaser.close()
            self._releaser = None
        if self._reports is not None:
            self._reports.close()
            self._reports = None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # otherwise it reports the shutdown as a failure
            await asyncio.to_thread(llm.shutdown, self._pool_config.shutdown_grace_s)

    def _running(self) -> AsyncLLM:
        """Return the AsyncLLM. Raise WorkerLostError before ``start`` and after ``stop``."""
        if self._llm is None:
            raise WorkerLostError("the engine of this worker is not running")
        return self._llm


def kv_role(config: Config, pool: Pool) -> str:
    """Return vLLM's ``kv_role``. It is fixed when an engine starts.

    ``kv_both`` costs a prefill or decode engine little: see test_kv_roles.py for what depends on
    the role in vLLM.
    """
    if config.cluster.role_change:
        return "kv_both"
    return "kv_producer" if pool is Pool.PREFILL else "kv_consumer"


def engine_arguments(config: Config, pool: Pool, model: ResolvedModel) -> dict[str, Any]:
    """Return the arguments for ``AsyncEngineArgs``, without the KV connector.

    The pool's ``engine`` settings override Baton's. Benchmarks and tests also start an aggregated
    engine with these arguments, for comparison.
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
            # Pass the class, because vLLM replaces the name "uni" by "mp" on CPUs. With "mp", the
            # engine core and the rank are two processes that spin while they wait for each other,
            # on cores that the other pool needs.
            arguments["distributed_executor_backend"] = UniProcExecutor
        arguments["logits_processors"] = [LOGITS_PROCESSOR]
        # Limits a step to about a second of CPU time. Without the limit, a short prompt waits until
        # a long prompt is complete.
        arguments["long_prefill_token_threshold"] = 512
    return arguments | pool_config.engine


def start_llm(
    arguments: Mapping[str, Any], stat_loggers: list[StatLoggerFactory] | None = None
) -> AsyncLLM:
    """Start vLLM with ``engine_arguments``. Blocks. vLLM's own errors are passed on."""
    args = AsyncEngineArgs(**arguments)
    with log_buffers_kept():
        config = args.create_engine_config()
    with contextlib.ExitStack() as stack:
        if args.distributed_executor_backend is UniProcExecutor:
            # vLLM binds OpenMP threads only for ranks that are processes of their own. Here the
            # engine core's process inherits the binding from the environment.
            stack.enter_context(OMPProcessManager(config).configure_omp_envs(0, 0))
        return AsyncLLM.from_vllm_config(
            config, stat_loggers=stat_loggers, disable_log_stats=args.disable_log_stats
        )
