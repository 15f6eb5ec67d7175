"""When blocks go back to the engine: both live ends, their threads run one step at a time.

``DecodeClient`` and ``PrefillServer`` are the real ones, but the test holds the clock, the network
and the threads. A thread goes on when it is told to, and stops again where it would wait, speak
or copy, so that all else can happen in between: cancels, failures of other parts, evictions.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kv_transfer import receive, send, wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import KvGeometry, Rectangle, heads_of, plan_pair, sources
from kv_transfer.options import TransferOptions
from kv_transfer.pages import KvPages, PageView
from kv_transfer.receive import DecodeClient, Reservation, TransferResult
from kv_transfer.send import PrefillServer, StepChunk
from kv_transfer.session import ReceiveSession, ReceiveState, SendSession

LAYERS, HEADS, BLOCK_TOKENS, CONTENT, BLOCKS = 2, 2, 2, 2, 9
GEOMETRY = KvGeometry("m", "float32", LAYERS, HEADS, CONTENT, 4, BLOCK_TOKENS, "HNC", True, 1, 0)
OPTIONS = TransferOptions(
    host="here",
    incarnation="d1",
    token="secret",
    message_bytes=2 * GEOMETRY.block_bytes,
    staging_buffers=2,
    pair_timeout_s=5,
    reserve_timeout_s=30,
    prefill_timeout_s=30,
    transfer_timeout_s=20,
    pair_idle_s=15,
    peer_lease_s=30,
    max_pairs=5,
    max_pending=3,
)


_PAUSES = 12  # enough for a few messages
PLACES = ["group", "said", "heard", "wait", "copy", "copy", "copy", "idle"]  # where threads pause


class Stepped(threading.Thread):
    """A thread that goes on only when told to, until it pauses or ends."""

    def __init__(
        self, target: Callable[..., None], args: tuple[Any, ...] = (), name: str = "",
        daemon: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(target=target, args=args, name=name, daemon=daemon)
        self.arguments = args
        self.ended = False
        self.blocked = False  # until a condition is notified
        self.place = "start"
        self._may_go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        """Nothing runs before the first ``go``."""

    def go(self) -> None:
        if self.ident is None:
            super().start()
        self._may_go.release()
        assert self._stopped.acquire(timeout=10), "a thread waits where it should not"

    def run(self) -> None:
        self._may_go.acquire()
        try:
            super().run()
        finally:
            self.ended = True
            self._stopped.release()

    def pause(self, place: str) -> None:
        self.place = place
        self._stopped.release()
        self._may_go.acquire()

    def is_alive(self) -> bool:
        return not self.ended

    def join(self, timeout: float | None = None) -> None:
        for _ in range(10):
            self.go_to("nowhere")

    def go_to(self, place: str) -> None:
        """Go on until it pauses there, for a while."""
        for _ in range(_PAUSES):
            if self.ended or self.blocked:
                break
            self.go()
            if self.place == place:
                break


def pause(place: str) -> None:
    thread = threading.current_thread()
    assert isinstance(thread, Stepped)
    thread.pause(place)


class SteppedCondition:
    """One whose waiters go on only when notified, and when told to."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiters: deque[Stepped] = deque()

    def wait(self) -> None:
        thread = threading.current_thread()
        assert isinstance(thread, Stepped)
        thread.blocked = True
        self._waiters.append(thread)
        self._lock.release()
        try:
            thread.pause("asleep")
        finally:
            self._lock.acquire()

    def notify(self) -> None:
        if self._waiters:
            self._waiters.popleft().blocked = False

    def notify_all(self) -> None:
        while self._waiters:
            self.notify()


class AccidentError(Exception):
    """What no code of ours raises, such as a copy that fails."""


def random_caches() -> list[torch.Tensor]:
    return [torch.randn(BLOCKS, HEADS, BLOCK_TOKENS, CONTENT) for _ in range(LAYERS)]


def tokens_of(cache: torch.Tensor, block_ids: tuple[int, ...]) -> torch.Tensor:
    """``[tokens, heads, content]`` of a request."""
    return cache[list(block_ids)].transpose(1, 2).flatten(0, 1)


