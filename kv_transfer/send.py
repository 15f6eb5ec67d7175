"""The prefill side: a control server and one sender thread per pair.

    engine thread ── begin_step, layer_done, end_step, finish ──▸ sessions ◂── HELLO, RESERVE,
                                                                    │          CANCEL ── control
    sender thread of a pair: next_message ▸ gather ▸ HEADER ▸ send ◂┘                    thread

All state is guarded by one condition; nothing that blocks is done while it is held, so the
engine's step never waits for a peer.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import zmq

from kv_transfer import wire
from kv_transfer.errors import IncompatibleError, KvTransferError, ProtocolError
from kv_transfer.geometry import KvGeometry, Rectangle
from kv_transfer.options import TransferOptions
from kv_transfer.pages import KvPages
from kv_transfer.pair import PREFILL_RANK, Pair, PendingWork, backend_for, join_store
from kv_transfer.session import SendSession, SendState
from kv_transfer.side_stream import after, mark, side_stream, wait_done

logger = logging.getLogger(__name__)

_LINGER_MS = 500  # for the last words to the peers
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
    peer: _Peer | None = None
    gathering: bool = False
    engine_finished: bool = False


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
    last_heard_s: float
    closed: bool = False
    pair: Pair | None = None
    keys: dict[str, None] = field(default_factory=dict)  # in order of reservation
    thread: threading.Thread = field(init=False)


class PrefillServer:
    """Holds the KV of finished and running prefills and streams it to whoever reserved it.

    ``pages`` must stay valid until ``stop`` returns. Methods named for the engine are called
    from its thread and do not block on the network.
    """

    def __init__(
        self,
        pages: KvPages,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._geometry = geometry
        self._options = options
        self._clock = clock
        self._max_blocks = max(1, options.message_bytes // geometry.block_bytes)
        self._changed = threading.Condition()
        self._transfers: dict[str, _Transfer] = {}
        self._waiting: dict[str, _WaitingReservation] = {}
        self._ended_keys: OrderedDict[str, str] = OrderedDict()  # key -> why, newest last
        self._released: set[str] = set()
        self._step: list[_Transfer] = []
        self._computed: torch.cuda.Event | None = None  # all layers that were ever advanced
        self._peers: dict[bytes, _Peer] = {}
        self._stopping = False
        self._outgoing: deque[tuple[bytes, wire.ToDecode]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.IPV6, ":" in options.host)
        host = f"[{options.host}]" if ":" in options.host else options.host
        port: int = self._router.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._control = threading.Thread(target=self._serve, name="kv-control", daemon=True)
        self._control.start()

    # ---- engine thread -------------------------------------------------------------------

    def begin_step(self, chunks: Iterable[StepChunk]) -> None:
        """The engine starts to compute these chunks; earlier tokens of a new request are cached."""
        with self._changed:
            self._step = [t for chunk in chunks if (t := self._open(chunk)) is not None]

    def layer_done(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the current step's chunks are in the cache."""
        if self._step:
            computed = mark(self._pages.device)
            with self._changed:
                self._computed = computed
                for transfer in self._step:
                    transfer.session.advance(layers_done)
                self._changed.notify_all()

    def end_step(self) -> None:
        """The step's forward pass is over."""
        if self._step:
            self.layer_done(self._geometry.num_layers)
            self._step = []

    def finish(self, key: str, first_token: int | None, *, computed: bool) -> None:
        """The engine request ended: sampled (``computed``) or aborted."""
        with self._changed:
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
            self._settle()

    def preempt(self, keys: Iterable[str]) -> None:
        """The engine took these requests' blocks away; returns when nobody reads them any more.

        What was not sent is lost to the decode side, which recomputes.
        """
        with self._changed:
            for key in keys:
                transfer = self._transfers.get(key)
                if transfer is None:
                    continue
                self._fail(transfer, "the prefill was preempted")
                while transfer.gathering:  # one gather, milliseconds; holds the pages only
                    self._changed.wait()
                self._settle()

    def take_released(self) -> set[str]:
        """Engine request ids whose blocks may be freed, each once."""
        with self._changed:
            released, self._released = self._released, set()
            return released

    def stop(self) -> None:
        """End all threads; transfers under way are failed to their peers. Idempotent."""
        with self._changed:
            if self._stopping:
                return
            for transfer in self._transfers.values():
                self._fail(transfer, "the prefill worker stops")
            self._stopping = True
            peers = list(self._peers.values())
            self._changed.notify_all()
        self._wake()
        for peer in peers:
            if peer.pair is not None:
                peer.pair.abort()  # wakes a sender whose peer does not take its message
        for thread in (self._control, *(peer.thread for peer in peers)):
            thread.join(timeout=self._options.pair_timeout_s)

    # ---- state, with the condition held --------------------------------------------------

    def _open(self, chunk: StepChunk) -> _Transfer | None:
        transfer, token_start = self._transfers.get(chunk.key), chunk.token_start
        if transfer is None:
            session = SendSession(chunk.key, chunk.num_tokens, self._geometry, self._max_blocks)
            transfer = _Transfer(session, chunk.request_id, torch.empty(0), self._clock())
            self._transfers[chunk.key] = transfer
            # Prefix hits leave with this step's layers, not at once: vLLM hands out a block that
            # another request is only about to compute in this very step.
            token_start = 0
            if chunk.key in self._ended_keys:
                session.cancel()  # over before it began; `finish` releases its blocks
            waiting = self._waiting.pop(chunk.key, None)
            if waiting is not None and not waiting.peer.closed:
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
        try:
            transfer.session.reserve(start, end)
        except ProtocolError as error:
            logger.error("%s", error)
            self._post(peer, wire.Fail(transfer.session.key, str(error)))
            return
        transfer.peer = peer
        peer.keys[transfer.session.key] = None

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        if transfer.session.terminal:
            return
        transfer.session.fail()
        if transfer.peer is not None:
            self._post(transfer.peer, wire.Fail(transfer.session.key, reason))
        logger.warning("KV transfer %s failed: %s", transfer.session.key, reason)

    def _end_unknown(self, key: str, reason: str) -> None:
        """Remember a key that ended before it began, so that a late reservation fails at once."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
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
            if transfer.peer is not None:
                transfer.peer.keys.pop(key, None)
        self._changed.notify_all()

    def _close_peer(self, peer: _Peer, reason: str) -> None:
        if peer.closed:
            return
        peer.closed = True
        self._peers.pop(peer.routing_id, None)
        for key in list(peer.keys):
            self._fail(self._transfers[key], reason)
        for key in [k for k, w in self._waiting.items() if w.peer is peer]:
            del self._waiting[key]
        self._post(peer, wire.Refuse(peer.hello.pair_id, reason))
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
                self._receive_all()
            while self._outgoing:
                routing_id, message = self._outgoing.popleft()
                self._router.send_multipart([routing_id, wire.encode(message)])
            with self._changed:
                if self._stopping and not self._outgoing:
                    break
                if self._clock() >= next_sweep_s:
                    next_sweep_s = self._clock() + _SWEEP_S
                    self._sweep()
        self._router.close(linger=_LINGER_MS)
        self._wake_read.close()
        self._wake_write.close()

    def _receive_all(self) -> None:
        while True:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            routing_id = frames[0]
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames")
                message = wire.decode_to_prefill(frames[1])
                with self._changed:
                    self._handle(routing_id, message)
            except ProtocolError as error:
                logger.warning("KV control message dropped: %s", error)
            except Exception:  # a defect of ours: costs this message, and is loud
                logger.exception("KV control message failed")

    def _handle(self, routing_id: bytes, message: wire.ToPrefill) -> None:
        if isinstance(message, wire.Hello):
            self._hello(routing_id, message)
            return
        if isinstance(message, wire.Release):
            self._require_token(message.token)
            self._drop(message.key, "released by the router")
            return
        peer = self._peers.get(routing_id)
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
                self._drop(message.key, "cancelled by the decode worker")
            case wire.Bye():
                self._close_peer(peer, "the decode worker closed the pair")

    def _require_token(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self._options.token.encode()):
            raise ProtocolError("wrong cluster token")

    def _hello(self, routing_id: bytes, hello: wire.Hello) -> None:
        self._require_token(hello.token)
        refusal = self._refusal(hello)
        if refusal is not None:
            logger.error("KV pair refused: %s", refusal)
            self._outgoing.append((routing_id, wire.Refuse(hello.pair_id, refusal)))
            return
        peer = _Peer(routing_id, hello, self._clock())
        peer.thread = threading.Thread(
            target=self._send_loop, args=(peer,), name="kv-send", daemon=True
        )
        if (old := self._peers.get(routing_id)) is not None:
            self._close_peer(old, "the decode worker opened a new pair")
        peer.thread.start()
        self._peers[routing_id] = peer
        self._post(peer, wire.Welcome(hello.pair_id))

    def _refusal(self, hello: wire.Hello) -> str | None:
        if hello.version != wire.PROTOCOL_VERSION:
            return f"protocol version {hello.version}, {wire.PROTOCOL_VERSION} spoken here"
        if hello.expected_incarnation != self._options.incarnation:
            return "this prefill worker was restarted since"
        if hello.backend != backend_for(self._pages.device):
            return f"caches behind {hello.backend} and {backend_for(self._pages.device)}"
        if len(self._peers) >= self._options.max_pairs:
            return f"{self._options.max_pairs} pairs are open already (kv_transfer.max_pairs)"
        try:
            self._geometry.require_compatible(hello.geometry)
        except IncompatibleError as error:
            return str(error)
        return None

    def _on_reserve(self, peer: _Peer, message: wire.Reserve) -> None:
        key = message.key
        if key in self._ended_keys:
            self._post(peer, wire.Fail(key, f"transfer is over: {self._ended_keys[key]}"))
        elif (transfer := self._transfers.get(key)) is not None:
            self._reserve(transfer, peer, message.token_start, message.token_end)
            self._changed.notify_all()
        elif len(self._waiting) >= self._options.max_pending:
            self._post(peer, wire.Fail(key, "too many reservations (kv_transfer.max_pending)"))
        else:
            self._waiting[key] = _WaitingReservation(
                peer, message.token_start, message.token_end, self._clock()
            )

    def _drop(self, key: str, reason: str) -> None:
        transfer = self._transfers.get(key)
        if transfer is None:
            self._end_unknown(key, reason)
        else:
            transfer.session.cancel()
        self._settle()

    def _sweep(self) -> None:
        now_s = self._clock()
        for transfer in self._transfers.values():
            if (
                transfer.session.state is SendState.OFFERED
                and transfer.engine_finished
                and now_s - transfer.since_s > self._options.reserve_timeout_s
            ):
                self._fail(transfer, "nobody reserved it in time (kv_transfer.reserve_timeout_s)")
        for key, waiting in list(self._waiting.items()):
            if now_s - waiting.since_s > self._options.prefill_timeout_s:
                self._end_unknown(key, "no such prefill came (kv_transfer.prefill_timeout_s)")
        for peer in list(self._peers.values()):
            # A peer that sets up its group does not speak; pair_timeout_s bounds that.
            if peer.pair is not None and now_s - peer.last_heard_s > self._options.peer_lease_s:
                self._close_peer(peer, "the decode worker went silent (kv_transfer.peer_lease_s)")
        self._settle()

    # ---- sender thread, one per pair -----------------------------------------------------

    def _send_loop(self, peer: _Peer) -> None:
        try:
            self._options.bind_this_thread()
            pair = self._make_pair(peer)
            with self._changed:
                peer.last_heard_s = self._clock()
                peer.pair = pair
            with side_stream(self._pages.device):
                self._stream(peer, pair)
        except KvTransferError as error:
            with self._changed:
                self._close_peer(peer, f"the pair broke: {error}")
        except Exception:  # a defect of ours: costs this pair, and is loud
            logger.exception("KV sender failed")
            with self._changed:
                self._close_peer(peer, "internal error of the sender")
        finally:
            if peer.pair is not None:
                peer.pair.abort()

    def _make_pair(self, peer: _Peer) -> Pair:
        hello, timeout_s = peer.hello, self._options.pair_timeout_s
        store = join_store(hello.store_host, hello.store_port, timeout_s)
        return Pair(
            store, hello.pair_id, PREFILL_RANK, self._pages.device, self._options.host, timeout_s
        )

    def _stream(self, peer: _Peer, pair: Pair) -> None:
        block_elements = self._geometry.block_bytes // self._geometry.item_bytes
        staging = [
            torch.empty(
                self._max_blocks * block_elements,
                dtype=self._pages.dtype,
                device=self._pages.device,
            )
            for _ in range(self._options.staging_buffers)
        ]
        in_flight: deque[tuple[_Transfer, Rectangle, PendingWork, torch.Tensor]] = deque()
        while True:
            job: tuple[_Transfer, Rectangle] | None = None
            with self._changed:
                while not (peer.closed or self._stopping):
                    job = self._next_job(peer) if staging else None
                    if job is not None or in_flight:
                        break
                    self._changed.wait()
                if peer.closed or self._stopping:
                    return
                computed = self._computed
            if job is None:
                transfer, area, work, buffer = in_flight.popleft()
                work.wait(self._options.transfer_timeout_s)
                staging.append(buffer)
                with self._changed:
                    transfer.session.message_sent(area)
                    peer.last_heard_s = self._clock()  # it took the message
                continue
            transfer, area = job
            buffer = staging.pop()
            message = buffer[: area.num_blocks * block_elements]
            try:
                after(computed, self._pages.device)
                self._pages.gather(area, transfer.block_ids, message)
                wait_done(mark(self._pages.device), self._options.transfer_timeout_s)
            finally:
                with self._changed:
                    transfer.gathering = False
                    self._settle()
            self._post(peer, wire.Header(transfer.session.key, area, message.nbytes))
            in_flight.append((transfer, area, pair.send(message), buffer))

    def _next_job(self, peer: _Peer) -> tuple[_Transfer, Rectangle] | None:
        """The next message of this pair, oldest reservation first; ends what is complete."""
        ended = False
        try:
            for key in peer.keys:
                transfer = self._transfers[key]
                if (area := transfer.session.next_message()) is not None:
                    transfer.gathering = True
                    return transfer, area
                if (end := transfer.session.take_end()) is not None:
                    self._post(peer, end)
                    ended = True
        finally:
            if ended:
                self._settle()
        return None
