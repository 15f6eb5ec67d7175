"""An event loop in virtual time. It runs tasks in an order that depends on a seed.

When no task can run, the time jumps to the next timer, so waits cost no real time. Any of the tasks
that can run may run first. asyncio's own loop always runs tasks in the order in which they became
ready, so a test in that loop never meets most orders that occur on a busy machine. The same seed
gives the same run.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(Exception):
    """No task can run and no timer is set, so time cannot advance."""


class _NoSelector(selectors.SelectSelector):
    """Never waits for files. A wait with a timeout only advances the loop's time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("no task can run, no timer is set")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 s. Only the steps of tasks are shuffled. Other callbacks are not."""

    def __init__(self, seed: int) -> None:
        self._clock = _NoSelector()
        self._rng = random.Random(seed)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call ``func`` now. A thread would run in real time."""
        assert executor is None
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        # Each task has at most one step in this queue, so any order of the steps is valid.
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
    """Wait in virtual time. Fails in any other loop, because the wait would take real time."""
    assert isinstance(asyncio.get_running_loop(), VirtualLoop)
    await asyncio.sleep(seconds)


def run_virtually(main: Coroutine[Any, Any, T], seed: int) -> T:
    """Run ``main`` as ``asyncio.run`` does, but in virtual time.

    Raises:
        DeadlockError: no task can run and no timer is set.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(main)