class Machine(RuleBasedStateMachine):
    """An engine's blocks, and what must not happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.keys: list[str] = []
        self.owners: dict[int, str] = {}  # of a block: the key for which the engine holds it
        self.used: dict[Stepped, str] = {}  # by a thread that copies just now: the blocks of
        self.broken: list[str] = []
        self.patch = pytest.MonkeyPatch()

    def fake(self, module: ModuleType, **fakes: object) -> None:
        for name, fake in fakes.items():
            self.patch.setattr(module, name, fake)
        self.patch.setattr(module.logger, "exception", self.log_exception)

    def rank_of_this_thread(self) -> Any:
        """The other end of the pair for which the calling thread works."""
        raise NotImplementedError

    def slow(self, copy: Callable[..., None]) -> Callable[..., None]:
        """Takes its time, during which the blocks must stay with their request."""

        def slow_copy(
            view: PageView, area: Rectangle, block_ids: torch.Tensor, buffer: torch.Tensor
        ) -> None:
            thread = threading.current_thread()
            assert isinstance(thread, Stepped)
            per_block = view._pages_per_block
            pages = slice(area.page_start // per_block, -(-area.page_end // per_block))
            blocks = block_ids.tolist()[pages]
            before = {self.owners.get(block) for block in blocks}
            self.expect(len(before) == 1 and None not in before, "a block that is not held")
            self.used[thread] = before.pop() or ""
            try:
                thread.pause("copy")
                copy(view, area, block_ids, buffer)
                if self.rank_of_this_thread().accident:
                    raise AccidentError
            finally:
                owner = self.used.pop(thread)
                after = {self.owners.get(block) for block in blocks}
                self.expect(after == {owner}, "a block changed hands while it was copied")

        return slow_copy

    def expect(self, true: bool, what: str) -> None:
        """An assertion inside the code under test, which would catch and log it."""
        if not true:
            self.broken.append("".join(traceback.format_stack()) + what)

    def log_exception(self, *_: object) -> None:
        if not isinstance(sys.exception(), AccidentError):
            self.broken.append(traceback.format_exc())

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not self.broken, self.broken[0]


# ---- the decode end --------------------------------------------------------------------------


class PrefillRank:
    """What a decode rank has a pair with: control socket, process group, an honest prefill."""

    def __init__(self, machine: DecodeMachine, tp_rank: int, tp_size: int) -> None:
        self.geometry = replace(GEOMETRY, tp_rank=tp_rank, tp_size=tp_size)
        self.plan = plan_pair(self.geometry, GEOMETRY)
        held = heads_of(tp_rank, tp_size, HEADS)
        parts = [cache[:, held.start : held.end].contiguous() for cache in machine.prefill]
        self._view = KvPages(parts).view(self.plan, held)
        self._machine = machine
        self.pair_id: str | None = None
        self.inbox: deque[wire.ToDecode] = deque()  # of the decode rank
        self.tensors: deque[torch.Tensor] = deque()
        self.sends: dict[str, SendSession] = {}
        self.sent: dict[str, tuple[int, int]] = {}  # messages and bytes
        self.announced = 0
        self.ended: set[str] = set()
        self.left = False
        self.lost = False  # the connection
        self.accident = False  # at the next copy

    def speak(self, key: str) -> None:
        """The next message of a transfer."""
        send = self.sends[key]
        if (area := send.next_message(0)) is not None:
            self.announce(key, area, area.num_pages * self.plan.page_bytes)
            send.message_sent(0, area, hidden=False)
            messages, num_bytes = self.sent[key]
            self.sent[key] = messages + 1, num_bytes + area.num_pages * self.plan.page_bytes
        elif (end := send.take_end(0)) is not None:
            self.ended.add(key)
            self.inbox.append(end)

    def announce(self, key: str, area: Rectangle, num_bytes: int) -> None:
        """The right bytes where there are any."""
        self.inbox.append(wire.Header(self.announced, key, area, num_bytes))
        self.announced += 1
        blocks = torch.tensor(self._machine.sources.get(key, ()))
        tensor = torch.full((max(0, num_bytes) // 4,), torch.nan)
        if (
            num_bytes == area.num_pages * self.plan.page_bytes > 0
            and key in self.sends
            and area.layer_end <= LAYERS
            and area.page_end <= len(blocks)
        ):
            self._view.gather(area, blocks, tensor)
        self.tensors.append(tensor)

    # as the control socket

    def send(self, frame: bytes, _flags: int = 0) -> None:
        message = wire.decode_to_prefill(frame)
        match message:
            case wire.Hello():
                self.pair_id = message.pair_id
            case wire.Reserve():
                self._machine.expect(message.key not in self.sends, "reserved twice over a pair")
                self._machine.check_reservation(message.key, self)
                send = SendSession(message.key, message.token_end, LAYERS)
                start, end = message.token_start, message.token_end
                send.reserve(0, self.plan, OPTIONS.message_bytes, start, end)
                send.add_chunk(0, end)
                send.advance(LAYERS)
                send.finish(7)
                self.sends[message.key], self.sent[message.key] = send, (0, 0)
            case wire.Cancel() if message.key in self.sends:
                self.sends[message.key].cancel()
            case wire.Bye():
                self._machine.expect(not self.left, "said goodbye twice")
                self.left = True
            case wire.Ping() if not self._machine.silent:
                self.inbox.append(wire.Pong())
        pause("said")

    def recv(self) -> bytes:
        frame = wire.encode(self.inbox.popleft())
        pause("heard")
        return frame

    def readable(self) -> bool:
        return bool(self.inbox)

    # as the process group

    def receive(self, tensor: torch.Tensor) -> Work:
        return Work(self, tensor)

    def abort(self) -> None:
        self.lost = True

    def aborted(self, timeout_s: float) -> bool:
        return True


class Work:
    """A receive that is under way. Its bytes come as early as they can, at any rate."""

    def __init__(self, rank: PrefillRank, tensor: torch.Tensor) -> None:
        self._rank = rank
        source = rank.tensors.popleft()
        if len(source) != len(tensor):
            raise PairError("a message of another size")
        tensor.copy_(source)

    def wait(self, timeout_s: float) -> None:
        pause("wait")
        if self._rank.lost:
            raise PairError("connection lost")


class Monitor:
    def __init__(self, rank: PrefillRank) -> None:
        self._rank = rank

    def readable(self) -> bool:
        return self._rank.lost


class Poller:
    """Returns at once, with whatever is readable when the thread goes on."""

    def __init__(self) -> None:
        self._sources: list[Any] = []

    def register(self, source: Any, _flags: int) -> None:
        self._sources.append(source)

    def poll(self, _timeout_ms: int) -> list[tuple[Any, int]]:
        pause("idle")
        return [
            (source.fileno() if isinstance(source, socket.socket) else source, 1)
            for source in self._sources
            if (
                select.select([source], [], [], 0)[0]
                if isinstance(source, socket.socket)
                else source.readable()
            )
        ]


class HeldPeer(receive._Peer):
    """The real one, but for its control socket."""

    rank: PrefillRank
    thread: Stepped

    def _connect(self, stack: contextlib.ExitStack) -> Any:
        control: Any = self.rank
        stack.callback(self._goodbye, control)
        pause("start")
        return control, Monitor(self.rank)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()


WORKERS = {"p1": 1, "p2": 2, "p4": 4}  # prefill workers with so many ranks


def addresses_of(worker: str) -> tuple[str, ...]:
    return tuple(f"{worker}/{rank}" for rank in range(WORKERS[worker]))


index = st.integers(0, 7)  # of a list, modulo its length


class DecodeMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.silent = False  # the prefill workers
        self.trouble = False  # of any kind but a cancel
        self.cancelled: set[str] = set()
        self.parts: dict[str, dict[str, receive._Part]] = {}  # by key and address
        self.peers: list[HeldPeer] = []
        self.held: dict[str, Reservation] = {}  # not reported as yet
        self.workers: dict[str, tuple[tuple[str, ...], str]] = {}  # by key
        self.sources: dict[str, tuple[int, ...]] = {}
        self.prefill, self.caches = random_caches(), random_caches()
        self.fake(
            receive,
            threading=SimpleNamespace(Thread=Stepped, Lock=threading.Lock),
            zmq=SimpleNamespace(
                Poller=Poller, POLLIN=zmq.POLLIN, NOBLOCK=zmq.NOBLOCK, ZMQError=zmq.ZMQError
            ),
            _Peer=self.make_peer,
            Pair=self.make_pair,
            host_store=lambda *_: SimpleNamespace(port=1),
            join_store=lambda *_: None,
        )
        self.patch.setattr(PageView, "scatter", self.slow(PageView.scatter))
        pages = KvPages(self.caches)
        self.client = DecodeClient(pages, GEOMETRY, OPTIONS, lambda: self.now_s)

    def make_peer(self, client: DecodeClient, address: str, incarnation: str) -> HeldPeer:
        worker, _, tp_rank = address.partition("/")
        peer = HeldPeer(client, address, incarnation)
        peer.rank = PrefillRank(self, int(tp_rank), WORKERS[worker])
        self.peers.append(peer)
        return peer

    def rank_of(self, peer: receive._Peer) -> PrefillRank:
        return next(held.rank for held in self.peers if held is peer)

    def rank_of_this_thread(self) -> PrefillRank:
        return next(p.rank for p in self.peers if p.thread is threading.current_thread())

    def make_pair(self, *_: object) -> PrefillRank:
        rank = self.rank_of_this_thread()
        pause("group")
        if rank.lost:
            raise PairError("connection lost")
        return rank

    def peer(self, which: int, *, up: bool = False) -> HeldPeer | None:
        """From the busiest on."""
        peers = [p for p in self.peers if p.alive and (p.plan is not None or not up)]
        peers.sort(key=self.client.busy)
        return peers[-1 - which % len(peers)] if peers else None

    # ---- the engine ----------------------------------------------------------------------

    @rule(
        worker=st.sampled_from(["p1", "p2", "p2", "p4"]), incarnation=st.sampled_from("aaab"),
        blocks=st.integers(1, 3), first=st.integers(0, 2), short=st.integers(0, 1),
        welcome=st.booleans(), too_many=st.sampled_from([False, False, False, True]),
    )  # fmt: skip
    def reserve(
        self, worker: str, incarnation: str, blocks: int, first: int, short: int,
        welcome: bool, too_many: bool,
    ) -> None:  # fmt: skip
        free = [block for block in range(BLOCKS) if block not in self.owners][:blocks]
        if len(free) < blocks or (len(self.held) == OPTIONS.max_pending and not too_many):
            return
        key = f"r{len(self.keys)}#1"
        addresses, start = addresses_of(worker), min(first, blocks - 1) * BLOCK_TOKENS
        end = blocks * BLOCK_TOKENS - short
        self.held[key] = Reservation(
            key, f"engine-{key}", addresses, incarnation, tuple(free), start, end
        )
        self.owners |= dict.fromkeys(free, key)
        self.sources[key] = tuple((len(self.keys) + block) % BLOCKS for block in range(blocks))
        self.workers[key] = addresses, incarnation
        self.keys.append(key)
        self.client.reserve(self.held[key])
        if key in self.client.transfers:
            self.parts[key] = self.client.transfers[key].parts
        if welcome:
            self.meet()

    def meet(self) -> None:
        """All pairs are made."""
        while starting := [peer for peer in self.peers if peer.alive and peer.plan is None]:
            starting[0].thread.go()
            self.welcome(starting[0])

    @rule(which=index)
    def cancel(self, which: int) -> None:
        """Preferably what is being written; also what has ended, which D may not have heard."""
        if self.keys:
            keys = [*self.used.values(), *self.held] if which % 2 else self.keys
            key = self.keys[-1] if not keys else keys[which // 2 % len(keys)]
            self.cancelled.add(key)
            self.client.cancel(key, *self.workers[key])

    @rule(worker=st.sampled_from(sorted(WORKERS)))
    def prewarm(self, worker: str) -> None:
        self.client.prewarm(addresses_of(worker), "a")

    # ---- the peers' threads, the clock ---------------------------------------------------

    @rule(which=index, place=st.sampled_from(PLACES))
    def go(self, which: int, place: str) -> None:
        if (peer := self.peer(which)) is not None:
            peer.thread.go_to(place)

    @precondition(lambda self: not self.peaceful)
    @rule(seconds=st.sampled_from([1, 1, 6, 16]))
    def wait(self, seconds: int) -> None:
        self.trouble = True
        self.now_s += seconds

    # ---- the prefill workers -------------------------------------------------------------

    def welcome(self, peer: HeldPeer) -> None:
        if peer.rank.pair_id is not None:
            peer.rank.inbox.append(wire.Welcome(peer.rank.pair_id, peer.rank.geometry))
            peer.rank.pair_id = None

    @rule(which=index)
    def answer(self, which: int) -> None:
        if (peer := self.peer(which)) is not None:
            self.welcome(peer)

    def to_send(self) -> list[tuple[HeldPeer, str]]:
        return [
            (peer, key)
            for peer in self.peers
            for key, send in peer.rank.sends.items()
            if peer.alive and not send.terminal
        ]

    @rule(
        which=index, worker=st.sampled_from(sorted(WORKERS)), messages=st.integers(1, 4),
        place=st.sampled_from(PLACES), then=st.sampled_from(["", "", "cancel", "fail"]),
    )  # fmt: skip
    def speak(self, which: int, worker: str, messages: int, place: str, then: str) -> None:
        """A prefill rank sends, its peer goes on to somewhere in the middle of it, and then?"""
        if not self.to_send():
            self.reserve(worker, "a", 2, 0, 0, welcome=True, too_many=False)
            self.all_go_to("idle")
        if not (possible := self.to_send()):
            return
        peer, some_key = possible[which % len(possible)]
        for _ in range(messages):
            peer.rank.speak(some_key)
        peer.thread.go_to(place)
        if then == "cancel":
            self.cancel(1)
        if then == "fail" and not self.peaceful:  # say the other ranks
            self.trouble = True
            for other in self.peers:
                if other is not peer and some_key in other.rank.sends:
                    other.rank.inbox.append(wire.Fail(some_key, "for no reason"))
                    other.thread.go_to("nowhere")

    def all_go_to(self, place: str) -> None:
        for peer in self.peers:
            for _ in range(3):
                peer.thread.go_to(place)

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        """Pairs are made, and what was reserved is sent."""
        for peer in rounds * self.peers:
            self.welcome(peer)
            for key in peer.rank.sends:
                for _ in range(4):
                    peer.rank.speak(key)
            peer.thread.go_to("nowhere")

    @precondition(lambda self: not self.peaceful)
    @rule(
        which=index, how=st.sampled_from(["refuse", "refuse", "header", "lose", "accident"]),
        place=st.sampled_from(PLACES),
    )  # fmt: skip
    def lose(self, which: int, how: str, place: str) -> None:
        if (peer := self.peer(which)) is not None:
            self.trouble = True
            if how == "refuse":
                peer.rank.inbox.append(wire.Refuse("", "another pair needed the room"))
            if how == "header":  # dropped, and its tensor comes all the same
                peer.rank.inbox = deque(
                    m for m in peer.rank.inbox if not isinstance(m, wire.Header)
                )
            peer.rank.lost |= how == "lose"
            peer.rank.accident |= how == "accident"
            peer.thread.go_to(place)

    @precondition(lambda self: not self.peaceful)
    @rule(
        which=index, key=index, layer=st.integers(0, LAYERS), page=st.integers(0, 2),
        more=st.sampled_from([0, 0, 0, 1, 4, -4]),
    )  # fmt: skip
    def announce_what_was_not_asked_for(
        self, which: int, key: int, layer: int, page: int, more: int
    ) -> None:
        if (peer := self.peer(which, up=True)) is not None:
            self.trouble = True
            area = Rectangle(layer, layer + 1, page, page + 1)
            some_key = self.key_known_to(peer, key)
            peer.rank.announce(some_key, area, peer.rank.plan.page_bytes + more)

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, key=index, fail=st.booleans())
    def end_early(self, which: int, key: int, fail: bool) -> None:
        """FAIL, or an END that names what was sent up to now."""
        if (peer := self.peer(which, up=True)) is None:
            return
        self.trouble = True
        some_key = self.key_known_to(peer, key)
        if fail:
            peer.rank.inbox.append(wire.Fail(some_key, "for no reason"))
        elif (send := peer.rank.sends.get(some_key)) is not None:
            messages, num_bytes = peer.rank.sent[some_key]
            start, end = send._parts[0].token_start, send.num_tokens
            peer.rank.ended.add(some_key)
            peer.rank.inbox.append(wire.End(some_key, start, end, messages, num_bytes, 0, 7))

    def key_known_to(self, peer: HeldPeer, key: int) -> str:
        """What was reserved over this pair, from the newest on, and what was not."""
        keys = ["unknown", *self.keys[-2:], *peer.rank.sends]
        return keys[-1 - key % len(keys)]

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def each_reservation_is_reported_once_when_nobody_writes(self) -> None:
        for result in self.client.take_results():
            self.reported(result)
        assert set(self.client.transfers) == set(self.held), "reported or under way, never neither"

    def reported(self, result: TransferResult) -> None:
        reservation = self.held.pop(result.key)  # KeyError: a second time
        parts = self.parts.get(result.key, {})  # none: it was refused at once
        states = [part.session.state for part in parts.values()]
        assert all(part.session.terminal and not part.scattering for part in parts.values())
        assert result.key not in self.used.values(), "its blocks are being written"
        assert result.retries <= len(parts)
        for block in reservation.block_ids:
            del self.owners[block]
        assert result.complete == (set(states) == {ReceiveState.COMPLETE})
        if not result.complete:
            assert self.trouble or result.key in self.cancelled or not parts, "for no reason"
            return
        ranks = sources(0, 1, len(reservation.addresses), HEADS)
        assert set(parts) == {reservation.addresses[rank] for rank in ranks}
        assert all(result.key in self.rank_of(part.peer).ended for part in parts.values())
        assert result.first_token == 7
        start, end = reservation.token_start, reservation.token_end
        for cache, source in zip(self.caches, self.prefill, strict=True):
            got = tokens_of(cache, reservation.block_ids)[start:end]
            assert torch.equal(got, tokens_of(source, self.sources[result.key])[start:end])

    def check_reservation(self, key: str, rank: PrefillRank) -> None:
        """Called when a RESERVE is said."""
        states = [p.session.state for p in self.parts[key].values() if self.rank_of(p.peer) is rank]
        started = {ReceiveState.RECEIVING, ReceiveState.COMPLETE}
        self.expect(not started & set(states), "reserved again what has begun to arrive")

    @invariant()
    def peers_are_bounded_and_serve_what_was_reserved_from_them(self) -> None:
        known = list(self.client._peers.values())
        assert len(known) <= OPTIONS.max_pairs
        assert set(known) == {p for p in self.peers if p.alive and not p._stopping}
        for transfer in self.client.transfers.values():
            for part in transfer.parts.values():
                assert part.session.terminal or part.peer in known, "nobody will end this part"

    @initialize(ending=st.sampled_from(["calm", "silence", "stop"]), peaceful=st.booleans())
    def begin(self, ending: str, peaceful: bool) -> None:
        self.ending, self.peaceful = ending, peaceful

    def teardown(self) -> None:
        """However it ends, nothing is left."""
        try:
            if self.ending == "calm":
                self.all_goes_well(8)
                self.each_reservation_is_reported_once_when_nobody_writes()
                assert self.trouble or not self.held
            self.silent = self.trouble = True
            for _ in range(60 if self.ending != "stop" else 0):
                self.wait(1 + int(OPTIONS.peer_lease_s))
                for peer in self.peers:
                    peer.thread.go_to("idle")
            if self.ending == "stop":
                self.client.stop()
            self.each_reservation_is_reported_once_when_nobody_writes()
            self.nothing_is_broken()
            assert not self.held, "neither reported nor under way"
            self.client.stop()
            assert all(peer.rank.left and not peer.alive for peer in self.peers)
            assert not self.client._peers
        finally:
            self.patch.undo()


# ---- the prefill end -------------------------------------------------------------------------

PREFILL_BLOCK_TOKENS = 2 * BLOCK_TOKENS  # a page is half of a block there
AHEAD = [0, -1, 0, -1, -2, 1, 2, 3]  # of the engine, with a reservation
DECODE_RANKS = {"a": (1, 0), "b0": (2, 0), "b1": (2, 1)}  # of two workers: tp_size, tp_rank


@dataclass(slots=True)
class Prompt:
    """A request of the prefill engine."""

    key: str
    worker: str  # that decodes it
    tokens: int
    truth: list[torch.Tensor]  # by layer, [tokens, heads, content]
    block_ids: tuple[int, ...] = ()
    computed: int = 0
    preempted: bool = False
    finished: bool = False
    spoilt: bool = False  # preempted once, or not reserved by all decode ranks


@dataclass(slots=True)
class Part:
    """What a decode rank reserved from the prefill rank, with blocks of its own."""

    session: ReceiveSession
    caches: list[torch.Tensor]
    view: PageView
    told: bool = False  # what became of it


class DecodeRank:
    """What a prefill rank has a pair with: process group, an honest decode rank behind it."""

    def __init__(self, machine: PrefillMachine, name: str) -> None:
        self._machine = machine
        self.name = name
        self.routing_id = f"{name}/{len(machine.ranks)}".encode()
        tp_size, tp_rank = DECODE_RANKS[name]
        self.geometry = replace(GEOMETRY, tp_size=tp_size, tp_rank=tp_rank)
        self.plan = plan_pair(machine.geometry, self.geometry)
        self.parts: dict[str, Part] = {}
        self.welcome = self.closed = self.lost = self.accident = False
        self._headers: deque[wire.Header] = deque()
        self._tensors: deque[torch.Tensor] = deque()
        self._heard = 0

    def say(self, message: wire.ToPrefill) -> None:
        self._machine.router.inbox.append([self.routing_id, wire.encode(message)])

    def reserve(self, prompt: Prompt, start: int) -> None:
        blocks = -(-prompt.tokens // BLOCK_TOKENS)
        shape = (blocks, len(self.geometry.heads), BLOCK_TOKENS, CONTENT)
        caches = [torch.zeros(shape) for _ in range(LAYERS)]
        session = ReceiveSession(prompt.key, start, prompt.tokens)
        session.follow(self.plan)
        view = KvPages(caches).view(self.plan, self.geometry.heads)
        self.parts[prompt.key] = Part(session, caches, view)
        self.say(wire.Reserve(prompt.key, start, prompt.tokens))

    def hear(self, message: wire.ToDecode) -> None:
        match message:
            case wire.Welcome():
                self.welcome = True
            case wire.Refuse():
                self.closed = True
            case wire.Header():
                self._machine.expect(message.sequence == self._heard, "a header is missing")
                self._heard += 1
                self._headers.append(message)
                self._match()
            case wire.Fail():
                part = self.parts[message.key]
                part.told = True
                part.session.fail()
            case wire.End():
                self._end(message)

    def _match(self) -> None:
        """Each message with the tensor that it announced."""
        while self._headers and self._tensors:
            header, tensor = self._headers.popleft(), self._tensors.popleft()
            part = self.parts[header.key]
            self._machine.expect(header.num_bytes == tensor.nbytes, "of another size")
            if not part.session.terminal:
                part.session.header(header.area, header.num_bytes)
                part.view.scatter(header.area, torch.arange(len(part.caches[0])), tensor)
                part.session.received(header.area, header.num_bytes)

    def _end(self, end: wire.End) -> None:
        part, prompt = self.parts[end.key], self._machine.prompts[end.key]
        self._machine.expect(not part.told, "a second END, or one after FAIL")
        part.told = True
        if part.session.terminal:
            return
        part.session.end(end)
        self._machine.expect(end.first_token == 7, "another first token")
        heads, first = self.plan.heads, self.geometry.heads.start
        for cache, truth in zip(part.caches, prompt.truth, strict=True):
            got = tokens_of(cache, tuple(range(len(cache))))[
                part.session.token_start : prompt.tokens
            ]
            got = got[:, heads.start - first : heads.end - first]
            want = truth[part.session.token_start :, heads.start : heads.end]
            self._machine.expect(torch.equal(got, want), "not what was computed")

    # as the process group

    def send(self, tensor: torch.Tensor) -> Sending:
        return Sending(self, tensor)

    def abort(self) -> None:
        self.lost = True

    def aborted(self, timeout_s: float) -> bool:
        return True

    def take(self, tensor: torch.Tensor) -> None:
        self._tensors.append(tensor.clone())
        self._match()


class Sending:
    """A send that is under way. Its bytes leave as late as they can."""

    def __init__(self, rank: DecodeRank, tensor: torch.Tensor) -> None:
        self._rank, self._tensor = rank, tensor

    def wait(self, timeout_s: float) -> None:
        pause("wait")
        if self._rank.lost:
            raise PairError("connection lost")
        self._rank.take(self._tensor)


class Router:
    """The control server's socket."""

    def __init__(self, ranks: dict[bytes, DecodeRank]) -> None:
        self._ranks = ranks
        self.inbox: deque[list[bytes]] = deque()

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: list[bytes]) -> None:
        if frames[0] in self._ranks:
            self._ranks[frames[0]].hear(wire.decode_to_decode(frames[1]))

    def readable(self) -> bool:
        return bool(self.inbox)

    def bind_to_random_port(self, _address: str) -> int:
        return 1

    def setsockopt(self, *_: object) -> None: ...

    def close(self, linger: int) -> None: ...


