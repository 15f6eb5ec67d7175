"""Tests when the decode engine gets its blocks back.

A real ``DecodeClient`` runs one step at a time (``kv_stepped``).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, replace
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
from kv_transfer.geometry import LayerBlockRange, heads_of, plan_pair, sources
from kv_transfer.kv_caches import KvCaches, UnitView
from kv_transfer.receive import client, control, receiver
from kv_transfer.receive.receiver import Receiver
from kv_transfer.receive.records import Leg, Peer, Reservation, TransferResult
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
    """A correct prefill rank. It also replaces the decode rank's control socket and ``Pair``."""

    def __init__(self, machine: DecodeMachine, tp_rank: int, tp_size: int) -> None:
        self.geometry = replace(GEOMETRY, tp_rank=tp_rank, tp_size=tp_size)
        self.plan = plan_pair(self.geometry, GEOMETRY)
        held = heads_of(tp_rank, tp_size, HEADS)
        own = [cache[:, held.start : held.end].contiguous() for cache in machine.prefill]
        self._view = KvCaches(own).view(self.plan, held)
        self._machine = machine
        self.pair_id: str | None = None
        self.inbox: deque[wire.ToDecode] = deque()  # messages for the decode rank
        self.tensors: deque[torch.Tensor] = deque()
        self.sends: dict[str, SendSession] = {}
        self.sent: dict[str, tuple[int, int]] = {}  # messages and bytes, by transfer id
        self.announced = 0
        self.end_sent: set[str] = set()
        self.said_bye = False  # the decode rank has sent BYE
        self.lost = False  # the connection is lost
        self.accident = False  # the next copy fails

    def send_next(self, transfer_id: str) -> None:
        """Send the next message of a transfer. After the last one, send END."""
        send = self.sends[transfer_id]
        if (block_range := send.next_message(0)) is not None:
            self.announce(transfer_id, block_range, block_range.num_units * self.plan.unit_bytes)
            send.message_sent(0, block_range, hidden=False)
            messages, num_bytes = self.sent[transfer_id]
            self.sent[transfer_id] = (
                messages + 1,
                num_bytes + block_range.num_units * self.plan.unit_bytes,
            )
        elif (end := send.take_manifest(0)) is not None:
            self.end_sent.add(transfer_id)
            self.inbox.append(end)

    def announce(self, transfer_id: str, block_range: LayerBlockRange, num_bytes: int) -> None:
        """Announce a message and send it. If the header is wrong, the message is all NaN."""
        self.inbox.append(wire.Header(self.announced, transfer_id, block_range, num_bytes))
        self.announced += 1
        blocks = torch.tensor(self._machine.sources.get(transfer_id, ()))
        tensor = torch.full((max(0, num_bytes) // 4,), torch.nan)
        if (
            num_bytes == block_range.num_units * self.plan.unit_bytes > 0
            and transfer_id in self.sends
            and block_range.layer_end <= LAYERS
            and block_range.unit_end <= len(blocks)
        ):
            self._view.gather(block_range, blocks, tensor)
        self.tensors.append(tensor)

    # as the decode rank's control socket

    def send(self, frame: bytes, _flags: int = 0) -> None:
        message = wire.decode_to_prefill(frame)
        match message:
            case wire.Hello():
                self.pair_id = message.pair_id
            case wire.Reserve():
                self._machine.expect(message.transfer_id not in self.sends, "a second RESERVE")
                self._machine.check_reservation(message.transfer_id, self)
                send = SendSession(message.transfer_id, message.token_end, LAYERS)
                start, end = message.token_start, message.token_end
                send.reserve(0, self.plan, OPTIONS.message_bytes, start, end)
                send.add_chunk(0, end)
                send.advance(LAYERS)
                send.request_finished(7)
                self.sends[message.transfer_id], self.sent[message.transfer_id] = send, (0, 0)
            case wire.Cancel() if message.transfer_id in self.sends:
                self.sends[message.transfer_id].cancel()
            case wire.Bye():
                self._machine.expect(not self.said_bye, "a second BYE")
                self.said_bye = True
            case wire.Ping() if not self._machine.silent:
                self.inbox.append(wire.Pong())
        pause("sent")

    def recv(self) -> bytes:
        frame = wire.encode(self.inbox.popleft())
        pause("received")
        return frame

    def readable(self) -> bool:
        return bool(self.inbox)

    # as the decode rank's Pair

    def receive(self, buffer: torch.Tensor, _elements: int) -> Work:
        return Work(self, buffer)

    def abort(self) -> None:
        self.lost = True

    def wait_aborted(self, timeout_s: float) -> bool:
        return True


class Work:
    """A receive that has started. Its bytes arrive immediately. As with gloo, it does not notice if
    there are more or fewer than announced."""

    def __init__(self, rank: PrefillRank, buffer: torch.Tensor) -> None:
        self._rank = rank
        source = rank.tensors.popleft()
        buffer[: len(source)].copy_(source)

    def wait(self, timeout_s: float) -> None:
        pause("wait")
        if self._rank.lost:
            raise PairError("connection lost")


class Monitor:
    def __init__(self, rank: PrefillRank) -> None:
        self._rank = rank

    def readable(self) -> bool:
        return self._rank.lost


@dataclass(slots=True, eq=False)
class HeldPeer:
    """A peer of the client, its thread, and the prefill rank behind it."""

    peer: Peer
    thread: Stepped
    rank: PrefillRank

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()


WORKERS = {"p1": 1, "p2": 2, "p4": 4}  # prefill workers and their numbers of ranks


def addresses_of(worker: str) -> tuple[str, ...]:
    return tuple(f"{worker}/{rank}" for rank in range(WORKERS[worker]))


class DecodeMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.silent = False  # the prefill workers do not answer
        self.trouble = False  # something other than a cancel may have failed transfers
        self.cancelled: set[str] = set()
        self.legs: dict[str, dict[str, Leg]] = {}  # by transfer id and control address
        self.peers: list[HeldPeer] = []
        self.held: dict[str, Reservation] = {}  # by transfer id, if not yet reported
        # By transfer id: the prefill worker's control addresses and incarnation.
        self.workers: dict[str, tuple[tuple[str, ...], str]] = {}
        self.sources: dict[str, tuple[int, ...]] = {}  # by transfer id: blocks in ``prefill``
        self.prefill, self.caches = random_caches(), random_caches()
        self.fake(
            receiver,
            Receiver=self.make_receiver,
            threading=SimpleNamespace(Thread=Stepped),
            Pair=self.make_pair,
        )
        self.fake(
            control,
            zmq=SimpleNamespace(
                Poller=Poller, POLLIN=zmq.POLLIN, NOBLOCK=zmq.NOBLOCK, ZMQError=zmq.ZMQError
            ),
            _connect=self.connect,
        )
        self.patch.setattr(UnitView, "scatter", self.slow(UnitView.scatter))
        kv_caches = KvCaches(self.caches)
        self.client = client.DecodeClient(kv_caches, GEOMETRY, OPTIONS, lambda: self.now_s)

    def make_receiver(self, peer: Peer, *args: Any) -> Receiver:
        made = Receiver(peer, *args)
        assert isinstance(made.thread, Stepped)
        worker, _, tp_rank = peer.address.partition("/")
        rank = PrefillRank(self, int(tp_rank), WORKERS[worker])
        self.peers.append(HeldPeer(peer, made.thread, rank))
        return made

    def connect(self, _address: str, _secret: str, stack: contextlib.ExitStack) -> Any:
        rank: Any = self.rank_of_this_thread()
        stack.callback(control.send_bye, rank)
        pause("start")
        return rank, Monitor(rank)

    def rank_of(self, peer: Peer) -> PrefillRank:
        return next(held.rank for held in self.peers if held.peer is peer)

    def rank_of_this_thread(self) -> PrefillRank:
        return next(p.rank for p in self.peers if p.thread is threading.current_thread())

    def make_pair(self, *_: object) -> PrefillRank:
        rank = self.rank_of_this_thread()
        pause("group")
        if rank.lost:
            raise PairError("connection lost")
        return rank

    def peer(self, which: int, *, up: bool = False) -> HeldPeer | None:
        """Return some live peer. ``which`` 0 selects a busy one if there is any."""
        peers = [p for p in self.peers if p.alive and (p.peer.plan is not None or not up)]
        peers.sort(key=lambda held: self.client.transfers.is_busy(held.peer))
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
        transfer_id = f"r{len(self.transfer_ids)}#1"
        addresses, start = addresses_of(worker), min(first, blocks - 1) * BLOCK_TOKENS
        end = blocks * BLOCK_TOKENS - short
        self.held[transfer_id] = Reservation(
            transfer_id=transfer_id,
            request_id=f"engine-{transfer_id}",
            addresses=addresses,
            incarnation=incarnation,
            block_ids=tuple(free),
            token_start=start,
            token_end=end,
        )
        self.owners |= dict.fromkeys(free, transfer_id)
        self.sources[transfer_id] = tuple(
            (len(self.transfer_ids) + block) % BLOCKS for block in range(blocks)
        )
        self.workers[transfer_id] = addresses, incarnation
        self.transfer_ids.append(transfer_id)
        self.client.reserve(self.held[transfer_id])
        if transfer_id in self.client.transfers.by_id:
            self.legs[transfer_id] = self.client.transfers.by_id[transfer_id].legs
        if welcome:
            self.meet()

    def meet(self) -> None:
        """Run the receivers until every pair is open."""
        while starting := [peer for peer in self.peers if peer.alive and peer.peer.plan is None]:
            starting[0].thread.go()
            self.welcome(starting[0])

    @rule(which=index)
    def cancel(self, which: int) -> None:
        """Cancel a transfer, perhaps an ended one.

        An odd ``which`` prefers transfers that are not yet reported: first those whose blocks are
        being written.
        """
        if self.transfer_ids:
            transfer_ids = [*self.used.values(), *self.held] if which % 2 else self.transfer_ids
            transfer_ids = transfer_ids or self.transfer_ids[-1:]
            transfer_id = transfer_ids[which // 2 % len(transfer_ids)]
            self.cancelled.add(transfer_id)
            self.client.cancel(transfer_id, *self.workers[transfer_id])

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
            (peer, transfer_id)
            for peer in self.peers
            for transfer_id, send in peer.rank.sends.items()
            if peer.alive and not send.ended
        ]

    @rule(
        which=index, worker=st.sampled_from(sorted(WORKERS)), messages=st.integers(1, 4),
        place=st.sampled_from(PLACES), then=st.sampled_from(["", "", "cancel", "fail"]),
    )  # fmt: skip
    def send_next(self, which: int, worker: str, messages: int, place: str, then: str) -> None:
        """Let a prefill rank send, and run its peer up to some place.

        Then perhaps cancel a transfer, or let the other prefill ranks fail the same transfer.
        """
        if not self.to_send():
            self.reserve(worker, "a", 2, 0, 0, welcome=True, too_many=False)
            self.all_go_to("idle")
        if not (possible := self.to_send()):
            return
        peer, some_id = possible[which % len(possible)]
        for _ in range(messages):
            peer.rank.send_next(some_id)
        peer.thread.go_to(place)
        if then == "cancel":
            self.cancel(1)
        if then == "fail" and not self.peaceful:
            self.trouble = True
            for other in self.peers:
                if other is not peer and some_id in other.rank.sends:
                    other.rank.inbox.append(wire.Fail(some_id, "for no reason"))
                    other.thread.go_to("nowhere")

    def all_go_to(self, place: str) -> None:
        for peer in self.peers:
            for _ in range(3):
                peer.thread.go_to(place)

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        """Open the pairs, send what was reserved, and run the receivers."""
        for peer in rounds * self.peers:
            self.welcome(peer)
            for transfer_id in peer.rank.sends:
                for _ in range(4):
                    peer.rank.send_next(transfer_id)
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
            if how == "header":  # headers are lost, but their tensors arrive
                peer.rank.inbox = deque(
                    m for m in peer.rank.inbox if not isinstance(m, wire.Header)
                )
            peer.rank.lost |= how == "lose"
            peer.rank.accident |= how == "accident"
            peer.thread.go_to(place)

    @precondition(lambda self: not self.peaceful)
    @rule(
        which=index, number=index, layer=st.integers(0, LAYERS), unit=st.integers(0, 2),
        more=st.sampled_from([0, 0, 0, 1, 4, -4]),
    )  # fmt: skip
    def announce_unasked(self, which: int, number: int, layer: int, unit: int, more: int) -> None:
        if (peer := self.peer(which, up=True)) is not None:
            self.trouble = True
            block_range = LayerBlockRange(layer, layer + 1, unit, unit + 1)
            some_id = self.id_known_to(peer, number)
            peer.rank.announce(some_id, block_range, peer.rank.plan.unit_bytes + more)

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, number=index, fail=st.booleans())
    def end_early(self, which: int, number: int, fail: bool) -> None:
        """Send FAIL, or an END with a manifest of what was sent so far."""
        if (peer := self.peer(which, up=True)) is None:
            return
        self.trouble = True
        some_id = self.id_known_to(peer, number)
        if fail:
            peer.rank.inbox.append(wire.Fail(some_id, "for no reason"))
        elif (send := peer.rank.sends.get(some_id)) is not None:
            messages, num_bytes = peer.rank.sent[some_id]
            peer.rank.end_sent.add(some_id)
            peer.rank.inbox.append(
                wire.End(
                    transfer_id=some_id,
                    token_start=send._legs[0].token_start,
                    token_end=send.num_tokens,
                    messages=messages,
                    num_bytes=num_bytes,
                    hidden_bytes=0,
                    first_token_id=7,
                )
            )

    def id_known_to(self, peer: HeldPeer, number: int) -> str:
        """Return the id of a transfer of this pair (0: the newest), or one unknown to the pair."""
        transfer_ids = ["unknown", *self.transfer_ids[-2:], *peer.rank.sends]
        return transfer_ids[-1 - number % len(transfer_ids)]

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def each_reservation_is_reported_once_when_nobody_writes(self) -> None:
        for result in self.client.take_results():
            self.reported(result)
        assert set(self.client.transfers.by_id) == set(self.held), "lost, or known after the report"

    def reported(self, result: TransferResult) -> None:
        reservation = self.held.pop(result.transfer_id)  # KeyError if it is reported twice
        legs = self.legs.get(result.transfer_id, {})  # empty if ``reserve`` refused it
        states = [leg.session.state for leg in legs.values()]
        assert all(leg.session.ended and not leg.scattering for leg in legs.values())
        assert result.transfer_id not in self.used.values(), "its blocks are being written"
        assert result.retries <= len(legs)
        for block in reservation.block_ids:
            del self.owners[block]
        assert result.complete == (set(states) == {ReceiveState.COMPLETE})
        if not result.complete:
            assert self.trouble or result.transfer_id in self.cancelled or not legs, (
                "failed for no reason"
            )
            return
        ranks = sources(0, 1, len(reservation.addresses), HEADS)
        assert set(legs) == {reservation.addresses[rank] for rank in ranks}
        assert all(result.transfer_id in self.rank_of(leg.peer).end_sent for leg in legs.values())
        assert result.first_token_id == 7
        start, end = reservation.token_start, reservation.token_end
        for cache, source in zip(self.caches, self.prefill, strict=True):
            got = tokens_of(cache, reservation.block_ids)[start:end]
            assert torch.equal(got, tokens_of(source, self.sources[result.transfer_id])[start:end])

    def check_reservation(self, transfer_id: str, rank: PrefillRank) -> None:
        """Check a RESERVE when it is sent."""
        states = [
            p.session.state for p in self.legs[transfer_id].values() if self.rank_of(p.peer) is rank
        ]
        started = {ReceiveState.RECEIVING, ReceiveState.COMPLETE}
        self.expect(not started & set(states), "reserved again although messages have arrived")

    @invariant()
    def peers_are_bounded_and_serve_what_was_reserved_from_them(self) -> None:
        known = list(self.client.transfers.peers.values())
        assert len(known) <= OPTIONS.max_pairs
        assert set(known) == {p.peer for p in self.peers if p.alive and not p.peer.closing}
        for transfer in self.client.transfers.by_id.values():
            for leg in transfer.legs.values():
                assert leg.session.ended or leg.peer in known, "no receiver will end this leg"

    @initialize(ending=st.sampled_from(["calm", "silence", "stop"]), peaceful=st.booleans())
    def begin(self, ending: str, peaceful: bool) -> None:
        self.ending, self.peaceful = ending, peaceful

    def teardown(self) -> None:
        """Check that nothing is left, for each kind of ending."""
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
            assert not self.held, "some reservations were not reported"
            self.client.stop()
            assert all(peer.rank.said_bye and not peer.alive for peer in self.peers)
            assert not self.client.transfers.peers
        finally:
            self.patch.undo()


@pytest.mark.parametrize(
    ("refusals", "messages", "complete"), [(1, 0, True), (2, 0, False), (1, 1, False)]
)
def test_a_reservation_is_repeated_once_and_only_if_nothing_has_arrived(
    refusals: int, messages: int, complete: bool
) -> None:
    machine = DecodeMachine()
    machine.begin(ending="silence", peaceful=False)
    machine.reserve("p1", "a", 3, 0, 0, welcome=True, too_many=False)
    for _ in range(refusals):
        machine.all_go_to("idle")
        for peer, transfer_id in machine.to_send() * messages:
            peer.rank.send_next(transfer_id)
        machine.lose(0, "refuse", "nowhere")
        machine.meet()
    machine.all_goes_well(2)
    (result,) = machine.client.transfers._results
    assert (result.complete, result.retries) == (complete, 0 if messages else 1)
    machine.teardown()


def test_a_restarted_prefill_worker_cannot_fail_a_transfer_of_its_successor() -> None:
    machine = DecodeMachine()
    machine.begin(ending="silence", peaceful=False)
    for incarnation in "ba":
        machine.reserve("p1", incarnation, 1, 0, 0, welcome=True, too_many=False)
    machine.peers[0].rank.inbox.append(wire.Fail("r1#1", "restarted"))
    machine.all_goes_well(3)
    assert [result.complete for result in machine.client.transfers._results] == [True, True]
    machine.teardown()


def test_a_client_that_stops_makes_no_new_pair() -> None:
    """At the stop, a receiver has read REFUSE and is about to start a new pair."""
    machine = DecodeMachine()
    machine.begin(ending="stop", peaceful=False)
    machine.reserve("p1", "a", 1, 0, 0, welcome=True, too_many=False)
    machine.all_go_to("idle")
    machine.lose(0, "refuse", "received")
    machine.teardown()


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(DecodeMachine.TestCase.settings, max_examples=100)
