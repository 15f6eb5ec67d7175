"""Drains a cluster that is being stopped, within its grace period.

    router finishes its requests ▸ workers drain and end ▸ (the launcher kills what is left)

Ray's calls may hang, so each step runs in a thread that can be abandoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from cluster.local.signals import StopSignal

_ROUTER_SHARE: Final = 0.8  # the router's part of the grace period; workers get what is left
_LATE_S: Final = 1.0  # a Ray call may end this late, because an abandoned call logs errors
_MIN_STEP_S: Final = 0.1  # a step gets this time even if it starts after the deadline
_POLL_S: Final = 0.05  # how soon a second signal is noticed


class Drainable(Protocol):
    """The part of ``cluster.ray.head.RayRuntime`` that draining uses."""

    def is_alive(self) -> bool: ...
    def drain_router(self, grace_s: float) -> None: ...
    def delete(self, timeout_s: float) -> bool: ...


class Drainer:
    """Drains one cluster, once.

    Args:
        progress: called with each step, and with each error of a step.
    """

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self.has_abandoned_call = False  # a thread may still be inside a call of the runtime

    def drain(self, runtime: Drainable, grace_s: float, signal: StopSignal) -> None:
        """Let the router finish its requests, then let the workers end.

        The router drains first, because its requests still need the workers. If a step fails,
        the error is reported and the next step runs. Calls that still run are abandoned when
        ``signal`` says hurry, or about one second after ``grace_s``.
        """
        deadline_s = time.monotonic() + grace_s

        def left_s() -> float:
            return max(_MIN_STEP_S, deadline_s - time.monotonic())

        self._progress("draining")
        self._run(lambda: runtime.drain_router(left_s() * _ROUTER_SHARE), deadline_s, signal)
        if runtime.is_alive():  # without Ray's processes, Serve cannot stop the workers
            self._progress("stopping the workers")
            self._run(lambda: runtime.delete(left_s()), deadline_s, signal)

    def _run(self, step: Callable[[], object], deadline_s: float, signal: StopSignal) -> None:
        """Run ``step`` in a thread until it ends, the deadline passes or ``signal`` says hurry.

        The step bounds its own time, unless a Ray call hangs.
        """
        errors: list[Exception] = []

        def run() -> None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the launcher kills what is left
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline_s += _LATE_S
        while thread.is_alive() and time.monotonic() < deadline_s and not signal.hurry:
            thread.join(_POLL_S)
        self.has_abandoned_call |= thread.is_alive()
        for error in errors:
            self._progress(f"draining failed: {type(error).__name__}: {error}")
