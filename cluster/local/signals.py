"""Turns SIGINT, SIGTERM and SIGHUP into two flags, which the launcher polls while it waits."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Protocol, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal(Protocol):
    """Tells a cluster whether it should end."""

    requested: bool  # drain, then end
    hurry: bool  # end immediately, without waiting for requests


class NeverStop:
    """A signal that never comes, for callers that end the cluster themselves."""

    requested = False
    hurry = False


class Signals:
    """Handles signals inside a ``with`` block.

    The first signal sets ``requested``, the second sets ``hurry``. Enter the block from the main
    thread. Leaving the block restores the former handlers.
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
