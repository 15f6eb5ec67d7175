"""Test the stream between two real ends: with ZeroMQ, a gloo process group and threads."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
import zmq

from kv_transfer import wire
from kv_transfer.curve import protect_client
from kv_transfer.kv_caches import UnitView
from kv_transfer.releaser import Releaser
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    BLOCKS,
    GEOMETRY,
    LAYERS,
    OPTIONS,
    Decode,
    Prefill,
    blocks_of,
    chunk_of,
    random_caches,
    same_blocks,
    stream,
)
from tests.support.waiting import wait_until


def blocks_for(tokens: int, rng: random.Random) -> list[int]:
    return rng.sample(range(BLOCKS), blocks_of(tokens))


@pytest.mark.parametrize("reserve", ["before", "after"])
@pytest.mark.parametrize(
    ("tokens", "cached_on_p", "cached_on_d"),
    [
        (1, 0, 0),
        (BLOCK_TOKENS, 0, 0),
        (BLOCK_TOKENS + 1, 0, BLOCK_TOKENS),
        (200, 0, 0),
        (200, 5 * BLOCK_TOKENS, 0),
        (200, 0, 5 * BLOCK_TOKENS),
        (200, 3 * BLOCK_TOKENS, 7 * BLOCK_TOKENS),
        (200, 7 * BLOCK_TOKENS, 3 * BLOCK_TOKENS),
    ],
)
def test_exactly_the_lacking_blocks_arrive(
    tokens: int, cached_on_p: int, cached_on_d: int, reserve: str
) -> None:
    rng = random.Random(tokens + cached_on_p * 7 + cached_on_d)
    with stream() as (prefill, decode):
        source, target = blocks_for(tokens, rng), blocks_for(tokens, rng)
        untouched = [layer.clone() for layer in decode.caches]
        if reserve == "before":
            decode.reserve(prefill, "r#1", target, cached_on_d, tokens)
        prefill.compute("r#1", source, tokens, cached=cached_on_p)
        prefill.server.request_finished("r#1", 42, computed=True)
        if reserve == "after":
            decode.reserve(prefill, "r#1", target, cached_on_d, tokens)
        result = decode.result("r#1")

        lacking = blocks_of(tokens) - cached_on_d // BLOCK_TOKENS
        assert result.complete
        assert result.first_token_id == 42
        assert result.backend == "gloo"
        assert result.num_bytes == lacking * LAYERS * GEOMETRY.block_bytes
        first = cached_on_d // BLOCK_TOKENS
        assert same_blocks(prefill.caches, source, decode.caches, target, first)
        others = sorted(set(range(BLOCKS)) - set(target[first:]))
        assert same_blocks(untouched, others, decode.caches, others)
        prefill.wait_released("r#1")


def test_many_transfers_at_once_over_one_pair() -> None:
    rng = random.Random(1)
    with stream() as (prefill, decode):
        tokens = {f"r{i}#1": rng.randrange(1, 130) for i in range(40)}
        free = list(range(BLOCKS))
        for transfer_id, count in tokens.items():
            source = rng.sample(range(BLOCKS), blocks_of(count))
            target = rng.sample(free, blocks_of(count))
            decode.reserve(prefill, transfer_id, target, 0, count)
            prefill.compute(transfer_id, source, count)
            prefill.server.request_finished(transfer_id, None, computed=True)
            assert decode.result(transfer_id).complete
            assert same_blocks(prefill.caches, source, decode.caches, target)
        for transfer_id in tokens:
            prefill.wait_released(transfer_id)


def test_cancelled_by_d_before_during_and_after_leaves_nothing_held() -> None:
    """V#46283, V#50425: prefill must release its blocks after a CANCEL and after an abort."""
    rng = random.Random(2)
    with stream() as (prefill, decode):
        for moment in ("before the prefill", "during", "after"):
            transfer_id = f"{moment}#1"
            source, target = blocks_for(100, rng), blocks_for(100, rng)
            decode.reserve(prefill, transfer_id, target, 0, 100)
            if moment == "before the prefill":
                decode.cancel(prefill, transfer_id)
                assert not decode.result(transfer_id).complete
            prefill.compute(transfer_id, source, 64)
            if moment == "during":
                decode.cancel(prefill, transfer_id)
                assert not decode.result(transfer_id).complete
            prefill.server.request_finished(transfer_id, 42, computed=False)
            if moment == "after":  # no CANCEL: the aborted prefill fails the transfer
                assert not decode.result(transfer_id).complete
            prefill.wait_released(transfer_id)
        assert not decode.client.transfers.by_id


