"""Carries reports from an engine's ranks to the engine's front end, over a socket of Baton's own.

A prefill rank reports the address of its control server. Any rank reports why it cannot serve.
"""

from __future__ import annotations

import logging
import time

import msgspec
import zmq

from core.net import bracketed
from kv_transfer import wire
from kv_transfer.curve import protect_client, protect_server
from kv_transfer.errors import KvTransferError

logger = logging.getLogger(__name__)

_FRAMES_AT_A_TIME = 64


class RankReport(msgspec.Struct, frozen=True):
    """Either an address or a fault."""

    rank: int
    address: str = ""
    fault: str = ""  # why this rank cannot serve, or cannot serve any longer


def send_report(endpoint: str, secret: str, report: RankReport) -> None:
    """Send a report to the front end. Any thread of a rank may call this."""
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.setsockopt(zmq.LINGER, 10_000)  # ms; the front end listens before any rank starts
        push.setsockopt(zmq.IPV6, "[" in endpoint)
        protect_client(push, secret)
        push.connect(endpoint)
        push.send(msgspec.msgpack.encode(report))


class RankReports:
    """Receives the reports of all ranks. One thread at a time may use it.

    The front end opens it before it makes the engine, and passes ``endpoint`` to the ranks in the
    connector's configuration.
    """

    def __init__(self, host: str, secret: str) -> None:
        self._dropped = False
        self._pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._pull.setsockopt(zmq.IPV6, ":" in host)
        self._pull.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        protect_server(self._pull, secret)
        bound = bracketed(host)
        self.endpoint = f"tcp://{bound}:{self._pull.bind_to_random_port(f'tcp://{bound}')}"

    def addresses(self, ranks: int, timeout_s: float) -> tuple[str, ...]:
        """Wait for the control addresses of all ranks, and return them by rank.

        Raises:
            KvTransferError: a rank reported a fault, or an address is missing after ``timeout_s``.
        """
        found: dict[int, str] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(found) < ranks:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not self._pull.poll(int(remaining_s * 1000) + 1):
                raise KvTransferError(
                    f"{len(found)} of {ranks} ranks have reported a KV control address "
                    f"within {timeout_s} s"
                )
            report = self._receive()
            if report is None or not 0 <= report.rank < ranks:
                continue
            if report.fault:
                raise KvTransferError(report.fault)
            found[report.rank] = report.address
        return tuple(found[rank] for rank in range(ranks))

    def fault(self, timeout_s: float = 0) -> str | None:
        """Return the next fault that a rank has reported, or None. Each fault is returned once.

        Waits at most ``timeout_s`` for each report.
        """
        for _ in range(_FRAMES_AT_A_TIME):  # a rank that never stops sending must not block us
            if not self._pull.poll(int(timeout_s * 1000)):
                break
            report = self._receive()
            if report is not None and report.fault:
                return report.fault
        return None

    def _receive(self) -> RankReport | None:
        """Receive one report; return None if it is malformed."""
        frames = self._pull.recv_multipart()
        try:
            return msgspec.msgpack.decode(b"".join(frames), type=RankReport)
        except (msgspec.DecodeError, ValueError, RecursionError):
            if not self._dropped:  # a defective rank must not fill the log
                logger.warning("dropped a malformed report of a rank")
            self._dropped = True
            return None

    def close(self) -> None:
        self._pull.close(linger=0)
