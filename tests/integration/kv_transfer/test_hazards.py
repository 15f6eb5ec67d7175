"""What broke for others who stream KV, tried on real ends: a test for each, named after it.

References are to public issue trackers: V vllm-project/vllm, S sgl-project/sglang, D ai-dynamo/
dynamo, A vllm-project/aibrix, N NVIDIA/nccl. What is tried elsewhere already:

    prefix blocks in suffix slots (V#48633)    test_stream: exactly_the_lacking_blocks_arrive,
                                               a_message_that_was_not_reserved; test_shapes
    decode aborted, or its client gone         test_stream: cancelled_by_d_before_during_and_after;
    (V#46283, V#50425, D#7489)                 after a storm of it, blocks, threads: test_soak
    a decode rank never reserves (V#41269)     test_shapes: does_not_hold_prefill_for_ever
    abandoned prefills compute on (D#13691)    test_connector_scheduler: an_abort_after_a_step
    a killed prefill, others go on (S#12779)   test_stream: death_of_prefill_fails_its_transfers
    no notice of what fails before it began    test_stream: a_reservation_for_an_aborted_prefill,
    (S#36033)                                  preemption_fails_the_transfer
    failed transfers are recomputed            test_connector_scheduler: recomputed_from_the_start
    drained: all KV was acknowledged           test_connector_scheduler: sent_blocks_stay_until_a_
    (D#13559)                                  rank_releases_them
    engine asleep (V#41180)                    test_connector_scheduler, while nothing is aborted
    a pickled frame (CVE-2025-47277)           test_stream: no_pickle_on_the_wire
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import zmq

from kv_transfer import side_stream, wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import Rectangle, split_into_messages
from kv_transfer.kv_caches import PageView
from kv_transfer.pair import Pair, PendingWork
from kv_transfer.receive import client as receive
from kv_transfer.receive.client import DecodeClient, Reservation, TransferResult
from kv_transfer.send import server as send
from kv_transfer.send.server import PrefillServer, StepChunk
from kv_transfer.session import SendSession
from tests.support import tcp_faults
from tests.support.kv_faults import (
    CHILD_TOKENS,
    PATIENT_S,
    Clock,
    DecodeEnd,
    Gate,
    HangingAborts,
    PrefillEnd,
    SilentPrefill,
    Stranger,
    child,
    kv_threads,
    line_of,
    running,
    wait_stopped,
)
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    BLOCKS,
    GEOMETRY,
    LAYERS,
    OPTIONS,
    Decode,
    Prefill,
    blocks_of,
    same_blocks,
    stream,
)
from tests.support.vllm_scheduler import SchedulerBench, result_of
from tests.support.waiting import wait_until

LONG = 20 * BLOCK_TOKENS  # dozens of messages, of which few fit into the staging buffers
SOURCE, TARGET = list(range(20)), list(range(30, 50))
# Beyond the patience of any wait here: what ends within it was not ended by a timeout.
NEVER_S = 600.0
ends = partial(stream, pair_timeout_s=PATIENT_S)


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    before = kv_threads()
    yield
    wait_until(lambda: not kv_threads() - before, what="all threads of the stream have ended")


def compute(prefill: Prefill, key: str, blocks: list[int], tokens: int) -> None:
    """All of a prompt, and the first token."""
    prefill.compute(key, blocks, tokens)
    prefill.server.finish(key, 42, computed=True)


def step(prefill: Prefill, key: str, start: int, end: int, tokens: int = LONG) -> None:
    """One chunk of a prompt, in the blocks of ``SOURCE``."""
    blocks = tuple(SOURCE[: blocks_of(end)])
    prefill.server.begin_step([StepChunk(key, f"engine-{key}", blocks, start, end, tokens)])
    prefill.server.end_step()


def delivers(prefill: Prefill, decode: Decode, key: str) -> bool:
    """Whether a whole transfer works, and none of the engine's calls waits for anybody's peer."""
    decode.reserve(prefill, key, [60, 61], 0, 20)
    engine = threading.Thread(target=compute, args=(prefill, key, [62, 63], 20), daemon=True)
    engine.start()
    wait_until(lambda: not engine.is_alive(), what="the engine's calls have returned")
    return decode.result(key).complete and same_blocks(
        prefill.caches, [62, 63], decode.caches, [60, 61]
    )


def fill(caches: list[torch.Tensor], blocks: list[int], value: float) -> None:
    """The engine gives blocks to another request."""
    for cache in caches:
        cache[blocks] = value


def filled(caches: list[torch.Tensor], blocks: list[int], value: float) -> bool:
    return all(bool((cache[blocks] == value).all()) for cache in caches)


def only_peer(decode: Decode) -> receive._Peer:
    (peer,) = decode.client._peers.values()
    return peer


# silent corruption


def test_late_write_of_an_aborted_request_lands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """S#35049: it is aborted while a message is being written and others are on their way."""
    with ends() as (prefill, decode), Gate(monkeypatch, PageView, "scatter") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        decode.cancel(prefill, "a#1")
        assert not decode.client.take_results(), "its blocks are being written"
        gate.open()
        assert not decode.result("a#1").complete
        fill(decode.caches, TARGET, 7)
        assert delivers(prefill, decode, "b#1")  # after all that was on its way
        assert filled(decode.caches, TARGET, 7)
        prefill.wait_released("a#1")


