"""Hazards of silent corruption: KV in wrong blocks, or incomplete KV. See ``kv_hazards``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kv_transfer import side_stream, wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import LayerBlockRange, split_into_messages
from kv_transfer.kv_caches import UnitView
from kv_transfer.pair import Pair, PendingWork
from kv_transfer.receive import receiver
from kv_transfer.receive.records import Reservation
from kv_transfer.receive.transfers import ReceiveTransfers
from kv_transfer.send import sender, server
from kv_transfer.send.transfers import SendTransfers
from kv_transfer.session import SendSession
from tests.support.kv_faults import (
    Clock,
    DecodeEnd,
    Gate,
    PrefillEnd,
    running,
)
from tests.support.kv_hazards import (
    LONG,
    NEVER_S,
    SOURCE,
    TARGET,
    compute,
    delivers,
    ends,
    fill,
    filled,
    record_receivers,
)
from tests.support.kv_stream import (
    GEOMETRY,
    LAYERS,
    OPTIONS,
    Prefill,
    same_blocks,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


def test_late_write_of_an_aborted_request_lands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """S#35049: the request is aborted while D writes one message and others are in flight."""
    with ends() as (prefill, decode), Gate(monkeypatch, UnitView, "scatter") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        decode.cancel(prefill, "a#1")
        assert not decode.client.take_results(), "D still writes into its blocks"
        gate.open()
        assert not decode.result("a#1").complete
        fill(decode.caches, TARGET, 7)
        assert delivers(prefill, decode, "b#1")  # its messages follow all messages of a#1
        assert filled(decode.caches, TARGET, 7)
        prefill.wait_released("a#1")


