"""Runs both ends of a KV stream for tests: a prefill and a decode rank with small KV caches.

As a program, this module runs only a prefill end, which a test can kill.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.options import TransferOptions
from kv_transfer.receive.client import DecodeClient
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk
from kv_transfer.send.server import PrefillServer
from tests.support.waiting import wait_until

LAYERS, HEADS, BLOCK_TOKENS, CONTENT, BLOCKS = 4, 2, 16, 8, 64
GEOMETRY = KvGeometry(
    model="tiny",
    dtype="float32",
    num_layers=LAYERS,
    total_kv_heads=HEADS,
    content=CONTENT,
    item_bytes=4,
    block_tokens=BLOCK_TOKENS,
    layout="LBHNC",
    positions_known=True,
    tp_size=1,
    tp_rank=0,
)
OPTIONS = TransferOptions(
    host="127.0.0.1",
    incarnation="",
    secret="secret",
    message_bytes=3 * GEOMETRY.block_bytes,
    staging_buffers=2,
    pair_timeout_s=15,  # torch's store looks up host names, which may take seconds
    reserve_timeout_s=30,
    prefill_timeout_s=30,
    transfer_timeout_s=30,
    pair_idle_s=60,
    peer_lease_s=3,
    max_pairs=8,
    max_pending=64,
)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def random_caches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, HEADS, BLOCK_TOKENS, CONTENT)
    return [torch.randn(shape, generator=generator) for _ in range(LAYERS)]


def chunk_of(
    transfer_id: str, blocks: tuple[int, ...], start: int, end: int, tokens: int
) -> StepChunk:
    """Return a chunk with tokens ``[start, end)`` of a prompt of ``tokens`` tokens."""
    return StepChunk(
        transfer_id=transfer_id,
        request_id=f"engine-{transfer_id}",
        block_ids=blocks,
        token_start=start,
        token_end=end,
        num_tokens=tokens,
    )


class Prefill:
    """A prefill end, and an engine's calls to it."""

    def __init__(self, caches: list[torch.Tensor], incarnation: str = "p1", **options: Any):
        self.caches = caches
        self.server = PrefillServer(
            KvCaches(caches), GEOMETRY, replace(OPTIONS, incarnation=incarnation, **options)
        )
        self.released: set[str] = set()

    def compute(
        self, transfer_id: str, block_ids: list[int], tokens: int, cached: int = 0, chunk: int = 40
    ) -> None:
        """Run engine steps for a prompt. They write no KV: the caches already hold random KV."""
        for start in range(cached, tokens, chunk):
            end = min(tokens, start + chunk)
            blocks = tuple(block_ids[: blocks_of(end)])
            self.server.begin_step([chunk_of(transfer_id, blocks, start, end, tokens)])
            for layer in range(LAYERS):
                self.server.layer_done(layer + 1)
            self.server.end_step()

    def wait_released(self, transfer_id: str) -> None:
        def released() -> bool:
            self.released |= self.server.take_released()
            return f"engine-{transfer_id}" in self.released

        wait_until(released, what=f"blocks of {transfer_id} are released")


class Decode:
    """A decode end that waits for the results that a test asks for."""

    def __init__(self, caches: list[torch.Tensor], incarnation: str = "d1", **options: Any):
        self.caches = caches
        self.client = DecodeClient(
            KvCaches(caches), GEOMETRY, replace(OPTIONS, incarnation=incarnation, **options)
        )
        self.results: dict[str, TransferResult] = {}

    def reserve(
        self, prefill: Prefill | str, transfer_id: str, block_ids: list[int], start: int, end: int,
        incarnation: str = "p1",
    ) -> None:  # fmt: skip
        address = prefill if isinstance(prefill, str) else prefill.server.address
        self.client.reserve(
            Reservation(
                transfer_id=transfer_id,
                request_id=f"engine-{transfer_id}",
                addresses=(address,),
                incarnation=incarnation,
                block_ids=tuple(block_ids),
                token_start=start,
                token_end=end,
            )
        )

    def cancel(self, prefill: Prefill, transfer_id: str) -> None:
        self.client.cancel(transfer_id, (prefill.server.address,), "p1")

    def result(self, transfer_id: str) -> TransferResult:
        def arrived() -> bool:
            for result in self.client.take_results():
                reported = result.transfer_id
                assert reported not in self.results, f"{reported} was reported twice"
                self.results[reported] = result
            return transfer_id in self.results

        wait_until(arrived, what=f"transfer {transfer_id} ends")
        return self.results[transfer_id]


@contextmanager
def stream(**options: Any) -> Iterator[tuple[Prefill, Decode]]:
    """Yield one prefill and one decode end. At the exit, check that all of their threads end."""
    before = set(threading.enumerate())
    prefill = Prefill(random_caches(1), **options)
    decode = Decode(random_caches(2), **options)
    try:
        yield prefill, decode
    finally:
        decode.client.stop()
        prefill.server.stop()
        wait_until(lambda: not _kv_threads() - before, what="all threads have ended")


def _kv_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kv-")}


def same_blocks(
    source: list[torch.Tensor], source_ids: list[int], target: list[torch.Tensor],
    target_ids: list[int], first: int = 0,
) -> bool:  # fmt: skip
    """Return whether the listed blocks are equal in all layers. Start at list index ``first``."""
    return all(
        torch.equal(a[source_ids[first:]], b[target_ids[first:]])
        for a, b in zip(source, target, strict=True)
    )


if __name__ == "__main__":  # print the address, then wait to be killed
    print(Prefill(random_caches(1)).server.address, flush=True)
    os.read(sys.stdin.fileno(), 1)
