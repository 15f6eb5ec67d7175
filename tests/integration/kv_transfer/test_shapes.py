"""The stream between workers of unlike shapes: processes, process groups, several ranks a side."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
import zmq

from kv_transfer.errors import PairError
from kv_transfer.geometry import KvGeometry
from kv_transfer.pair import (
    DECODE_RANK,
    PREFILL_RANK,
    Pair,
    PendingWork,
    close_pair,
    host_store,
    join_store,
)
from kv_transfer.receive import client as receive
from kv_transfer.send import server as send
from tests.support.kv_shapes import (
    DecodeRanks,
    PrefillProcess,
    RankCaches,
    geometry_of,
    shapes,
)
from tests.support.kv_stream import Decode, Prefill, stream
from tests.support.waiting import wait_until

BLOCKS = 48
LONG, TOKENS, HALF = "long#1", 301, 160
PROMPTS = {"short#1": 3, "page#1": 32, LONG: TOKENS}  # tokens
SOURCE = list(range(20))  # blocks of the long prompt


@pytest.fixture(scope="module")
def process() -> Iterator[PrefillProcess]:
    process = PrefillProcess()
    yield process
    process.close()


def pair_of(
    heads: int, tp: tuple[int, int], block_tokens: tuple[int, int] = (16, 16),
    layouts: tuple[str, str] = ("HNC", "HNC"),
) -> tuple[KvGeometry, KvGeometry]:  # fmt: skip
    prefill, decode = (
        geometry_of(heads, *each) for each in zip(tp, block_tokens, layouts, strict=True)
    )
    return prefill, decode


Reserved = dict[str, tuple[list[int], int]]  # by key: blocks, first token


def reserved_by(geometry: KvGeometry, starts: dict[str, int], rng: random.Random) -> Reserved:
    free = rng.sample(range(BLOCKS), BLOCKS)
    return {
        key: ([free.pop() for _ in range(-(-tokens // geometry.block_tokens))], starts[key])
        for key, tokens in PROMPTS.items()
    }


def check(caches: RankCaches, reserved: Reserved, page_tokens: int) -> None:
    """The reserved tokens are right, and nothing else was written but the rest of a last page."""
    expected = RankCaches(caches.geometry, BLOCKS)
    for key, (blocks, start) in reserved.items():
        tokens = PROMPTS[key]
        expected.fill(key, blocks, start, tokens, tokens)
        page_end = -(-tokens // page_tokens) * page_tokens
        for layer in range(caches.geometry.num_layers):
            tail = caches.read(layer, blocks, tokens, page_end)
            expected.write(layer, blocks, tokens, page_end, tail)
    assert torch.equal(caches.storage, expected.storage)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair_of(2, (1, 1)), id="1 to 1"),
        pytest.param(pair_of(2, (1, 2)), id="1 to 2"),
        pytest.param(pair_of(2, (2, 1)), id="2 to 1"),
        pytest.param(pair_of(4, (1, 4)), id="1 to 4"),
        pytest.param(pair_of(4, (4, 1)), id="4 to 1"),
        pytest.param(pair_of(2, (2, 4)), id="2 to 4, copies in decode"),
        pytest.param(pair_of(2, (4, 2)), id="4 to 2, copies in prefill"),
        pytest.param(pair_of(2, (4, 4)), id="4 to 4, copies on both sides"),
        pytest.param(pair_of(2, (4, 1)), id="4 to 1, idle prefill ranks"),
        pytest.param(pair_of(6, (3, 2)), id="3 to 2"),
        pytest.param(pair_of(6, (2, 3)), id="2 to 3"),
        pytest.param(pair_of(2, (1, 1), (16, 64)), id="blocks 16 to 64"),
        pytest.param(pair_of(2, (1, 1), (64, 16)), id="blocks 64 to 16"),
        pytest.param(pair_of(2, (1, 1), (48, 32), ("NHC", "HNC/1")), id="blocks 48 to 32"),
        pytest.param(pair_of(6, (3, 2), (48, 32), ("HNC/1", "NHC")), id="3 to 2, blocks 48 to 32"),
    ],
)
@pytest.mark.parametrize("message_bytes", [600, 100_000])
def test_each_rank_gets_its_part(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], message_bytes: int
) -> None:
    """Several prompts at once over one set of pairs, with prefix hits on both sides."""
    prefill, decode = pair
    rng = random.Random(str(pair))
    with shapes(process, *pair, BLOCKS, message_bytes=message_bytes) as (addresses, ranks):
        starts = {
            key: rng.randrange(tokens) // decode.block_tokens * decode.block_tokens
            for key, tokens in PROMPTS.items()
        }
        source = reserved_by(prefill, dict.fromkeys(PROMPTS, 0), rng)
        targets = [reserved_by(decode, starts, rng) for _ in ranks.clients]

        def reserve(key: str) -> None:
            for rank, target in enumerate(targets):
                ranks.reserve(rank, addresses, key, *target[key], PROMPTS[key])

        reserve("page#1")
        reserve(LONG)
        for key, tokens in PROMPTS.items():
            blocks, middle = source[key][0], max(1, tokens // 3)
            cached = min(2 * prefill.block_tokens, middle - 1)
            process.call("compute", key, blocks, 0, middle, tokens, cached)
            process.call("compute", key, blocks, middle, tokens, tokens)
            process.call("finish", key)
        reserve("short#1")

        page_tokens = math.gcd(prefill.block_tokens, decode.block_tokens)
        for key, tokens in PROMPTS.items():
            slots = (-(-tokens // page_tokens) * page_tokens - starts[key]) * decode.num_layers
            for result, caches in zip(ranks.results(key), ranks.caches, strict=True):
                assert result.complete
                assert result.first_token == 42
                heads = len(caches.geometry.heads)
                assert result.num_bytes == slots * heads * decode.content * decode.item_bytes
        for caches, target in zip(ranks.caches, targets, strict=True):
            check(caches, target, page_tokens)
        process.wait_released(*PROMPTS)


def begin(process: PrefillProcess, addresses: tuple[str, ...], ranks: DecodeRanks) -> None:
    """All decode ranks have reserved, and half of the prompt is computed."""
    for rank in range(len(ranks.clients)):
        ranks.reserve(rank, addresses, LONG, SOURCE, 0, TOKENS)
    process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)


def end(process: PrefillProcess) -> None:
    process.call("compute", LONG, SOURCE, HALF, TOKENS, TOKENS)
    process.call("finish", LONG)


unlike = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair_of(2, (1, 2)), id="1 to 2"),
        pytest.param(pair_of(2, (2, 4)), id="2 to 4"),
        pytest.param(pair_of(2, (4, 1)), id="4 to 1, idle prefill ranks"),
        pytest.param(pair_of(6, (3, 2)), id="3 to 2"),
    ],
)


@unlike
@pytest.mark.parametrize("computed", [0, HALF, TOKENS])
def test_a_cancel_frees_all_ranks(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], computed: int
) -> None:
    """As the engine does it: each decode rank cancels for itself."""
    with shapes(process, *pair, BLOCKS) as (addresses, ranks):
        for rank in range(len(ranks.clients)):
            ranks.reserve(rank, addresses, LONG, SOURCE, 0, TOKENS)
        if computed:
            process.call("compute", LONG, SOURCE, 0, computed, TOKENS)
        for client in ranks.clients:
            client.cancel(LONG, addresses, "p1")
        assert not any(result.complete for result in ranks.results(LONG))
        if computed < TOKENS:
            process.call("compute", LONG, SOURCE, computed, TOKENS, TOKENS)
        process.call("finish", LONG)
        process.wait_released(LONG)


@pytest.mark.parametrize(
    ("pair", "failing", "reached"),
    [
        pytest.param(pair_of(2, (1, 2)), 0, [0, 1], id="1 to 2"),
        pytest.param(pair_of(2, (2, 4)), 0, [0, 1], id="2 to 4"),
        pytest.param(pair_of(2, (4, 1)), 0, [0], id="4 to 1"),
        pytest.param(pair_of(2, (4, 1)), 1, [0], id="4 to 1, the idle one"),
        pytest.param(pair_of(6, (3, 2)), 0, [0, 1], id="3 to 2: by way of a rank that both read"),
    ],
)
def test_a_part_that_a_prefill_rank_fails(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], failing: int, reached: list[int]
) -> None:
    """Whoever needs it hears of it at once; the others get theirs, and nobody keeps any block."""
    with shapes(process, *pair, BLOCKS) as (addresses, ranks):
        begin(process, addresses, ranks)
        process.call("preempt", LONG, failing)
        for rank in reached:
            assert not ranks.result(LONG, rank).complete
        end(process)
        for rank, result in enumerate(ranks.results(LONG)):
            assert result.complete == (rank not in reached)
        process.wait_released(LONG)


@unlike
def test_a_part_that_a_decode_rank_fails(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], caplog: pytest.LogCaptureFixture
) -> None:
    with shapes(process, *pair, BLOCKS) as (addresses, ranks):
        for rank in range(1, len(ranks.clients)):
            ranks.reserve(rank, addresses, LONG, SOURCE, 0, TOKENS)
        ranks.reserve(0, addresses, LONG, SOURCE, 1, TOKENS)  # not where a page begins
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        assert not ranks.result(LONG, 0).complete
        end(process)
        ranks.results(LONG)
        process.wait_released(LONG)
    assert "reservation of [1, 301)" in caplog.text


def test_a_decode_rank_that_never_reserves_does_not_hold_prefill_for_ever(
    process: PrefillProcess,
) -> None:
    """Its pair was refused, or it knows too many transfers: prefill does not hear of that, and the
    other decode rank got all that it needs."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS, reserve_timeout_s=0.1) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert ranks.result(LONG, 0).complete
        process.wait_released(LONG)


