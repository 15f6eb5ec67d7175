"""What this router has on each worker: the live shell around ``router.placement``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from cluster.types import WorkerRecord
from router.placement import (
    OwnLoad,
    Placement,
    PlacementFacts,
    PlacementState,
    WorkerKey,
    decide,
)


class PlacementBook:
    """Places requests and keeps count of them until they end.

    Args:
        clock: monotonic time, seconds.
        suspect_s: how long a worker that failed a request is avoided. A dead worker has
            lost its lease by then.
    """

    def __init__(self, clock: Callable[[], float], suspect_s: float) -> None:
        self._clock = clock
        self._suspect_s = suspect_s
        self._own: dict[WorkerKey, OwnLoad] = {}
        self._suspects: dict[WorkerKey, float] = {}
        self._state = PlacementState(self._own, self._suspects)

    @property
    def is_empty(self) -> bool:
        """Nothing is kept of any worker."""
        return not self._own and not self._suspects

    def own_load(self, key: WorkerKey) -> OwnLoad:
        """What this router has on one worker."""
        return self._own.get(key, OwnLoad())

    def place(self, snapshot: tuple[WorkerRecord, ...], facts: PlacementFacts) -> Placement:
        """Choose workers; hold them with ``on_worker``. Raises UnavailableError."""
        placement = decide(snapshot, facts, self._state, self._clock())
        self._state = placement.state
        return placement

    @contextlib.contextmanager
    def on_worker(self, key: WorkerKey, tokens: int) -> Iterator[None]:
        """Count a request of ``tokens`` prompt tokens on a worker for the block."""
        self._add(key, 1, tokens)
        try:
            yield
        finally:
            self._add(key, -1, -tokens)

    def suspect(self, key: WorkerKey) -> None:
        """A worker failed a request: avoid it for a while."""
        self._suspects[key] = self._clock() + self._suspect_s

    def new_snapshot(self, keys: frozenset[WorkerKey]) -> None:
        """The registry was read and knows these workers: reports count from here on."""
        now_s = self._clock()
        for key, load in list(self._own.items()):
            self._own[key] = replace(load, recent_requests=0, recent_tokens=0)
            if load.requests == 0 and key not in keys:
                del self._own[key]
        for key, until_s in list(self._suspects.items()):
            if until_s <= now_s:
                del self._suspects[key]

    def _add(self, key: WorkerKey, requests: int, tokens: int) -> None:
        load = self._own.get(key, OwnLoad())
        self._own[key] = OwnLoad(
            load.requests + requests,
            load.tokens + tokens,
            # One that was sent before the snapshot may end after it.
            max(load.recent_requests + requests, 0),
            max(load.recent_tokens + tokens, 0),
        )
