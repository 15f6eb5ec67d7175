"""Holds what all pairs of one tensor-parallel rank of this worker share."""

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
    # A thread that cannot abort a process group calls this with the reason. The worker should then
    # be replaced.
    on_stuck: Callable[[str], None]
