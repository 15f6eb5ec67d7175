"""Signals as two flags, looked at by whoever waits."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Protocol, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal(Protocol):
    """Tells a cluster that somebody wants it to end."""

    requested: bool  # end, in good order
    hurry: bool  # end at once


class NeverStop:
    """For callers that end the cluster themselves."""

    requested = False
    hurry = False


class Signals:
    """While entered, the first signal sets ``requested`` and the second ``hurry``.

    Must be entered from the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.hurry = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.hurry = self.requested
        self.requested = True
