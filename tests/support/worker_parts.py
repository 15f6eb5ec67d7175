"""What tests give to a ``worker.replica.WorkerReplica``."""

from __future__ import annotations

from core.types import Pool
from decode_worker.servicer import add_decode_service
from prefill_worker.servicer import add_prefill_service

SERVICES = {Pool.PREFILL: add_prefill_service, Pool.DECODE: add_decode_service}


class NoMetrics:
    """Replaces ``worker.replica.MetricsServer``, whose stop takes half a second."""

    port = 1

    def __init__(self, _host: str) -> None: ...

    def stop(self) -> None: ...
