"""Hazards of peers that die, restart, stop or misbehave. See ``kv_hazards``.

P2pNccl is a KV connector of vLLM.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.kv_caches import UnitView
from kv_transfer.pair import Pair
from tests.support.kv_faults import (
    CHILD_TOKENS,
    Clock,
    DecodeEnd,
    Gate,
    PrefillEnd,
    SilentPrefill,
    Stranger,
    child,
    kv_threads,
    line_of,
    running,
    wait_stopped,
)
from tests.support.kv_hazards import (
    LONG,
    NEVER_S,
    SOURCE,
    TARGET,
    close_only_pair,
    compute,
    delivers,
    ends,
    fill,
    step,
)
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    Prefill,
    blocks_of,
    same_blocks,
)
from tests.support.vllm_scheduler import SchedulerBench, result_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


@pytest.mark.parametrize("pool", ["kv_producer", "kv_consumer"])
def test_engine_steps_while_an_aborted_transfer_is_open(pool: str) -> None:
    """V#41180: no request is left, but the engine must step to learn that the blocks are free."""
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
    """V#49238, S#16903: the new process listens at the old one's address."""
    blocks = list(range(blocks_of(CHILD_TOKENS)))
    decode = DecodeEnd(peer_lease_s=NEVER_S, transfer_timeout_s=NEVER_S)
    with running(decode), child("prefill") as victim:
        address = line_of(victim)
        decode.reserve(address, "child#1", blocks, 0, CHILD_TOKENS)
        wait_stopped(victim)
        decode.reserve(address, "queued#1", [60], 0, 9)
        victim.send_signal(signal.SIGKILL)
        for transfer_id in ("child#1", "queued#1"):
            assert not decode.result(transfer_id).complete

        def same_port(router: zmq.Socket[bytes], host: str) -> int:
            port = address.rpartition(":")[2]
            router.bind(f"{host}:{port}")
            return int(port)

        with monkeypatch.context() as patch:
            patch.setattr(zmq.Socket, "bind_to_random_port", same_port)
            restarted = PrefillEnd(incarnation="p2")
        with running(restarted):
            assert restarted.server.address == address
            decode.reserve(address, "late#1", [60], 0, 9, incarnation="p1")
            assert not decode.result("late#1").complete
            decode.reserve(address, "new#1", [60], 0, 9, incarnation="p2")
            compute(restarted, "new#1", [63], 9)
            assert decode.result("new#1").complete
            assert same_blocks(restarted.caches, [63], decode.caches, [60])


def test_a_hanging_prefill_does_not_make_decode_unhealthy() -> None:
    """S#12779: P neither answers nor dies. Its transfer fails in time. Another P serves D."""
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

    monkeypatch.setattr(UnitView, "gather", broken)


def break_pair(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise PairError("broken")

    monkeypatch.setattr(Pair, "send", broken)


def stop(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill.server.stop()


@pytest.mark.parametrize("disrupt", [break_gather, break_pair, close_only_pair, stop])
def test_decode_is_told_of_every_failure_in_mid_stream(
    monkeypatch: pytest.MonkeyPatch,
    disrupt: Callable[[Prefill, pytest.MonkeyPatch], None],
) -> None:
    """S#36033, A#2289, V#55870: D is told immediately, not only after a timeout."""
    with ends(peer_lease_s=60, transfer_timeout_s=60) as (prefill, decode):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        step(prefill, "a#1", 0, LONG - BLOCK_TOKENS)
        (leg,) = decode.client.transfers.by_id["a#1"].legs.values()
        wait_until(lambda: leg.session.messages, what="KV flows")
        disrupt(prefill, monkeypatch)
        step(prefill, "a#1", LONG - BLOCK_TOKENS, LONG)
        prefill.server.request_finished("a#1", 42, computed=True)
        assert not decode.result("a#1").complete
        assert decode.results["a#1"].retries == 0, "KV had arrived, so the transfer is not retried"
        prefill.wait_released("a#1")


def test_scaling_prefill_down_does_not_affect_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """D#7933, D#13559: one P stops while D streams from it. Another P stopped earlier."""
    staying, leaving, left = PrefillEnd(), PrefillEnd(), PrefillEnd()
    left.server.stop()
    decode = DecodeEnd(pair_timeout_s=1)
    with running(decode, staying, leaving), Gate(monkeypatch, UnitView, "scatter") as gate:
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


def test_one_bad_peer_that_never_makes_its_group_stalls_no_other_decode() -> None:
    """P2pNccl: the peer sends HELLO and reserves, and does nothing more."""
    prefill, decode = PrefillEnd(), DecodeEnd()
    with running(decode, prefill), Stranger(prefill.server.address) as bad:
        bad.hello()
        assert isinstance(bad.receive(), wire.Welcome)
        bad.send(wire.Reserve("bad#1", 0, LONG))
        wait_until(lambda: prefill.server.transfers.waiting, what="the peer has reserved")
        compute(prefill, "bad#1", SOURCE, LONG)
        assert delivers(prefill, decode, "a#1")
        bad.send(wire.Bye())
        prefill.wait_released("bad#1")


def test_one_bad_peer_that_never_makes_its_group_stalls_no_other_prefill() -> None:
    """P2pNccl: the peer sends WELCOME and does nothing more. D makes its other pairs meanwhile."""
    prefill, decode = PrefillEnd(), DecodeEnd()
    with running(decode, prefill), SilentPrefill() as bad:
        decode.reserve(bad.address, "bad#1", TARGET, 0, LONG)
        bad.welcome()
        assert delivers(prefill, decode, "a#1")
        decode.client.cancel("bad#1", (bad.address,), "p1")
        assert not decode.result("bad#1").complete


def test_one_bad_peer_that_stops_reading_stalls_no_other() -> None:
    """P2pNccl: SIGSTOP stops a decode process. P serves others, and the process can continue."""
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
    """P2pNccl, aws-do-eks#84: when the peer's lease expires, P's sender to this peer ends.

    When the peer continues, it does not take other bytes for its KV.
    """
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


def test_one_bad_peer_that_never_stops_sending_stalls_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P2pNccl: one listener serves all peers. A stranger sends without end. Others get answers."""
    caplog.set_level("ERROR", "kv_transfer.send.control")
    original = zmq.Socket.recv_multipart

    def one_more(control: zmq.Socket[bytes], *args: Any) -> list[bytes]:
        try:
            return original(control, *args)
        except zmq.Again:
            return [b"a stranger", b"nonsense"]

    with ends() as (prefill, decode), monkeypatch.context() as patch:
        patch.setattr(zmq.Socket, "recv_multipart", one_more)
        assert delivers(prefill, decode, "a#1")
