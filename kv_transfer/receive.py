"""The decode side: one thread per prefill peer does everything that concerns this peer.

    engine thread ── reserve, cancel ──▸ sessions ◂── peer thread: HELLO ▸ pair ▸ RESERVE …
                  ◂── take_results ──                  HEADER ▸ receive ▸ scatter ▸ … ▸ END

A peer that is slow or dies costs its own transfers only. Incoming KV is written into blocks by
this process alone, so a block is never written after its transfer was reported to the engine:
``cancel`` waits with the report until a scatter that has begun is over.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq
from torch.distributed import TCPStore

from kv_transfer import wire
from kv_transfer.errors import IncompatibleError, KvTransferError, PairError, ProtocolError
from kv_transfer.geometry import KvGeometry
from kv_transfer.options import TransferOptions
from kv_transfer.pages import KvPages
from kv_transfer.pair import DECODE_RANK, Pair, backend_for, host_store
from kv_transfer.session import ReceiveSession, ReceiveState
from kv_transfer.side_stream import mark, side_stream, wait_done

logger = logging.getLogger(__name__)

_PING_S = 1.0  # well under any peer_lease_s that makes sense


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that the engine holds for tokens ``[token_start, token_end)`` of a request."""

    key: str
    request_id: str  # the engine's
    address: str  # control address of the prefill rank
    incarnation: str  # of the prefill worker
    block_ids: tuple[int, ...]  # all blocks of the request from token 0 on
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a reservation ended; reported once, after the last write to its blocks."""

    key: str
    request_id: str
    complete: bool
    first_token: int | None
    backend: str
    num_bytes: int
    messages: int
    tokens: int
    transfer_ms: float  # first header -> manifest complete


@dataclass(slots=True)
class _Transfer:
    session: ReceiveSession
    reservation: Reservation
    block_ids: torch.Tensor
    progress_at_s: float
    first_header_at_s: float | None = None
    scattering: bool = False


class DecodeClient:
    """Reserves and receives. The engine-facing methods never block on the network.

    ``on_result`` is called, with the lock held, whenever ``take_results`` has something new.
    """

    def __init__(
        self,
        pages: KvPages,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
        on_result: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_result = on_result
        self.pages = pages
        self.geometry = geometry
        self.options = options
        self.clock = clock
        self.lock = threading.Lock()
        self.transfers: dict[str, _Transfer] = {}
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._results: list[TransferResult] = []
        self.store: TCPStore = host_store(options.host, options.pair_timeout_s)

    def reserve(self, reservation: Reservation) -> None:
        """Ask the prefill peer for this KV; the outcome appears in ``take_results``."""
        block_ids = torch.tensor(reservation.block_ids, dtype=torch.int64)
        session = ReceiveSession(
            reservation.key, reservation.token_start, reservation.token_end, self.geometry
        )
        with self.lock:
            transfer = _Transfer(session, reservation, block_ids, self.clock())
            self.transfers[reservation.key] = transfer
            if len(self.transfers) > self.options.max_pending:
                self.fail(transfer, "too many transfers (kv_transfer.max_pending)")
                return
            peer = self._peer(reservation.address, reservation.incarnation)
            if peer is None:
                self.fail(transfer, "too many pairs (kv_transfer.max_pairs)")
                return
            peer.post(wire.Reserve(reservation.key, reservation.token_start, reservation.token_end))

    def cancel(self, key: str, address: str, incarnation: str) -> None:
        """The engine dropped the request; a reservation that was made is still reported once."""
        with self.lock:
            transfer = self.transfers.get(key)
            if transfer is not None:
                transfer.session.cancel()
                self.settle(transfer)
            peer = self._peer(address, incarnation)
            if peer is not None:
                peer.post(wire.Cancel(key))

    def take_results(self) -> list[TransferResult]:
        with self.lock:
            results, self._results = self._results, []
            return results

    def stop(self) -> None:
        """Say goodbye to all peers and end the threads. Idempotent."""
        with self.lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.stop()

    # ---- with the lock held --------------------------------------------------------------

    def _peer(self, address: str, incarnation: str) -> _Peer | None:
        peer = self._peers.get((address, incarnation))
        if peer is None:
            if len(self._peers) >= self.options.max_pairs:
                return None
            peer = self._peers[address, incarnation] = _Peer(self, address, incarnation)
        return peer

    def fail(self, transfer: _Transfer, reason: str) -> None:
        if not transfer.session.terminal:
            logger.warning("KV transfer %s failed: %s", transfer.session.key, reason)
            transfer.session.fail()
            self.settle(transfer)

    def settle(self, transfer: _Transfer) -> None:
        """Report a transfer that has ended, unless a scatter into its blocks is under way."""
        session, reservation = transfer.session, transfer.reservation
        if not session.terminal or transfer.scattering:
            return
        if self.transfers.pop(session.key, None) is None:
            return
        began_s = transfer.first_header_at_s
        self._results.append(
            TransferResult(
                session.key,
                reservation.request_id,
                session.state is ReceiveState.COMPLETE,
                session.first_token,
                backend_for(self.pages.device),
                session.num_bytes,
                session.messages,
                session.token_end - session.token_start,
                0.0 if began_s is None else (self.clock() - began_s) * 1000,
            )
        )
        self._on_result()

    def forget(self, peer: _Peer, reason: str) -> None:
        """A peer is gone: its transfers fail, the next reservation starts a new pair."""
        with self.lock:
            self._peers.pop((peer.address, peer.incarnation), None)
            for transfer in list(self.transfers.values()):
                where = transfer.reservation
                if (where.address, where.incarnation) == (peer.address, peer.incarnation):
                    self.fail(transfer, reason)


class _Peer:
    """The pair with one prefill rank, and the thread that serves it."""

    def __init__(self, client: DecodeClient, address: str, incarnation: str) -> None:
        self.address = address
        self.incarnation = incarnation
        self._client = client
        self._outgoing: deque[wire.ToPrefill] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._stopping = False
        self._pair: Pair | None = None
        self._staging: torch.Tensor | None = None
        self._last_heard_s = client.clock()
        self._thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)
        self._thread.start()

    def post(self, message: wire.ToPrefill) -> None:
        self._outgoing.append(message)
        with contextlib.suppress(OSError):  # full: the thread is awake; closed: it has ended
            self._wake_write.send(b"\0")

    def stop(self) -> None:
        self._stopping = True
        self.post(wire.Bye())
        self._thread.join(timeout=self._client.options.pair_timeout_s)

    # ---- peer thread ---------------------------------------------------------------------

    def _run(self) -> None:
        reason = "this worker stops"
        try:
            with contextlib.ExitStack() as stack:
                self._client.options.bind_this_thread()
                stack.enter_context(side_stream(self._client.pages.device))
                control, monitor = self._connect(stack)
                self._pair = self._open(control)
                stack.callback(self._pair.abort)
                self._loop(control, monitor)
        except KvTransferError as error:
            reason = f"{self.address}: {error}"
        except Exception:  # a defect of ours: costs this pair, and is loud
            logger.exception("KV receiver failed")
            reason = "internal error of the receiver"
        finally:
            self._client.forget(self, reason)
            self._wake_read.close()
            self._wake_write.close()

    def _connect(self, stack: contextlib.ExitStack) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """The control socket and its monitor, which tells of a lost connection."""
        control: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        stack.callback(control.close)
        control.setsockopt(zmq.LINGER, 200)  # ms: let BYE leave
        control.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        control.setsockopt(zmq.IPV6, "[" in self.address)
        monitor = control.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stack.callback(monitor.close)
        stack.callback(control.disable_monitor)
        control.connect(self.address)
        return control, monitor

    def _open(self, control: zmq.Socket[bytes]) -> Pair:
        options, client = self._client.options, self._client
        pair_id = uuid.uuid4().hex
        hello = wire.Hello(
            wire.PROTOCOL_VERSION,
            options.token,
            self.incarnation,
            options.incarnation,
            client.geometry,
            backend_for(client.pages.device),
            pair_id,
            options.host,
            client.store.port,
        )
        control.send(wire.encode(hello))
        deadline_s = client.clock() + options.pair_timeout_s
        while True:
            remaining_s = deadline_s - client.clock()
            if remaining_s <= 0 or not control.poll(int(remaining_s * 1000) + 1):
                raise PairError(f"no answer to HELLO within {options.pair_timeout_s} s")
            answer = wire.decode_to_decode(control.recv())
            if isinstance(answer, wire.Refuse):
                raise IncompatibleError(answer.reason)
            if isinstance(answer, wire.Welcome) and answer.pair_id == pair_id:
                break
            raise ProtocolError(f"{type(answer).__name__} before WELCOME")
        # Reservations leave before the group is made, so that the peer can prepare meanwhile.
        self._flush(control)
        store, host = client.store, options.host
        pair = Pair(store, pair_id, DECODE_RANK, client.pages.device, host, options.pair_timeout_s)
        self._last_heard_s = client.clock()
        return pair

    def _loop(self, control: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for source in (control, monitor, self._wake_read):
            poller.register(source, zmq.POLLIN)
        next_ping_s = 0.0
        while True:
            ready = dict(poller.poll(int(_PING_S * 1000)))
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            now_s = self._client.clock()
            if now_s >= next_ping_s:
                next_ping_s = now_s + _PING_S
                control.send(wire.encode(wire.Ping()))
            self._flush(control)
            if self._stopping:
                return
            if control in ready:  # one at a time: a long stream must not hold up our PING
                self._handle(wire.decode_to_decode(control.recv()))
            elif monitor in ready:  # after everything that it had sent
                raise PairError("the prefill worker closed its control connection")
            self._expire(self._client.clock())

    def _flush(self, control: zmq.Socket[bytes]) -> None:
        while self._outgoing:
            control.send(wire.encode(self._outgoing.popleft()))

    def _handle(self, message: wire.ToDecode) -> None:
        client = self._client
        self._last_heard_s = client.clock()
        match message:
            case wire.Header():
                self._receive(message)
            case wire.End():
                with client.lock:
                    transfer = client.transfers.get(message.key)
                    if transfer is not None and not transfer.session.terminal:
                        try:
                            transfer.session.end(message)
                        except ProtocolError as error:
                            client.fail(transfer, str(error))
                        client.settle(transfer)
            case wire.Fail():
                with client.lock:
                    transfer = client.transfers.get(message.key)
                    if transfer is not None:
                        client.fail(transfer, f"the prefill worker says: {message.reason}")
            case wire.Refuse():
                raise PairError(f"the prefill worker gave the pair up: {message.reason}")
            case wire.Pong():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} after WELCOME")

    def _receive(self, header: wire.Header) -> None:
        """Take the announced tensor off the pair, and into the blocks if they are still ours."""
        client, options = self._client, self._client.options
        assert self._pair is not None
        elements, rest = divmod(header.num_bytes, client.geometry.item_bytes)
        if rest or not 0 < header.num_bytes <= self._staging_bytes:
            raise ProtocolError(f"a message of {header.num_bytes} bytes was announced")
        if self._staging is None:
            self._staging = torch.empty(
                self._staging_bytes // client.geometry.item_bytes,
                dtype=client.pages.dtype,
                device=client.pages.device,
            )
        message = self._staging[:elements]
        began_s = client.clock()
        self._pair.receive(message).wait(options.transfer_timeout_s)
        with client.lock:
            transfer = client.transfers.get(header.key)
            if transfer is None or transfer.session.terminal:
                return  # cancelled meanwhile; the bytes had to be taken all the same
            try:
                transfer.session.header(header.area, header.num_bytes)
            except ProtocolError as error:
                client.fail(transfer, str(error))
                return
            transfer.progress_at_s = client.clock()
            if transfer.first_header_at_s is None:
                transfer.first_header_at_s = began_s
            transfer.scattering = True
        try:
            client.pages.scatter(header.area, transfer.block_ids, message)
            wait_done(mark(client.pages.device), options.transfer_timeout_s)
        finally:
            with client.lock:
                transfer.scattering = False
                if not transfer.session.terminal:
                    transfer.session.received(header.area)
                client.settle(transfer)

    @property
    def _staging_bytes(self) -> int:
        """The largest message: ``message_bytes``, or one block of one layer if that is larger."""
        return max(self._client.options.message_bytes, self._client.geometry.block_bytes)

    def _expire(self, now_s: float) -> None:
        client, options = self._client, self._client.options
        if now_s - self._last_heard_s > options.peer_lease_s:
            raise PairError("the prefill worker went silent (kv_transfer.peer_lease_s)")
        with client.lock:
            for transfer in list(client.transfers.values()):
                where = transfer.reservation
                if (where.address, where.incarnation) != (self.address, self.incarnation):
                    continue
                if transfer.first_header_at_s is None:
                    continue  # the prefill worker answers for its queue: KV, FAIL or silence
                if now_s - transfer.progress_at_s > options.transfer_timeout_s:
                    client.fail(transfer, "no progress (kv_transfer.transfer_timeout_s)")
                    self.post(wire.Cancel(transfer.session.key))
