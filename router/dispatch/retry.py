"""Decides whether and when a retry follows a failed attempt. Pure: times are passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import WORKER_DRAINING, BatonError, CapacityError, WorkerUnreachableError
from core.types import WorkerKey

FIRST_WAIT_S = 0.05  # the wait doubles each time
MAX_WAIT_S = 1.0  # a replacement is noticed within a second


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """From the configuration (``router.max_attempts`` and so on)."""

    max_attempts: int
    timeout_s: float  # time to find a worker, from the first failure since the latest new token
    avoid_s: float  # how long to avoid a worker that failed
    cold_start_timeout_s: float = 180.0  # time to find the workers of the first attempt


@dataclass(slots=True)
class Retries:
    """The failures of one request.

    Attributes:
        lost_attempts: how many attempts workers accepted and did not end. Each may have killed a
            worker.

    A retry waits only if no worker is left: 50 ms at first, then twice as long each time, up to one
    second. A new token resets the wait.
    """

    limits: RetryLimits
    lost_attempts: int = 0
    last: BatonError | None = None
    _avoided_until_s: dict[WorkerKey, float] = field(default_factory=dict)
    _tokens: int = 0
    _has_failed: bool = False
    _search_until_s: float = 0.0  # once ``last`` is set
    _waits: int = 0

    def failed(
        self,
        error: BatonError,
        worker: WorkerKey | None,
        *,
        tokens: int,
        now_s: float,
    ) -> None:
        """Note that an attempt failed.

        Args:
            worker: the worker at fault; None if no worker is at fault.
            tokens: how many tokens the client has by now.

        Raises:
            BatonError: ``error``, if ``max_attempts`` attempts are lost, or if a worker cannot be
                reached and ``timeout_s`` is over.
        """
        refused = error.reason == WORKER_DRAINING or isinstance(error, CapacityError)
        unreachable = isinstance(error, WorkerUnreachableError)
        self.lost_attempts += not (refused or unreachable)
        self.last = error
        if worker is not None:
            hint_s = error.retry_after_s if refused else None
            self._avoided_until_s[worker] = now_s + (hint_s or self.limits.avoid_s)
        if not self._has_failed or tokens > self._tokens:
            self._search_until_s, self._waits = now_s + self.limits.timeout_s, 0
        self._has_failed, self._tokens = True, tokens
        late = now_s > self._search_until_s
        if self.is_over or (unreachable and late):
            raise error

    def begin_wait(self, error: BatonError, now_s: float) -> None:
        """Note that the first attempt finds no worker and waits for one.

        Args:
            error: raised if none comes within ``cold_start_timeout_s``.
        """
        self.last, self._search_until_s = error, now_s + self.limits.cold_start_timeout_s

    @property
    def is_over(self) -> bool:
        """Whether the request has lost as many attempts as it may."""
        return self.lost_attempts >= self.limits.max_attempts

    def excluded(self, now_s: float) -> frozenset[WorkerKey]:
        """The workers that the request avoids now."""
        return frozenset(key for key, until_s in self._avoided_until_s.items() if until_s > now_s)

    def wait_s(self, now_s: float) -> float:
        """How long to wait before the next search for workers, when no worker is left.

        Raises:
            BatonError: the last failure. It is raised if it is a CapacityError and the client has
                no token yet, or if the time to find a worker would end during the wait.
        """
        assert self.last is not None, "nothing has failed"
        wait_s = min(FIRST_WAIT_S * 2.0**self._waits, MAX_WAIT_S)
        full = isinstance(self.last, CapacityError) and self._tokens == 0
        if full or now_s + wait_s > self._search_until_s:
            raise self.last  # it says more than "no worker is left"
        self._waits += 1
        return wait_s
