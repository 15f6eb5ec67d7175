"""When blocks go back to the decode engine: a real ``DecodeClient``, one step at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import Rectangle, heads_of, plan_pair, sources
from kv_transfer.kv_caches import KvPages, PageView
from kv_transfer.receive import client as receive
from kv_transfer.receive.client import DecodeClient, Reservation, TransferResult
from kv_transfer.session import ReceiveState, SendSession
from tests.support.kv_stepped import (
    BLOCK_TOKENS,
    BLOCKS,
    GEOMETRY,
    HEADS,
    LAYERS,
    OPTIONS,
    PLACES,
    Machine,
    Poller,
    Stepped,
    index,
    pause,
    random_caches,
    tokens_of,
)


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


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(DecodeMachine.TestCase.settings, max_examples=100)
