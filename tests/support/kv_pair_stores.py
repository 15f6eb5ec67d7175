"""The stores of a pair whose two ranks are threads of one test."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

from kv_transfer import wire
from kv_transfer.pair_store import PairStore


def linked_stores(timeout_s: float) -> tuple[PairStore, PairStore]:
    """Return the stores of decode and prefill, in the order of their ranks."""
    to_decode: SimpleQueue[wire.Publish] = SimpleQueue()
    to_prefill: SimpleQueue[wire.Publish] = SimpleQueue()
    return (
        PairStore(to_prefill.put, _taking(to_decode), timeout_s),
        PairStore(to_decode.put, _taking(to_prefill), timeout_s),
    )


def _taking(values: SimpleQueue[wire.Publish]) -> Callable[[float], wire.Publish | None]:
    def take(timeout_s: float) -> wire.Publish | None:
        try:
            return values.get(timeout=timeout_s)
        except Empty:
            return None

    return take
