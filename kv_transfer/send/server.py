"""The prefill side: a control server and one sender thread per pair.

    engine thread ── begin_step, layer_done, end_step, finish ──▸ sessions ◂── HELLO, RESERVE,
                                                                    │          CANCEL ── control
    sender thread of a pair: next_message ▸ gather ▸ HEADER ▸ send ◂┘                    thread

All state is guarded by one lock; nothing that blocks is done while it is held, so the engine's
step never waits for a peer. A sender sleeps until there is a whole message for its pair.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from kv_transfer import wire
from kv_transfer.errors import IncompatibleError, KvTransferError, ProtocolError
from kv_transfer.geometry import KvGeometry, PairPlan, Rectangle, plan_pair
from kv_transfer.kv_caches import KvPages, PageView
from kv_transfer.options import TransferOptions
from kv_transfer.pair import PREFILL_RANK, Pair, PendingWork, backend_for, close_pair, join_store
from kv_transfer.session import SendSession
from kv_transfer.side_stream import after, mark, side_stream, wait_done

logger = logging.getLogger(__name__)

_LINGER_MS = 500  # for the last words to the peers
_FRAMES_AT_A_TIME = 64
_SWEEP_S = 0.5  # resolution of the leases and reservations below, all of them seconds long


@dataclass(frozen=True, slots=True)
class StepChunk:
    """Tokens ``[token_start, token_end)`` of a request that one engine step computes."""

    key: str
    request_id: str  # the engine's
    block_ids: tuple[int, ...]  # all blocks of the request up to token_end
    token_start: int
    token_end: int
    num_tokens: int  # of the prompt


@dataclass(slots=True)
class _Transfer:
    session: SendSession
    request_id: str
    block_ids: torch.Tensor
    since_s: float  # opened, then: the engine finished
    peers: dict[int, _Peer] = field(default_factory=dict)  # by decode rank
    gathering: int = 0  # senders that read its blocks just now
    engine_finished: bool = False
    computed_at_s: float | None = None  # all layers of all tokens
    last_sent_s: float = 0.0  # to whichever decode rank
    stall_s: float = 0.0


@dataclass(slots=True)
class _WaitingReservation:
    peer: _Peer
    token_start: int
    token_end: int
    since_s: float


@dataclass(slots=True, eq=False)
class _Peer:
    routing_id: bytes
    hello: wire.Hello
    plan: PairPlan
    last_heard_s: float
    wake: threading.Condition  # over the server's lock: a message may be ready
    last_used_s: float = 0.0
    up: bool = False
    closed: bool = False
    announced: int = 0  # messages
    pair: Pair | None = None  # also None if the plan carries nothing
    keys: dict[str, None] = field(default_factory=dict)  # in order of reservation
    thread: threading.Thread = field(init=False)

    @property
    def rank(self) -> int:
        return self.hello.geometry.tp_rank


@dataclass(frozen=True, slots=True)
class _InFlight:
    transfer: _Transfer
    area: Rectangle
    work: PendingWork
    buffer: torch.Tensor


class PrefillServer:
    """Holds the KV of finished and running prefills and streams it to whoever reserved it.

    ``pages`` must stay valid until ``stop`` returns. Methods named for the engine are called
    from its thread and do not block on the network. ``on_stuck`` is called, from any thread, if a
    process group cannot be aborted: this process should then be replaced.
    """

    def __init__(
        self,
        pages: KvPages,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
        on_stuck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._pages = pages
        self._geometry = geometry
        self._options = options
        self._clock = clock
        self._on_stuck = on_stuck
        self._lock = threading.Lock()
        self._gathered = threading.Condition(self._lock)  # a sender has read some blocks
        self._transfers: dict[str, _Transfer] = {}
        self._waiting: dict[str, list[_WaitingReservation]] = {}
        self._ended_keys: OrderedDict[str, str] = OrderedDict()  # key -> why, newest last
        self._released: set[str] = set()
        self._step: list[_Transfer] = []
        self._computed: torch.cuda.Event | None = None  # all layers that were ever advanced
        self._peers: dict[bytes, _Peer] = {}
        self._closed: dict[bytes, str] = {}  # routing id -> incarnation, newest last
        self._senders: list[threading.Thread] = []
        self._bad_frames = 0  # since the last sweep
        self._stopping = False
        self._outgoing: deque[tuple[bytes, wire.ToDecode]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.IPV6, ":" in options.host)
        # A peer whose host vanished closes no connection: each is asked for signs of life.
        ping_ms = min(round(options.peer_lease_s * 1000 / 2), 2**31 - 1)
        self._router.setsockopt(zmq.HEARTBEAT_IVL, ping_ms)
        self._router.setsockopt(zmq.HEARTBEAT_TIMEOUT, ping_ms)
        host = f"[{options.host}]" if ":" in options.host else options.host
        port: int = self._router.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._control = threading.Thread(target=self._serve, name="kv-control", daemon=True)
        self._control.start()

    # ---- engine thread -------------------------------------------------------------------

    def begin_step(self, chunks: Iterable[StepChunk]) -> None:
        """The engine starts to compute these chunks; earlier tokens of a new request are cached."""
        with self._lock:
            self._step = [t for chunk in chunks if (t := self._open(chunk)) is not None]

    def layer_done(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the current step's chunks are in the cache."""
        if self._step:
            computed = mark(self._pages.device)
            with self._lock:
                self._computed = computed
                for transfer in self._step:
                    transfer.session.advance(layers_done)
                    if transfer.computed_at_s is None and transfer.session.all_computed:
                        transfer.computed_at_s = self._clock()
                    self._wake_senders(transfer)

    def end_step(self) -> None:
        """The step's forward pass is over."""
        if self._step:
            self.layer_done(self._geometry.num_layers)
            self._step = []

    def finish(self, key: str, first_token: int | None, *, computed: bool) -> None:
        """The engine request ended: sampled (``computed``) or aborted."""
        with self._lock:
            transfer = self._transfers.get(key)
            if transfer is None:
                self._end_unknown(key, "the prefill was aborted")
            else:
                transfer.engine_finished = True
                transfer.since_s = self._clock()
                if computed:
                    transfer.session.finish(first_token)
                else:
                    self._fail(transfer, "the prefill was aborted")
                for peer in transfer.peers.values():
                    peer.wake.notify()
            self._settle()

    def preempt(self, keys: Iterable[str]) -> None:
        """The engine took these requests' blocks away; returns when nobody reads them any more.

        What was not sent is lost to the decode side, which recomputes.
        """
        with self._lock:
            for key in keys:
                transfer = self._transfers.get(key)
                if transfer is None:
                    continue
                self._fail(transfer, "the prefill was preempted")
                while transfer.gathering:  # one gather, milliseconds; holds the pages only
                    self._gathered.wait()
                self._settle()

    def take_released(self) -> set[str]:
        """Engine request ids whose blocks may be freed, each once."""
        with self._lock:
            released, self._released = self._released, set()
            return released

    def paired_with(self) -> set[str]:
        """Incarnations of the decode workers all of whose pairs with this rank are up."""
        with self._lock:
            up = Counter(peer.hello.incarnation for peer in self._peers.values() if peer.up)
            return {
                peer.hello.incarnation
                for peer in self._peers.values()
                if up[peer.hello.incarnation] == peer.plan.decode_ranks
            }

    def stop(self) -> None:
        """End all threads; transfers under way are failed to their peers. Idempotent."""
        with self._lock:
            if self._stopping:
                return
            for transfer in self._transfers.values():
                self._fail(transfer, "the prefill worker stops")
            self._stopping = True
            for peer in self._peers.values():
                peer.wake.notify()
                if peer.pair is not None:
                    peer.pair.abort()  # wakes a sender whose peer does not take its message
        self._wake()
        for thread in (self._control, *self._senders):  # of closed pairs, too
            thread.join(timeout=self._options.pair_timeout_s)

    # ---- state, with the lock held -------------------------------------------------------

    def _open(self, chunk: StepChunk) -> _Transfer | None:
        transfer, token_start = self._transfers.get(chunk.key), chunk.token_start
        if transfer is None:
            session = SendSession(chunk.key, chunk.num_tokens, self._geometry.num_layers)
            transfer = _Transfer(session, chunk.request_id, torch.empty(0), self._clock())
            self._transfers[chunk.key] = transfer
            # Prefix hits leave with this step's layers, not at once: vLLM hands out a block that
            # another request is only about to compute in this very step.
            token_start = 0
            if chunk.key in self._ended_keys:
                session.cancel()  # over before it began; `finish` releases its blocks
            for waiting in self._waiting.pop(chunk.key, ()):
                if not waiting.peer.closed:
                    self._reserve(transfer, waiting.peer, waiting.token_start, waiting.token_end)
        if transfer.session.terminal:
            return None
        transfer.block_ids = torch.tensor(chunk.block_ids, dtype=torch.int64)
        try:
            transfer.session.add_chunk(token_start, chunk.token_end)
        except ProtocolError as error:  # a defect; costs this transfer, not the engine
            self._fail(transfer, str(error))
            return None
        return transfer

    def _reserve(self, transfer: _Transfer, peer: _Peer, start: int, end: int) -> None:
        session = transfer.session
        try:
            session.reserve(peer.rank, peer.plan, self._options.message_bytes, start, end)
        except ProtocolError as error:
            logger.error("%s", error)
            self._post(peer, wire.Fail(session.key, str(error)))
            return
        transfer.peers[peer.rank] = peer
        peer.keys[session.key] = None
        peer.wake.notify()

    def _wake_senders(self, transfer: _Transfer) -> None:
        for rank in transfer.session.ready_ranks():
            transfer.peers[rank].wake.notify()

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        if transfer.session.terminal:
            return
        transfer.session.fail()
        self._tell_peers(transfer, reason)
        logger.warning("KV transfer %s failed: %s", transfer.session.key, reason)

    def _tell_peers(self, transfer: _Transfer, reason: str, but: _Peer | None = None) -> None:
        for peer in transfer.peers.values():
            if peer is not but:
                self._post(peer, wire.Fail(transfer.session.key, reason))

    def _end_unknown(self, key: str, reason: str) -> None:
        """Remember a key that ended before it began, so that a late reservation fails at once."""
        for waiting in self._waiting.pop(key, ()):
            self._post(waiting.peer, wire.Fail(key, reason))
        self._remember(key, reason)

    def _remember(self, key: str, reason: str) -> None:
        self._ended_keys[key] = reason
        while len(self._ended_keys) > self._options.max_pending:
            self._ended_keys.popitem(last=False)

    def _settle(self) -> None:
        """Drop transfers that both the stream and the engine are done with."""
        done = [
            key
            for key, t in self._transfers.items()
            if t.session.terminal and t.engine_finished and not t.gathering
        ]
        for key in done:
            transfer = self._transfers.pop(key)
            self._released.add(transfer.request_id)
            self._remember(key, transfer.session.state.value)
            for peer in transfer.peers.values():
                peer.keys.pop(key, None)
                peer.last_used_s = self._clock()

    def _close_peer(self, peer: _Peer, reason: str) -> None:
        if peer.closed:
            return
        peer.closed = True
        self._peers.pop(peer.routing_id, None)
        self._closed[peer.routing_id] = peer.hello.incarnation
        while len(self._closed) > self._options.max_pairs:
            del self._closed[next(iter(self._closed))]
        for key in list(peer.keys):
            # One part lost, and the others are of no use.
            self._fail(self._transfers[key], reason)
        for key, waiting in list(self._waiting.items()):
            self._waiting[key] = [w for w in waiting if w.peer is not peer]
            if not self._waiting[key]:
                del self._waiting[key]
        self._post(peer, wire.Refuse(peer.hello.pair_id, reason))
        peer.wake.notify()
        if peer.pair is not None:
            peer.pair.abort()  # wakes its sender
        self._settle()

    def _post(self, peer: _Peer, message: wire.ToDecode) -> None:
        self._outgoing.append((peer.routing_id, message))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is awake; closed: it has ended
            self._wake_write.send(b"\0")

    # ---- control thread ------------------------------------------------------------------

    def _serve(self) -> None:
        self._options.bind_this_thread()
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        next_sweep_s = self._clock() + _SWEEP_S
        while True:
            ready = dict(poller.poll(int(_SWEEP_S * 1000)))
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            if self._router in ready:
                self._receive_some()
            while self._outgoing:
                routing_id, message = self._outgoing.popleft()
                self._router.send_multipart([routing_id, wire.encode(message)])
            with self._lock:
                if self._stopping and not self._outgoing:
                    break
                if self._clock() >= next_sweep_s:
                    next_sweep_s = self._clock() + _SWEEP_S
                    self._sweep()
        self._router.close(linger=_LINGER_MS)
        self._wake_read.close()
        self._wake_write.close()

    def _receive_some(self) -> None:
        """A bounded number: one who talks without end must not keep others from their answers."""
        for _ in range(_FRAMES_AT_A_TIME):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            routing_id = frames[0]
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames")
                message = wire.decode_to_prefill(frames[1])
                with self._lock:
                    self._handle(routing_id, message)
            except ProtocolError as error:
                self._bad_frames += 1
                if self._bad_frames == 1:  # a stranger must not fill the log
                    logger.warning("KV control message dropped: %s", error)
            except Exception:  # a defect of ours: costs this message, and is loud
                logger.exception("KV control message failed")

    def _handle(self, routing_id: bytes, message: wire.ToPrefill) -> None:
        if isinstance(message, wire.Hello):
            self._hello(routing_id, message)
            return
        if isinstance(message, wire.Release):
            self._require_token(message.token)
            self._drop(message.key, "released by the router", None)
            return
        peer = self._peers.get(routing_id)
        if peer is None and routing_id in self._closed:  # it crossed our REFUSE
            if isinstance(message, wire.Cancel):
                self._cancel(message.key, self._closed[routing_id], None)
            return
        if peer is None:
            self._outgoing.append((routing_id, wire.Refuse("", "no such pair")))
            raise ProtocolError(f"{type(message).__name__} before HELLO")
        peer.last_heard_s = self._clock()
        match message:
            case wire.Ping():
                self._post(peer, wire.Pong())
            case wire.Reserve():
                self._on_reserve(peer, message)
            case wire.Cancel():
                self._cancel(message.key, peer.hello.incarnation, peer)
            case wire.Bye():
                self._close_peer(peer, "the decode worker closed the pair")

    def _require_token(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self._options.token.encode()):
            raise ProtocolError("wrong cluster token")

    def _hello(self, routing_id: bytes, hello: wire.Hello) -> None:
        self._require_token(hello.token)
        try:
            plan = self._accept(hello)
        except IncompatibleError as error:
            logger.error("KV pair refused: %s", error)
            self._outgoing.append((routing_id, wire.Refuse(hello.pair_id, str(error))))
            return
        now_s = self._clock()
        peer = _Peer(routing_id, hello, plan, now_s, threading.Condition(self._lock), now_s)
        peer.thread = threading.Thread(
            target=self._send_loop, args=(peer,), name="kv-send", daemon=True
        )
        if (old := self._peers.get(routing_id)) is not None:
            self._close_peer(old, "the decode worker opened a new pair")
        peer.thread.start()
        self._senders = [t for t in self._senders if t.is_alive()] + [peer.thread]
        self._peers[routing_id] = peer
        self._post(peer, wire.Welcome(hello.pair_id, self._geometry))

    def _accept(self, hello: wire.Hello) -> PairPlan:
        """Raises IncompatibleError with the sentence that refuses this peer."""
        if hello.version != wire.PROTOCOL_VERSION:
            raise IncompatibleError(
                f"protocol version {hello.version}, {wire.PROTOCOL_VERSION} spoken here"
            )
        if hello.expected_incarnation != self._options.incarnation:
            raise IncompatibleError("this prefill worker was restarted since")
        if hello.backend != backend_for(self._pages.device):
            raise IncompatibleError(
                f"caches behind {hello.backend} and {backend_for(self._pages.device)}"
            )
        if self._stopping:
            raise IncompatibleError("this prefill worker stops")
        plan = plan_pair(self._geometry, hello.geometry)
        if len(self._peers) >= self._options.max_pairs:
            idle = [peer for peer in self._peers.values() if not self._busy(peer)]
            if not idle:
                raise IncompatibleError(
                    f"{len(self._peers)} pairs are busy already (kv_transfer.max_pairs)"
                )
            oldest = min(idle, key=lambda peer: peer.last_used_s)
            self._close_peer(oldest, "another pair needed the room (kv_transfer.max_pairs)")
        return plan

    def _busy(self, peer: _Peer) -> bool:
        waits = any(w.peer is peer for waiting in self._waiting.values() for w in waiting)
        return bool(peer.keys) or waits or not peer.up

    def _on_reserve(self, peer: _Peer, message: wire.Reserve) -> None:
        key = message.key
        peer.last_used_s = self._clock()
        if key in self._ended_keys:
            self._post(peer, wire.Fail(key, f"transfer is over: {self._ended_keys[key]}"))
        elif self._of_another(key, peer.hello.incarnation):
            self._post(peer, wire.Fail(key, "another decode worker has reserved it"))
        elif (transfer := self._transfers.get(key)) is not None:
            self._reserve(transfer, peer, message.token_start, message.token_end)
        elif any(waiting.peer is peer for waiting in self._waiting.get(key, ())):
            raise ProtocolError("RESERVE once more")  # they would wait without bound
        elif key not in self._waiting and len(self._waiting) >= self._options.max_pending:
            self._post(peer, wire.Fail(key, "too many reservations (kv_transfer.max_pending)"))
        else:
            self._waiting.setdefault(key, []).append(
                _WaitingReservation(peer, message.token_start, message.token_end, self._clock())
            )

    def _of_another(self, key: str, incarnation: str) -> bool:
        """Whether another decode worker has reserved this. An attempt has one only; a second one
        is a defect, and must not end what is the first one's."""
        transfer = self._transfers.get(key)
        peers = [] if transfer is None else list(transfer.peers.values())
        peers += [waiting.peer for waiting in self._waiting.get(key, ())]
        return any(peer.hello.incarnation != incarnation for peer in peers)

    def _cancel(self, key: str, incarnation: str, by: _Peer | None) -> None:
        if self._of_another(key, incarnation):
            raise ProtocolError("CANCEL of another decode worker's transfer")
        self._drop(key, "cancelled by the decode worker", by)

    def _drop(self, key: str, reason: str, by: _Peer | None) -> None:
        transfer = self._transfers.get(key)
        if transfer is None:
            self._end_unknown(key, reason)
        elif not transfer.session.terminal:
            transfer.session.cancel()
            self._tell_peers(transfer, reason, but=by)
        self._settle()

    def _sweep(self) -> None:
        now_s = self._clock()
        if self._bad_frames > 1:
            logger.warning("%d more KV control messages dropped", self._bad_frames - 1)
        self._bad_frames = 0
        for transfer in self._transfers.values():
            if (
                transfer.session.unreserved
                and transfer.engine_finished
                and now_s - transfer.since_s > self._options.reserve_timeout_s
            ):
                self._fail(transfer, "not reserved in time (kv_transfer.reserve_timeout_s)")
        for key, waiting in list(self._waiting.items()):
            if now_s - waiting[0].since_s > self._options.prefill_timeout_s:
                self._end_unknown(key, "no such prefill came (kv_transfer.prefill_timeout_s)")
        for peer in list(self._peers.values()):
            # A peer that sets up its group does not speak; pair_timeout_s bounds that.
            if peer.up and now_s - peer.last_heard_s > self._options.peer_lease_s:
                self._close_peer(peer, "the decode worker went silent (kv_transfer.peer_lease_s)")
        self._settle()

    # ---- sender thread, one per pair -----------------------------------------------------

    def _send_loop(self, peer: _Peer) -> None:
        try:
            self._options.bind_this_thread()
            pair = self._make_pair(peer) if peer.plan.heads else None
            with self._lock:
                peer.last_heard_s = self._clock()
                peer.pair, peer.up = pair, True
            with side_stream(self._pages.device):
                self._stream(peer)
        except KvTransferError as error:
            with self._lock:
                self._close_peer(peer, f"the pair broke: {error}")
        except Exception:  # a defect of ours: costs this pair, and is loud
            logger.exception("KV sender failed")
            with self._lock:
                self._close_peer(peer, "internal error of the sender")
        finally:
            close_pair(peer.pair, self._options.pair_timeout_s, self._on_stuck)

    def _make_pair(self, peer: _Peer) -> Pair:
        hello, timeout_s = peer.hello, self._options.pair_timeout_s
        store = join_store(hello.store_host, hello.store_port, timeout_s)
        return Pair(
            store, hello.pair_id, PREFILL_RANK, self._pages.device, self._options.host, timeout_s
        )

    def _stream(self, peer: _Peer) -> None:
        """Send what is ready until the peer is closed; one message a staging buffer at a time."""
        view = self._pages.view(peer.plan, self._geometry.heads)
        max_pages = peer.plan.max_pages(self._options.message_bytes)
        staging = view.staging(max_pages, self._options.staging_buffers)
        in_flight: deque[_InFlight] = deque()
        while True:
            with self._lock:
                while True:
                    if peer.closed or self._stopping:
                        return
                    job = self._next_job(peer) if staging else None
                    if job is not None or in_flight:
                        break
                    peer.wake.wait()
                computed = self._computed
            if job is None:
                self._await_sent(peer, oldest := in_flight.popleft(), stalled=not staging)
                staging.append(oldest.buffer)
            else:
                in_flight.append(self._send(peer, view, *job, computed, staging.pop()))

    def _send(
        self, peer: _Peer, view: PageView, transfer: _Transfer, area: Rectangle,
        computed: torch.cuda.Event | None, buffer: torch.Tensor,
    ) -> _InFlight:  # fmt: skip
        message = buffer[: area.num_pages * view.page_elements]
        # First, so that the peer is ready to receive when the message is.
        self._post(peer, wire.Header(peer.announced, transfer.session.key, area, message.nbytes))
        peer.announced += 1
        try:
            after(computed, view.device)
            view.gather(area, transfer.block_ids, message)
            wait_done(mark(view.device), self._options.transfer_timeout_s)
        finally:
            with self._lock:
                transfer.gathering -= 1
                if transfer.session.terminal:
                    self._gathered.notify_all()
                    self._settle()
        assert peer.pair is not None, "a plan without heads has no messages"
        return _InFlight(transfer, area, peer.pair.send(message), buffer)

    def _await_sent(self, peer: _Peer, sent: _InFlight, *, stalled: bool) -> None:
        began_s = self._clock()
        sent.work.wait(self._options.transfer_timeout_s)
        with self._lock:
            now_s = peer.last_heard_s = self._clock()  # it took the message
            transfer = sent.transfer
            if stalled:
                transfer.stall_s += now_s - began_s
            transfer.last_sent_s = now_s
            hidden = transfer.computed_at_s is None
            transfer.session.message_sent(peer.rank, sent.area, hidden=hidden)

    def _next_job(self, peer: _Peer) -> tuple[_Transfer, Rectangle] | None:
        """The next message of this pair, oldest reservation first; ends what is complete."""
        ended = False
        try:
            for key in list(peer.keys):
                transfer = self._transfers[key]
                if (area := transfer.session.next_message(peer.rank)) is not None:
                    transfer.gathering += 1
                    return transfer, area
                if (end := transfer.session.take_end(peer.rank)) is not None:
                    self._post(peer, self._timed(end, transfer))
                    del peer.keys[key]  # from here on its pair may close
                    ended = True
        finally:
            if ended:
                self._settle()
        return None

    def _timed(self, end: wire.End, transfer: _Transfer) -> wire.End:
        computed_s = transfer.computed_at_s
        tail_s = 0.0 if computed_s is None else max(0.0, transfer.last_sent_s - computed_s)
        return msgspec.structs.replace(end, tail_ms=tail_s * 1000, stall_ms=transfer.stall_s * 1000)
