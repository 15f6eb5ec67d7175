"""Test the stream between workers of different shapes, with several ranks and real process groups.

A leg is the part of a transfer between one pair of ranks. A unit is the smallest range of tokens
that is sent. Its size is the greatest common divisor of the two block sizes.
"""

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

from kv_transfer.errors import PairError
from kv_transfer.geometry import KvGeometry
from kv_transfer.pair import (
    DECODE_RANK,
    PREFILL_RANK,
    Pair,
    PendingWork,
    close_pair,
)
from kv_transfer.receive import receiver
from kv_transfer.receive.control import ControlConnection
from kv_transfer.send import sender
from tests.support.kv_pair_stores import linked_stores
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
PROMPTS = {"short#1": 3, "unit#1": 32, LONG: TOKENS}  # numbers of tokens
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


Reserved = dict[str, tuple[list[int], int]]  # by transfer id: blocks, index of the first token


def reserved_by(geometry: KvGeometry, starts: dict[str, int], rng: random.Random) -> Reserved:
    free = rng.sample(range(BLOCKS), BLOCKS)
    return {
        transfer_id: (
            [free.pop() for _ in range(-(-tokens // geometry.block_tokens))],
            starts[transfer_id],
        )
        for transfer_id, tokens in PROMPTS.items()
    }


def check(caches: RankCaches, reserved: Reserved, unit_tokens: int) -> None:
    """Check the KV of the reserved tokens. No other KV may change, except in the last unit."""
    expected = RankCaches(caches.geometry, BLOCKS)
    for transfer_id, (blocks, start) in reserved.items():
        tokens = PROMPTS[transfer_id]
        expected.fill(transfer_id, blocks, start, tokens, tokens)
        unit_end = -(-tokens // unit_tokens) * unit_tokens
        for layer in range(caches.geometry.num_layers):
            tail = caches.read(layer, blocks, tokens, unit_end)
            expected.write(layer, blocks, tokens, unit_end, tail)
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
def test_each_rank_gets_its_leg(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], message_bytes: int
) -> None:
    """Send several prompts at once over one set of pairs, with prefix hits on both sides."""
    prefill, decode = pair
    rng = random.Random(str(pair))
    with shapes(process, *pair, BLOCKS, message_bytes=message_bytes) as (addresses, ranks):
        starts = {
            transfer_id: rng.randrange(tokens) // decode.block_tokens * decode.block_tokens
            for transfer_id, tokens in PROMPTS.items()
        }
        source = reserved_by(prefill, dict.fromkeys(PROMPTS, 0), rng)
        targets = [reserved_by(decode, starts, rng) for _ in ranks.clients]

        def reserve(transfer_id: str) -> None:
            for rank, target in enumerate(targets):
                ranks.reserve(
                    rank, addresses, transfer_id, *target[transfer_id], PROMPTS[transfer_id]
                )

        reserve("unit#1")
        reserve(LONG)
        for transfer_id, tokens in PROMPTS.items():
            blocks, middle = source[transfer_id][0], max(1, tokens // 3)
            cached = min(2 * prefill.block_tokens, middle - 1)
            process.call("compute", transfer_id, blocks, 0, middle, tokens, cached)
            process.call("compute", transfer_id, blocks, middle, tokens, tokens)
            process.call("finish", transfer_id)
        reserve("short#1")

        unit_tokens = math.gcd(prefill.block_tokens, decode.block_tokens)
        for transfer_id, tokens in PROMPTS.items():
            slots = (
                -(-tokens // unit_tokens) * unit_tokens - starts[transfer_id]
            ) * decode.num_layers
            for result, caches in zip(ranks.results(transfer_id), ranks.caches, strict=True):
                assert result.complete
                assert result.first_token_id == 42
                heads = len(caches.geometry.heads)
                assert result.num_bytes == slots * heads * decode.content * decode.item_bytes
        for caches, target in zip(ranks.caches, targets, strict=True):
            check(caches, target, unit_tokens)
        process.wait_released(*PROMPTS)


def begin(process: PrefillProcess, addresses: tuple[str, ...], ranks: DecodeRanks) -> None:
    """Let all decode ranks reserve, then compute half of the prompt."""
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
    """Each decode rank cancels for itself, as with a real engine."""
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
        pytest.param(pair_of(6, (3, 2)), 0, [0, 1], id="3 to 2, through a rank that both read"),
    ],
)
def test_a_leg_that_a_prefill_rank_fails(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], failing: int, reached: list[int]
) -> None:
    """The decode ranks in ``reached`` fail immediately. The others complete. P frees all blocks."""
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
def test_a_leg_that_a_decode_rank_fails(
    process: PrefillProcess, pair: tuple[KvGeometry, KvGeometry], caplog: pytest.LogCaptureFixture
) -> None:
    with shapes(process, *pair, BLOCKS) as (addresses, ranks):
        for rank in range(1, len(ranks.clients)):
            ranks.reserve(rank, addresses, LONG, SOURCE, 0, TOKENS)
        ranks.reserve(0, addresses, LONG, SOURCE, 1, TOKENS)  # not the start of a unit
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        assert not ranks.result(LONG, 0).complete
        end(process)
        ranks.results(LONG)
        process.wait_released(LONG)
    assert "reservation of [1, 301)" in caplog.text


def test_a_decode_rank_that_never_reserves_does_not_hold_prefill_for_ever(
    process: PrefillProcess,
) -> None:
    """Neither RESERVE nor CANCEL arrives, for example because the pair was refused. The other
    decode rank still gets its whole leg."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS, reserve_timeout_s=0.1) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert ranks.result(LONG, 0).complete
        process.wait_released(LONG)


def test_a_decode_rank_that_has_its_leg_may_close_its_pair(process: PrefillProcess) -> None:
    """Decode rank 0 makes room for another pair. The slower rank must still get its own leg."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert ranks.result(LONG, 0).complete
        client = ranks.clients[0]
        with client.transfers.lock:
            (peer,) = client.transfers.peers.values()
            client.transfers.close_peer(peer)
        wait_until(lambda: process.call("peers") == [0], what="the pair is closed")
        ranks.reserve(1, addresses, LONG, SOURCE, 0, TOKENS)
        assert ranks.result(LONG, 1).complete
        process.wait_released(LONG)


def test_a_waiting_transfer_takes_all_of_its_reservations(process: PrefillProcess) -> None:
    """``max_pending`` counts transfers, not the reservations of several ranks for one transfer."""
    with shapes(process, *pair_of(2, (1, 2)), BLOCKS, max_pending=1) as (addresses, ranks):
        ranks.reserve(0, addresses, LONG, SOURCE, 0, TOKENS)
        wait_until(lambda: process.call("waiting") == [1], what="one rank's reservation waits")
        ranks.reserve(1, addresses, LONG, SOURCE, 0, TOKENS)
        wait_until(lambda: process.call("waiting") == [2], what="both reservations wait")
        process.call("compute", LONG, SOURCE, 0, HALF, TOKENS)
        end(process)
        assert all(result.complete for result in ranks.results(LONG))
        process.wait_released(LONG)


# ---- how pairs are closed ------------------------------------------------------------------


def paired(prefill: Prefill, decode: Decode) -> None:
    """Complete a transfer, so that the pair is made."""
    decode.reserve(prefill, "first#1", [5], 0, 9)
    prefill.compute("first#1", [1], 9)
    prefill.server.request_finished("first#1", 42, computed=True)
    assert decode.result("first#1").complete


@pytest.mark.parametrize(
    "waiting_for", [Pair.send, lambda pair, buffer: pair.receive(buffer, len(buffer))]
)
@pytest.mark.parametrize("aborting", [DECODE_RANK, PREFILL_RANK])
def test_an_abort_ends_waits_at_both_ends(
    waiting_for: Callable[[Pair, torch.Tensor], PendingWork], aborting: int
) -> None:
    """Without the abort, a thread waits for a silent peer for up to transfer_timeout_s."""
    stores, cpu = linked_stores(timeout_s=5), torch.device("cpu")
    with ThreadPoolExecutor() as pool:
        pairs = list(
            pool.map(
                lambda rank: Pair(stores[rank], rank, cpu, "127.0.0.1", 5),
                (DECODE_RANK, PREFILL_RANK),
            )
        )
        # The peer does nothing, so only a timeout or an abort ends the wait.
        work = waiting_for(pairs[DECODE_RANK], torch.zeros(1000))
        waiting = pool.submit(work.wait, 8)
        pairs[aborting].abort()
        wait_until(waiting.done, what="the wait is over", within_s=4)
        assert isinstance(waiting.exception(), PairError)


@pytest.mark.parametrize("side", [sender, receiver])
def test_stop_also_ends_the_threads_of_pairs_closed_before(
    monkeypatch: pytest.MonkeyPatch, side: ModuleType
) -> None:
    """A thread that aborts its process group while the interpreter exits is killed inside C++,
    so the process dies of SIGABRT instead of exiting cleanly."""
    ending = threading.Event()

    def slow_close(*args: Any) -> None:
        ending.set()
        threading.Event().wait(0.5)
        close_pair(*args)

    monkeypatch.setattr(side, "close_pair", slow_close)
    with stream() as (prefill, decode):
        paired(prefill, decode)
        with decode.client.transfers.lock:
            (peer,) = decode.client.transfers.peers.values()
            decode.client.transfers.close_peer(peer)
        assert ending.wait(10)
        wait_until(lambda: not prefill.server.transfers.peers, what="prefill has closed the pair")
        stopped, thread = {
            sender: (prefill.server.stop, "kv-send"),
            receiver: (decode.client.stop, "kv-receive"),
        }[side]
        stopped()
        assert thread not in {each.name for each in threading.enumerate()}


def test_the_last_messages_of_a_pair_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """All messages posted before the close are sent, even if the close comes right after a flush.

    Without the CANCEL, prefill would keep the blocks until a timeout.
    """
    closed = threading.Event()
    flush = ControlConnection.flush

    with stream(peer_lease_s=60) as (prefill, decode):

        def flush_then_close(connection: ControlConnection) -> None:
            flush(connection)
            if not closed.is_set():
                closed.set()
                decode.cancel(prefill, "r#1")
                with decode.client.transfers.lock:
                    decode.client.transfers.close_peer(connection._peer)

        paired(prefill, decode)
        decode.reserve(prefill, "r#1", [6], 0, 9)
        wait_until(
            lambda: bool(prefill.server.transfers.waiting), what="the reservation has arrived"
        )
        monkeypatch.setattr(ControlConnection, "flush", flush_then_close)
        wait_until(lambda: "r#1" in prefill.server.transfers.ended_ids, what="CANCEL has arrived")
        wait_until(lambda: not prefill.server.transfers.peers, what="BYE has arrived")
