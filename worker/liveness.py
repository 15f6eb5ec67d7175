"""Finds an engine that is alive but makes no progress.

Such an engine keeps its connections and has no exit code, so only a question to it shows the hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from core.errors import WorkerLostError

# Time for an answer that has arrived but is unread. If this process was suspended, not the engine,
# the answer is already there.
_LATE_ANSWER_WAIT_S = 0.5


class LivenessProbe:
    """Pings one engine at each check. Belongs to one event loop.

    The probe watches the engine's loop and not its requests, because every request may be shorter
    than the timeout. If the loop runs, each request ends by itself or at its deadline.

    Args:
        ping: returns when the engine's loop has answered, which happens between two steps.
        timeout_s: the engine hangs if it does not answer for this time. Must be longer than any
            step.
        clock: seconds on any monotonic scale.
    """

    def __init__(
        self,
        ping: Callable[[], Coroutine[Any, Any, object]],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ping = ping
        self._timeout_s = timeout_s
        self._clock = clock
        self._pending: asyncio.Task[object] | None = None  # at most one ping at a time
        self._sent_s = 0.0

    async def check(self) -> None:
        """Look for the answer to the last ping. If it is there, send the next ping.

        Takes half a second at most.

        Raises:
            WorkerLostError: the engine has not answered for ``timeout_s``.
            Exception: any error that the last ping raised.
        """
        pending = self._pending
        if pending is not None:
            if self._clock() - self._sent_s > self._timeout_s:
                await asyncio.wait([pending], timeout=_LATE_ANSWER_WAIT_S)
                if not pending.done():
                    raise WorkerLostError(
                        "the engine of this worker has done nothing for "
                        f"{self._clock() - self._sent_s:.0f} s"
                    )
            if not pending.done():
                return
            pending.result()
        self._pending = asyncio.create_task(self._ping(), name="liveness probe")
        self._sent_s = self._clock()

    async def close(self) -> None:
        """Cancel the ping that is under way."""
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.gather(self._pending, return_exceptions=True)
