"""Carries reports from an engine's ranks to the engine's front end, over a socket of Baton's own.

A prefill rank reports the address of its control server. Any rank reports why it cannot serve.
"""

from __future__ import annotations

import hmac
import logging
import time

import msgspec
import zmq

from core.net import bracketed
from kv_transfer import wire
from kv_transfer.errors import KvTransferError

logger = logging.getLogger(__name__)

_FRAMES_AT_A_TIME = 64


class RankReport(msgspec.Struct, frozen=True):
    """Either an address or a fault."""

    token: str  # shared secret of the cluster; a stranger must not report a fault
    rank: int
    address: str = ""
    fault: str = ""  # why this rank cannot serve, or cannot serve any longer


def send_report(endpoint: str, report: RankReport) -> None:
    """Send a report to the front end. Any thread of a rank may call this."""
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.setsockopt(zmq.LINGER, 10_000)  # ms; the front end listens before any rank starts
        push.setsockopt(zmq.IPV6, "[" in endpoint)
        push.connect(endpoint)
        push.send(msgspec.msgpack.encode(report))


class RankReports:
    """Receives the reports of all ranks. One thread at a time may use it.

    The front end opens it before it makes the engine, and passes ``endpoint`` to the ranks in the
    connector's configuration. Reports with a wrong token are dropped.
    """

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._dropped = False
        self._pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._pull.setsockopt(zmq.IPV6, ":" in host)
        self._pull.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
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
        for _ in range(_FRAMES_AT_A_TIME):  # a stranger that never stops sending must not block us
            if not self._pull.poll(int(timeout_s * 1000)):
                break
            report = self._receive()
            if report is not None and report.fault:
                return report.fault
        return None

    def _receive(self) -> RankReport | None:
        """Receive one report; return None if it is not from one of our ranks."""
        frames = self._pull.recv_multipart()
        try:
            report = msgspec.msgpack.decode(b"".join(frames), type=RankReport)
        except (msgspec.DecodeError, ValueError, RecursionError):
            report = None
        if report is None or not hmac.compare_digest(report.token.encode(), self._token.encode()):
            if not self._dropped:  # a stranger must not fill the log
                logger.warning("dropped a report that is not from one of our ranks")
            self._dropped = True
            return None
        return report

    def close(self) -> None:
        self._pull.close(linger=0)
