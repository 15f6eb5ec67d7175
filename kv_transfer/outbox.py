"""Lets any thread pass messages to the one thread that owns a ZeroMQ socket.

A ZeroMQ socket belongs to one thread. Other threads append to the outbox and write one byte to a
socket pair. The owner's poller watches the socket pair.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """A queue of messages and a way to wake the thread that sends them."""

    def __init__(self) -> None:
        self._messages: deque[T] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @property
    def wake_socket(self) -> socket.socket:
        """The owner's poller watches this socket; it is readable after ``post`` and ``wake``."""
        return self._reader

    def post(self, message: T) -> None:
        """Queue a message and wake the owner. Any thread may call this. Never blocks."""
        self._messages.append(message)
        self.wake()

    def wake(self) -> None:
        """Wake the owner. Any thread may call this. Never blocks."""
        # If the socket is full, the owner has a wake-up to read. If it is closed, the owner ended.
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def clear_wakes(self) -> None:
        """Read pending wake-ups; the owner calls this when ``wake_socket`` is readable."""
        self._reader.recv(4096)

    def take(self) -> T:
        """Remove the oldest message. Raises IndexError if there is none."""
        return self._messages.popleft()

    def __len__(self) -> int:
        return len(self._messages)

    def close(self) -> None:
        """The owner calls this when it ends. Later posts are never sent."""
        self._reader.close()
        self._writer.close()
