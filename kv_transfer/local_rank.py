"""What one tensor-parallel rank of this worker brings to each of its pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.options import TransferOptions


@dataclass(frozen=True, slots=True)
class LocalRank:
    """The caches are borrowed from the engine and must outlive all threads of the stream."""

    caches: KvCaches
    geometry: KvGeometry
    options: TransferOptions
    clock: Callable[[], float]  # monotonic, seconds
    # Called from any thread if a process group cannot be aborted. This process should then be
    # replaced. The argument is the reason.
    on_stuck: Callable[[str], None]