def test_released_before_the_first_step_frees_what_the_step_took() -> None:
    """The release arrives after the engine has planned the first step and before the step runs."""
    with stream() as (prefill, decode):
        owner = Releaser((prefill.server.address,), OPTIONS.secret)
        try:
            owner.release("r#1")
            wait_until(
                lambda: "r#1" in prefill.server.transfers.ended_ids, what="the release has arrived"
            )
            decode.reserve(prefill, "r#1", [5, 6], 0, 20)
            prefill.compute("r#1", [1, 2], 20)
            prefill.server.request_finished("r#1", 42, computed=True)
            prefill.wait_released("r#1")
            assert not decode.result("r#1").complete
        finally:
            owner.close()


def test_prefix_hits_wait_for_the_layers_of_the_step_that_found_them() -> None:
    """vLLM also reports prefix hits on blocks that another request computes in the same step."""
    with stream() as (prefill, decode):
        blocks, target = [1, 2, 3], [11, 12, 13]
        decode.reserve(prefill, "r#1", target, 0, 40)
        wait_until(
            lambda: bool(prefill.server.transfers.waiting), what="the reservation has arrived"
        )
        prefill.server.begin_step([chunk_of("r#1", (1, 2, 3), 32, 40, 40)])
        wait_until(
            lambda: all(peer.pair is not None for peer in prefill.server.transfers.peers.values()),
            what="the pair is made",
        )
        (leg,) = decode.client.transfers.by_id["r#1"].legs.values()
        session = leg.session
        for layer in range(LAYERS):
            assert prefill.server.transfers.by_id["r#1"].session.next_message(0) is None
            prefill.caches[layer][blocks] += 1  # the step computes the layer
            prefill.server.layer_done(layer + 1)
            wait_until(
                lambda layer=layer: session._arrived[layer] == 3,  # type: ignore[misc]
                what="the layer has arrived",
            )
        prefill.server.end_step()
        prefill.server.request_finished("r#1", 42, computed=True)
        assert decode.result("r#1").complete
        assert same_blocks(prefill.caches, blocks, decode.caches, target)


def test_cancel_without_a_reservation_frees_prefill() -> None:
    """V#41269: decode rejects the request before it reserves anything."""
    with stream() as (prefill, decode):
        prefill.compute("r#1", [1, 2], 20)
        prefill.server.request_finished("r#1", 42, computed=True)
        decode.cancel(prefill, "r#1")
        prefill.wait_released("r#1")


def test_release_by_the_front_end_needs_the_secret() -> None:
    with stream() as (prefill, _):
        prefill.compute("r#1", [1, 2], 20)
        prefill.server.request_finished("r#1", 42, computed=True)
        stranger = Releaser((prefill.server.address,), "guess")
        owner = Releaser((prefill.server.address,), OPTIONS.secret)
        try:
            stranger.release("r#1")
            prefill.compute("other#1", [3], 10)
            prefill.server.request_finished("other#1", 42, computed=True)
            owner.release("other#1")
            prefill.wait_released("other#1")
            assert "engine-r#1" not in prefill.released
            owner.release("r#1")
            prefill.wait_released("r#1")
        finally:
            stranger.close()
            owner.close()


def test_kv_that_nobody_reserves_is_dropped_in_time() -> None:
    with stream(reserve_timeout_s=0.1) as (prefill, decode):
        prefill.compute("r#1", [1, 2], 20)
        prefill.server.request_finished("r#1", 42, computed=True)
        prefill.wait_released("r#1")
        decode.reserve(prefill, "r#1", [5, 6], 0, 20)
        assert not decode.result("r#1").complete, "a late reservation must fail, not hang"


def test_a_reservation_for_an_aborted_prefill_fails_at_once() -> None:
    """S#36033: every reservation is answered, if necessary with FAIL."""
    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5, 6], 0, 20)
        prefill.server.request_finished("r#1", None, computed=False)
        assert not decode.result("r#1").complete
        prefill.server.request_finished("s#1", None, computed=False)
        decode.reserve(prefill, "s#1", [5, 6], 0, 20)
        assert not decode.result("s#1").complete


