"""vLLM's statistics: the load of the engine, and the reports of KV receives."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from core.errors import InternalError
from kv_transfer.vllm.metrics import ReceiveReport

# A report leaves the engine core in the same message as the first token, so only a defect can
# exceed this bound.
_REPORT_TIMEOUT_S = 5.0


class EngineStats:
    """Records vLLM's scheduler statistics of one engine. Belongs to one event loop.

    The engine sets ``blocks_total`` and ``block_tokens`` when vLLM has started.
    """

    def __init__(self) -> None:
        self.waiting = 0  # requests
        self.running = 0  # requests
        self.blocks_total = 0
        self.block_tokens = 0
        self._usage = 0.0  # of the KV cache, 0 to 1
        self._reports: dict[str, asyncio.Future[ReceiveReport]] = {}

    @property
    def blocks_free(self) -> int:
        return round((1.0 - self._usage) * self.blocks_total)

    def expect_report(self, transfer_id: str) -> asyncio.Future[ReceiveReport]:
        """Return a future for a transfer's report.

        The caller must call ``forget_report`` when it no longer needs the future.
        """
        report = self._reports[transfer_id] = asyncio.get_running_loop().create_future()
        return report

    def forget_report(self, transfer_id: str) -> None:
        """Drop a transfer's future. Unknown ids are ignored."""
        self._reports.pop(transfer_id, None)

    def logger(self, _config: VllmConfig, _engine_index: int = 0) -> StatLoggerBase:
        """Make a logger for vLLM that passes each record to this object.

        vLLM gets this method as a StatLoggerFactory.
        """
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
        """Store the load from one ``SchedulerStats``, and resolve the futures of its reports."""
        self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.running = scheduler_stats.num_running_reqs
        self._usage = scheduler_stats.kv_cache_usage
        for receive in (scheduler_stats.kv_connector_stats or {}).get("receives", ()):
            report = msgspec.convert(receive, ReceiveReport)
            future = self._reports.get(report.transfer_id)
            if future is not None and not future.done():
                future.set_result(report)


async def wait_for_report(
    report: asyncio.Future[ReceiveReport] | None, transfer_id: str
) -> ReceiveReport | None:
    """Wait for the report of a transfer. Return None if ``report`` is None.

    Raises InternalError if the report does not arrive within 5 s.
    """
    if report is None:
        return None
    try:
        async with asyncio.timeout(_REPORT_TIMEOUT_S):
            return await report
    except TimeoutError:
        raise InternalError(f"the engine did not report the KV transfer of {transfer_id}") from None
