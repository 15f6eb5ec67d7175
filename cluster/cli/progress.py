"""Shows that a long step is still running. The output is plain text, so it also suits a pipe."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, TextIO

TICK_S: Final = 1.0  # one dot per second
_TICKS_PER_NUMBER: Final = 5  # every fifth tick prints the seconds instead of a dot
_ELAPSED_TIME: Final = re.compile(r",? \(?\d+ s\)?$")  # " (12 s)" or ", 12 s"


class Progress:
    """Prints one line per step: its name, a dot for each second, and its duration.

        starting the workers ....5....10....15.. 17.3 s

    A step lasts until the next call of ``step`` or ``done``. The methods are thread-safe.
    """

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._lock = threading.Lock()
        self._step: str | None = None
        self._started_s = 0.0
        self._ticks = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def step(self, message: str) -> None:
        """End the running step and begin the next one.

        If ``message`` ends with an elapsed time, that time is removed, because this class shows the
        time itself. If ``message`` is the same as that of the running step, the call has no effect.
        """
        message = _ELAPSED_TIME.sub("", message)
        with self._lock:
            if message == self._step:
                return
            self._end()
            self._step, self._started_s, self._ticks = message, self._clock(), 0
            self._write(message)

    def done(self) -> None:
        """End the running step."""
        with self._lock:
            self._end()

    def tick(self) -> None:
        """Show the seconds that have passed since the last tick."""
        with self._lock:
            if self._step is None:
                return
            while self._started_s + (self._ticks + 1) * TICK_S <= self._clock():
                self._ticks += 1
                number = self._ticks % _TICKS_PER_NUMBER == 0
                space = " " if self._ticks == 1 else ""
                self._write(f"{space}{self._ticks if number else '.'}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        self.done()

    def _run(self) -> None:
        while not self._closed.wait(TICK_S / 4):
            self.tick()

    def _end(self) -> None:
        if self._step is not None:
            self._write(f" {self._clock() - self._started_s:.1f} s\n")
            self._step = None

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a closed pipe must not stop the work itself
            self._out.write(text)
            self._out.flush()
