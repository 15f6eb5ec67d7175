"""Hazards of leaks: blocks and pairs that one side keeps without need. See ``kv_hazards``."""

from __future__ import annotations

import threading

import pytest
import torch

from kv_transfer.geometry import LayerBlockRange
from kv_transfer.kv_caches import UnitView
from kv_transfer.receive.control import ControlConnection
from tests.support.kv_faults import (
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
    only_peer,
    step,
)
from tests.support.kv_stream import (
    BLOCK_TOKENS,
)
from tests.support.vllm_scheduler import SchedulerBench, result_for
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


def test_decode_without_room_for_a_transfer_cancels_it() -> None:
    """V#41269: without the CANCEL, P would hold the KV for the whole reserve_timeout_s."""
    prefill, decode = PrefillEnd(), DecodeEnd(max_pending=1)
    with running(decode, prefill):
        decode.reserve(prefill, "a#1", [30], 0, 9)
        decode.reserve(prefill, "b#1", [31], 0, 9)
        assert not decode.result("b#1").complete
        compute(prefill, "b#1", [1], 9)
        prefill.wait_released("b#1")
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete


def test_cancel_on_a_pair_that_is_being_closed_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """V#46283: the messages posted before a pair is closed must be sent, and then BYE.

    Without CANCEL and BYE, P would keep the KV and the pair until a timeout.
    """
    original, armed = ControlConnection.flush, threading.Event()

    def flush_then_close(connection: ControlConnection) -> None:
        original(connection)
        if armed.is_set():  # as if the engine's thread ran here, after the flush
            armed.clear()
            decode.cancel(prefill, "a#1")
            with decode.client.transfers.lock:
                decode.client.transfers.close_peer(connection._peer)

    monkeypatch.setattr(ControlConnection, "flush", flush_then_close)
    prefill, decode = PrefillEnd(peer_lease_s=NEVER_S), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        compute(prefill, "a#1", SOURCE, LONG)
        armed.set()
        wait_until(lambda: not prefill.server.transfers.peers, what="BYE has arrived")
        prefill.wait_released("a#1")


def test_bye_of_a_pair_that_is_being_closed_arrives() -> None:
    """V#46283: without BYE, P would keep the pair until its lease expires."""
    prefill, decode = PrefillEnd(peer_lease_s=NEVER_S), DecodeEnd()
    with running(decode, prefill):
        assert delivers(prefill, decode, "first#1")
        only_peer(decode).close()
        wait_until(lambda: not prefill.server.transfers.peers, what="BYE has arrived")


def test_cancel_does_not_delay_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """D#14507, D#13691: no further message of a cancelled prompt is read or sent.

    The next request on the pair does not wait for the rest of this prompt.
    """
    read: list[int] = []  # the first block of the request, for each message
    original = UnitView.gather

    def noted(
        view: UnitView, block_range: LayerBlockRange, block_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        read.append(int(block_ids[0]))
        original(view, block_range, block_ids, out)

    monkeypatch.setattr(UnitView, "gather", noted)
    with ends() as (prefill, decode), Gate(monkeypatch, UnitView, "gather") as gate:
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        decode.reserve(prefill, "b#1", [60], 0, 9)
        step(prefill, "a#1", 0, LONG - BLOCK_TOKENS)
        gate.wait_entered()
        with prefill.server.transfers.lock:
            prefill.server.transfers.cancel("a#1", "released by the router", None)
        step(prefill, "a#1", LONG - BLOCK_TOKENS, LONG)  # planned before the cancel
        compute(prefill, "b#1", [63], 9)
        gate.open()
        assert decode.result("b#1").complete
        prefill.server.request_finished("a#1", None, computed=False)
        prefill.wait_released("a#1")
        assert read == [SOURCE[0], 63, 63], "P has read another message of a#1"


def test_received_kv_is_admitted_like_any_other() -> None:
    """S#30033: D reserves only if enough blocks are free. A transfer holds blocks until it ends."""
    bench = SchedulerBench("kv_consumer", blocks=11)  # ten usable ones and the null block
    try:
        for name in "abc":
            bench.add(name, [ord(name)] * 60, "receive", max_tokens=4)
        first = bench.step()
        assert [r.transfer_id for r in first.plan.reservations] == ["a#1", "b#1"]
        assert bench.blocks_used == 8
        assert not bench.step().plan.reservations, "there are no blocks for c"
        bench.abort("a")
        assert not bench.step().plan.reservations, "a's blocks may still be written"
        (a, _) = first.plan.reservations
        bench.step(received=[result_for(a, complete=False)])
        assert [r.transfer_id for r in bench.step().plan.reservations] == ["c#1"]
    finally:
        bench.close()
