"""A datagram socket on which a rank "rings" to wake its idle engine core.

A rank rings when it has the result of a transfer, complete or not. Without the doorbell, an engine
core that only waits for KV asks its ranks for results every millisecond. On CPUs this takes a third
of a core away from the other pool. With the doorbell, the engine core sleeps instead. A ring is
only a hint: if one is lost, the engine core wakes at its timeout.
"""

from __future__ import annotations

import contextlib
import select
import socket


def _address(incarnation: str) -> str:
    return f"\0baton-kv-{incarnation}"  # abstract address: there is no file to remove


_MAX_RINGS = 1000  # read at a time: other users of this machine can ring without end


class Doorbell:
    """The engine core's end; each worker that can receive KV has one."""

    def __init__(self, incarnation: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_address(incarnation))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until a rank rings, at most ``timeout_s``.

        Return immediately if a rank has rung since the last wait.
        """
        self._poll.poll(timeout_s * 1000)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MAX_RINGS):
                self._socket.recv(1)

    def close(self) -> None:
        self._socket.close()


class DoorbellButton:
    """A rank's end. One thread at a time may use it."""

    def __init__(self, incarnation: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._address = _address(incarnation)

    def ring(self) -> None:
        """Wake the engine core. Never blocks. Has no effect if there is no listener."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", self._address)

    def close(self) -> None:
        self._socket.close()
