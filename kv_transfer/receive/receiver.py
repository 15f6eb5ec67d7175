"""The thread of one pair. It opens the pair, receives messages and writes them into blocks."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections import deque
from dataclasses import dataclass

import torch

from kv_transfer import wire
from kv_transfer.errors import KvTransferError, PairClosedError, PairError, ProtocolError
from kv_transfer.geometry import plan_pair
from kv_transfer.kv_caches import UnitView
from kv_transfer.local_rank import LocalRank
from kv_transfer.pair import (
    DECODE_RANK,
    Pair,
    PendingWork,
    backend_for,
    close_pair,
)
from kv_transfer.pair_store import PairStore
from kv_transfer.receive.control import ControlConnection, control_connection
from kv_transfer.receive.records import Peer
from kv_transfer.receive.transfers import ReceiveTransfers
from kv_transfer.side_stream import mark, side_stream, wait_done

logger = logging.getLogger(__name__)

_PING_S = 1.0  # well below any sensible peer_lease_s


@dataclass(frozen=True, slots=True)
class _Incoming:
    """An announced message on its way into a staging buffer."""

    header: wire.Header
    buffer: torch.Tensor
    message: torch.Tensor  # the part of ``buffer`` that the message fills
    work: PendingWork
    began_s: float


class Receivers:
    """Starts the receivers of one rank and joins their threads.

    ``ReceiveTransfers`` refers to this object, and this object does not refer back. A reference
    cycle would keep closed process groups and their open files until a garbage collection.
    """

    def __init__(self, rank: LocalRank) -> None:
        self.rank = rank
        self._threads: list[threading.Thread] = []  # including those of closed pairs

    def start(self, peer: Peer, transfers: ReceiveTransfers) -> None:
        """Start a receiver. The caller holds the lock of ``transfers``."""
        thread = Receiver(peer, transfers, self.rank).thread
        thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=self.rank.options.pair_timeout_s)


class Receiver:
    """Receives from one peer until the pair is closed. The caller starts ``thread``."""

    def __init__(self, peer: Peer, transfers: ReceiveTransfers, rank: LocalRank) -> None:
        self.peer = peer
        self.thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)
        self._transfers = transfers
        self._rank = rank
        self._view: UnitView | None = None
        self._staging: list[torch.Tensor] = []  # free buffers
        self._incoming: deque[_Incoming] = deque()  # in the order of their headers
        self._announced = 0  # number of messages announced so far
        self._last_heard_s = rank.clock()

    def _run(self) -> None:
        reason, retry = "this worker stops", False
        peer, transfers, rank = self.peer, self._transfers, self._rank
        try:
            with contextlib.ExitStack() as stack:
                rank.options.bind_this_thread()
                stack.enter_context(side_stream(rank.caches.device))
                control = stack.enter_context(control_connection(peer, rank))
                self._open_pair(control)
                self._serve(control)
        except KvTransferError as error:
            reason, retry = f"{peer.address}: {error}", isinstance(error, PairClosedError)
        except Exception:  # a defect of ours; it costs this pair and is logged with its traceback
            logger.exception("KV receiver failed")
            reason = "internal error of the receiver"
        finally:
            with transfers.lock:
                transfers.pair_closed(peer, reason, retry=retry)
            peer.outbox.close()
            close_pair(peer.pair, rank.options.pair_timeout_s, rank.on_stuck)

    def _open_pair(self, control: ControlConnection) -> None:
        """Exchange HELLO and WELCOME, plan the pair and make the process group."""
        peer, rank, options = self.peer, self._rank, self._rank.options
        pair_id = uuid.uuid4().hex
        control.send(self._hello(pair_id))
        welcome = control.wait_welcome(pair_id, options.pair_timeout_s)
        plan = plan_pair(welcome.geometry, rank.geometry)
        # Send the posted reservations before the group is made. Otherwise the peer might drop the
        # KV meanwhile, because nobody has reserved it.
        control.flush()
        if plan.heads:
            host, timeout_s = options.host, options.pair_timeout_s
            store = PairStore(control.send, control.wait_published, timeout_s)
            peer.pair = Pair(store, DECODE_RANK, rank.caches.device, host, timeout_s)
        view = self._view = rank.caches.view(plan, rank.geometry.heads)
        max_units = plan.max_units(options.message_bytes)
        self._staging = view.staging(max_units, options.staging_buffers)
        with self._transfers.lock:
            self._transfers.pair_is_up(peer, plan)
        control.flush()  # what was posted while gloo connected
        self._last_heard_s = rank.clock()

    def _hello(self, pair_id: str) -> wire.Hello:
        options = self._rank.options
        return wire.Hello(
            version=wire.PROTOCOL_VERSION,
            expected_incarnation=self.peer.incarnation,
            incarnation=options.incarnation,
            geometry=self._rank.geometry,
            backend=backend_for(self._rank.caches.device),
            pair_id=pair_id,
        )

    def _serve(self, control: ControlConnection) -> None:
        """Handle messages until the pair is closed. Raises PairError if the connection is lost."""
        next_ping_s = 0.0
        while True:
            ready = control.poll(0 if self._incoming else int(_PING_S * 1000))
            now_s = self._rank.clock()
            if now_s >= next_ping_s:
                next_ping_s = now_s + _PING_S
                control.send(wire.Ping())
                self._expire(now_s)
            # Read ``closing`` before the flush, so that all messages posted before the close leave.
            closing = self.peer.closing
            control.flush()
            if closing:
                return
            if ready.message:  # one at a time: a long stream must not delay our PING
                self._handle(control.receive())
            elif self._incoming:
                self._finish_oldest()
            elif ready.lost:  # handled after all messages that arrived before the loss
                raise PairError("the prefill worker closed its control connection")

    def _handle(self, message: wire.ToDecode) -> None:
        transfers, peer = self._transfers, self.peer
        self._last_heard_s = self._rank.clock()
        if isinstance(message, wire.Header):
            self._begin_receive(message)
            return
        while self._incoming:  # END refers to all messages announced before it
            self._finish_oldest()
        match message:
            case wire.End():
                with transfers.lock:
                    transfers.complete_leg(message, peer)
            case wire.Fail():
                with transfers.lock:
                    transfers.fail_by_peer(message, peer)
            case wire.Refuse():
                raise PairClosedError(f"the prefill worker closed the pair: {message.reason}")
            case wire.Pong() | wire.Publish():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} after WELCOME")

    def _begin_receive(self, header: wire.Header) -> None:
        """Start to receive a message; earlier ones may still be on their way into the blocks."""
        if not self._staging:
            self._finish_oldest()
        buffer = self._staging[-1]
        elements, rest = divmod(header.num_bytes, self._rank.geometry.item_bytes)
        if self.peer.pair is None or rest or not 0 < elements <= buffer.numel():
            raise ProtocolError(f"this pair cannot carry a message of {header.num_bytes} bytes")
        if header.sequence != self._announced:
            raise ProtocolError(f"message {header.sequence} announced, {self._announced} expected")
        self._announced += 1
        self._staging.pop()
        work = self.peer.pair.receive(buffer, elements)
        now_s = self._rank.clock()
        self._incoming.append(_Incoming(header, buffer, buffer[:elements], work, now_s))

    def _finish_oldest(self) -> None:
        """Wait for the oldest announced message and write it into its blocks."""
        incoming, options = self._incoming.popleft(), self._rank.options
        # A peer that has announced a message and does not send it counts as silent.
        incoming.work.wait(min(options.transfer_timeout_s, options.peer_lease_s))
        self._last_heard_s = self._rank.clock()
        try:
            self._scatter(incoming)
        finally:
            self._staging.append(incoming.buffer)

    def _scatter(self, incoming: _Incoming) -> None:
        """Write a message into its blocks, unless its leg has ended or the message is wrong."""
        transfers, header = self._transfers, incoming.header
        assert self._view is not None
        with transfers.lock:
            found = transfers.begin_scatter(header, self.peer, incoming.began_s)
        if found is None:
            return
        transfer, leg = found
        try:
            self._view.scatter(header.block_range, transfer.block_ids, incoming.message)
            wait_done(mark(self._view.device), self._rank.options.transfer_timeout_s)
        finally:
            with transfers.lock:
                transfers.end_scatter(header, transfer, leg)

    def _expire(self, now_s: float) -> None:
        if now_s - self._last_heard_s > self._rank.options.peer_lease_s:
            raise PairError("the prefill worker went silent (kv_transfer.peer_lease_s)")
        with self._transfers.lock:
            self._transfers.expire(self.peer, now_s)
