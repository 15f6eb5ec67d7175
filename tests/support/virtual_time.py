"""An event loop in virtual time, which runs tasks in an order that depends on a seed.

Time passes only when no task can run, so waits cost no real time. Of the tasks that can run, any
may be first. asyncio's own loop always takes the one that became ready first, so with it a test
never sees most orders that a busy machine produces. A run is a function of its seed.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(Exception):
    """Every task waits for another one, so time cannot advance."""


class _NoSelector(selectors.SelectSelector):
    """Has no files to wait for. A wait with a timeout advances the loop's time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("every task waits for another one")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 s. Callbacks that are not steps of a task keep asyncio's order."""

    def __init__(self, seed: int) -> None:
        self._clock = _NoSelector()
        self._rng = random.Random(seed)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def _run_once(self) -> None:
        # Each task has at most one step in here, so the steps may swap places.
        ready = self._ready  # type: ignore[attr-defined]
        places = [
            place
            for place, handle in enumerate(ready)
            if isinstance(getattr(handle._callback, "__self__", None), asyncio.Task)
        ]
        steps = [ready[place] for place in places]
        self._rng.shuffle(steps)
        for place, step in zip(places, steps, strict=True):
            ready[place] = step
        super()._run_once()  # type: ignore[misc]


async def elapse(seconds: float) -> None:
    """Wait in virtual time. Fails in a loop that would really wait."""
    assert isinstance(asyncio.get_running_loop(), VirtualLoop)
    await asyncio.sleep(seconds)


def run_virtually(main: Coroutine[Any, Any, T], seed: int) -> T:
    """``asyncio.run`` in virtual time.

    Raises:
        DeadlockError: all tasks wait for each other.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(main)
