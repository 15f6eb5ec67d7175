"""Finds an engine that lives and does nothing, which no connection and no exit code tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from core.errors import WorkerLostError

# For an answer that is here but unread: it may have been this process that stood still.
_LAST_LOOK_S = 0.5


class LivenessProbe:
    """Asks one engine again and again; belongs to one event loop.

    Not its requests are watched but its loop, for they may all be shorter than the timeout. One
    whose loop runs ends each request by itself or by the request's deadline.

    Args:
        ask: returns when the engine's loop has answered, which it does between two steps.
        timeout_s: without an answer; longer than any step.
        clock: seconds on any monotonic scale.
    """

    def __init__(
        self,
        ask: Callable[[], Coroutine[Any, Any, object]],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._timeout_s = timeout_s
        self._clock = clock
        self._question: asyncio.Task[object] | None = None  # the only one under way
        self._asked_s = 0.0

    async def check(self) -> None:
        """Look for the answer to the question of an earlier check, and ask anew if it is there.

        Takes half a second at most.

        Raises:
            WorkerLostError: the engine hangs.
            Exception: what ``ask`` raised.
        """
        question = self._question
        if question is not None:
            if self._clock() - self._asked_s > self._timeout_s:
                await asyncio.wait([question], timeout=_LAST_LOOK_S)
                if not question.done():
                    raise WorkerLostError(
                        "the engine of this worker has done nothing for "
                        f"{self._clock() - self._asked_s:.0f} s"
                    )
            if not question.done():
                return
            question.result()
        self._question = asyncio.create_task(self._ask(), name="liveness probe")
        self._asked_s = self._clock()

    async def close(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.gather(self._question, return_exceptions=True)
