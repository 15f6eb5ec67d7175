"""The calls that one server has in flight, and their end when the server leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import BatonError


class InFlight:
    """Belongs to one event loop. What may come in is its owner's to say.

    Args:
        leaving: makes the error that a call ends with when it is sent away.
    """

    def __init__(self, leaving: Callable[[], BatonError]) -> None:
        self._leaving = leaving
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}  # None: it is sent away
        self._idle = asyncio.Event()
        self._idle.set()

    def __contains__(self, key: str) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    @contextmanager
    def track(self, key: str) -> Iterator[None]:
        """The current task serves the call ``key``, which is not in flight yet, for the block.

        Raises:
            BatonError: at the end of the block, if the call was sent away.
        """
        self._tasks[key] = asyncio.current_task()
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._tasks[key] is not None:
                raise
            raise self._leaving() from None
        finally:
            del self._tasks[key]
            if not self._tasks:
                self._idle.set()

    def send_away(self) -> None:
        """End what is in flight, for the callers to go on elsewhere."""
        for key, task in self._tasks.items():
            if task is not None:
                self._tasks[key] = None
                task.cancel()

    async def drained(self) -> None:
        """Return when nothing is in flight."""
        await self._idle.wait()
