"""Tracks the calls that one server has in flight, and ends them when the server shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import BatonError


class InFlight:
    """The calls in flight, by key. Belongs to one event loop.

    The owner of this object decides which calls are accepted.

    Args:
        leaving: returns the error with which a call ends after ``send_away``.
    """

    def __init__(self, leaving: Callable[[], BatonError]) -> None:
        self._leaving = leaving
        # None: ``send_away`` has cancelled the call's task, which has not ended yet.
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __contains__(self, key: str) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    @contextmanager
    def track(self, key: str) -> Iterator[None]:
        """Count the call ``key`` as in flight during the block. The current task must serve it.

        ``key`` must not be in flight already.

        Raises:
            BatonError: ``send_away`` ended the call. This error replaces the task's CancelledError.
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
        """End all calls in flight, so that their callers continue elsewhere. Idempotent."""
        for key, task in self._tasks.items():
            if task is not None:
                self._tasks[key] = None
                task.cancel()

    async def drained(self) -> None:
        """Wait until no call is in flight."""
        await self._idle.wait()
