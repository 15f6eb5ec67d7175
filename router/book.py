"""What this router has on each worker: the live shell around ``router.placement``."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from cluster.types import WorkerRecord
from router.placement import (
    OwnLoad,
    Placement,
    PlacementFacts,
    PlacementLimits,
    PlacementState,
    WorkerKey,
    decide,
    tokens_on,
    worker_key,
)


@dataclass(frozen=True, slots=True)
class HeldPlacement:
    """A placement, which counts on its workers until it is closed."""

    placement: Placement
    _prefill: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _decode: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def prefilled(self) -> None:
        """The prefill worker has nothing more to do for it. Idempotent."""
        self._prefill.close()

    def close(self) -> None:
        """Nobody has. Idempotent."""
        self._prefill.close()
        self._decode.close()


class PlacementBook:
    """Places requests and keeps count of them until they end.

    Args:
        clock: monotonic time, seconds.
        suspect_s: how long a worker that failed a request is avoided. A dead worker has
            lost its lease by then.
        report_snapshots: within so many snapshots a worker reports again.

    Attributes:
        on_room: called when workers may have more room than before.
    """

    def __init__(
        self,
        limits: PlacementLimits,
        clock: Callable[[], float],
        suspect_s: float,
        report_snapshots: int = 1,
    ) -> None:
        self.on_room: Callable[[], None] = lambda: None
        self._limits = limits
        self._clock = clock
        self._suspect_s = suspect_s
        self._report_snapshots = report_snapshots
        self._own: dict[WorkerKey, OwnLoad] = {}
        # Requests and tokens at most, from each of the latest snapshots to the next one.
        self._peaks: dict[WorkerKey, deque[tuple[int, int]]] = {}
        self._suspects: dict[WorkerKey, float] = {}
        self._state = PlacementState(self._own, self._suspects)

    @property
    def is_empty(self) -> bool:
        """Nothing is kept of any worker."""
        return not self._own and not self._suspects

    def own_load(self, key: WorkerKey) -> OwnLoad:
        """What this router has on one worker."""
        return self._own.get(key, OwnLoad())

    def place(
        self, snapshot: tuple[WorkerRecord, ...], facts: PlacementFacts
    ) -> HeldPlacement | None:
        """Choose workers and count the request on them; None: there is no room, and it may wait.

        Raises:
            UnavailableError: a pool that is needed has no worker.
        """
        placement = decide(snapshot, facts, self._state, self._limits, self._clock())
        if placement is None:
            return None
        self._state = placement.state
        held = HeldPlacement(placement)
        for record, part in ((placement.prefill, held._prefill), (placement.decode, held._decode)):
            if record is not None:
                self._count(part, worker_key(record), tokens_on(record, facts))
        return held

    def suspect(self, key: WorkerKey) -> None:
        """A worker failed a request: avoid it for a while."""
        self._suspects[key] = self._clock() + self._suspect_s

    def new_snapshot(self, keys: frozenset[WorkerKey]) -> None:
        """The registry was read and knows these workers: reports count from here on."""
        now_s = self._clock()
        for key, load in list(self._own.items()):
            peaks = self._peaks[key]
            peaks.append((load.requests, load.tokens))
            self._own[key] = _own_load(load.requests, load.tokens, peaks)
            if key not in keys and self._own[key] == OwnLoad():
                del self._own[key], self._peaks[key]
        for key, until_s in list(self._suspects.items()):
            if until_s <= now_s:
                del self._suspects[key]
        self.on_room()

    def _count(self, part: contextlib.ExitStack, key: WorkerKey, tokens: int) -> None:
        """Count a request on a worker until ``part`` is closed."""
        self._add(key, 1, tokens)

        def end() -> None:
            self._add(key, -1, -tokens)
            self.on_room()

        part.callback(end)

    def _add(self, key: WorkerKey, requests: int, tokens: int) -> None:
        load = self._own.get(key, OwnLoad())
        peaks = self._peaks.setdefault(key, deque([(0, 0)], maxlen=self._report_snapshots + 1))
        requests, tokens = load.requests + requests, load.tokens + tokens
        peaks[-1] = max(peaks[-1][0], requests), max(peaks[-1][1], tokens)
        self._own[key] = _own_load(requests, tokens, peaks)


def _own_load(requests: int, tokens: int, peaks: deque[tuple[int, int]]) -> OwnLoad:
    # Without the last: what was sent since the snapshot is in no report yet.
    peak_requests = max((each[0] for each in islice(peaks, len(peaks) - 1)), default=0)
    peak_tokens = max((each[1] for each in islice(peaks, len(peaks) - 1)), default=0)
    return OwnLoad(requests, tokens, peak_requests, peak_tokens)
