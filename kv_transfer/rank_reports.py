"""What an engine's front end and its own ranks tell each other beside the engine.

rank ▸ front end   the address of its control server; why it cannot serve
front end ▸ rank   RELEASE
"""

from __future__ import annotations

import hmac
import logging
import time

import msgspec
import zmq

from kv_transfer import wire
from kv_transfer.errors import KvTransferError

logger = logging.getLogger(__name__)

_FRAMES_AT_A_TIME = 64


class RankReport(msgspec.Struct, frozen=True):
    """Either an address or a fault."""

    token: str  # shared secret of the cluster; a stranger's fault would cost the worker
    rank: int
    address: str = ""
    fault: str = ""  # why this rank cannot be used, or not any more


def report(endpoint: str, message: RankReport) -> None:
    """From a rank, from any thread."""
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.setsockopt(zmq.LINGER, 10_000)  # ms; the front end has been listening since before
        push.setsockopt(zmq.IPV6, "[" in endpoint)
        push.connect(endpoint)
        push.send(msgspec.msgpack.encode(message))


class RankReports:
    """Hears the ranks; for one thread at a time.

    Opened before the engine is made; ``endpoint`` goes to the ranks in the connector's
    configuration. What does not carry ``token`` is dropped.
    """

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._dropped = False
        self._pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._pull.setsockopt(zmq.IPV6, ":" in host)
        self._pull.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        bound = f"[{host}]" if ":" in host else host
        self.endpoint = f"tcp://{bound}:{self._pull.bind_to_random_port(f'tcp://{bound}')}"

    def addresses(self, ranks: int, timeout_s: float) -> tuple[str, ...]:
        """The control addresses by rank. Raises KvTransferError at a fault, or if one is missing
        in time."""
        found: dict[int, str] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(found) < ranks:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not self._pull.poll(int(remaining_s * 1000) + 1):
                raise KvTransferError(
                    f"{len(found)} of {ranks} ranks have reported a KV control address "
                    f"within {timeout_s} s"
                )
            message = self._next()
            if message is None or not 0 <= message.rank < ranks:
                continue
            if message.fault:
                raise KvTransferError(message.fault)
            found[message.rank] = message.address
        return tuple(found[rank] for rank in range(ranks))

    def fault(self, timeout_s: float = 0) -> str | None:
        """Why a rank cannot be used, if one has said so since the last call."""
        for _ in range(_FRAMES_AT_A_TIME):  # one who talks without end must not hold us up
            if not self._pull.poll(int(timeout_s * 1000)):
                break
            message = self._next()
            if message is not None and message.fault:
                return message.fault
        return None

    def _next(self) -> RankReport | None:
        """None: not from one of our ranks."""
        frames = self._pull.recv_multipart()
        try:
            message = msgspec.msgpack.decode(b"".join(frames), type=RankReport)
        except (msgspec.DecodeError, ValueError, RecursionError):
            message = None
        if message is None or not hmac.compare_digest(message.token.encode(), self._token.encode()):
            if not self._dropped:  # a stranger must not fill the log
                logger.warning("a report that is not from one of our ranks was dropped")
            self._dropped = True
            return None
        return message

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
