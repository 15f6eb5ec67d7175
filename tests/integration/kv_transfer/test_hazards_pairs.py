"""Hazards of pairs: order of messages, aborts, bounds, idle pairs. See ``kv_hazards``."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from kv_transfer import wire
from kv_transfer.kv_caches import UnitView
from kv_transfer.pair import Pair
from kv_transfer.receive.records import Reservation
from kv_transfer.send.transfers import SendTransfers
from tests.support import tcp_faults
from tests.support.kv_faults import (
    Clock,
    DecodeEnd,
    Gate,
    HangingAborts,
    PrefillEnd,
    Stranger,
    kv_threads,
    running,
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
    only_peer,
    record_receivers,
)
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    BLOCKS,
    OPTIONS,
    Decode,
    blocks_of,
    chunk_of,
    same_blocks,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


def test_request_ids_of_the_two_engines_may_differ() -> None:
    """V#42839: one id may name different requests on the two engines. Only transfer ids count."""
    with ends() as (prefill, decode):
        requests = {"a#1": ("1", "2", 1, 30), "b#1": ("2", "1", 2, 31)}
        for transfer_id, (_, its_id, _, block) in requests.items():
            decode.client.reserve(
                Reservation(
                    transfer_id=transfer_id,
                    request_id=its_id,
                    addresses=(prefill.server.address,),
                    incarnation="p1",
                    block_ids=(block,),
                    token_start=0,
                    token_end=9,
                )
            )
        for transfer_id, (its_id, _, block, _) in requests.items():
            chunk = chunk_of(transfer_id, (block,), 0, 9, 9)
            prefill.server.begin_step([replace(chunk, request_id=its_id)])
            prefill.server.end_step()
        prefill.server.request_finished("b#1", 42, computed=True)
        assert decode.result("b#1").request_id == "1"
        assert wait_until(prefill.server.take_released, what="b's blocks are released") == {"2"}
        prefill.server.request_finished("a#1", 42, computed=True)
        assert decode.result("a#1").request_id == "2"
        for _, _, source, target in requests.values():
            assert same_blocks(prefill.caches, [source], decode.caches, [target])


