"""What a request that lost a worker may still try, and when. Pure: times are passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import WORKER_DRAINING, BatonError, CapacityError, WorkerUnreachableError
from core.types import WorkerKey

FIRST_WAIT_S = 0.05  # then twice as long each time
MAX_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """From the configuration (``router.max_attempts`` and so on)."""

    max_attempts: int
    timeout_s: float  # without a new token, from the first failure on
    avoid_s: float  # a worker that failed the request; a dead one has left the registry by then


@dataclass(slots=True)
class Retries:
    """Failures of one request. The first after a token costs no wait, later ones do."""

    limits: RetryLimits
    last: BatonError | None = None
    _untaken: int = 0  # attempts that no worker took; they cost nothing
    _avoided_until_s: dict[WorkerKey, float] = field(default_factory=dict)
    _tokens: int = 0
    _failing_since_s: float | None = None
    _waits: int = 0

    def failed(
        self,
        error: BatonError,
        worker: WorkerKey | None,
        *,
        attempts: int,
        tokens: int,
        now_s: float,
    ) -> None:
        """The latest of ``attempts`` failed, by the fault of ``worker`` if that is not None.

        Args:
            tokens: that the application has by now.

        Raises:
            BatonError: ``error``, when there were too many attempts that a worker may have died of,
                or no worker can be reached for too long.
        """
        refused = error.reason == WORKER_DRAINING or isinstance(error, CapacityError)
        unreachable = isinstance(error, WorkerUnreachableError)
        self._untaken += refused or unreachable
        self.last = error
        if worker is not None:
            hint_s = error.retry_after_s if refused else None
            self._avoided_until_s[worker] = now_s + (hint_s or self.limits.avoid_s)
        if self._failing_since_s is None or tokens > self._tokens:
            self._failing_since_s, self._waits = now_s, 0
        self._tokens = tokens
        late = now_s > self._failing_since_s + self.limits.timeout_s
        if attempts - self._untaken >= self.limits.max_attempts or (unreachable and late):
            raise error

    def excluded(self, now_s: float) -> frozenset[WorkerKey]:
        """Workers that are not asked again yet."""
        return frozenset(key for key, until_s in self._avoided_until_s.items() if until_s > now_s)

    def wait_s(self, now_s: float) -> float:
        """No worker is left: when to look again.

        Raises:
            BatonError: the last failure, when waiting is no use or there is no time left for it.
        """
        assert self.last is not None, "nothing has failed"
        assert self._failing_since_s is not None
        wait_s = min(FIRST_WAIT_S * 2.0**self._waits, MAX_WAIT_S)
        full = isinstance(self.last, CapacityError) and self._tokens == 0
        if full or now_s + wait_s > self._failing_since_s + self.limits.timeout_s:
            raise self.last  # what happened first says more than that nobody is left
        self._waits += 1
        return wait_s
