"""What this router has on each worker: the live shell around ``router.placement.policy``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from core.errors import UnavailableError
from core.types import Pool, WorkerKey, WorkerRecord
from router.placement.policy import (
    RETRY_AFTER_S,
    NoWorker,
    OwnLoad,
    Placement,
    PlacementFacts,
    PlacementLimits,
    PlacementState,
    decide_placement,
    tokens_on,
)

RATE_MEMORY = 0.98  # of a prefill worker's rate: about the latest fifty prompts count


class HeldPlacement:
    """A placement, which counts on its workers until it is closed."""

    def __init__(self, placement: Placement, book: PlacementBook, facts: PlacementFacts) -> None:
        self.placement = placement
        self._book = book
        self._held = {
            record.pool: (record.key, tokens_on(record, facts))
            for record in (placement.prefill, placement.decode)
            if record is not None
        }
        for key, tokens in self._held.values():
            book.begin(key, tokens)

    def prefilled(self, done: bool) -> None:
        """The prefill worker has done its part, or will not do it. Idempotent."""
        self._end(Pool.PREFILL, done)

    def close(self) -> None:
        """No worker has anything more to do for it. Idempotent."""
        self._end(Pool.PREFILL, False)
        self._end(Pool.DECODE, False)

    def _end(self, pool: Pool, done: bool) -> None:
        if (held := self._held.pop(pool, None)) is not None:
            self._book.end(*held, done=done)


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
        self._counts: dict[WorkerKey, _Count] = {}
        self._own: dict[WorkerKey, OwnLoad] = {}
        self._suspects: dict[WorkerKey, float] = {}
        self._state = PlacementState(self._own, self._suspects)

    @property
    def is_empty(self) -> bool:
        """Nothing is kept of any worker."""
        return not self._counts and not self._suspects

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
        placement = decide_placement(snapshot, facts, self._state, self._limits, self._clock())
        if placement is None:
            return None
        if isinstance(placement, NoWorker):
            raise _unavailable(placement)
        self._state = placement.state
        return HeldPlacement(placement, self, facts)

    def begin(self, key: WorkerKey, tokens: int) -> None:
        """A worker has one request more."""
        count = self._counts.setdefault(key, _Count(self._report_snapshots))
        count.begin(tokens, self._clock())
        self._own[key] = count.load()

    def end(self, key: WorkerKey, tokens: int, *, done: bool) -> None:
        """A worker has one request less.

        Args:
            done: it has computed the request's tokens.
        """
        count = self._counts[key]
        count.end(tokens, self._clock(), done=done)
        self._own[key] = count.load()
        self.on_room()

    def suspect(self, key: WorkerKey) -> None:
        """A worker failed a request: avoid it for a while."""
        self._suspects[key] = self._clock() + self._suspect_s

    def new_snapshot(self, keys: frozenset[WorkerKey]) -> None:
        """The registry was read and knows these workers."""
        now_s = self._clock()
        for key, count in list(self._counts.items()):
            if key not in keys and count.requests == 0:
                del self._counts[key], self._own[key]
            else:
                count.new_snapshot()
                self._own[key] = count.load()
        for key, until_s in list(self._suspects.items()):
            if until_s <= now_s:
                del self._suspects[key]
        self.on_room()


class _Count:
    """Of one worker."""

    def __init__(self, report_snapshots: int) -> None:
        self.requests = 0
        self._tokens = 0
        # At most, from each of the latest snapshots to the next one; the last goes on to now.
        self._peaks = deque([(0, 0)], maxlen=report_snapshots + 1)
        self._done_tokens = 0.0
        self._busy_s = 0.0  # that took
        self._busy_since_s = 0.0

    def begin(self, tokens: int, now_s: float) -> None:
        if self.requests == 0:
            self._busy_since_s = now_s
        self.requests += 1
        self._tokens += tokens
        requests, peak = self._peaks[-1]
        self._peaks[-1] = max(requests, self.requests), max(peak, self._tokens)

    def end(self, tokens: int, now_s: float, *, done: bool) -> None:
        self.requests -= 1
        self._tokens -= tokens
        if done:
            self._done_tokens = RATE_MEMORY * self._done_tokens + tokens
            self._busy_s = RATE_MEMORY * self._busy_s + now_s - self._busy_since_s
            self._busy_since_s = now_s

    def new_snapshot(self) -> None:
        self._peaks.append((self.requests, self._tokens))

    def load(self) -> OwnLoad:
        # Without the last: what was sent since the snapshot is in no report yet.
        reported = list(self._peaks)[:-1]
        return OwnLoad(
            self.requests,
            self._tokens,
            peak_requests=max((requests for requests, _ in reported), default=0),
            peak_tokens=max((tokens for _, tokens in reported), default=0),
            tokens_per_s=self._done_tokens / self._busy_s if self._busy_s else 0.0,
        )


def _unavailable(missing: NoWorker) -> UnavailableError:
    detail = f"{missing.known} known, none usable" if missing.known else "none is known"
    return UnavailableError(
        f"no {missing.pool} worker can take the request ({detail})",
        reason=f"NO_{missing.pool.upper()}_WORKER",
        retry_after_s=RETRY_AFTER_S,
    )