def test_a_decode_rank_that_has_its_part_may_close_its_pair(process: PrefillProcess) -> None:
    """To make room for another: that must not cost a slower decode rank its own part."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert ranks.result(LONG, 0).complete
        client = ranks.clients[0]
        with client.lock:
            (peer,) = client._peers.values()
            client.retire(peer)
        wait_until(lambda: process.call("peers") == [0], what="the pair is closed")
        ranks.reserve(1, addresses, LONG, SOURCE, 0, TOKENS)
        assert ranks.result(LONG, 1).complete
        process.wait_released(LONG)


def test_a_waiting_transfer_takes_all_of_its_reservations(process: PrefillProcess) -> None:
    """The bound counts transfers; a second rank's reservation of the same one adds none."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS, max_pending=1) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        wait_until(lambda: process.call("waiting") == [1], what="one rank's reservation waits")
        ranks.reserve(1, addresses, LONG, SOURCE, 0, TOKENS)
        wait_until(lambda: process.call("waiting") == [2], what="the other's waits, too")
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert all(result.complete for result in ranks.results(LONG))
        process.wait_released(LONG)


# ---- how pairs end -------------------------------------------------------------------------


def paired(prefill: Prefill, decode: Decode) -> None:
    """A transfer has gone over the pair."""
    decode.reserve(prefill, "first#1", [5], 0, 9)
    prefill.compute("first#1", [1], 9)
    prefill.server.finish("first#1", 42, computed=True)
    assert decode.result("first#1").complete


