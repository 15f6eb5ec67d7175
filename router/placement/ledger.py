"""Counts this router's requests on each worker, and applies the placement policy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from core.types import Pool, WorkerKey, WorkerRecord, WorkerShare
from router.errors import no_worker_error
from router.placement.policy import (
    NoWorker,
    OwnLoad,
    Placement,
    PlacementFacts,
    PlacementLimits,
    PlacementState,
    decide_placement,
    tokens_on,
)
from router.room import NoRoom

RATE_MEMORY = 0.98  # decay of a prefill rate at each prompt; about the latest 50 prompts count
# Time constant of a decode rate's decay: about this many of the latest seconds with streams count.
# Long enough for some streams to begin and end, and short enough to follow the load.
DECODE_MEMORY_S = 10.0


class PlacementPermit:
    """A placement that counts as load on its workers until it is closed."""

    def __init__(
        self, placement: Placement, ledger: PlacementLedger, facts: PlacementFacts
    ) -> None:
        self.placement = placement
        self._ledger = ledger
        self._counted: dict[Pool, tuple[Account, int]] = {}
        for record in (placement.prefill, placement.decode):
            if record is not None:
                tokens = tokens_on(record, facts)
                self._counted[record.pool] = ledger.add(record, tokens), tokens
        self._streams = False  # the decode worker has sent a token

    def prefill_ended(self, done: bool) -> None:
        """Note that the prefill worker has answered (``done``) or failed. Idempotent."""
        self._remove(Pool.PREFILL, done)

    def decoded(self, count: int) -> None:
        """Note that the decode worker has sent tokens."""
        if count and (counted := self._counted.get(Pool.DECODE)) is not None:
            self._ledger.decoded(counted[0], count, starts=not self._streams)
            self._streams = True

    def close(self) -> None:
        """Note that the request no longer runs on its workers. Idempotent."""
        if self._streams and (counted := self._counted.get(Pool.DECODE)) is not None:
            self._ledger.stream_ended(counted[0])
        self._remove(Pool.PREFILL, False)
        self._remove(Pool.DECODE, False)

    def _remove(self, pool: Pool, done: bool) -> None:
        if (counted := self._counted.pop(pool, None)) is not None:
            self._ledger.remove(*counted, done=done)


class PlacementLedger:
    """Places requests and counts them on their workers until they end.

    Args:
        clock: monotonic time, seconds.
        suspect_s: how long a worker that failed a request is avoided.
        report_snapshots: a worker reports again within this many snapshots of the registry.

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
        self._accounts: dict[WorkerKey, Account] = {}
        self._own: dict[WorkerKey, OwnLoad] = {}
        self._suspects: dict[WorkerKey, float] = {}
        self._state = PlacementState(self._own, self._suspects)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept about any worker."""
        return not self._accounts and not self._suspects

    def own_load(self, key: WorkerKey) -> OwnLoad:
        """What this router has on one worker."""
        return self._own.get(key, OwnLoad())

    def place(
        self, snapshot: tuple[WorkerRecord, ...], facts: PlacementFacts
    ) -> PlacementPermit | NoRoom:
        """Choose workers and count the request on them.

        Returns NoRoom if a needed pool has no worker with room and the request may wait.

        Raises:
            UnavailableError: a pool that the request needs has no usable worker, and the request
                may not wait for one.
        """
        placement = decide_placement(snapshot, facts, self._state, self._limits, self._clock())
        if isinstance(placement, NoRoom):
            return placement
        if isinstance(placement, NoWorker):
            known = placement.known
            detail = f"{known} known, none usable" if known else "none is known"
            raise no_worker_error(placement.pool, detail)
        self._state = placement.state
        return PlacementPermit(placement, self, facts)

    def shares(self) -> tuple[WorkerShare, ...]:
        """This router's requests on each worker that it has used, and the rates of the workers."""
        now_s = self._clock()
        return tuple(
            WorkerShare(*key, each.pool, each.requests, each.tokens, each.tokens_per_s(now_s))
            for key, each in self._accounts.items()
        )

    def add(self, record: WorkerRecord, tokens: int) -> Account:
        """Count one more request on a worker. Return the worker's account."""
        account = self._accounts.get(record.key)
        if account is None or account.pool is not record.pool:  # the worker may change its role
            account = Account(record.key, record.pool, self._report_snapshots)
            self._accounts[record.key] = account
        account.add(tokens, self._clock())
        self._own[record.key] = account.load()
        return account

    def remove(self, account: Account, tokens: int, *, done: bool) -> None:
        """Count one request less on a worker.

        Args:
            done: whether the worker has computed the request's tokens.
        """
        account.remove(tokens, self._clock(), done=done)
        if self._accounts.get(account.key) is account:
            self._own[account.key] = account.load()
        self.on_room()

    def decoded(self, account: Account, count: int, *, starts: bool) -> None:
        """Count tokens that a decode worker has sent.

        Args:
            starts: these are the first tokens of a stream.
        """
        account.decoded(count, self._clock(), starts=starts)

    def stream_ended(self, account: Account) -> None:
        """Note that a stream of a decode worker has ended."""
        account.stream_ended(self._clock())

    def suspect(self, key: WorkerKey) -> None:
        """Avoid a worker for ``suspect_s``, because it failed a request."""
        self._suspects[key] = self._clock() + self._suspect_s

    def new_snapshot(self, keys: frozenset[WorkerKey]) -> None:
        """Note that the registry was read and lists these workers."""
        now_s = self._clock()
        for key, account in list(self._accounts.items()):
            if key not in keys and account.requests == 0:
                del self._accounts[key], self._own[key]
            else:
                account.new_snapshot()
                self._own[key] = account.load()
        for key, until_s in list(self._suspects.items()):
            if until_s <= now_s:
                del self._suspects[key]
        self.on_room()


