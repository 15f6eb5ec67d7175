"""Tells whether a cluster is ready: enough workers are ready, and the router serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import baton
from core.errors import BatonError
from core.types import Pool, WorkerRecord, WorkerState

_HEALTH_TIMEOUT_S: Final = 1.0  # a router on this machine answers within milliseconds


def count_ready(workers: Iterable[WorkerRecord]) -> dict[Pool, int]:
    """Return the number of ready workers in each pool."""
    ready = dict.fromkeys(Pool, 0)
    for worker in workers:
        if worker.state is WorkerState.READY:
            ready[worker.pool] += 1
    return ready


def router_serves(address: str) -> bool:
    """Return whether the router reports within one second that it serves requests."""
    with baton.Client(address) as client:
        try:
            return client.health(timeout_s=_HEALTH_TIMEOUT_S)
        except BatonError:
            return False


def describe_missing(ready: Mapping[Pool, int], wanted: Mapping[Pool, int]) -> str:
    """Describe for the user what the cluster still waits for before it is ready."""
    if all(ready[pool] == wanted[pool] for pool in Pool):
        return "waiting for the router"
    counts = ", ".join(f"{pool} {ready[pool]} of {wanted[pool]} ready" for pool in Pool)
    return f"starting the workers: {counts}"
