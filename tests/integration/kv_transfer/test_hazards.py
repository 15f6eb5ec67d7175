"""What broke for others who stream KV, tried on real ends.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import zmq

from kv_transfer import pair as pair_module
from kv_transfer import receive, send, side_stream, wire
from kv_transfer.pages import PageView
from kv_transfer.pair import Pair, PendingWork
from kv_transfer.receive import DecodeClient, Reservation, TransferResult
from kv_transfer.release import Releaser
from kv_transfer.send import PrefillServer, StepChunk
from kv_transfer.session import SendSession, SendState
from tests.support.kv_faults import (
    CHILD_TOKENS,
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
    LAYERS,
    OPTIONS,
    Decode,
    Prefill,
    blocks_of,
    random_caches,
    same_blocks,
    stream,
)
from tests.support.vllm_scheduler import SchedulerBench, result_of
from tests.support.waiting import wait_until

LONG = 20 * BLOCK_TOKENS  # dozens of messages, of which few fit into the staging buffers
SOURCE, TARGET = list(range(20)), list(range(30, 50))
# Beyond the patience of any wait here: what ends within it was not ended by a timeout.
NEVER_S = 600.0


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    before = kv_threads()
    yield
    wait_until(lambda: not kv_threads() - before, what="all threads of the stream have ended")


def compute(prefill: Prefill, key: str, blocks: list[int], tokens: int) -> None:
    """All of a prompt, and the first token."""
    prefill.compute(key, blocks, tokens)
    prefill.server.finish(key, 42, computed=True)


def delivers(prefill: Prefill, decode: Decode, key: str) -> bool:
    """Whether a whole transfer works, into blocks that no other test uses meanwhile."""
    decode.reserve(prefill, key, [60, 61], 0, 20)
    compute(prefill, key, [62, 63], 20)
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
    with stream() as (prefill, decode), Gate(monkeypatch, PageView, "scatter") as gate:
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
    with stream() as (prefill, decode), Gate(monkeypatch, PageView, "gather") as gate:
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
    log: list[tuple[str, str, object]] = []  # what, in which thread, which mark

    def note(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def noted(*args: Any) -> Any:
            result = original(*args)
            log.append((what, threading.current_thread().name, args[0]))
            return result

        monkeypatch.setattr(module, name, noted)

    for module in (send, receive):

        def mark(device: torch.device) -> object:
            log.append(("mark", threading.current_thread().name, made := object()))
            return made

        monkeypatch.setattr(module, "mark", mark)
        monkeypatch.setattr(module, "wait_done", lambda *_: None)
        note(module, "wait_done", "done")
    monkeypatch.setattr(send, "after", lambda *_: None)
    note(send, "after", "after")
    note(PageView, "gather", "gather")
    note(PageView, "scatter", "scatter")
    note(Pair, "send", "send")
    note(PendingWork, "wait", "moved")
    note(DecodeClient, "settle", "settle")
    with stream() as (prefill, decode):
        assert delivers(prefill, decode, "r#1")
        log.clear()
        decode.reserve(prefill, "s#1", [60], 0, 9)
        compute(prefill, "s#1", [63], 9)
        assert decode.result("s#1").complete

    def of(thread: str) -> list[tuple[str, object]]:
        return [(what, which) for what, name, which in log if name == thread]

    marks = [which for what, which in of("MainThread") if what == "mark"]
    sent = [entry for entry in of("kv-send") if entry[0] != "moved"]
    while sent:
        (_, behind), _, (_, own), (_, done), _ = turn = sent[:5]
        assert [what for what, _ in turn] == ["after", "gather", "mark", "done", "send"]
        assert behind in marks, "the sender waits for the engine's own stream"
        assert done is own
        sent = sent[5:]
    received = [entry for entry in of("kv-receive") if entry[0] in {"scatter", "mark", "done"}]
    assert received
    while received:
        _, (_, own), (_, done) = turn3 = received[:3]
        assert [what for what, _ in turn3] == ["scatter", "mark", "done"]
        assert done is own
        received = received[3:]
    order = [what for what, _ in of("kv-receive")]
    assert order.index("moved") < order.index("scatter")
    assert order.index("done") < order.index("settle"), "told before it was written"