@pytest.mark.parametrize("how", ["released", "preempted"])
def test_late_read_of_an_aborted_request_keeps_its_blocks(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """S#35049, the other end: blocks that a sender reads just now go to nobody else."""
    with ends() as (prefill, decode), Gate(monkeypatch, PageView, "gather") as gate:
        server = prefill.server
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        if how == "released":
            with server._lock:
                server._drop("a#1", "released by the router", None)
            assert not server.take_released()
        else:
            engine = threading.Thread(target=server.preempt, args=(["a#1"],))
            engine.start()
            wait_until(
                lambda: not engine.is_alive() or server._gathered._waiters,  # type: ignore[attr-defined]
                what="the engine waits, or does not",
            )
            assert engine.is_alive(), "the engine would compute into blocks that are being read"
        gate.open()
        if how == "preempted":
            engine.join(10)
        prefill.wait_released("a#1")
        assert not decode.result("a#1").complete


def test_first_failed_part_waits_for_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#56104: of two prefill ranks one dies while the other's part is being written."""
    ranks = [PrefillEnd(tp_rank=rank, tp_size=2) for rank in (0, 1)]
    decode, successor = DecodeEnd(), PrefillEnd(tp_rank=0, tp_size=2)

    def reserve(key: str, blocks: list[int], tokens: int, *from_ranks: Prefill) -> None:
        addresses = tuple(prefill.server.address for prefill in from_ranks)
        decode.client.reserve(Reservation(key, key, addresses, "p1", tuple(blocks), 0, tokens))

    def from_the_other(view: PageView, *_: Any) -> bool:
        peer = decode.client._peers.get((ranks[1].server.address, "p1"))
        return peer is not None and view is peer._view

    with (
        running(decode, *ranks, successor),
        Gate(monkeypatch, PageView, "scatter", from_the_other) as gate,
    ):
        reserve("a#1", TARGET, LONG, *ranks)
        transfer = decode.client.transfers["a#1"]
        ranks[0].compute("a#1", SOURCE, LONG)  # and never finished
        compute(ranks[1], "a#1", SOURCE, LONG)
        gate.wait_entered()
        ranks[0].server.stop()
        wait_until(lambda: transfer.ended, what="it is known that the first part is lost")
        assert not decode.client.take_results(), "its sibling is being written"
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
    """aws-do-eks#84: D stalls in mid-stream until P has given its blocks to another request."""
    clock = Clock()
    prefill, decode = PrefillEnd(clock=clock), DecodeEnd(peer_lease_s=NEVER_S)
    with running(decode, prefill), Gate(monkeypatch, PageView, "scatter") as gate:
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


def test_lease_of_unreserved_kv_ends_for_a_reservation_on_its_way() -> None:
    """aws-do-eks#84: the blocks are free, and D asks for them a moment too late."""
    clock = Clock()
    prefill, decode = PrefillEnd(clock=clock), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        compute(prefill, "a#1", SOURCE, LONG)
        clock.ahead_s = OPTIONS.reserve_timeout_s + 1
        with prefill.server._lock:  # or the pair would be silent, too
            for peer in prefill.server._peers.values():
                peer.last_heard_s = clock()
        prefill.wait_released("a#1")
        fill(prefill.caches, SOURCE, 7)
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        assert not decode.result("a#1").complete
        assert delivers(prefill, decode, "b#1"), "over the same pair"


def test_receive_and_use_on_different_streams_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#20263: only CUDA could garble KV here; on CPUs the order of the calls is checked.

    P: the engine marks a layer ▸ the sender's stream goes behind the mark ▸ gather ▸ its own mark
    is done ▸ send. D: received ▸ scatter ▸ its mark is done ▸ the engine is told.
    """
    log: dict[str, list[tuple[str, object]]] = {}  # by thread: what was called, with which mark

    def note(owner: Any, name: str, call: Callable[..., Any] | None = None) -> None:
        call = call or getattr(owner, name)

        def noted(*args: Any) -> Any:
            result = call(*args)
            about = result if name == "mark" else args[0]
            log.setdefault(threading.current_thread().name, []).append((name, about))
            return result

        monkeypatch.setattr(owner, name, noted)

    for module in (send, receive):
        note(module, "mark", lambda device: object())
        note(module, "wait_done", lambda *_: None)
    note(send, "after", lambda *_: None)
    for owner, name in [
        (PageView, "gather"),
        (PageView, "scatter"),
        (Pair, "send"),
        (PendingWork, "wait"),
        (DecodeClient, "settle"),
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
        assert [name for name, _ in turn] == ["after", "gather", "mark", "wait_done", "send"]
        (_, behind), _, (_, own), (_, done), _ = turn
        assert behind in by_engine
        assert done is own
    received = log["kv-receive"][:-1]
    assert log["kv-receive"][-1][0] == "settle", "with the manifest"
    for turn in zip(*[iter(received)] * 5, strict=True):
        assert [name for name, _ in turn] == ["wait", "scatter", "mark", "wait_done", "settle"]
        _, _, (_, own), (_, done), _ = turn
        assert done is own


class FakeCuda:
    """Streams and events that only keep a log."""

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

    def wait(self) -> None:  # as NCCL's work
        self.log.append(f"{self.stream} behind the transfer")

    @contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before


def test_receive_and_use_on_different_streams_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#20263, on a double: whoever waits for a mark is queued behind it or asks for it in time."""
    device, cuda = torch.device("cuda", 0), FakeCuda(monkeypatch)
    computed = side_stream.mark(device)
    with side_stream.side_stream(device):
        side_stream.after(computed, device)
        work = PendingWork(cuda, device)
    assert cuda.log == [
        "engine marked",
        "side behind it",
        "side behind the transfer",  # before the mark, or it would not cover the transfer
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
    """One warned, stored None, and went on."""
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
    """However long the prompt: what was read on P and not yet written on D fits into the buffers.
    Nothing of it is released to P's engine before all of it has left."""
    under_way, most = Counter[str](), 0

    def count(name: str, change: int) -> None:
        original = getattr(PageView, name)

        def counted(*args: Any) -> None:
            nonlocal most
            original(*args)
            under_way["messages"] += change
            most = max(most, under_way["messages"])

        monkeypatch.setattr(PageView, name, counted)

    count("gather", 1)
    count("scatter", -1)
    with ends() as (prefill, decode), Gate(monkeypatch, PageView, "scatter") as gate:
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
def test_missing_part_is_a_failed_transfer(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """P skips a message, and its manifest agrees with what it sent."""
    original, taken = SendSession.next_message, list[Rectangle]()
    messages = list(split_into_messages(Rectangle(0, LAYERS, 0, 20), 3))

    def lossy(session: SendSession, rank: int) -> Rectangle | None:
        area = original(session, rank)
        if area == messages[lost] and session.key == "a#1":
            taken.append(area)
            session._parts[rank].in_flight -= 1
            area = original(session, rank)
        return area

    monkeypatch.setattr(SendSession, "next_message", lossy)
    with ends() as (prefill, decode):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        prefill.compute("a#1", SOURCE, LONG, chunk=LONG)
        prefill.server.finish("a#1", 42, computed=True)
        assert not decode.result("a#1").complete
        assert taken == [messages[lost]]
        prefill.wait_released("a#1")
        assert delivers(prefill, decode, "b#1")


def test_missing_header_shifts_nothing_into_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes of a lost announcement would be taken for those of the next one, of equal size."""
    original, lost = PrefillServer._post, list[wire.Header]()

    def lossy(server: PrefillServer, peer: Any, message: wire.ToDecode) -> None:
        if isinstance(message, wire.Header) and not lost:
            lost.append(message)
        else:
            original(server, peer, message)

    monkeypatch.setattr(PrefillServer, "_post", lossy)
    with ends(transfer_timeout_s=2, message_bytes=LAYERS * GEOMETRY.block_bytes) as (
        prefill,
        decode,
    ):
        keys = [f"r{index}#1" for index in range(4)]
        for index, key in enumerate(keys):
            decode.reserve(prefill, key, [30 + index], 0, 9)
            compute(prefill, key, [index], 9)
        for index, key in enumerate(keys):
            if decode.result(key).complete:
                assert same_blocks(prefill.caches, [index], decode.caches, [30 + index]), key
        assert [header.key for header in lost] == keys[:1]
        assert not decode.results[keys[0]].complete


# leaks


def test_decode_that_has_no_room_for_a_transfer_says_so() -> None:
    """V#41269: rejected before it began; P would hold its KV for all of reserve_timeout_s."""
    prefill, decode = PrefillEnd(), DecodeEnd(max_pending=1)
    with running(decode, prefill):
        decode.reserve(prefill, "a#1", [30], 0, 9)
        decode.reserve(prefill, "b#1", [31], 0, 9)
        assert not decode.result("b#1").complete
        compute(prefill, "b#1", [1], 9)
        prefill.wait_released("b#1")
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete


def test_cancel_on_a_pair_that_is_being_closed_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#46283: the last words before a pair is retired must leave, goodbye included; else P keeps
    the KV and the pair until a lease ends them."""
    original, armed = receive._Peer._flush, threading.Event()

    def then_retired(peer: receive._Peer, control: zmq.Socket[bytes]) -> None:
        original(peer, control)
        if armed.is_set():  # the engine is quicker than the peer's thread
            armed.clear()
            decode.cancel(prefill, "a#1")
            with decode.client.lock:
                decode.client.retire(peer)

    monkeypatch.setattr(receive._Peer, "_flush", then_retired)
    prefill, decode = PrefillEnd(peer_lease_s=NEVER_S), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        compute(prefill, "a#1", SOURCE, LONG)
        armed.set()
        wait_until(lambda: not prefill.server._peers, what="prefill has heard the goodbye")
        prefill.wait_released("a#1")


def test_goodbye_on_a_pair_that_is_being_closed_is_heard() -> None:
    """V#46283: the peer's thread looks for what to say just before the goodbye is there."""

    class LookedInto(deque[wire.ToPrefill]):
        def append(self, message: wire.ToPrefill) -> None:
            if isinstance(message, wire.Bye):
                super().append(wire.Ping())
                peer._wake_write.send(b"\0")
                wait_until(lambda: not self, what="its thread has said what there was")
            super().append(message)

    prefill, decode = PrefillEnd(peer_lease_s=NEVER_S), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        peer = only_peer(decode)
        peer._outgoing = LookedInto(peer._outgoing)
        peer.leave()
        wait_until(lambda: not prefill.server._peers, what="prefill has heard the goodbye")


def test_cancel_holds_up_nobody_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """D#14507, D#13691: of a cancelled prompt no further message is read or sent, and the next
    request on the pair does not wait for its rest."""
    read: list[int] = []  # first blocks of the requests
    original = PageView.gather

    def noted(view: PageView, area: Rectangle, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        read.append(int(block_ids[0]))
        original(view, area, block_ids, out)

    monkeypatch.setattr(PageView, "gather", noted)
    with ends() as (prefill, decode), Gate(monkeypatch, PageView, "gather") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        decode.reserve(prefill, "b#1", [60], 0, 9)
        step(prefill, "a#1", 0, LONG - BLOCK_TOKENS)
        gate.wait_entered()
        with prefill.server._lock:
            prefill.server._drop("a#1", "released by the router", None)
        step(prefill, "a#1", LONG - BLOCK_TOKENS, LONG)  # planned already
        compute(prefill, "b#1", [63], 9)
        gate.open()
        assert decode.result("b#1").complete
        prefill.server.finish("a#1", None, computed=False)
        prefill.wait_released("a#1")
        assert read == [SOURCE[0], 63, 63], "one message was being read"


def test_transferred_in_kv_is_admitted_like_any_other() -> None:
    """S#30033: D reserves only what it has blocks for, and what it will generate waits its turn."""
    bench = SchedulerBench("kv_consumer", blocks=11)  # ten and the null block
    try:
        for name in "abc":
            bench.add(name, [ord(name)] * 60, "receive", max_tokens=4)
        first = bench.step()
        assert [r.key for r in first.plan.reservations] == ["a#1", "b#1"]
        assert bench.blocks_used == 8
        assert not bench.step().plan.reservations, "c would not fit"
        bench.abort("a")
        assert not bench.step().plan.reservations, "a's blocks may still be written"
        (a, _) = (
            TransferResult(r.key, r.request_id, False, None, "gloo", 0, 0, 60, 0.0)
            for r in first.plan.reservations
        )
        bench.step(received=[a])
        assert [r.key for r in bench.step().plan.reservations] == ["c#1"]
    finally:
        bench.close()


# death, restart, drain


@pytest.mark.parametrize("pool", ["kv_producer", "kv_consumer"])
def test_engine_steps_while_an_aborted_transfer_is_open(pool: str) -> None:
    """V#41180: nobody is left to serve, and the blocks come back only if the ranks are asked."""
    bench = SchedulerBench(pool, step_tokens=64)
    try:
        bench.add("r", list(range(100)), "send" if pool == "kv_producer" else "receive")
        first = bench.step()
        bench.abort("r")
        for _ in range(3):
            assert bench.scheduler.has_requests()
            assert bench.blocks_used
            bench.step()
        if pool == "kv_producer":
            bench.step(sent={"r"})
        else:
            bench.step(received=[result_of(first, complete=False)])
        assert bench.blocks_used == 0
        assert not bench.scheduler.has_requests()
    finally:
        bench.close()


def test_decode_outlives_a_prefill_that_is_killed_and_restarted_in_mid_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """V#49238, S#16903: the new process answers at the old one's address."""
    blocks = list(range(blocks_of(CHILD_TOKENS)))
    decode = DecodeEnd(peer_lease_s=NEVER_S, transfer_timeout_s=NEVER_S)
    with running(decode), child("prefill") as victim:
        address = line_of(victim)
        decode.reserve(address, "child#1", blocks, 0, CHILD_TOKENS)
        wait_stopped(victim)
        decode.reserve(address, "queued#1", [60], 0, 9)
        victim.send_signal(signal.SIGKILL)
        for key in ("child#1", "queued#1"):
            assert not decode.result(key).complete

        def same_port(router: zmq.Socket[bytes], host: str) -> int:
            port = address.rpartition(":")[2]
            router.bind(f"{host}:{port}")
            return int(port)

        with monkeypatch.context() as patch:
            patch.setattr(zmq.Socket, "bind_to_random_port", same_port)
            reborn = PrefillEnd(incarnation="p2")
        with running(reborn):
            assert reborn.server.address == address
            decode.reserve(address, "late#1", [60], 0, 9, incarnation="p1")
            assert not decode.result("late#1").complete
            decode.reserve(address, "new#1", [60], 0, 9, incarnation="p2")
            compute(reborn, "new#1", [63], 9)
            assert decode.result("new#1").complete
            assert same_blocks(reborn.caches, [63], decode.caches, [60])


def test_death_of_prefill_is_not_my_ill_health() -> None:
    """S#12779: P neither answers nor dies. Others are served, and what it owes fails in time."""
    blocks = list(range(blocks_of(CHILD_TOKENS)))
    healthy, stuck = PrefillEnd(), list[str]()
    decode = DecodeEnd(peer_lease_s=1.5, transfer_timeout_s=1.5, on_stuck=stuck.append)
    with running(decode, healthy), child("prefill") as victim:
        decode.reserve(line_of(victim), "child#1", blocks, 0, CHILD_TOKENS)
        wait_stopped(victim)
        assert delivers(healthy, decode, "a#1")
        assert not decode.result("child#1").complete
        assert delivers(healthy, decode, "b#1")
        assert not stuck


def break_gather(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(PageView, "gather", broken)


def break_pair(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise PairError("broken")

    monkeypatch.setattr(Pair, "send", broken)


def give_up_pair(prefill: Prefill, *_: pytest.MonkeyPatch) -> None:
    with prefill.server._lock:
        (peer,) = prefill.server._peers.values()
        prefill.server._close_peer(peer, "as if it had gone silent")


def stop(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill.server.stop()


@pytest.mark.parametrize("give_up", [break_gather, break_pair, give_up_pair, stop])
def test_notice_is_given_of_every_failure_in_mid_stream(
    monkeypatch: pytest.MonkeyPatch,
    give_up: Callable[[Prefill, pytest.MonkeyPatch], None],
) -> None:
    """S#36033, A#2289, V#55870: D hears of it at once, and no timeout has to tell it."""
    with ends(peer_lease_s=60, transfer_timeout_s=60) as (prefill, decode):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        step(prefill, "a#1", 0, LONG - BLOCK_TOKENS)
        (part,) = decode.client.transfers["a#1"].parts.values()
        wait_until(lambda: part.session.messages, what="KV flows")
        give_up(prefill, monkeypatch)
        step(prefill, "a#1", LONG - BLOCK_TOKENS, LONG)
        prefill.server.finish("a#1", 42, computed=True)
        assert not decode.result("a#1").complete
        assert decode.results["a#1"].retries == 0, "it had begun"
        prefill.wait_released("a#1")


def test_scaling_prefill_down_leaves_decode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """D#7933, D#13559: a P that D streams from leaves, and one that it never talked to is gone."""
    staying, leaving, left = PrefillEnd(), PrefillEnd(), PrefillEnd()
    left.server.stop()
    decode = DecodeEnd(pair_timeout_s=1)
    with running(decode, staying, leaving), Gate(monkeypatch, PageView, "scatter") as gate:
        decode.reserve(leaving, "a#1", TARGET, 0, LONG)
        compute(leaving, "a#1", SOURCE, LONG)
        gate.wait_entered()
        leaving.server.stop()
        gate.open()
        assert not decode.result("a#1").complete
        for gone in (leaving, left):
            decode.reserve(gone, "b#1", [50], 0, 9)
            assert not decode.result("b#1").complete
            del decode.results["b#1"]
        assert delivers(staying, decode, "c#1")


# NCCL and process groups


def test_request_ids_of_the_two_engines_may_differ() -> None:
    """V#42839: or be those of other requests; the key alone decides."""
    with ends() as (prefill, decode):
        requests = {"a#1": ("1", "2", 1, 30), "b#1": ("2", "1", 2, 31)}
        for key, (_, its_id, _, block) in requests.items():
            decode.client.reserve(
                Reservation(key, its_id, (prefill.server.address,), "p1", (block,), 0, 9)
            )
        for key, (its_id, _, block, _) in requests.items():
            prefill.server.begin_step([StepChunk(key, its_id, (block,), 0, 9, 9)])
            prefill.server.end_step()
        prefill.server.finish("b#1", 42, computed=True)
        assert decode.result("b#1").request_id == "1"
        assert wait_until(prefill.server.take_released, what="b's blocks are released") == {"2"}
        prefill.server.finish("a#1", 42, computed=True)
        assert decode.result("a#1").request_id == "2"
        for _, _, source, target in requests.values():
            assert same_blocks(prefill.caches, [source], decode.caches, [target])


def test_one_bad_peer_that_never_makes_its_group_stalls_no_other_decode() -> None:
    """P2pNccl: it says HELLO and reserves, and that is all."""
    prefill, decode = PrefillEnd(), DecodeEnd()
    with running(decode, prefill), Stranger(prefill.server.address) as bad:
        bad.hello()
        assert isinstance(bad.hear(), wire.Welcome)
        bad.say(wire.Reserve("bad#1", 0, LONG))
        wait_until(lambda: prefill.server._waiting, what="it has reserved")
        compute(prefill, "bad#1", SOURCE, LONG)
        assert delivers(prefill, decode, "a#1")
        bad.say(wire.Bye())
        prefill.wait_released("bad#1")


def test_one_bad_peer_that_never_makes_its_group_stalls_no_other_prefill() -> None:
    """P2pNccl: it says WELCOME, and that is all. D's other pairs are made meanwhile."""
    prefill, decode = PrefillEnd(), DecodeEnd()
    with running(decode, prefill), SilentPrefill() as bad:
        decode.reserve(bad.address, "bad#1", TARGET, 0, LONG)
        bad.welcome()
        assert delivers(prefill, decode, "a#1")
        decode.client.cancel("bad#1", (bad.address,), "p1")
        assert not decode.result("bad#1").complete


def test_one_bad_peer_that_stops_reading_stalls_nobody() -> None:
    """P2pNccl: a decode process stops in mid-stream. Others are served, and it may go on."""
    prefill = PrefillEnd(peer_lease_s=NEVER_S, transfer_timeout_s=NEVER_S)
    decode, blocks = DecodeEnd(), list(range(blocks_of(CHILD_TOKENS)))
    with running(decode, prefill), child("decode", prefill.server.address) as bad:
        compute(prefill, "child#1", blocks, CHILD_TOKENS)
        wait_stopped(bad)
        assert delivers(prefill, decode, "a#1")
        assert not prefill.server.take_released() - {"engine-a#1"}
        bad.send_signal(signal.SIGCONT)
        assert line_of(bad) == "True"
        prefill.wait_released("child#1")


def test_one_bad_peer_that_stops_reading_costs_its_lease_only() -> None:
    """P2pNccl, aws-do-eks#84: the sender that waits for it ends, too; and when it wakes up it does
    not take what it finds for its KV."""
    clock = Clock()
    prefill, decode = PrefillEnd(transfer_timeout_s=NEVER_S, clock=clock), DecodeEnd()
    blocks = list(range(blocks_of(CHILD_TOKENS)))
    with running(decode, prefill), child("decode", prefill.server.address) as bad:
        compute(prefill, "child#1", blocks, CHILD_TOKENS)
        wait_stopped(bad)
        clock.ahead_s = 100
        prefill.wait_released("child#1")
        fill(prefill.caches, blocks, 7)
        wait_until(lambda: not kv_threads("kv-send"), what="the sender has ended")
        assert delivers(prefill, decode, "a#1")
        bad.send_signal(signal.SIGCONT)
        assert line_of(bad) == "False"


def test_one_bad_peer_that_talks_without_end_stalls_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P2pNccl's one listener: somebody has always sent one more frame, and others get answers."""
    caplog.set_level("ERROR", "kv_transfer.send.server")
    original = zmq.Socket.recv_multipart

    def one_more(control: zmq.Socket[bytes], *args: Any) -> list[bytes]:
        try:
            return original(control, *args)
        except zmq.Again:
            return [b"somebody", b"nonsense"]

    with ends() as (prefill, decode), monkeypatch.context() as patch:
        patch.setattr(zmq.Socket, "recv_multipart", one_more)
        assert delivers(prefill, decode, "a#1")


def test_mismatched_order_on_both_sides_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """N#479, N#1279, N#522: D reserves in one order, P computes in another, in chunks by turns.
    A send or receive is posted only when both sides know of it, so none waits on a device."""
    announced, posted = Counter[str](), Counter[str]()

    def count(owner: Any, name: str, when: Callable[..., bool], into: Counter[str], what: str
              ) -> None:  # fmt: skip
        original = getattr(owner, name)

        def counted(*args: Any) -> Any:
            into[what] += when(*args)
            assert posted["receives"] <= announced["P"]
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    def is_header(server: PrefillServer, peer: Any, message: object) -> bool:
        return isinstance(message, wire.Header)

    count(PrefillServer, "_post", is_header, announced, "P")
    count(Pair, "receive", lambda *_: True, posted, "receives")
    count(Pair, "send", lambda *_: True, posted, "sends")
    rng = random.Random(7)
    keys = {f"r{index}#1": rng.randrange(1, 3 * BLOCK_TOKENS) for index in range(16)}
    with ends() as (prefill, decode):
        source, target = rng.sample(range(BLOCKS), BLOCKS), rng.sample(range(BLOCKS), BLOCKS)
        blocks = {key: (source[3 * i : 3 * i + 3], target[3 * i : 3 * i + 3])
                  for i, key in enumerate(keys)}  # fmt: skip
        for key in rng.sample(sorted(keys), len(keys) // 2):
            decode.reserve(prefill, key, blocks[key][1], 0, keys[key])
        for start in range(0, 3 * BLOCK_TOKENS, 10):
            turn = [key for key, tokens in keys.items() if start < tokens]
            for key in rng.sample(turn, len(turn)):
                end = min(start + 10, keys[key])
                chunk = StepChunk(key, key, tuple(blocks[key][0]), start, end, keys[key])
                prefill.server.begin_step([chunk])
                prefill.server.end_step()
        for key in rng.sample(sorted(keys), len(keys)):
            if key not in decode.client.transfers and key not in decode.results:
                decode.reserve(prefill, key, blocks[key][1], 0, keys[key])
            prefill.server.finish(key, 42, computed=True)
        for key, tokens in keys.items():
            assert decode.result(key).complete, key
            of_p, of_d = (ids[: blocks_of(tokens)] for ids in blocks[key])
            assert same_blocks(prefill.caches, of_p, decode.caches, of_d)
        assert posted["sends"] == posted["receives"] == announced["P"]


def test_abort_that_hangs_asks_for_a_new_process_and_harms_no_other_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N#863, N#1013: on both sides, in mid-stream."""
    stuck: dict[str, list[str]] = {"P": [], "D": []}
    prefill = PrefillEnd(pair_timeout_s=2, on_stuck=stuck["P"].append)
    decode = DecodeEnd(pair_timeout_s=2, transfer_timeout_s=2, on_stuck=stuck["D"].append)
    other = DecodeEnd(incarnation="d2")
    with (
        running(decode, other, prefill),
        HangingAborts(monkeypatch) as fault,
        Gate(monkeypatch, PageView, "scatter") as gate,
    ):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        fault.on = False
        give_up_pair(prefill)
        gate.open()
        prefill.wait_released("a#1")
        assert not decode.result("a#1").complete
        assert delivers(prefill, other, "b#1")
        for side, reasons in stuck.items():
            wait_until(lambda reasons=reasons: reasons, what=f"{side} is told")  # type: ignore[misc]
            assert "could not be aborted within 2 s" in reasons[0]
        assert delivers(prefill, decode, "c#1"), "over a new pair"
    assert [len(reasons) for reasons in stuck.values()] == [1, 1]


def test_aborting_several_at_once_ends_them_all() -> None:
    """N#564: three pairs with a message under way each."""
    prefills = [PrefillEnd(peer_lease_s=NEVER_S) for _ in range(3)]
    decode = DecodeEnd(transfer_timeout_s=NEVER_S)
    with running(decode, *prefills), ExitStack() as patches:
        gate = Gate(patches.enter_context(pytest.MonkeyPatch.context()), Pair, "send")
        patches.enter_context(gate)
        for index, prefill in enumerate(prefills):
            key = f"r{index}#1"
            decode.reserve(prefill, key, [30 + index], 0, 9)
            compute(prefill, key, [index], 9)
        gate.wait_entered()
        peers = list(decode.client._peers.values())
        wait_until(
            lambda: all(len(peer._staging) < OPTIONS.staging_buffers for peer in peers),
            what="D waits for three messages",
        )
        decode.client.stop()
        wait_until(lambda: not kv_threads("kv-receive"), what="no receiver waits any more")


class FakeNccl:
    """Keeps what a group was made with."""

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace()
            self._timeout = timedelta()

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.size, self.options = size, options

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.device = device


def test_communicators_leave_the_device_to_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """N#522, N#1431, V#18242: few channels (memory, SMs), connected before the first message, a
    timeout, and no watchdog of NCCL's own that ends the process. On a double."""
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    device = torch.device("cuda", 0)
    group = Pair(torch.distributed.HashStore(), "pair", 0, device, "127.0.0.1", 5)._group
    assert isinstance(group, FakeNccl)
    assert (group.size, group.device) == (2, device)
    assert group.options.config.max_ctas <= 4
    assert group.options._timeout == timedelta(seconds=5)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


def files() -> int:
    return int(psutil.Process().num_fds())


def test_groups_are_bounded_on_prefill() -> None:
    """V#18242: more decode workers than P has room for, one after the other, again and again. The
    groups, threads and files of those that had to leave are gone."""
    prefill = PrefillEnd(max_pairs=2, peer_lease_s=NEVER_S)
    decodes = [DecodeEnd(incarnation=f"d{index}") for index in range(4)]
    with running(*decodes, prefill):
        for turn in range(3):
            for index, decode in enumerate(decodes):
                assert delivers(prefill, decode, f"{turn}-{index}#1")
                assert len(prefill.server._peers) <= 2
            wait_until(lambda: len(kv_threads("kv-send")) == 2, what="the others' senders ended")
            wait_until(lambda: len(kv_threads("kv-receive")) == 2, what="and their receivers")
            if turn == 0:
                at_first = files()
        wait_until(lambda: files() <= at_first, what="no file is left open")


def test_groups_are_bounded_on_decode() -> None:
    """V#18242: the same with more prefill workers; each that is left hears the goodbye."""
    decode = DecodeEnd(max_pairs=2)
    prefills = [PrefillEnd(peer_lease_s=NEVER_S) for _ in range(4)]
    with running(decode, *prefills):
        for turn in range(3):
            for index, prefill in enumerate(prefills):
                assert delivers(prefill, decode, f"{turn}-{index}#1")
                assert len(decode.client._peers) <= 2
            wait_until(lambda: len(kv_threads("kv-receive")) == 2, what="other receivers ended")
            wait_until(lambda: len(kv_threads("kv-send")) == 2, what="and their senders")
            assert not prefills[0].server._peers
            if turn == 0:
                at_first = files()
        wait_until(lambda: files() <= at_first, what="no file is left open")


def test_a_connection_that_nobody_closes_is_given_up() -> None:
    """The other host is gone, and nothing comes that says so."""
    prefill, decode = PrefillEnd(peer_lease_s=1), DecodeEnd(peer_lease_s=1)
    with running(decode, prefill):
        assert delivers(prefill, decode, "a#1")
        at_first = files()
        port = int(prefill.server.address.rpartition(":")[2])
        with tcp_faults.silence(control := tcp_faults.ends(os.getpid(), port=port)):
            assert len(control) == 2
            wait_until(lambda: not tcp_faults.ends(os.getpid(), port=port), what="both are closed")
        assert delivers(prefill, decode, "b#1")
        wait_until(lambda: files() <= at_first, what="no file is left open")


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_groups_are_bounded_where_all_are_busy(side: str, caplog: pytest.LogCaptureFixture) -> None:
    """V#18242: who finds no room is refused at once, with a sentence, and disturbs nobody."""
    prefill, decode = PrefillEnd(max_pairs=1), DecodeEnd(max_pairs=1)
    late = (
        (prefill, DecodeEnd(incarnation="d2"))
        if side == "prefill"
        else (PrefillEnd(peer_lease_s=NEVER_S), decode)
    )
    with running(decode, late[1], prefill, late[0]):
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server._waiting, what="the only pair is busy")
        late[1].reserve(late[0], "b#1", [31], 0, 9)
        assert not late[1].result("b#1").complete
        assert "busy" in caplog.text
        assert "kv_transfer.max_pairs" in caplog.text
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete
        assert delivers(*late, "c#1"), "now there is room"


def test_groups_are_bounded_under_load() -> None:
    """V#18242: four decode workers at once, again and again, and P has room for two. They drive
    each other out; what is served is right, and all else fails in the end and frees its KV."""
    clock, engine, most = Clock(), threading.Lock(), list[int]()
    prefill = PrefillEnd(max_pairs=2, peer_lease_s=NEVER_S, clock=clock)
    decodes = [DecodeEnd(incarnation=f"d{index}") for index in range(4)]
    served = Counter[bool]()

    def load(index: int, decode: Decode) -> None:
        for turn in range(5):
            key, source = f"{index}-{turn}#1", [index * 16 + turn]
            decode.reserve(prefill, key, [turn], 0, 9)
            with engine:
                compute(prefill, key, source, 9)
                most.append(len(prefill.server._peers))
            complete = decode.result(key).complete
            with engine:
                served[complete] += 1
            assert not complete or same_blocks(prefill.caches, source, decode.caches, [turn])

    with running(*decodes, prefill), ThreadPoolExecutor() as pool:
        for done in [pool.submit(load, *each) for each in enumerate(decodes)]:
            done.result()
        assert served.total() == 20
        assert served[True] >= 5
        assert max(most) == 2
        clock.ahead_s = OPTIONS.reserve_timeout_s + 1
        wait_until(lambda: not prefill.server._transfers, what="no KV is held any more")
        assert len(prefill.server.take_released()) == 20


def test_groups_are_bounded_and_a_reservation_on_its_way_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """V#18242: P gives a pair's room to another while a reservation for it is on the wire."""
    original, lost = PrefillServer._on_reserve, list[str]()

    def too_late(server: PrefillServer, peer: Any, message: wire.Reserve) -> None:
        if message.key == "a#1" and not lost:
            lost.append(message.key)
            server._close_peer(peer, "another pair needed the room")
        else:
            original(server, peer, message)

    monkeypatch.setattr(PrefillServer, "_on_reserve", too_late)
    with ends() as (prefill, decode):
        assert delivers(prefill, decode, "first#1")
        for key in ("a#1", "b#1"):
            decode.reserve(prefill, key, [30 + len(lost)], 0, 9)
            compute(prefill, key, [0], 9)
        assert [decode.result(key).complete for key in ("a#1", "b#1")] == [True, True]
        assert decode.results["a#1"].retries == 1
        assert lost == ["a#1"]


def test_groups_are_retired_when_idle() -> None:
    """V#18242: after pair_idle_s both sides have room again, and the next request makes a pair."""
    clock = Clock()
    prefill = PrefillEnd(peer_lease_s=NEVER_S)
    decode = DecodeEnd(clock=clock, peer_lease_s=NEVER_S)
    with running(decode, prefill):
        assert delivers(prefill, decode, "a#1")
        clock.ahead_s = OPTIONS.pair_idle_s / 2
        assert delivers(prefill, decode, "b#1"), "it is in use"
        assert len(kv_threads("kv-receive")) == 1
        clock.ahead_s += OPTIONS.pair_idle_s / 2 + 1
        decode.reserve(prefill, "c#1", [30], 0, 9)
        wait_until(lambda: prefill.server._waiting, what="it is reserved over the same pair")
        clock.ahead_s += OPTIONS.pair_idle_s + 1
        compute(prefill, "c#1", [0], 9)
        assert decode.result("c#1").complete, "idle is who waits for nothing"
        clock.ahead_s += OPTIONS.pair_idle_s + 1
        wait_until(lambda: not prefill.server._peers, what="both have closed it")
        wait_until(lambda: not kv_threads("kv-receive"), what="its threads have ended")
        assert delivers(prefill, decode, "d#1")


def test_groups_are_bounded_although_a_pair_leaves_twice() -> None:
    """V#18242: for want of room and idle at the same time. Its successor must stay known, or
    nobody counts or stops it."""
    with ends() as (prefill, decode):
        assert delivers(prefill, decode, "a#1")
        old = only_peer(decode)
        with decode.client.lock:
            decode.client.retire(old)
        assert delivers(prefill, decode, "b#1")
        with decode.client.lock:
            decode.client.retire(old)
        assert only_peer(decode) is not old


def test_no_pickle_is_read_or_written_during_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-47277: neither by us nor, for us, by a process group or its store."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    with monkeypatch.context() as patch:
        for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
            patch.setattr(pickle, name, forbidden)
        with ends() as (prefill, decode):
            assert delivers(prefill, decode, "a#1")


def test_explicit_bind_address_is_the_only_one() -> None:
    """CVE-2025-47277: an address that nothing would choose by itself."""
    host = "127.0.0.2"
    before = listening()
    prefill, decode = PrefillEnd(host=host), DecodeEnd(host=host)
    with running(decode, prefill):
        assert delivers(prefill, decode, "a#1")
        own = listening() - before
        assert len(own) >= 3, "the control server, the store, gloo"
        assert {ip.removeprefix("::ffff:") for ip, _ in own} == {host}


def listening() -> set[tuple[str, int]]:
    return {
        tuple(each.laddr)
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_token_on_control_is_needed_for_every_word() -> None:
    """CVE-2025-47277: without a HELLO that has it, nothing said about a transfer is heard."""
    with ends() as (prefill, decode), Stranger(prefill.server.address) as stranger:
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server._waiting, what="it has reserved")
        stranger.hello(token="guess")
        for message in (
            wire.Reserve("a#1", 0, 9),
            wire.Cancel("a#1"),
            wire.Bye(),
            wire.Ping(),
        ):
            stranger.say(message)
            assert isinstance(stranger.hear(), wire.Refuse)
        stranger.say(wire.Release("guess", "a#1"))
        stranger.say(wire.Ping())
        assert isinstance(stranger.hear(), wire.Refuse), "all before it was handled"
        assert len(prefill.server._peers) == 1
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete
