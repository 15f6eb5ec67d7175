"""Lets an engine's front end tell the engine's ranks to drop KV that nobody will fetch."""

from __future__ import annotations

import zmq

from kv_transfer import wire
from kv_transfer.curve import protect_client


class Releaser:
    """Sends messages to the control servers of all ranks. Only one thread may use it."""

    def __init__(self, addresses: tuple[str, ...], secret: str) -> None:
        self._sockets: list[zmq.Socket[bytes]] = []
        for address in addresses:
            dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.IPV6, "[" in address)
            protect_client(dealer, secret)
            dealer.connect(address)
            self._sockets.append(dealer)

    def release(self, transfer_id: str) -> None:
        """Tell all ranks to drop the KV of a transfer. Never blocks.

        Raises:
            zmq.Again: 1,000 messages (ZeroMQ's default bound) are queued for one rank.
        """
        frame = wire.encode(wire.Release(transfer_id))
        for dealer in self._sockets:
            dealer.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        for dealer in self._sockets:
            dealer.close()