def test_preemption_fails_the_transfer_and_stops_reading() -> None:
    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5, 6, 7, 8], 0, 60)
        prefill.compute("r#1", [1, 2, 3], 40)
        prefill.server.preempt(["r#1"])
        assert not decode.result("r#1").complete
        prefill.compute("r#1", [9, 10, 11, 12], 60)  # recomputed in other blocks, not streamed
        prefill.server.request_finished("r#1", 42, computed=True)
        prefill.wait_released("r#1")


def test_a_restarted_prefill_worker_is_told_from_the_old_one() -> None:
    """V#49238: the new process has the address of the old one."""
    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5], 0, 9, incarnation="p0")
        assert not decode.result("r#1").complete
        decode.reserve(prefill, "s#1", [5], 0, 9, incarnation="p1")
        prefill.compute("s#1", [1], 9)
        prefill.server.request_finished("s#1", 42, computed=True)
        assert decode.result("s#1").complete, "a refused pair must not affect the next one"


def test_unlike_caches_are_refused_with_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with stream() as (prefill, decode):
        receivers = decode.client.receivers
        receivers.rank = replace(receivers.rank, geometry=replace(GEOMETRY, content=16))
        decode.reserve(prefill, "r#1", [5], 0, 9)
        assert not decode.result("r#1").complete
    assert "content is 8 in prefill and 16 in decode" in caplog.text


def test_without_the_secret_there_is_no_pair(caplog: pytest.LogCaptureFixture) -> None:
    with stream() as (prefill, decode):
        receivers = decode.client.receivers
        options = replace(receivers.rank.options, secret="guess", pair_timeout_s=0.5)
        receivers.rank = replace(receivers.rank, options=options)
        decode.reserve(prefill, "r#1", [5], 0, 9)
        assert not decode.result("r#1").complete
        assert not prefill.server.transfers.peers
    assert "no answer to HELLO" in caplog.text


def test_random_bytes_on_the_control_channel_do_no_harm() -> None:
    rng = random.Random(3)
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with stream() as (prefill, decode), stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        protect_client(stranger, OPTIONS.secret)
        stranger.connect(prefill.server.address)
        nested = b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 60_000 + b"\xc0"
        stranger.send(nested)
        for _ in range(200):
            stranger.send_multipart([rng.randbytes(rng.randrange(0, 50))] * rng.randrange(1, 4))
            stranger.send(wire.encode(wire.Reserve("r#1", 0, 9)))
        decode.reserve(prefill, "r#1", [5], 0, 9)
        prefill.compute("r#1", [1], 9)
        prefill.server.request_finished("r#1", 42, computed=True)
        assert decode.result("r#1").complete


def test_death_of_prefill_fails_its_transfers_and_no_others() -> None:
    """S#12779, invariant 6 of docs/architecture.md: a dead peer costs only its own transfers."""
    victim = subprocess.Popen(
        [sys.executable, "-m", "tests.support.kv_stream"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert victim.stdout is not None
    assert victim.stdin is not None
    try:
        address = victim.stdout.readline().strip()
        with stream() as (prefill, decode):
            decode.reserve(address, "doomed#1", [5], 0, 9)
            wait_until(
                lambda: any(
                    peer.pair is not None for peer in decode.client.transfers.peers.values()
                ),
                what="the pair with the victim is made",
            )
            victim.send_signal(signal.SIGKILL)
            assert not decode.result("doomed#1").complete
            decode.reserve(prefill, "r#1", [6], 0, 9)
            prefill.compute("r#1", [1], 9)
            prefill.server.request_finished("r#1", 42, computed=True)
            assert decode.result("r#1").complete
    finally:
        victim.kill()
        victim.wait()
        victim.stdout.close()
        victim.stdin.close()


def test_death_of_decode_frees_prefill() -> None:
    with stream(peer_lease_s=1.5) as (prefill, decode):
        decode.reserve(prefill, "r#1", [5, 6], 0, 20)
        wait_until(
            lambda: bool(prefill.server.transfers.waiting), what="the reservation has arrived"
        )
        with decode.client.transfers.lock:
            (peer,) = decode.client.transfers.peers.values()
            decode.client.transfers.close_peer(peer)  # sends BYE, as a process that ends does
        prefill.compute("r#1", [1, 2], 20)
        prefill.server.request_finished("r#1", 42, computed=True)
        decode.cancel(prefill, "r#1")
        prefill.wait_released("r#1")


def test_a_second_prefill_and_decode_pair_up_while_the_first_work() -> None:
    with stream() as (p1, d1):
        p2, d2 = Prefill(random_caches(3)), Decode(random_caches(4))
        try:
            for name, prefill, decode in [
                ("a", p1, d1),
                ("b", p1, d2),
                ("c", p2, d1),
                ("d", p2, d2),
            ]:
                decode.reserve(prefill, name, [5], 0, 9)
                prefill.compute(name, [1], 9)
                prefill.server.request_finished(name, 42, computed=True)
                assert decode.result(name).complete
                assert same_blocks(prefill.caches, [1], decode.caches, [5])
        finally:
            d2.client.stop()
            p2.server.stop()


def test_a_peer_whose_pair_was_closed_is_told_and_pairs_again() -> None:
    """Without REFUSE, decode would keep using the closed pair until ``peer_lease_s`` expires."""
    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5], 0, 9)
        wait_until(
            lambda: bool(prefill.server.transfers.waiting), what="the reservation has arrived"
        )
        (peer,) = prefill.server.transfers.peers.values()
        with prefill.server.transfers.lock:
            prefill.server.transfers.close_peer(peer, "closed by the test")
        prefill.compute("r#1", [1], 9)
        prefill.server.request_finished("r#1", 42, computed=True)
        result = decode.result("r#1")
        assert result.complete, "nothing had arrived, so decode reserves over a new pair"
        assert result.retries == 1


