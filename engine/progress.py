"""Finds an engine that lives and does nothing, which no connection and no exit code tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import WorkerLostError


class ProgressWatch:
    """Of one engine; belongs to one event loop.

    Args:
        timeout_s: without a step, while there are requests; longer than any step.
        clock: seconds on any monotonic scale.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._requests = 0
        self._stepped_s = 0.0

    def step(self) -> None:
        """The engine did something."""
        self._stepped_s = self._clock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """The engine has one more request for the block."""
        if not self._requests:
            self.step()  # it had no reason to
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    def check(self) -> None:
        """Raises WorkerLostError if the engine hangs."""
        silent_s = self._clock() - self._stepped_s
        if self._requests and silent_s > self._timeout_s:
            raise WorkerLostError(
                f"the engine of this worker has {self._requests} requests and has done nothing "
                f"for {silent_s:.0f} s"
            )
