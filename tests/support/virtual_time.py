"""An event loop whose time passes only when nothing is left to do, and whose order is a seed's.

A run is a function of its seed: waits cost no time, and of the tasks that could go on at one
moment any may be the first (asyncio's own loop always takes the one that became ready first, so
most orders that a busy machine produces are never seen in a test).
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(Exception):
    """Everybody waits, and for nothing that time could bring."""


class _NoSelector(selectors.SelectSelector):
    """Nothing ever comes from outside; waiting for it moves the loop's time on."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("every task waits for another one")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 s. The order of callbacks that are no task's is asyncio's."""

    def __init__(self, seed: int) -> None:
        self._clock = _NoSelector()
        self._rng = random.Random(seed)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def _run_once(self) -> None:
        # A task has one step at a time here, so steps may change places with one another.
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
    """Wait; costs nothing, and is refused in a loop where it would."""
    assert isinstance(asyncio.get_running_loop(), VirtualLoop)
    await asyncio.sleep(seconds)


def run_virtually(main: Coroutine[Any, Any, T], seed: int) -> T:
    """``asyncio.run`` in virtual time.

    Raises:
        DeadlockError: ``main`` waits for what can never come.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(main)
