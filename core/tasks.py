"""Supervises the tasks that must run as long as their process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

logger = logging.getLogger(__name__)

RESTART_S: Final = 1.0  # so that a task that always fails neither floods the log nor takes the CPU
HEALTHY_S: Final = 10.0  # a task that has run for so long counts as healthy again
MAX_FAILURES: Final = 5  # of one task, before its process should be replaced


class Supervisor:
    """Starts a task again if it raises or returns. Belongs to one event loop.

    Without it, such a task would end silently, and its process would look healthy: routers would
    never hear of a new worker, for example.

    Args:
        on_change: called when ``failing`` may have changed.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._tasks: list[asyncio.Task[None]] = []
        self._failures: dict[str, int] = {}  # by task, since it was healthy

    @property
    def failing(self) -> bool:
        """Whether a task has failed and has not run for ``HEALTHY_S`` since."""
        return bool(self._failures)

    @property
    def has_given_up(self) -> bool:
        """Whether a task has failed ``MAX_FAILURES`` times. Its process should be replaced."""
        return any(count >= MAX_FAILURES for count in self._failures.values())

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run ``run()`` in the background until ``stop``.

        Args:
            name: for the log and for ``asyncio.Task``.
        """
        self._tasks.append(asyncio.create_task(self._keep_running(name, run), name=name))

    async def stop(self) -> None:
        """Cancel all tasks and wait for their ends. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_running(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            healthy = loop.call_later(HEALTHY_S, self._note_healthy, name)
            try:
                await run()
                logger.error("%s has ended; it is started again", name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                if task.cancelling():
                    raise
                logger.exception("%s was cancelled by a defect; it is started again", name)
            except Exception:
                logger.exception("%s has failed; it is started again", name)
            finally:
                healthy.cancel()
            self._failures[name] = self._failures.get(name, 0) + 1
            self._on_change()
            await asyncio.sleep(RESTART_S)

    def _note_healthy(self, name: str) -> None:
        if self._failures.pop(name, None):
            self._on_change()
