"""The control thread of a prefill rank.

It owns the control socket, handles the messages that arrive and sends those that other threads
post.
"""

from __future__ import annotations

import logging
import threading

import zmq

from core.net import bracketed
from kv_transfer import wire
from kv_transfer.curve import protect_server
from kv_transfer.errors import IncompatibleError, ProtocolError
from kv_transfer.geometry import PairPlan, plan_pair
from kv_transfer.local_rank import LocalRank
from kv_transfer.options import TransferOptions
from kv_transfer.pair import backend_for
from kv_transfer.send.sender import Sender
from kv_transfer.send.transfers import SendTransfers

logger = logging.getLogger(__name__)

_LINGER_MS = 500  # time for the last messages to leave
_FRAMES_AT_A_TIME = 64
_SWEEP_S = 0.5  # resolution of the leases and reservation timeouts, which are seconds long


class ControlServer:
    """Listens for all decode ranks, and starts a sender for each. The caller starts ``thread``."""

    def __init__(self, rank: LocalRank, transfers: SendTransfers) -> None:
        self.thread = threading.Thread(target=self._run, name="kv-control", daemon=True)
        self.sender_threads: list[threading.Thread] = []  # including those of closed pairs
        self._rank = rank
        self._transfers = transfers
        self._bad_frames = 0  # number of messages dropped since the last sweep
        self._socket = _router_socket(rank.options)
        host = bracketed(rank.options.host)
        port: int = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"

    def _run(self) -> None:
        self._rank.options.bind_this_thread()
        transfers, outbox, clock = self._transfers, self._transfers.outbox, self._rank.clock
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(outbox.wake_socket, zmq.POLLIN)
        next_sweep_s = clock() + _SWEEP_S
        while True:
            ready = dict(poller.poll(int(_SWEEP_S * 1000)))
            if outbox.wake_socket.fileno() in ready:
                outbox.clear_wakes()
            if self._socket in ready:
                self._receive_some()
            while outbox:
                routing_id, message = outbox.take()
                self._socket.send_multipart([routing_id, wire.encode(message)])
            with transfers.lock:
                if transfers.stopping and not outbox:
                    break
                if clock() >= next_sweep_s:
                    next_sweep_s = clock() + _SWEEP_S
                    self._report_bad_frames()
                    transfers.expire()
        self._socket.close(linger=_LINGER_MS)
        outbox.close()

    def _receive_some(self) -> None:
        """Handle a bounded number of messages, so that answers leave even if a peer floods us."""
        for _ in range(_FRAMES_AT_A_TIME):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            routing_id = frames[0]
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames")
                message = wire.decode_to_prefill(frames[1])
                with self._transfers.lock:
                    self._handle(routing_id, message)
            except ProtocolError as error:
                self._bad_frames += 1
                if self._bad_frames == 1:  # a defective peer must not fill the log
                    logger.warning("KV control message dropped: %s", error)
            except Exception:  # a defect of ours; it costs this message and is logged
                logger.exception("KV control message failed")

    def _report_bad_frames(self) -> None:
        if self._bad_frames > 1:
            logger.warning("%d more KV control messages dropped", self._bad_frames - 1)
        self._bad_frames = 0

    # ---- with the lock held --------------------------------------------------------------

    def _handle(self, routing_id: bytes, message: wire.ToPrefill) -> None:
        transfers = self._transfers
        if isinstance(message, wire.Hello):
            self._hello(routing_id, message)
            return
        if isinstance(message, wire.Release):
            transfers.cancel(message.transfer_id, "released by the router", None)
            return
        peer = transfers.peers.get(routing_id)
        if peer is None and routing_id in transfers.closed_peers:  # the message crossed our REFUSE
            if isinstance(message, wire.Cancel):
                incarnation = transfers.closed_peers[routing_id]
                transfers.cancel_by_decode(message.transfer_id, incarnation, None)
            return
        if peer is None:
            transfers.outbox.post((routing_id, wire.Refuse("", "no such pair")))
            raise ProtocolError(f"{type(message).__name__} before HELLO")
        peer.last_heard_s = self._rank.clock()
        match message:
            case wire.Ping():
                transfers.post(peer, wire.Pong())
            case wire.Publish():
                if not peer.up:
                    peer.published.put(message)
            case wire.Reserve():
                transfers.reserve(peer, message)
            case wire.Cancel():
                transfers.cancel_by_decode(message.transfer_id, peer.hello.incarnation, peer)
            case wire.Bye():
                transfers.close_peer(peer, "the decode worker closed the pair")

    def _hello(self, routing_id: bytes, hello: wire.Hello) -> None:
        transfers = self._transfers
        try:
            plan = self._accept(hello)
        except IncompatibleError as error:
            logger.error("KV pair refused: %s", error)
            transfers.outbox.post((routing_id, wire.Refuse(hello.pair_id, str(error))))
            return
        peer = transfers.new_peer(routing_id, hello, plan)
        if (old := transfers.peers.get(routing_id)) is not None:
            transfers.close_peer(old, "the decode worker opened a new pair")
        transfers.peers[routing_id] = peer
        transfers.post(peer, wire.Welcome(hello.pair_id, self._rank.geometry))
        sender = Sender(peer, transfers, self._rank)
        try:
            sender.thread.start()  # after WELCOME, because the sender posts messages of its own
        except RuntimeError:  # the process may start no more threads
            transfers.close_peer(peer, "the prefill worker can start no thread")
            raise
        self.sender_threads = [t for t in self.sender_threads if t.is_alive()] + [sender.thread]

    def _accept(self, hello: wire.Hello) -> PairPlan:
        """Check a HELLO, make room for the new pair and return its plan.

        Raises:
            IncompatibleError: the pair is refused. The peer gets this error's message as reason.
        """
        backend = backend_for(self._rank.caches.device)
        if hello.version != wire.PROTOCOL_VERSION:
            raise IncompatibleError(
                f"decode speaks KV protocol version {hello.version}, prefill speaks "
                f"{wire.PROTOCOL_VERSION}"
            )
        if hello.expected_incarnation != self._rank.options.incarnation:
            raise IncompatibleError(
                "this prefill worker has restarted: its incarnation is not the one that the decode "
                "worker was told"
            )
        if hello.backend != backend:
            raise IncompatibleError(f"decode uses {hello.backend}, prefill uses {backend}")
        if self._transfers.stopping:
            raise IncompatibleError("this prefill worker stops")
        plan = plan_pair(self._rank.geometry, hello.geometry)
        self._transfers.make_room_for_peer()
        return plan


def _router_socket(options: TransferOptions) -> zmq.Socket[bytes]:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
    router.setsockopt(zmq.IPV6, ":" in options.host)
    protect_server(router, options.secret)
    # A peer whose host vanished closes no connection, so ZeroMQ pings each connection.
    ping_ms = min(round(options.peer_lease_s * 1000 / 2), 2**31 - 1)
    router.setsockopt(zmq.HEARTBEAT_IVL, ping_ms)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, ping_ms)
    return router
