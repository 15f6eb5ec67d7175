"""The decode side: one thread per prefill peer does everything that concerns this peer.

    engine thread ── reserve, cancel ──▸ sessions ◂── peer thread: HELLO ▸ pair ▸ RESERVE …
                  ◂── take_results ──                  HEADER ▸ receive ▸ scatter ▸ … ▸ END

A peer that is slow or dies costs its own transfers only. Incoming KV is written into blocks by
this process alone, so a block is never written after its transfer was reported to the engine:
the report waits until each part has ended and no scatter is under way.
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
from dataclasses import dataclass, field

import torch
import zmq
from torch.distributed import TCPStore

from kv_transfer import wire
from kv_transfer.errors import (
    IncompatibleError,
    KvTransferError,
    PairClosedError,
    PairError,
    ProtocolError,
)
from kv_transfer.geometry import KvGeometry, PairPlan, plan_pair, sources
from kv_transfer.kv_caches import KvPages, PageView
from kv_transfer.options import TransferOptions
from kv_transfer.pair import (
    DECODE_RANK,
    Pair,
    PendingWork,
    backend_for,
    close_pair,
    host_store,
    join_store,
)
from kv_transfer.session import ReceiveSession, ReceiveState
from kv_transfer.side_stream import mark, side_stream, wait_done

logger = logging.getLogger(__name__)

_PING_S = 1.0  # well under any peer_lease_s that makes sense


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that the engine holds for tokens ``[token_start, token_end)`` of a request."""

    key: str
    request_id: str  # the engine's
    addresses: tuple[str, ...]  # control addresses of the prefill worker, by its ranks
    incarnation: str  # of the prefill worker
    block_ids: tuple[int, ...]  # all blocks of the request from token 0 on
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a reservation ended on this rank; reported once, after the last write to its blocks."""

    key: str
    request_id: str
    complete: bool
    first_token: int | None
    backend: str
    num_bytes: int
    messages: int
    tokens: int
    transfer_ms: float  # first header -> last manifest
    hidden_bytes: int = 0  # of num_bytes, sent while the prefill was still computing
    tail_ms: float = 0.0  # the prefill's last layer -> last byte sent
    stall_ms: float = 0.0  # the prefill waited for the link with all its buffers full
    retries: int = 0  # reservations repeated over a new pair


@dataclass(slots=True)
class _Part:
    """What comes from one prefill rank."""

    session: ReceiveSession
    peer: _Peer
    progress_at_s: float
    first_header_at_s: float | None = None
    scattering: bool = False
    retries: int = 0


@dataclass(slots=True)
class _Transfer:
    reservation: Reservation
    block_ids: torch.Tensor
    parts: dict[str, _Part] = field(default_factory=dict)  # by control address

    @property
    def ended(self) -> bool:
        return all(part.session.terminal for part in self.parts.values())


class DecodeClient:
    """Reserves and receives. The engine-facing methods never block on the network.

    ``on_result`` is called, with the lock held, whenever ``take_results`` has something new;
    ``on_stuck``, from any thread, if a process group cannot be aborted: this process should then
    be replaced.
    """

    def __init__(
        self,
        pages: KvPages,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
        on_result: Callable[[], None] = lambda: None,
        on_stuck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_result = on_result
        self.on_stuck = on_stuck
        self.pages = pages
        self.geometry = geometry
        self.options = options
        self.clock = clock
        self.lock = threading.Lock()
        self.transfers: dict[str, _Transfer] = {}
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._threads: list[threading.Thread] = []
        self._results: list[TransferResult] = []
        self._stopping = False
        self.store: TCPStore = host_store(options.host, options.pair_timeout_s)

    def reserve(self, reservation: Reservation) -> None:
        """Ask the prefill ranks for this KV; the outcome appears in ``take_results``."""
        block_ids = torch.tensor(reservation.block_ids, dtype=torch.int64)
        with self.lock:
            transfer = _Transfer(reservation, block_ids)
            self.transfers[reservation.key] = transfer
            peers = self._peers_of(reservation.addresses, reservation.incarnation)
            if peers is None:
                self.fail(transfer, "all pairs are busy (kv_transfer.max_pairs)")
                return
            if len(self.transfers) > self.options.max_pending:
                for peer in peers:
                    peer.post(wire.Cancel(reservation.key))  # it need not hold the KV
                self.fail(transfer, "too many transfers (kv_transfer.max_pending)")
                return
            for peer in peers:
                session = ReceiveSession(
                    reservation.key, reservation.token_start, reservation.token_end
                )
                part = _Part(session, peer, self.clock())
                transfer.parts[peer.address] = part
                peer.reserve(part)

    def cancel(self, key: str, addresses: tuple[str, ...], incarnation: str) -> None:
        """The engine dropped the request; a reservation that was made is still reported once."""
        with self.lock:
            transfer = self.transfers.get(key)
            if transfer is not None:
                for part in transfer.parts.values():
                    part.session.cancel()
                self.settle(transfer)
            for peer in self._peers_of(addresses, incarnation) or ():
                peer.post(wire.Cancel(key))

    def prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """Begin to make the pairs with a prefill worker before there is a request, if they fit."""
        with self.lock:
            if len(self._peers) + len(addresses) <= self.options.max_pairs:
                self._peers_of(addresses, incarnation)

    def paired_with(self) -> set[str]:
        """Incarnations of the prefill workers all of whose pairs that were begun are up."""
        with self.lock:
            begun = {peer.incarnation for peer in self._peers.values()}
            return begun - {p.incarnation for p in self._peers.values() if p.plan is None}

    def take_results(self) -> list[TransferResult]:
        with self.lock:
            results, self._results = self._results, []
            return results

    def stop(self) -> None:
        """Say goodbye to all peers and end the threads. Idempotent."""
        with self.lock:
            self._stopping = True
            for peer in self._peers.values():
                peer.leave()
                peer.abort()
        for thread in self._threads:  # of closed pairs, too
            thread.join(timeout=self.options.pair_timeout_s)

    # ---- with the lock held --------------------------------------------------------------

    def _peers_of(self, addresses: tuple[str, ...], incarnation: str) -> list[_Peer] | None:
        """The peers at those prefill ranks that this rank needs; None if there is no room."""
        mine, total = self.geometry, self.geometry.total_kv_heads
        try:
            ranks = sources(mine.tp_rank, mine.tp_size, len(addresses), total)
        except IncompatibleError as error:
            logger.error("no prefill worker for this model: %s", error)
            return None
        needed = [(addresses[rank], incarnation) for rank in ranks]
        for key in needed:
            if key in self._peers:
                continue
            if self._stopping or not self._make_room(set(needed)):
                return None
            peer = self._peers[key] = _Peer(self, *key)
            self._threads = [t for t in self._threads if t.is_alive()] + [peer.thread]
        return [self._peers[key] for key in needed]

    def _make_room(self, keep: set[tuple[str, str]]) -> bool:
        """Whether one more pair fits, perhaps after the idle one that was used longest ago left."""
        if len(self._peers) < self.options.max_pairs:
            return True
        idle = [p for key, p in self._peers.items() if key not in keep and not self.busy(p)]
        if idle:
            self.retire(min(idle, key=lambda peer: peer.last_used_s))
        return bool(idle)

    def busy(self, peer: _Peer) -> bool:
        return any(
            part.peer is peer
            for transfer in self.transfers.values()
            for part in transfer.parts.values()
        )

    def retire(self, peer: _Peer) -> None:
        """Close a pair on which nothing happens; the next reservation makes a new one."""
        self._drop(peer)
        peer.leave()

    def _drop(self, peer: _Peer) -> None:
        key = peer.address, peer.incarnation
        if self._peers.get(key) is peer:  # not its successor
            del self._peers[key]

    def fail(self, transfer: _Transfer, reason: str) -> None:
        """One part lost, and the others are of no use."""
        if transfer.parts and transfer.ended:
            return
        logger.warning("KV transfer %s failed: %s", transfer.reservation.key, reason)
        for part in transfer.parts.values():
            if not part.session.terminal:
                part.session.fail()
                part.peer.post(wire.Cancel(transfer.reservation.key))
        self.settle(transfer)

    def settle(self, transfer: _Transfer) -> None:
        """Report a transfer all of whose parts have ended, and that nobody writes to any more."""
        reservation, parts = transfer.reservation, list(transfer.parts.values())
        if not transfer.ended or any(part.scattering for part in parts):
            return
        if self.transfers.pop(reservation.key, None) is None:
            return
        sessions = [part.session for part in parts]
        ends = [session.end_message for session in sessions if session.end_message is not None]
        began_s = [p.first_header_at_s for p in parts if p.first_header_at_s is not None]
        now_s = self.clock()
        for part in parts:
            part.peer.last_used_s = now_s
        self._results.append(
            TransferResult(
                reservation.key,
                reservation.request_id,
                bool(parts) and all(s.state is ReceiveState.COMPLETE for s in sessions),
                ends[0].first_token if ends else None,
                backend_for(self.pages.device),
                sum(session.num_bytes for session in sessions),
                sum(session.messages for session in sessions),
                reservation.token_end - reservation.token_start,
                (now_s - min(began_s)) * 1000 if began_s else 0.0,
                sum(end.hidden_bytes for end in ends),
                max((end.tail_ms for end in ends), default=0.0),
                max((end.stall_ms for end in ends), default=0.0),
                sum(part.retries for part in parts),
            )
        )
        self._on_result()

    def part_of(self, key: str, peer: _Peer) -> tuple[_Transfer, _Part] | None:
        """What is still to come for a transfer from this peer."""
        transfer = self.transfers.get(key)
        part = transfer.parts.get(peer.address) if transfer is not None else None
        if transfer is None or part is None or part.peer is not peer or part.session.terminal:
            return None
        return transfer, part

    def forget(self, peer: _Peer, reason: str, *, retry: bool) -> None:
        """A pair is gone, and what it carried fails.

        ``retry``: the peer only wanted the room. A reservation of which nothing has come, and
        which it may not even have seen, is made once more.
        """
        with self.lock:
            self._drop(peer)
            for transfer in list(self.transfers.values()):
                part = transfer.parts.get(peer.address)
                if part is None or part.peer is not peer or part.session.terminal:
                    continue
                untouched = part.session.state is ReceiveState.RESERVED and not part.retries
                where = transfer.reservation
                if retry and untouched and self._peers_of(where.addresses, where.incarnation):
                    part.retries += 1
                    part.peer = self._peers[peer.address, peer.incarnation]
                    part.peer.reserve(part)
                else:
                    self.fail(transfer, reason)


@dataclass(frozen=True, slots=True)
class _Incoming:
    """A message that was announced and is on its way into a staging buffer."""

    header: wire.Header
    buffer: torch.Tensor
    message: torch.Tensor
    work: PendingWork
    began_s: float


class _Peer:
    """The pair with one prefill rank, and the thread that serves it."""

    def __init__(self, client: DecodeClient, address: str, incarnation: str) -> None:
        self.address = address
        self.incarnation = incarnation
        self.plan: PairPlan | None = None  # from when the pair is up
        self.last_used_s = client.clock()
        self._client = client
        self._outgoing: deque[wire.ToPrefill] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._stopping = False
        self._pair: Pair | None = None
        self._view: PageView | None = None
        self._staging: list[torch.Tensor] = []
        self._incoming: deque[_Incoming] = deque()
        self._announced_count = 0
        self._last_heard_s = client.clock()
        self.thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)
        self.thread.start()

    def post(self, message: wire.ToPrefill) -> None:
        self._outgoing.append(message)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is awake; closed: it has ended
            self._wake_write.send(b"\0")

    def reserve(self, part: _Part) -> None:
        """With the client's lock held."""
        session = part.session
        if self.plan is not None:
            session.follow(self.plan)
        self.post(wire.Reserve(session.key, session.token_start, session.token_end))

    def leave(self) -> None:
        """Say goodbye when all that was posted has been said."""
        self._stopping = True
        self._wake()

    def abort(self) -> None:
        """Also end a wait for a message that has been announced."""
        if self._pair is not None:
            self._pair.abort()

    # ---- peer thread ---------------------------------------------------------------------

    def _run(self) -> None:
        reason, retry = "this worker stops", False
        client, options = self._client, self._client.options
        try:
            with contextlib.ExitStack() as stack:
                options.bind_this_thread()
                stack.enter_context(side_stream(client.pages.device))
                control, monitor = self._connect(stack)
                self._open(control)
                self._loop(control, monitor)
        except KvTransferError as error:
            reason, retry = f"{self.address}: {error}", isinstance(error, PairClosedError)
        except Exception:  # a defect of ours: costs this pair, and is loud
            logger.exception("KV receiver failed")
            reason = "internal error of the receiver"
        finally:
            client.forget(self, reason, retry=retry)
            self._wake_read.close()
            self._wake_write.close()
            close_pair(self._pair, options.pair_timeout_s, client.on_stuck)

    def _connect(self, stack: contextlib.ExitStack) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """The control socket and its monitor, which tells of a lost connection."""
        control: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        stack.callback(control.close)
        stack.callback(self._goodbye, control)
        control.setsockopt(zmq.LINGER, 200)  # ms: let BYE leave
        control.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        control.setsockopt(zmq.IPV6, "[" in self.address)
        monitor = control.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stack.callback(monitor.close)
        stack.callback(control.disable_monitor)
        control.connect(self.address)
        return control, monitor

    def _goodbye(self, control: zmq.Socket[bytes]) -> None:
        """However it ends: else the peer finds out by its lease."""
        with contextlib.suppress(zmq.ZMQError):
            control.send(wire.encode(wire.Bye()), zmq.NOBLOCK)

    def _open(self, control: zmq.Socket[bytes]) -> None:
        """HELLO, WELCOME, the plan, the process group."""
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
        plan = plan_pair(self._welcome(control, pair_id).geometry, client.geometry)
        # Reservations leave before the group is made, so that the peer can prepare meanwhile.
        self._flush(control)
        if plan.heads:
            host, timeout_s = options.host, options.pair_timeout_s
            # A connection of its own: a wait on one is a wait for all who share it.
            store = join_store(host, client.store.port, timeout_s)
            self._pair = Pair(store, pair_id, DECODE_RANK, client.pages.device, host, timeout_s)
        view = self._view = client.pages.view(plan, client.geometry.heads)
        max_pages = plan.max_pages(options.message_bytes)
        self._staging = view.staging(max_pages, options.staging_buffers)
        with client.lock:
            self.plan = plan
            for transfer in client.transfers.values():
                part = transfer.parts.get(self.address)
                if part is not None and part.peer is self:
                    part.session.follow(plan)
        self._last_heard_s = client.clock()

    def _welcome(self, control: zmq.Socket[bytes], pair_id: str) -> wire.Welcome:
        client, timeout_s = self._client, self._client.options.pair_timeout_s
        deadline_s = client.clock() + timeout_s
        poller = zmq.Poller()
        poller.register(control, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        while True:
            remaining_s = deadline_s - client.clock()
            ready = dict(poller.poll(int(max(0, remaining_s) * 1000) + 1))
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            if self._stopping:
                raise PairError("this worker needs no pair any more")
            if control not in ready:
                if remaining_s <= 0:
                    raise PairError(f"no answer to HELLO within {timeout_s} s")
                continue
            answer = wire.decode_to_decode(control.recv())
            if isinstance(answer, wire.Refuse):
                raise IncompatibleError(answer.reason)
            if isinstance(answer, wire.Welcome) and answer.pair_id == pair_id:
                return answer
            raise ProtocolError(f"{type(answer).__name__} before WELCOME")

    def _loop(self, control: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for source in (control, monitor, self._wake_read):
            poller.register(source, zmq.POLLIN)
        next_ping_s = 0.0
        while True:
            ready = dict(poller.poll(0 if self._incoming else int(_PING_S * 1000)))
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            now_s = self._client.clock()
            if now_s >= next_ping_s:
                next_ping_s = now_s + _PING_S
                control.send(wire.encode(wire.Ping()))
                self._expire(now_s)
            stopping = self._stopping  # before the last words are said
            self._flush(control)
            if stopping:
                return
            if control in ready:  # one at a time: a long stream must not hold up our PING
                self._handle(wire.decode_to_decode(control.recv()))
            elif self._incoming:
                self._take()
            elif monitor in ready:  # after everything that it had sent
                raise PairError("the prefill worker closed its control connection")

    def _flush(self, control: zmq.Socket[bytes]) -> None:
        while self._outgoing:
            control.send(wire.encode(self._outgoing.popleft()))

    def _handle(self, message: wire.ToDecode) -> None:
        client = self._client
        self._last_heard_s = client.clock()
        if isinstance(message, wire.Header):
            self._announced(message)
            return
        while self._incoming:  # the rest is about what was announced before
            self._take()
        match message:
            case wire.End():
                with client.lock:
                    if (found := client.part_of(message.key, self)) is not None:
                        transfer, part = found
                        try:
                            part.session.end(message)
                        except ProtocolError as error:
                            client.fail(transfer, str(error))
                        client.settle(transfer)
            case wire.Fail():
                with client.lock:
                    if (found := client.part_of(message.key, self)) is not None:
                        client.fail(found[0], f"the prefill worker says: {message.reason}")
            case wire.Refuse():
                raise PairClosedError(f"the prefill worker gave the pair up: {message.reason}")
            case wire.Pong():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} after WELCOME")

    def _announced(self, header: wire.Header) -> None:
        """Begin to receive a message; the one before may still be on its way into the blocks."""
        client = self._client
        if not self._staging:
            self._take()
        buffer = self._staging[-1]
        elements, rest = divmod(header.num_bytes, client.geometry.item_bytes)
        if self._pair is None or rest or not 0 < elements <= buffer.numel():
            raise ProtocolError(f"a message of {header.num_bytes} bytes was announced")
        if header.sequence != self._announced_count:
            raise ProtocolError(
                f"message {header.sequence} was announced after {self._announced_count}"
            )
        self._announced_count += 1
        message = self._staging.pop()[:elements]
        work = self._pair.receive(message)
        self._incoming.append(_Incoming(header, buffer, message, work, client.clock()))

    def _take(self) -> None:
        """Wait for the oldest message, and put it into the blocks if they are still ours."""
        client, incoming = self._client, self._incoming.popleft()
        # It was announced: a peer that does not send it now is silent.
        options = client.options
        incoming.work.wait(min(options.transfer_timeout_s, options.peer_lease_s))
        self._last_heard_s = client.clock()
        try:
            self._store(incoming)
        finally:
            self._staging.append(incoming.buffer)

    def _store(self, incoming: _Incoming) -> None:
        client, header = self._client, incoming.header
        assert self._view is not None
        with client.lock:
            if (found := client.part_of(header.key, self)) is None:
                return  # cancelled meanwhile; the bytes had to be taken all the same
            transfer, part = found
            try:
                part.session.header(header.area, header.num_bytes)
            except ProtocolError as error:
                client.fail(transfer, str(error))
                return
            part.progress_at_s = client.clock()
            if part.first_header_at_s is None:
                part.first_header_at_s = incoming.began_s
            part.scattering = True
        try:
            self._view.scatter(header.area, transfer.block_ids, incoming.message)
            wait_done(mark(self._view.device), client.options.transfer_timeout_s)
        finally:
            with client.lock:
                part.scattering = False
                if not part.session.terminal:
                    part.session.received(header.area, header.num_bytes)
                client.settle(transfer)

    def _expire(self, now_s: float) -> None:
        client, options = self._client, self._client.options
        if now_s - self._last_heard_s > options.peer_lease_s:
            raise PairError("the prefill worker went silent (kv_transfer.peer_lease_s)")
        with client.lock:
            if not client.busy(self) and now_s - self.last_used_s > options.pair_idle_s:
                client.retire(self)
            for transfer in list(client.transfers.values()):
                part = transfer.parts.get(self.address)
                if part is None or part.peer is not self or part.first_header_at_s is None:
                    continue  # the prefill worker answers for its queue: KV, FAIL or silence
                if part.session.terminal:
                    continue
                if now_s - part.progress_at_s > options.transfer_timeout_s:
                    client.fail(transfer, "no progress (kv_transfer.transfer_timeout_s)")