class Account:
    """This router's requests on one worker. Only the ledger changes it."""

    def __init__(self, key: WorkerKey, pool: Pool, report_snapshots: int) -> None:
        self.key = key
        self.pool = pool
        self.requests = 0
        self.tokens = 0
        # The peak (requests, tokens) of each interval between two recent snapshots. The last pair
        # covers the time since the latest snapshot.
        self._peaks = deque([(0, 0)], maxlen=report_snapshots + 1)
        self._done_tokens = 0.0
        self._busy_s = 0.0  # time spent on _done_tokens
        self._busy_since_s = 0.0
        # Decode: streams that have begun; tokens and seconds while there were any, decayed.
        self._streams = 0
        self._stream_tokens = 0.0
        self._stream_s = 0.0
        self._counted_s = 0.0  # when these two were decayed last

    def add(self, tokens: int, now_s: float) -> None:
        if self.requests == 0:
            self._busy_since_s = now_s
        self.requests += 1
        self.tokens += tokens
        requests, peak = self._peaks[-1]
        self._peaks[-1] = max(requests, self.requests), max(peak, self.tokens)

    def remove(self, tokens: int, now_s: float, *, done: bool) -> None:
        self.requests -= 1
        self.tokens -= tokens
        if done:
            self._done_tokens = RATE_MEMORY * self._done_tokens + tokens
            self._busy_s = RATE_MEMORY * self._busy_s + now_s - self._busy_since_s
            self._busy_since_s = now_s

    def decoded(self, count: int, now_s: float, *, starts: bool) -> None:
        self._decay(now_s)
        # The time in which a stream's first tokens were made counts only if there were others.
        if self._streams or not starts:
            self._stream_tokens += count
        self._streams += starts

    def stream_ended(self, now_s: float) -> None:
        self._decay(now_s)
        self._streams -= 1

    def tokens_per_s(self, now_s: float) -> float:
        """The rate while this router had requests on the worker; 0 while unknown."""
        if self.pool is Pool.PREFILL:
            return self._done_tokens / self._busy_s if self._busy_s else 0.0
        self._decay(now_s)
        return self._stream_tokens / self._stream_s if self._stream_s else 0.0

    def _decay(self, now_s: float) -> None:
        """Age both sums to ``now_s``. ``_stream_s`` sums the weights of the seconds with streams;
        ``_stream_tokens`` sums the weights of the tokens."""
        if self._streams:
            weight = math.exp(-(now_s - self._counted_s) / DECODE_MEMORY_S)
            self._stream_tokens *= weight
            self._stream_s = self._stream_s * weight + DECODE_MEMORY_S * (1 - weight)
        self._counted_s = now_s

    def new_snapshot(self) -> None:
        self._peaks.append((self.requests, self.tokens))

    def load(self) -> OwnLoad:
        # Leave out the last pair: the latest reports are older than the time that this pair covers.
        reported = list(self._peaks)[:-1]
        return OwnLoad(
            self.requests,
            self.tokens,
            peak_requests=max((requests for requests, _ in reported), default=0),
            peak_tokens=max((tokens for _, tokens in reported), default=0),
            tokens_per_s=self._done_tokens / self._busy_s if self._busy_s else 0.0,
        )