def test_a_stream_longer_than_the_lease_keeps_its_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run of messages must not delay the receiver's PING."""
    scatter = UnitView.scatter

    def slow_scatter(self: UnitView, *args: Any) -> None:
        threading.Event().wait(0.05)
        scatter(self, *args)

    monkeypatch.setattr(UnitView, "scatter", slow_scatter)
    with stream(peer_lease_s=1.5) as (prefill, decode):
        tokens = 40 * BLOCK_TOKENS  # in 64 messages
        decode.reserve(prefill, "r#1", list(range(20, 60)), 0, tokens)
        prefill.compute("r#1", list(range(40)), tokens)
        prefill.server.request_finished("r#1", 42, computed=True)
        assert decode.result("r#1").complete


def test_more_transfers_than_the_bound_are_failed_not_queued() -> None:
    with stream(max_pending=2) as (prefill, decode):
        for index in range(4):
            decode.reserve(prefill, f"r{index}#1", [5 + index], 0, 9)
        assert not decode.result("r3#1").complete
        assert not decode.result("r2#1").complete
        prefill.compute("r0#1", [1], 9)
        prefill.server.request_finished("r0#1", 42, computed=True)
        assert decode.result("r0#1").complete


def test_a_message_that_was_not_reserved_fails_the_transfer() -> None:
    """V#48633: blocks of one range must never be written to another range."""
    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5, 6], 16, 20)
        wait_until(
            lambda: bool(prefill.server.transfers.waiting), what="the reservation has arrived"
        )
        with prefill.server.transfers.lock:  # now P believes that D lacks everything
            prefill.server.transfers.waiting["r#1"][0].token_start = 0
        before = [layer[5].clone() for layer in decode.caches]
        prefill.compute("r#1", [1, 2], 20)
        prefill.server.request_finished("r#1", 42, computed=True)
        assert not decode.result("r#1").complete
        assert all(
            torch.equal(layer[5], kept) for layer, kept in zip(decode.caches, before, strict=True)
        )


def test_no_pickle_on_the_wire() -> None:
    """CVE-2025-47277: a pickled frame is refused as malformed."""
    import pickle

    with pytest.raises(Exception, match="not a control message"):
        wire.decode_to_prefill(pickle.dumps({"tag": "ping"}))
    assert msgspec.msgpack.decode(wire.encode(wire.Ping())) == {"type": "ping"}


def test_everything_listens_on_loopback() -> None:
    import psutil

    with stream() as (prefill, decode):
        decode.reserve(prefill, "r#1", [5], 0, 9)
        prefill.compute("r#1", [1], 9)
        prefill.server.request_finished("r#1", 42, computed=True)
        assert decode.result("r#1").complete
        listening = [
            c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"
        ]
        assert len(listening) >= 3, "the control server, and gloo on both sides of the pair"
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