@pytest.mark.parametrize("how", ["released", "preempted"])
def test_late_read_of_an_aborted_request_keeps_its_blocks(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """S#35049, on the prefill side: no block is released while a sender reads it."""
    with ends() as (prefill, decode), Gate(monkeypatch, UnitView, "gather") as gate:
        server = prefill.server
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        if how == "released":
            with server.transfers.lock:
                server.transfers.cancel("a#1", "released by the router", None)
            assert not server.take_released()
        else:
            engine = threading.Thread(target=server.preempt, args=(["a#1"],))
            engine.start()
            wait_until(
                lambda: not engine.is_alive() or server.transfers._gathered._waiters,  # type: ignore[attr-defined]
                what="the engine waits or has returned",
            )
            assert engine.is_alive(), "preempt returned while a sender reads the blocks"
        gate.open()
        if how == "preempted":
            engine.join(10)
        prefill.wait_released("a#1")
        assert not decode.result("a#1").complete


def test_first_failed_leg_waits_for_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#56104: one of two prefill ranks stops while D writes KV of the other rank.

    A leg is the part of a transfer between one pair of ranks.
    """
    ranks = [PrefillEnd(tp_rank=rank, tp_size=2) for rank in (0, 1)]
    decode, successor = DecodeEnd(), PrefillEnd(tp_rank=0, tp_size=2)

    def reserve(transfer_id: str, blocks: list[int], tokens: int, *from_ranks: Prefill) -> None:
        addresses = tuple(prefill.server.address for prefill in from_ranks)
        decode.client.reserve(
            Reservation(
                transfer_id=transfer_id,
                request_id=transfer_id,
                addresses=addresses,
                incarnation="p1",
                block_ids=tuple(blocks),
                token_start=0,
                token_end=tokens,
            )
        )

    receivers = record_receivers(monkeypatch)

    def from_the_other(view: UnitView, *_: Any) -> bool:
        address = ranks[1].server.address
        return any(r._view is view and r.peer.address == address for r in receivers)

    with (
        running(decode, *ranks, successor),
        Gate(monkeypatch, UnitView, "scatter", from_the_other) as gate,
    ):
        reserve("a#1", TARGET, LONG, *ranks)
        transfer = decode.client.transfers.by_id["a#1"]
        ranks[0].compute("a#1", SOURCE, LONG)  # no request_finished: this leg stays open
        compute(ranks[1], "a#1", SOURCE, LONG)
        gate.wait_entered()
        ranks[0].server.stop()
        wait_until(lambda: transfer.ended, what="decode has noticed the lost leg")
        assert not decode.client.take_results(), "D still writes the other leg"
        gate.open()
        assert not decode.result("a#1").complete
        fill(decode.caches, TARGET, 7)
        reserve("b#1", [60], 9, successor, ranks[1])
        for prefill in (successor, ranks[1]):
            compute(prefill, "b#1", [63], 9)
        assert decode.result("b#1").complete
        for head, prefill in enumerate((successor, ranks[1])):
            for there, here in zip(prefill.caches, decode.caches, strict=True):
                assert torch.equal(there[63, 0], here[60, head])
        assert filled(decode.caches, TARGET, 7)
        ranks[1].wait_released("a#1")


def test_lease_that_ran_out_fails_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """aws-do-eks#84: D stalls in mid-stream until P has reused the blocks for another request."""
    clock = Clock()
    prefill, decode = PrefillEnd(clock=clock), DecodeEnd(peer_lease_s=NEVER_S)
    with running(decode, prefill), Gate(monkeypatch, UnitView, "scatter") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        clock.ahead_s = 100
        prefill.wait_released("a#1")
        fill(prefill.caches, SOURCE, 7)
        gate.open()
        assert not decode.result("a#1").complete
        assert not any(bool((cache[TARGET] == 7).any()) for cache in decode.caches)
        assert delivers(prefill, decode, "b#1")


def test_lease_of_unreserved_kv_expires_before_a_reservation_arrives() -> None:
    """aws-do-eks#84: the blocks are free when D's reservation arrives."""
    clock = Clock()
    prefill, decode = PrefillEnd(clock=clock), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        compute(prefill, "a#1", SOURCE, LONG)
        clock.ahead_s = OPTIONS.reserve_timeout_s + 1
        with prefill.server.transfers.lock:  # without this, the pair's lease expires, too
            for peer in prefill.server.transfers.peers.values():
                peer.last_heard_s = clock()
        prefill.wait_released("a#1")
        fill(prefill.caches, SOURCE, 7)
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        assert not decode.result("a#1").complete
        assert delivers(prefill, decode, "b#1"), "the pair must still work"


def test_receive_and_use_on_different_streams_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#20263: a wrong order corrupts no KV on CPUs, so this test checks the order of the calls.

    P: the engine's thread marks written layers ▸ the sender's stream queues behind this mark ▸
    gather ▸ the sender waits for its own mark ▸ send.
    D: wait for the message ▸ scatter ▸ the receiver waits for its own mark ▸ report.
    """
    log: dict[str, list[tuple[str, object]]] = {}  # by thread: (call, mark or first argument)

    def note(owner: Any, name: str, call: Callable[..., Any] | None = None) -> None:
        call = call or getattr(owner, name)

        def noted(*args: Any) -> Any:
            result = call(*args)
            about = result if name == "mark" else args[0]
            log.setdefault(threading.current_thread().name, []).append((name, about))
            return result

        monkeypatch.setattr(owner, name, noted)

    for module in (server, sender, receiver):
        note(module, "mark", lambda device: object())
    for module in (sender, receiver):
        note(module, "wait_done", lambda *_: None)
    note(sender, "queue_after", lambda *_: None)
    for owner, name in [
        (UnitView, "gather"),
        (UnitView, "scatter"),
        (Pair, "send"),
        (PendingWork, "wait"),
        (ReceiveTransfers, "report_if_ended"),
    ]:
        note(owner, name)
    with ends() as (prefill, decode):
        assert delivers(prefill, decode, "first#1")
        log.clear()
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        assert decode.result("a#1").complete

    by_engine = [mark for _, mark in log["MainThread"]]
    sent = [call for call in log["kv-send"] if call[0] != "wait"]
    assert len(sent) == 5 * decode.results["a#1"].messages
    for turn in zip(*[iter(sent)] * 5, strict=True):
        assert [name for name, _ in turn] == ["queue_after", "gather", "mark", "wait_done", "send"]
        (_, behind), _, (_, own), (_, done), _ = turn
        assert behind in by_engine
        assert done is own
    received = log["kv-receive"][:-1]
    assert log["kv-receive"][-1][0] == "report_if_ended", "END comes last"
    for turn in zip(*[iter(received)] * 5, strict=True):
        calls = [name for name, _ in turn]
        assert calls == ["wait", "scatter", "mark", "wait_done", "report_if_ended"]
        _, _, (_, own), (_, done), _ = turn
        assert done is own


class FakeCuda:
    """Fakes CUDA streams, CUDA events and NCCL's work. Logs the calls that order work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.done = False
        self.stream = "engine"
        cuda = SimpleNamespace(wait_event=lambda event: self.log.append(f"{self.stream} behind it"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "stream", self.enter)

    def record(self, stream: object) -> None:
        self.log.append(f"{self.stream} marked")

    def query(self) -> bool:
        return self.done

    def wait(self) -> None:  # of NCCL's work
        self.log.append(f"{self.stream} behind the transfer")

    @contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before


def test_receive_and_use_on_different_streams_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#20263, with a fake of CUDA: work on the side stream waits for the engine's mark.

    A thread waits for the device with a timeout.
    """
    device, cuda = torch.device("cuda", 0), FakeCuda(monkeypatch)
    computed = side_stream.mark(device)
    with side_stream.side_stream(device):
        side_stream.queue_after(computed, device)
        work = PendingWork(cuda, device)
    assert cuda.log == [
        "engine marked",
        "side behind it",
        "side behind the transfer",  # before the next mark, so that this mark covers it
        "side marked",
    ]
    with pytest.raises(PairError, match="no progress on the device"):
        work.wait(0)
    cuda.done = True
    work.wait(0)


@pytest.mark.parametrize("side", ["kv-send", "kv-receive"])
def test_out_of_memory_for_a_staging_buffer_is_a_failed_transfer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    """Another system only warned, stored None and continued."""
    empty = torch.empty

    def no_room(*args: Any, **options: Any) -> torch.Tensor:
        if threading.current_thread().name == side:
            raise torch.OutOfMemoryError("no room")
        return empty(*args, **options)

    with ends() as (prefill, decode):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", no_room)
            decode.reserve(prefill, "a#1", TARGET, 0, LONG)
            compute(prefill, "a#1", SOURCE, LONG)
            assert not decode.result("a#1").complete
        prefill.wait_released("a#1")
        assert "OutOfMemoryError: no room" in caplog.text
        assert delivers(prefill, decode, "b#1")


def test_staging_is_bounded_when_decode_does_not_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that P has read and D has not written fit into the buffers, however long the prompt.

    P releases no block before the whole prompt has been sent.
    """
    under_way, most = Counter[str](), 0

    def count(name: str, change: int) -> None:
        original = getattr(UnitView, name)

        def counted(*args: Any) -> None:
            nonlocal most
            original(*args)
            under_way["messages"] += change
            most = max(most, under_way["messages"])

        monkeypatch.setattr(UnitView, name, counted)

    count("gather", 1)
    count("scatter", -1)
    with ends() as (prefill, decode), Gate(monkeypatch, UnitView, "scatter") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        wait_until(lambda: most > 1, what="prefill is ahead of decode")
        assert not prefill.server.take_released()
        gate.open()
        assert decode.result("a#1").messages > 4 * OPTIONS.staging_buffers
        assert under_way["messages"] == 0
        assert most <= 2 * OPTIONS.staging_buffers


@pytest.mark.parametrize("lost", [0, 1, -1], ids=["the first", "one between", "the last"])
def test_missing_message_is_a_failed_transfer(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """P skips one message. The manifest matches the messages that P sent."""
    original, taken = SendSession.next_message, list[LayerBlockRange]()
    messages = list(split_into_messages(LayerBlockRange(0, LAYERS, 0, 20), 3))

    def lossy(session: SendSession, rank: int) -> LayerBlockRange | None:
        block_range = original(session, rank)
        if block_range == messages[lost] and session.transfer_id == "a#1":
            taken.append(block_range)
            session._legs[rank].in_flight -= 1
            block_range = original(session, rank)
        return block_range

    monkeypatch.setattr(SendSession, "next_message", lossy)
    with ends() as (prefill, decode):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        prefill.compute("a#1", SOURCE, LONG, chunk=LONG)
        prefill.server.request_finished("a#1", 42, computed=True)
        assert not decode.result("a#1").complete
        assert taken == [messages[lost]]
        prefill.wait_released("a#1")
        assert delivers(prefill, decode, "b#1")


def test_header_with_too_few_bytes_costs_only_its_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo ends the process if a message is longer than what it got to receive it."""
    original = SendTransfers.post

    def understate(transfers: SendTransfers, peer: Any, message: wire.ToDecode) -> None:
        if isinstance(message, wire.Header) and message.transfer_id == "a#1":
            message = msgspec.structs.replace(message, num_bytes=GEOMETRY.item_bytes)
        original(transfers, peer, message)

    monkeypatch.setattr(SendTransfers, "post", understate)
    with ends() as (prefill, decode):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        assert not decode.result("a#1").complete
        assert delivers(prefill, decode, "b#1")


def test_missing_header_moves_no_kv_into_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a HEADER is lost, D must not write this HEADER's KV into the blocks of the next HEADER."""
    original, lost = SendTransfers.post, list[wire.Header]()

    def lossy(transfers: SendTransfers, peer: Any, message: wire.ToDecode) -> None:
        if isinstance(message, wire.Header) and not lost:
            lost.append(message)
        else:
            original(transfers, peer, message)

    monkeypatch.setattr(SendTransfers, "post", lossy)
    with ends(transfer_timeout_s=2, message_bytes=LAYERS * GEOMETRY.block_bytes) as (
        prefill,
        decode,
    ):
        transfer_ids = [f"r{index}#1" for index in range(4)]
        for index, transfer_id in enumerate(transfer_ids):
            decode.reserve(prefill, transfer_id, [30 + index], 0, 9)
            compute(prefill, transfer_id, [index], 9)
        for index, transfer_id in enumerate(transfer_ids):
            if decode.result(transfer_id).complete:
                assert same_blocks(prefill.caches, [index], decode.caches, [30 + index]), (
                    transfer_id
                )
        assert [header.transfer_id for header in lost] == transfer_ids[:1]
        assert not decode.results[transfer_ids[0]].complete
