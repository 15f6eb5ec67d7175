"""Reports how receives ended, as vLLM statistics and as Prometheus metrics.

The scheduler side of a decode worker makes one report for each receive, unless the request is
aborted before its first token. vLLM carries the report to the front end together with the first
token. The front end adds the report to the request's phases and to the metrics below.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class ReceiveReport(msgspec.Struct):
    """How one receive ended, over all ranks, for the engine's front end."""

    transfer_id: str
    complete: bool
    first_index: int  # output position of the first token that this engine samples
    backend: str
    num_bytes: int
    messages: int
    tokens: int  # positions whose KV was received
    transfer_ms: float
    hidden_bytes: int  # part of num_bytes, sent while the prefill was still computing
    tail_ms: float  # the prefill's last layer -> last byte sent
    stall_ms: float  # how long the prefill rank waited because all its buffers were in flight
    retries: int  # reservations repeated over a new pair
    cached_tokens: int  # positions found in this engine's prefix cache
    computed_tokens: int  # positions that this engine computed to sample its first token


class ConnectorStats(KVConnectorStats):
    """Reports of receives, in vLLM's form for statistics that go to the front end."""

    data: dict[str, list[dict[str, Any]]]

    def reset(self) -> None:
        self.data = {"receives": []}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return ConnectorStats({"receives": self.data["receives"] + other.data["receives"]})

    def reduce(self) -> dict[str, int | float]:
        receives = self.data["receives"]
        return {
            "receives": len(receives),
            "failed": sum(not r["complete"] for r in receives),
            "bytes": sum(r["num_bytes"] for r in receives),
        }

    def is_empty(self) -> bool:
        return not self.data.get("receives")


class ConnectorMetrics(KVConnectorPromMetrics):
    """The metrics ``vllm:baton_kv_*``, with the same labels as vLLM's own metrics.

    The names need the prefix ``vllm:``. If an earlier engine in the same process has left metrics,
    vLLM finds and removes them by this prefix.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def counter(name: str, text: str) -> Any:
            metric = self._counter_cls(f"vllm:baton_kv_{name}", text, labelnames)
            return create_metric_per_engine(metric, per_engine_labelvalues)

        def histogram(name: str, text: str) -> Any:
            name = f"vllm:baton_kv_{name}_seconds"
            metric = self._histogram_cls(name, text, labelnames, buckets=_SECONDS)
            return create_metric_per_engine(metric, per_engine_labelvalues)

        self._transfers = counter("transfers", "KV transfers that completed or failed.")
        self._failed = counter("transfers_failed", "KV transfers that failed and were recomputed.")
        self._counts = {
            "num_bytes": counter("bytes", "Bytes of KV received."),
            "hidden_bytes": counter("hidden_bytes", "Bytes of KV sent while prefill computed."),
            "messages": counter("messages", "Messages of KV received."),
            "retries": counter("retries", "Reservations repeated over a new pair."),
        }
        self._times = {
            "transfer_ms": histogram("transfer", "Time from first header to last manifest."),
            "tail_ms": histogram("tail", "Time from prefill's last layer to the last byte."),
            "stall_ms": histogram("stall", "Time that prefill waited with all buffers in flight."),
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for receive in transfer_stats_data["receives"]:
            self._transfers[engine_idx].inc()
            if not receive["complete"]:
                self._failed[engine_idx].inc()
            for name, metric in self._counts.items():
                metric[engine_idx].inc(receive[name])
            for name, metric in self._times.items():
                if receive["complete"]:
                    metric[engine_idx].observe(receive[name] / 1000)