@pytest.mark.parametrize("waiting_for", [Pair.send, Pair.receive])
@pytest.mark.parametrize("aborting", [DECODE_RANK, PREFILL_RANK])
def test_an_abort_wakes_whoever_waits(
    waiting_for: Callable[[Pair, torch.Tensor], PendingWork], aborting: int
) -> None:
    """At both ends: else a thread is stuck with a silent peer until transfer_timeout_s is over."""
    store, cpu = host_store("127.0.0.1", 5), torch.device("cpu")
    with ThreadPoolExecutor() as pool:
        pairs = list(
            pool.map(
                lambda rank: Pair(
                    join_store("127.0.0.1", store.port, 5), "p", rank, cpu, "127.0.0.1", 5
                ),
                (DECODE_RANK, PREFILL_RANK),
            )
        )
        # The peer does nothing, thus this waits for ever.
        work = waiting_for(pairs[DECODE_RANK], torch.zeros(1000))
        waiting = pool.submit(work.wait, 8)
        pairs[aborting].abort()
        wait_until(waiting.done, what="the wait is over", within_s=4)
        assert isinstance(waiting.exception(), PairError)


@pytest.mark.parametrize("side", [send, receive])
def test_stop_also_ends_the_threads_of_pairs_closed_before(
    monkeypatch: pytest.MonkeyPatch, side: ModuleType
) -> None:
    """A thread that is giving up its process group when the interpreter ends is killed inside
    C++, and takes the process with it: SIGABRT instead of a clean exit."""
    ending = threading.Event()

    def slow_close(*args: Any) -> None:
        ending.set()
        threading.Event().wait(0.5)
        close_pair(*args)

    monkeypatch.setattr(side, "close_pair", slow_close)
    with stream() as (prefill, decode):
        paired(prefill, decode)
        with decode.client.lock:
            (peer,) = decode.client._peers.values()
            decode.client.retire(peer)
        assert ending.wait(10)
        wait_until(lambda: not prefill.server._peers, what="prefill has closed the pair")
        stopped, thread = {
            send: (prefill.server.stop, "kv-send"),
            receive: (decode.client.stop, "kv-receive"),
        }[side]
        stopped()
        assert thread not in {each.name for each in threading.enumerate()}


def test_the_last_words_of_a_pair_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was posted before it left, at any moment of its thread: without the CANCEL, prefill
    keeps the blocks until a timeout."""
    left = threading.Event()
    flush = receive._Peer._flush

    with stream(peer_lease_s=60) as (prefill, decode):

        def leave_behind_flush(self: receive._Peer, control: zmq.Socket[bytes]) -> None:
            flush(self, control)
            if not left.is_set():
                left.set()
                decode.cancel(prefill, "r#1")
                with decode.client.lock:
                    decode.client.retire(self)

        paired(prefill, decode)
        decode.reserve(prefill, "r#1", [6], 0, 9)
        wait_until(lambda: bool(prefill.server._waiting), what="the reservation has arrived")
        monkeypatch.setattr(receive._Peer, "_flush", leave_behind_flush)
        wait_until(lambda: "r#1" in prefill.server._ended_keys, what="CANCEL has arrived")
        wait_until(lambda: not prefill.server._peers, what="BYE has arrived")