def test_different_order_on_both_sides_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """N#479, N#1279, N#522: D reserves in one order. P computes chunks in another order.

    D starts a receive only after P has announced the message. P sends every announced message.
    """
    announced, posted = Counter[str](), Counter[str]()

    def count(owner: Any, name: str, when: Callable[..., bool], into: Counter[str], what: str
              ) -> None:  # fmt: skip
        original = getattr(owner, name)

        def counted(*args: Any) -> Any:
            into[what] += when(*args)
            assert posted["receives"] <= announced["P"]
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    def is_header(_: SendTransfers, peer: Any, message: object) -> bool:
        return isinstance(message, wire.Header)

    count(SendTransfers, "post", is_header, announced, "P")
    count(Pair, "receive", lambda *_: True, posted, "receives")
    count(Pair, "send", lambda *_: True, posted, "sends")
    rng = random.Random(7)
    prompts = {f"r{index}#1": rng.randrange(1, 3 * BLOCK_TOKENS) for index in range(16)}
    with ends() as (prefill, decode):
        source, target = rng.sample(range(BLOCKS), BLOCKS), rng.sample(range(BLOCKS), BLOCKS)
        blocks = {name: (source[3 * i : 3 * i + 3], target[3 * i : 3 * i + 3])
                  for i, name in enumerate(prompts)}  # fmt: skip
        for name in rng.sample(sorted(prompts), len(prompts) // 2):
            decode.reserve(prefill, name, blocks[name][1], 0, prompts[name])
        for start in range(0, 3 * BLOCK_TOKENS, 10):
            turn = [name for name, tokens in prompts.items() if start < tokens]
            for name in rng.sample(turn, len(turn)):
                end = min(start + 10, prompts[name])
                chunk = chunk_of(name, tuple(blocks[name][0]), start, end, prompts[name])
                prefill.server.begin_step([chunk])
                prefill.server.end_step()
        for name in rng.sample(sorted(prompts), len(prompts)):
            if name not in decode.client.transfers.by_id and name not in decode.results:
                decode.reserve(prefill, name, blocks[name][1], 0, prompts[name])
            prefill.server.request_finished(name, 42, computed=True)
        for name, tokens in prompts.items():
            assert decode.result(name).complete, name
            of_p, of_d = (ids[: blocks_of(tokens)] for ids in blocks[name])
            assert same_blocks(prefill.caches, of_p, decode.caches, of_d)
        assert posted["sends"] == posted["receives"] == announced["P"]


def test_a_hanging_abort_asks_for_a_new_process_and_harms_no_other_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N#863, N#1013: the aborts of both sides hang, in mid-stream."""
    stuck: dict[str, list[str]] = {"P": [], "D": []}
    prefill = PrefillEnd(pair_timeout_s=2, on_stuck=stuck["P"].append)
    decode = DecodeEnd(pair_timeout_s=2, transfer_timeout_s=2, on_stuck=stuck["D"].append)
    other = DecodeEnd(incarnation="d2")
    with (
        running(decode, other, prefill),
        HangingAborts(monkeypatch) as fault,
        Gate(monkeypatch, UnitView, "scatter") as gate,
    ):
        decode.reserve(prefill, "a#1", TARGET, 0, LONG)
        compute(prefill, "a#1", SOURCE, LONG)
        gate.wait_entered()
        fault.on = False
        close_only_pair(prefill)
        gate.open()
        prefill.wait_released("a#1")
        assert not decode.result("a#1").complete
        assert delivers(prefill, other, "b#1")
        for side, reasons in stuck.items():
            wait_until(lambda reasons=reasons: reasons, what=f"{side} is told")  # type: ignore[misc]
            assert "could not be aborted within 2 s" in reasons[0]
        assert delivers(prefill, decode, "c#1"), "over a new pair"
    assert [len(reasons) for reasons in stuck.values()] == [1, 1]


def test_aborting_several_at_once_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """N#564: D stops while each of three pairs waits for an announced message."""
    prefills = [PrefillEnd(peer_lease_s=NEVER_S) for _ in range(3)]
    receivers = record_receivers(monkeypatch)
    decode = DecodeEnd(transfer_timeout_s=NEVER_S)
    with running(decode, *prefills), ExitStack() as patches:
        gate = Gate(patches.enter_context(pytest.MonkeyPatch.context()), Pair, "send")
        patches.enter_context(gate)
        for index, prefill in enumerate(prefills):
            transfer_id = f"r{index}#1"
            decode.reserve(prefill, transfer_id, [30 + index], 0, 9)
            compute(prefill, transfer_id, [index], 9)
        gate.wait_entered()
        wait_until(
            lambda: all(len(each._staging) < OPTIONS.staging_buffers for each in receivers),
            what="D waits for three messages",
        )
        decode.client.stop()
        wait_until(lambda: not kv_threads("kv-receive"), what="no receiver waits any more")


def test_closing_a_pair_ends_its_making() -> None:
    """A rank that never joins keeps no thread of ours for pair_timeout_s."""
    prefill = PrefillEnd(pair_timeout_s=NEVER_S)
    with running(prefill), Stranger(prefill.server.address) as stranger:
        stranger.hello()
        assert isinstance(stranger.receive(), wire.Welcome)
        wait_until(lambda: kv_threads("kv-send"), what="a sender makes the pair")
        stranger.send(wire.Bye())
        wait_until(lambda: not kv_threads("kv-send"), what="the sender has ended")


class FakeNccl:
    """Fakes an NCCL process group and records its arguments."""

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace()
            self._timeout = timedelta()

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.size, self.options = size, options

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.device = device


def test_communicators_take_little_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """N#522, N#1431, V#18242, with a fake of NCCL: few channels save memory and SMs.

    The group has a timeout and is connected before the first message. NCCL's watchdog must not
    end the process.
    """
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    device = torch.device("cuda", 0)
    group = Pair(torch.distributed.HashStore(), 0, device, "127.0.0.1", 5)._group
    assert isinstance(group, FakeNccl)
    assert (group.size, group.device) == (2, device)
    assert group.options.config.max_ctas <= 4
    assert group.options._timeout == timedelta(seconds=5)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


def files() -> int:
    return int(psutil.Process().num_fds())


def test_groups_are_bounded_on_prefill() -> None:
    """V#18242: four decode workers use P in turn, three times. P has room for two pairs.

    No groups, threads or files of closed pairs remain.
    """
    prefill = PrefillEnd(max_pairs=2, peer_lease_s=NEVER_S)
    decodes = [DecodeEnd(incarnation=f"d{index}") for index in range(4)]
    with running(*decodes, prefill):
        for turn in range(3):
            for index, decode in enumerate(decodes):
                assert delivers(prefill, decode, f"{turn}-{index}#1")
                assert len(prefill.server.transfers.peers) <= 2
            wait_until(lambda: len(kv_threads("kv-send")) == 2, what="other senders ended")
            wait_until(lambda: len(kv_threads("kv-receive")) == 2, what="other receivers ended")
            if turn == 0:
                at_first = files()
        wait_until(lambda: files() <= at_first, what="no file is left open")


def test_groups_are_bounded_on_decode() -> None:
    """V#18242: the same with four prefill workers and one D. D sends BYE when it closes a pair."""
    decode = DecodeEnd(max_pairs=2)
    prefills = [PrefillEnd(peer_lease_s=NEVER_S) for _ in range(4)]
    with running(decode, *prefills):
        for turn in range(3):
            for index, prefill in enumerate(prefills):
                assert delivers(prefill, decode, f"{turn}-{index}#1")
                assert len(decode.client.transfers.peers) <= 2
            wait_until(lambda: len(kv_threads("kv-receive")) == 2, what="other receivers ended")
            wait_until(lambda: len(kv_threads("kv-send")) == 2, what="other senders ended")
            assert not prefills[0].server.transfers.peers
            if turn == 0:
                at_first = files()
        wait_until(lambda: files() <= at_first, what="no file is left open")


def test_a_connection_to_a_vanished_host_is_closed() -> None:
    """The peer's host vanishes without a FIN or RST."""
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
    """V#18242: a pair for which there is no room is refused immediately, with a clear reason."""
    prefill, decode = PrefillEnd(max_pairs=1), DecodeEnd(max_pairs=1)
    late = (
        (prefill, DecodeEnd(incarnation="d2"))
        if side == "prefill"
        else (PrefillEnd(peer_lease_s=NEVER_S), decode)
    )
    with running(decode, late[1], prefill, late[0]):
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the only pair is busy")
        late[1].reserve(late[0], "b#1", [31], 0, 9)
        assert not late[1].result("b#1").complete
        assert "busy" in caplog.text
        assert "kv_transfer.max_pairs" in caplog.text
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete
        assert delivers(*late, "c#1"), "now there is room"


def test_groups_are_bounded_under_load() -> None:
    """V#18242: four decode workers use P at the same time. P has room for two pairs.

    New pairs replace idle ones. A transfer either delivers the right KV, or fails and P releases
    its KV.
    """
    clock, engine, most = Clock(), threading.Lock(), list[int]()
    prefill = PrefillEnd(max_pairs=2, peer_lease_s=NEVER_S, clock=clock)
    decodes = [DecodeEnd(incarnation=f"d{index}") for index in range(4)]
    served = Counter[bool]()

    def load(index: int, decode: Decode) -> None:
        for turn in range(5):
            transfer_id, source = f"{index}-{turn}#1", [index * 16 + turn]
            decode.reserve(prefill, transfer_id, [turn], 0, 9)
            with engine:
                compute(prefill, transfer_id, source, 9)
                most.append(len(prefill.server.transfers.peers))
            complete = decode.result(transfer_id).complete
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
        wait_until(lambda: not prefill.server.transfers.by_id, what="no KV is held any longer")
        assert len(prefill.server.take_released()) == 20


def test_groups_are_bounded_and_a_reservation_on_its_way_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """V#18242: P closes a pair to make room while a RESERVE on this pair is on the wire."""
    original, lost = SendTransfers.reserve, list[str]()

    def too_late(transfers: SendTransfers, peer: Any, message: wire.Reserve) -> None:
        if message.transfer_id == "a#1" and not lost:
            lost.append(message.transfer_id)
            transfers.close_peer(peer, "another pair needed the room")
        else:
            original(transfers, peer, message)

    monkeypatch.setattr(SendTransfers, "reserve", too_late)
    with ends() as (prefill, decode):
        assert delivers(prefill, decode, "first#1")
        for transfer_id in ("a#1", "b#1"):
            decode.reserve(prefill, transfer_id, [30 + len(lost)], 0, 9)
            compute(prefill, transfer_id, [0], 9)
        assert decode.result("a#1").complete
        assert decode.result("b#1").complete
        assert decode.results["a#1"].retries == 1
        assert lost == ["a#1"]


def test_groups_are_closed_when_idle() -> None:
    """V#18242: both sides close a pair after pair_idle_s. The next request makes a new one."""
    clock = Clock()
    prefill = PrefillEnd(peer_lease_s=NEVER_S)
    decode = DecodeEnd(clock=clock, peer_lease_s=NEVER_S)
    with running(decode, prefill):
        assert delivers(prefill, decode, "a#1")
        clock.ahead_s = OPTIONS.pair_idle_s / 2
        assert delivers(prefill, decode, "b#1"), "the pair is in use"
        assert len(kv_threads("kv-receive")) == 1
        clock.ahead_s += OPTIONS.pair_idle_s / 2 + 1
        decode.reserve(prefill, "c#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the reservation has arrived")
        clock.ahead_s += OPTIONS.pair_idle_s + 1
        compute(prefill, "c#1", [0], 9)
        assert decode.result("c#1").complete, "a pair that waits for KV is not idle"
        clock.ahead_s += OPTIONS.pair_idle_s + 1
        wait_until(lambda: not prefill.server.transfers.peers, what="prefill has closed the pair")
        wait_until(lambda: not kv_threads("kv-receive"), what="the receiver has ended")
        assert delivers(prefill, decode, "d#1")


def test_groups_are_bounded_although_a_pair_is_closed_twice() -> None:
    """V#18242: D closes the same pair twice: to make room, and because the pair is idle.

    The second close must not remove the new pair, which must still be counted and stopped.
    """
    with ends() as (prefill, decode):
        assert delivers(prefill, decode, "a#1")
        old = only_peer(decode)
        with decode.client.transfers.lock:
            decode.client.transfers.close_peer(old)
        assert delivers(prefill, decode, "b#1")
        with decode.client.transfers.lock:
            decode.client.transfers.close_peer(old)
        assert only_peer(decode) is not old
