"""The engine front end's two words with its own ranks: where they listen, and RELEASE."""

from __future__ import annotations

import time

import msgspec
import zmq

from kv_transfer import wire
from kv_transfer.errors import KvTransferError


class AddressBook:
    """Collects the control addresses that the ranks report while the engine starts.

    Opened before the engine is made; ``endpoint`` goes to the ranks in the connector's
    configuration.
    """

    def __init__(self, host: str) -> None:
        self._pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._pull.setsockopt(zmq.IPV6, ":" in host)
        bound = f"[{host}]" if ":" in host else host
        self.endpoint = f"tcp://{bound}:{self._pull.bind_to_random_port(f'tcp://{bound}')}"

    def collect(self, ranks: int, timeout_s: float) -> tuple[str, ...]:
        """The addresses by rank. Raises KvTransferError if one is missing in time."""
        found: dict[int, str] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(found) < ranks:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not self._pull.poll(int(remaining_s * 1000) + 1):
                raise KvTransferError(
                    f"{len(found)} of {ranks} ranks have reported a KV control address "
                    f"within {timeout_s} s"
                )
            rank, address = msgspec.msgpack.decode(self._pull.recv(), type=tuple[int, str])
            found[rank] = address
        return tuple(found[rank] for rank in range(ranks))

    def close(self) -> None:
        self._pull.close(linger=0)


class Releaser:
    """Tells this engine's own ranks to drop KV that nobody will fetch. One thread only."""

    def __init__(self, addresses: tuple[str, ...], token: str) -> None:
        self._token = token
        self._sockets: list[zmq.Socket[bytes]] = []
        for address in addresses:
            dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.IPV6, "[" in address)
            dealer.connect(address)
            self._sockets.append(dealer)

    def release(self, key: str) -> None:
        """Queue the message; never blocks (ZeroMQ's own bound of 1,000 messages applies)."""
        frame = wire.encode(wire.Release(self._token, key))
        for dealer in self._sockets:
            dealer.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        for dealer in self._sockets:
            dealer.close()
