"""Lets an engine core that has nothing to do but wait for KV sleep until some has arrived.

vLLM asks its ranks every millisecond whether a transfer is complete, at the cost of a third of a
core that on CPUs somebody computes on. The ring is a hint: a lost one costs one nap.
"""

from __future__ import annotations

import contextlib
import select
import socket


def _address(incarnation: str) -> str:
    return f"\0baton-kv-{incarnation}"  # abstract: no file to remove


class Doorbell:
    """The engine core's end, one for each decode worker."""

    def __init__(self, incarnation: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_address(incarnation))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def nap(self, timeout_s: float) -> None:
        """Sleep until a rank rings, or has rung since the last nap; at most ``timeout_s``."""
        self._poll.poll(timeout_s * 1000)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    def close(self) -> None:
        self._socket.close()


class DoorbellButton:
    """A rank's end; used under its owner's lock."""

    def __init__(self, incarnation: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._address = _address(incarnation)

    def ring(self) -> None:
        """Never blocks: if nobody hears it, the nap ends by itself."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", self._address)

    def close(self) -> None:
        self._socket.close()