class PrefillMachine(Machine):
    @initialize(
        idle=st.sampled_from([False, False, True]), peaceful=st.sampled_from([False, False, True]),
        ending=st.sampled_from(["calm", "calm", "silence", "stop"]),
    )  # fmt: skip
    def begin(self, idle: bool, peaceful: bool, ending: str) -> None:
        """``idle``: a second copy of a head, which no decode rank fetches anything from."""
        self.ending, self.peaceful = ending, peaceful
        self.geometry = replace(
            GEOMETRY,
            block_tokens=PREFILL_BLOCK_TOKENS,
            tp_size=4 if idle else 1,
            tp_rank=1 if idle else 0,
        )
        shape = (BLOCKS, len(self.geometry.heads), PREFILL_BLOCK_TOKENS, CONTENT)
        self.caches = [torch.full(shape, torch.nan) for _ in range(LAYERS)]
        self.prompts: dict[str, Prompt] = {}
        self.held: set[str] = set()  # scheduled, and not released as yet
        self.step: list[tuple[Prompt, int, int]] = []  # prompts and their tokens
        self.layers_done = 0
        self.preempting: tuple[Stepped, Prompt] | None = None
        self.ranks: dict[bytes, DecodeRank] = {}
        self.open: dict[str, DecodeRank] = {}  # by name
        self.threads: list[Stepped] = []
        self.router = Router(self.ranks)
        context = SimpleNamespace(instance=lambda: SimpleNamespace(socket=lambda _: self.router))
        constants = ("NOBLOCK", "Again", "ROUTER", "LINGER", "MAXMSGSIZE", "IPV6", "POLLIN")
        self.fake(
            send,
            threading=SimpleNamespace(
                Thread=self.make_thread, Lock=threading.Lock, Condition=SteppedCondition
            ),
            zmq=SimpleNamespace(
                Poller=Poller, Context=context, **{name: getattr(zmq, name) for name in constants}
            ),
            Pair=self.make_pair,
            join_store=lambda *_: None,
        )
        self.patch.setattr(PageView, "gather", self.slow(PageView.gather))
        options = replace(OPTIONS, incarnation="p1", max_pairs=2)
        pages = KvPages(self.caches)
        self.server = PrefillServer(pages, self.geometry, options, lambda: self.now_s)
        close_peer = self.server._close_peer

        def close_idle_peer(peer: send._Peer, reason: str) -> None:
            waiting = [w.peer for some in self.server._waiting.values() for w in some]
            idle = not peer.keys and peer not in waiting
            self.expect(idle or "room" not in reason, "the room of a peer that needs it")
            close_peer(peer, reason)

        self.patch.setattr(self.server, "_close_peer", close_idle_peer)
        (self.control_thread,) = self.threads

    def make_thread(self, **kwargs: Any) -> Stepped:
        self.threads.append(Stepped(**kwargs))
        return self.threads[-1]

    def make_pair(self, *_: object) -> DecodeRank:
        pause("group")
        rank = self.rank_of_this_thread()
        if rank.lost:
            raise PairError("connection lost")
        return rank

    def rank_of_this_thread(self) -> DecodeRank:
        thread = threading.current_thread()
        assert isinstance(thread, Stepped)
        (peer,) = thread.arguments
        return self.ranks[peer.routing_id]

    # ---- the engine ----------------------------------------------------------------------

    def prompt(self, number: int) -> Prompt:
        """One that the engine knows, or will know."""
        key = f"r{number}#1"
        if key not in self.prompts:
            tokens = 1 + 7 * number % 11
            truth = [torch.randn(tokens, HEADS, CONTENT) for _ in range(LAYERS)]
            self.prompts[key] = Prompt(key, "a" if number % 2 else "b", tokens, truth)
        return self.prompts[key]

    def under_way(self) -> list[Prompt]:
        """From those that are being read on."""
        prompts = [self.prompts[key] for key in self.keys if not self.prompts[key].finished]
        return sorted(prompts, key=lambda prompt: prompt.key not in self.used.values())

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans(), tokens=st.integers(1, 9))
    def begin_step(self, new: bool, cached: bool, tokens: int) -> None:
        self.end_step()
        begun = [p for p in self.under_way() if not p.preempted and p.computed < p.tokens][:1]
        starts = [prompt.computed for prompt in begun]
        free = [block for block in range(BLOCKS) if block not in self.owners]
        prompt = self.prompt(len(self.keys))
        blocks = -(-prompt.tokens // PREFILL_BLOCK_TOKENS)
        if new and len(free) >= blocks:
            prompt.block_ids = tuple(free[:blocks])
            self.owners |= dict.fromkeys(prompt.block_ids, prompt.key)
            self.keys.append(prompt.key)
            self.held.add(prompt.key)
            begun.append(prompt)
            hit = cached and prompt.tokens > PREFILL_BLOCK_TOKENS
            starts.append(PREFILL_BLOCK_TOKENS if hit else 0)
        chunks = []
        self.layers_done = 0
        for prompt, start in zip(begun, starts, strict=True):
            end = min(start + tokens, prompt.tokens)
            # What another request of this step is only about to compute counts as cached.
            self.step.append((prompt, prompt.computed, end))
            taken = prompt.block_ids[: -(-end // PREFILL_BLOCK_TOKENS)]
            request_id = f"engine-{prompt.key}"
            chunks.append(StepChunk(prompt.key, request_id, taken, start, end, prompt.tokens))
        self.server.begin_step(chunks)

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans())
    def prefill(self, new: bool, cached: bool) -> None:
        """From the first step to the sampled token."""
        self.begin_step(new, cached, tokens=11)
        self.end_step()
        for which in range(len(self.under_way())):
            self.finish(which, abort=False)

    def write(self, layer: int) -> None:
        held = self.geometry.heads
        for prompt, start, end in self.step:
            for token in range(start, end):
                block = prompt.block_ids[token // PREFILL_BLOCK_TOKENS]
                values = prompt.truth[layer][token, held.start : held.end]
                self.caches[layer][block, :, token % PREFILL_BLOCK_TOKENS] = values

    @precondition(lambda self: self.step and self.layers_done < LAYERS)
    @rule()
    def layer(self) -> None:
        self.write(self.layers_done)
        self.layers_done += 1
        self.server.layer_done(self.layers_done)

    def end_step(self) -> None:
        for layer in range(self.layers_done, LAYERS):
            self.write(layer)
        for prompt, _, end in self.step:
            prompt.computed = end
        self.step = []
        self.server.end_step()

    @precondition(lambda self: self.preempting is None)
    @rule(which=index, abort=st.booleans())
    def finish(self, which: int, abort: bool) -> None:
        self.end_step()
        if prompts := self.under_way():
            prompt = prompts[which % len(prompts)]
            sampled = prompt.preempted or prompt.computed == prompt.tokens
            if sampled or (abort and not self.peaceful):
                prompt.finished = True
                self.server.finish(prompt.key, 7 if sampled else None, computed=sampled)

    @precondition(lambda self: not (self.preempting or self.peaceful))
    @rule()
    def abort_before_the_first_step(self) -> None:
        self.end_step()
        prompt = self.prompt(len(self.keys))
        prompt.finished = True
        self.keys.append(prompt.key)
        self.server.finish(prompt.key, None, computed=False)

    @precondition(lambda self: self.preempting is None)
    @rule(which=index)
    def preempt(self, which: int) -> None:
        """Preferably what is being read."""
        self.end_step()
        if prompts := [prompt for prompt in self.under_way() if not prompt.preempted]:
            prompt = prompts[which % len(prompts)]
            self.preempting = Stepped(self.server.preempt, args=([prompt.key],)), prompt

    @invariant()
    def preempted_blocks_are_read_no_more(self) -> None:
        if self.preempting is None:
            return
        thread, prompt = self.preempting
        thread.go_to("asleep")
        if thread.ended:
            assert prompt.key not in self.used.values()
            prompt.preempted = prompt.spoilt = True
            self.preempting = None
            self.free(prompt)
        else:
            assert prompt.key in self.used.values(), "waits for nothing"

    @invariant()
    def blocks_are_released_once_when_nobody_reads(self) -> None:
        for request_id in self.server.take_released():
            key = request_id.removeprefix("engine-")
            self.held.remove(key)  # KeyError: a second time
            assert self.prompts[key].finished
            assert key not in self.used.values(), "its blocks are being read"
            self.free(self.prompts[key])

    def free(self, prompt: Prompt) -> None:
        for block in prompt.block_ids:
            del self.owners[block]
            for cache in self.caches:
                cache[block] = torch.nan
        prompt.block_ids = ()

    # ---- the decode ranks and their network ----------------------------------------------

    @precondition(lambda self: not self.peaceful)
    @rule(
        name=st.sampled_from(sorted(DECODE_RANKS)),
        wrong=st.sampled_from(["", "token", "model"]), at_once=st.booleans(),
    )  # fmt: skip
    def hello(self, name: str, wrong: str, at_once: bool) -> None:
        if self.geometry.tp_size > 1 and name == "b0":
            return  # has no business with the second copy of a head
        rank = DecodeRank(self, name)
        self.ranks[rank.routing_id] = rank
        geometry = replace(rank.geometry, model="other" if wrong == "model" else GEOMETRY.model)
        token = "guess" if wrong == "token" else OPTIONS.token
        version = wire.PROTOCOL_VERSION
        rank.say(wire.Hello(version, token, "p1", name, geometry, "gloo", "", "", 0))
        if not wrong:
            self.open[name] = rank
        if at_once:
            self.all_goes_well(1)

    def rank(self, which: int) -> DecodeRank | None:
        ranks = [rank for rank in self.open.values() if rank.welcome and not rank.closed]
        return ranks[which % len(ranks)] if ranks else None

    @rule(number=index, first=st.integers(0, 2), all_ranks=st.sampled_from([True, True, False]))
    def reserve(self, number: int, first: int, all_ranks: bool) -> None:
        """The newest ones, and the next; each is for the ranks of one of the two workers."""
        prompt = self.prompt(max(0, len(self.keys) + AHEAD[number]))
        start = min(first, (prompt.tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        names = [name for name in DECODE_RANKS if name.startswith(prompt.worker)]
        prompt.spoilt |= not all_ranks
        for name in names if all_ranks else names[-1:]:
            if name not in self.open or self.open[name].closed:
                self.hello(name, wrong="", at_once=True)
            rank = self.open.get(name)
            again = any(prompt.key in r.parts for r in self.ranks.values() if r.name == name)
            if rank is not None and rank.welcome and not again:
                rank.reserve(prompt, start)
            elif rank is None or prompt.key not in rank.parts:
                prompt.spoilt = True

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, number=index)
    def cancel(self, which: int, number: int) -> None:
        if (rank := self.rank(which)) is not None and self.keys:
            key = self.some_key(number)
            if key in rank.parts:
                rank.parts[key].session.cancel()
            rank.say(wire.Cancel(key))
            self.control()

    def some_key(self, number: int) -> str:
        """Preferably what is being read."""
        keys = list(self.used.values()) if number % 2 else []
        keys = keys or self.keys
        return keys[-1 - number // 2 % len(keys)]

    @rule(number=index, owner=st.booleans())
    def release(self, number: int, owner: bool) -> None:
        if self.keys:
            token = OPTIONS.token if owner and not self.peaceful else "guess"
            message = wire.Release(token, self.some_key(number))
            self.router.inbox.append([b"front end", wire.encode(message)])
            self.control()

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, how=st.sampled_from(["bye", "lose", "accident"]), sure=st.booleans())
    def lose(self, which: int, how: str, sure: bool) -> None:
        if sure and (rank := self.rank(which)) is not None:
            if how == "bye":
                rank.say(wire.Bye())
                self.control()
            rank.closed |= how == "bye"
            rank.lost |= how == "lose"
            rank.accident |= how == "accident"

    @precondition(lambda self: not self.peaceful)
    @rule(seconds=st.sampled_from([1, 6, 16]), silent=st.booleans())
    def wait(self, seconds: int, silent: bool) -> None:
        for rank in self.open.values():
            if rank.welcome and not (rank.closed or silent):
                rank.say(wire.Ping())
        self.control()
        self.now_s += seconds

    @rule()
    def control(self) -> None:
        """The server hears what was said to it, and says what it has to."""
        self.control_thread.go_to("idle")

    @rule(which=index, place=st.sampled_from([*PLACES, "asleep"]))
    def go(self, which: int, place: str) -> None:
        senders = [t for t in self.threads[1:] if not (t.ended or t.blocked)]
        if senders:
            senders[which % len(senders)].go_to(place)

    @precondition(lambda self: self.preempting is None)
    @rule(
        number=st.integers(0, 1), cached=st.booleans(), tokens=st.integers(1, 11),
        layers=st.integers(0, LAYERS), which=index, place=st.sampled_from(PLACES),
        then=st.sampled_from(["", "preempt", "abort", "cancel", "release", "bye", "lose"]),
    )  # fmt: skip
    def stream(
        self, number: int, cached: bool, tokens: int, layers: int, which: int, place: str,
        then: str,
    ) -> None:  # fmt: skip
        """Straight to somewhere in the middle of a step that is streamed, and what comes there."""
        self.reserve(number, 0, all_ranks=True)
        self.control()
        self.begin_step(number == 0, cached, tokens)
        for _ in range(layers):
            self.layer()
            self.go(which, place)
        if then == "preempt":
            self.preempt(0)
        if then == "abort":
            self.finish(0, abort=True)
        if then == "release":
            self.release(1, owner=True)
        if then == "cancel" and not self.peaceful:
            self.cancel(which, 1)
        if then in ("bye", "lose") and not self.peaceful:
            self.lose(which, then, sure=True)

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        for _ in range(rounds):
            self.control()
            for thread in self.threads:
                thread.go_to("nowhere")

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def bounds(self) -> None:
        server = self.server
        assert len(server._peers) <= 2
        assert len(server._ended_keys) <= OPTIONS.max_pending
        assert len(server._waiting) <= OPTIONS.max_pending
        waiting = [w.peer for reservations in server._waiting.values() for w in reservations]
        assert {peer.routing_id for peer in waiting} <= set(server._peers)
        assert all(set(peer.keys) <= set(server._transfers) for peer in server._peers.values())
        assert sum(t.gathering for t in server._transfers.values()) == len(self.used)

    @invariant()
    def no_sender_sleeps_while_there_is_something_to_send(self) -> None:
        for transfer in self.server._transfers.values():
            for rank in transfer.session.ready_ranks():
                thread = transfer.peers[rank].thread
                assert not (isinstance(thread, Stepped) and thread.blocked)

    def teardown(self) -> None:
        """However it ends, all blocks come back, and every decode rank is told."""
        try:
            self.end_step()
            if self.ending != "stop":
                self.end_quietly()
            self.server.stop()
            self.nothing_is_broken()
            assert all(thread.ended for thread in self.threads)
        finally:
            self.patch.undo()

    def end_quietly(self) -> None:
        for rank in self.open.values():
            rank.lost |= self.ending == "silence"
        for turn in range(16):
            self.all_goes_well(1)
            self.preempted_blocks_are_read_no_more()
            if self.preempting is None:
                self.begin_step(new=False, cached=False, tokens=11)
                self.end_step()
                for _ in self.under_way():
                    self.finish(0, abort=False)
            self.wait(0 if turn < 8 else 16, silent=self.ending == "silence")
            self.blocks_are_released_once_when_nobody_reads()
            self.bounds()
        assert not self.held, "blocks that the engine does not get back"
        assert not self.server._transfers
        assert not self.server._waiting
        assert not any(peer.keys for peer in self.server._peers.values())
        assert not self.server._peers or self.ending != "silence"
        for rank in self.ranks.values():
            for key, part in rank.parts.items():
                assert part.told or rank.closed or part.session.terminal
                prompt = self.prompts[key]
                if self.peaceful and prompt.finished and not (prompt.spoilt or rank.closed):
                    assert part.session.state is ReceiveState.COMPLETE


@pytest.mark.parametrize(
    ("refusals", "messages", "complete"), [(1, 0, True), (2, 0, False), (1, 1, False)]
)
def test_a_reservation_is_made_again_once_and_only_if_nothing_has_come(
    refusals: int, messages: int, complete: bool
) -> None:
    machine = DecodeMachine()
    machine.begin(ending="silence", peaceful=False)
    machine.reserve("p1", "a", 3, 0, 0, welcome=True, too_many=False)
    for _ in range(refusals):
        machine.all_go_to("idle")
        for peer, key in machine.to_send() * messages:
            peer.rank.speak(key)
        machine.lose(0, "refuse", "nowhere")
        machine.meet()
    machine.all_goes_well(2)
    (result,) = machine.client._results
    assert (result.complete, result.retries) == (complete, 0 if messages else 1)
    machine.teardown()


def test_a_restarted_prefill_worker_has_no_say_about_what_its_successor_sends() -> None:
    machine = DecodeMachine()
    machine.begin(ending="silence", peaceful=False)
    for incarnation in "ba":
        machine.reserve("p1", incarnation, 1, 0, 0, welcome=True, too_many=False)
    machine.peers[0].rank.inbox.append(wire.Fail("r1#1", "restarted"))
    machine.all_goes_well(3)
    assert [result.complete for result in machine.client._results] == [True, True]
    machine.teardown()


def test_a_client_that_stops_makes_no_new_pair() -> None:
    """It was asked to give a pair up, which else it would make again, and stops at that moment."""
    machine = DecodeMachine()
    machine.begin(ending="stop", peaceful=False)
    machine.reserve("p1", "a", 1, 0, 0, welcome=True, too_many=False)
    machine.all_go_to("idle")
    machine.lose(0, "refuse", "heard")
    machine.teardown()


def test_a_server_that_stops_makes_no_new_pair() -> None:
    """Its control thread still finds a HELLO."""
    machine = PrefillMachine()
    machine.begin(idle=False, peaceful=False, ending="stop")
    machine.hello("a", wrong="", at_once=False)
    machine.teardown()


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(DecodeMachine.TestCase.settings, max_examples=100)
TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(PrefillMachine.TestCase.settings, max_examples=150)
