"""Finds an engine that is alive but makes no progress.

The processes of such an engine keep running and keep their connections, so only a ping that gets no
answer shows the hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from core.errors import WorkerLostError

# Time to read an answer that has already arrived. If only this process was suspended, the ping
# looks overdue although the engine has answered it.
_LATE_ANSWER_WAIT_S = 0.5


class LivenessProbe:
    """Pings one engine and waits for each answer. Belongs to one event loop.

    The probe does not watch the requests. If each request reaches its deadline before
    ``timeout_s``, no request shows the hang. While the engine's loop runs, no request can hang,
    because each ends by its deadline.

    Args:
        ping: returns when the engine's loop has answered. The loop answers between two steps.
        timeout_s: an engine that does not answer for this time counts as hung. Must be longer than
            the longest step.
        clock: returns the seconds of a monotonic clock.
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
        """Send a ping, unless the last ping is still unanswered.

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
        """Cancel the ping that is under way, if there is one."""
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.gather(self._pending, return_exceptions=True)
