"""Runs ranks with KV caches of different shapes. Prefill ranks can run in another process.

``kv_of`` returns the KV of a prompt for each layer, head and token. This module writes and reads KV
by plain indexing, without the block units of ``kv_transfer.geometry``.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.receive.client import DecodeClient
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk
from kv_transfer.send.server import PrefillServer
from tests.support.kv_stream import OPTIONS
from tests.support.waiting import wait_until


def geometry_of(
    heads: int, tp: int, block_tokens: int, layout: str = "HNC", *, layers: int = 2,
    content: int = 4, dtype: str = "float32", positions_known: bool = True,
) -> KvGeometry:  # fmt: skip
    """Return rank 0's geometry.

    Args:
        layout: "HNC" or "NHC": the order of heads (H), tokens (N) and content (C) in a block. With
            a suffix such as "/7", each head's share of a block is packed in a random order with
            this seed.
    """
    return KvGeometry(
        model="tiny",
        dtype=dtype,
        num_layers=layers,
        total_kv_heads=heads,
        content=content,
        item_bytes=getattr(torch, dtype).itemsize,
        block_tokens=block_tokens,
        layout=layout,
        positions_known=positions_known,
        tp_size=tp,
        tp_rank=0,
    )


def ranks_of(geometry: KvGeometry) -> list[KvGeometry]:
    return [replace(geometry, tp_rank=rank) for rank in range(geometry.tp_size)]


def random_kv(seed: int | str, dtype: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(str(seed).encode()))
    return torch.randint(-128, 128, shape, generator=generator).to(getattr(torch, dtype))


def kv_of(transfer_id: str, geometry: KvGeometry, tokens: int) -> torch.Tensor:
    """Return the KV of a prompt: ``[layers, all heads, tokens, content]``."""
    shape = (geometry.num_layers, geometry.total_kv_heads, tokens, geometry.content)
    return random_kv(transfer_id, geometry.dtype, *shape)


class RankCaches:
    """One rank's caches, filled with noise.

    Args:
        interleaved: if True, the layers of a block are adjacent in memory. If False, the blocks of
            a layer are adjacent.
        offset: number of elements before the first block.
    """

    def __init__(
        self, geometry: KvGeometry, blocks: int, *, interleaved: bool = False, offset: int = 0
    ) -> None:
        self.geometry = geometry
        order, _, packing = geometry.layout.partition("/")
        heads, tokens, content = len(geometry.heads), geometry.block_tokens, geometry.content
        size, layers = heads * tokens * content, geometry.num_layers
        dtype = geometry.dtype
        self.storage = random_kv(
            f"noise {geometry.tp_rank}", dtype, offset + layers * blocks * size
        )
        inside = (tokens * content, content, 1) if order == "HNC" else (content, heads * content, 1)
        block, layer = (layers * size, size) if interleaved else (size, blocks * size)
        self.layers = [
            self.storage.as_strided(
                (blocks, heads, tokens, content), (block, *inside), offset + index * layer
            )
            for index in range(layers)
        ]
        self._packing: torch.Tensor | None = None
        if packing:
            generator = torch.Generator().manual_seed(int(packing))
            places = torch.randperm(tokens * content, generator=generator)
            self._packing = places.view(tokens, content)
        self.kv_caches = KvCaches(self.layers, self._packing if geometry.positions_known else None)

    def write(
        self, layer: int, blocks: Sequence[int], start: int, end: int, kv: torch.Tensor
    ) -> None:
        """Write the KV of a request's tokens ``[start, end)`` into one layer.

        Args:
            kv: ``[heads of the rank, tokens, content]``.
        """
        cache, at = self._at(layer, blocks, start, end)
        cache[at] = kv.transpose(0, 1)

    def read(self, layer: int, blocks: Sequence[int], start: int, end: int) -> torch.Tensor:
        cache, at = self._at(layer, blocks, start, end)
        return cache[at].transpose(0, 1)

    def fill(
        self, transfer_id: str, blocks: Sequence[int], start: int, end: int, tokens: int
    ) -> None:
        """Write the KV of a prompt's tokens ``[start, end)`` into all layers."""
        for layer in range(self.geometry.num_layers):
            self.fill_layer(layer, transfer_id, blocks, start, end, tokens)

    def fill_layer(
        self, layer: int, transfer_id: str, blocks: Sequence[int], start: int, end: int, tokens: int
    ) -> None:
        held = self.geometry.heads
        kv = kv_of(transfer_id, self.geometry, tokens)[layer, held.start : held.end, start:end]
        self.write(layer, blocks, start, end, kv)

    def _at(
        self, layer: int, blocks: Sequence[int], start: int, end: int
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Return a view of the layer, and an index that selects ``[tokens, heads, content]``."""
        token = torch.arange(start, end)
        block = torch.tensor(blocks)[token // self.geometry.block_tokens]
        inside = token % self.geometry.block_tokens
        if self._packing is None:
            return self.layers[layer], (block, slice(None), inside)
        head = torch.arange(len(self.geometry.heads))
        at = (block.view(-1, 1, 1), head.view(1, -1, 1), self._packing[inside].unsqueeze(1))
        return self.layers[layer].flatten(2), at


def blocks_for(geometry: KvGeometry, tokens: int, blocks: int, rng: random.Random) -> list[int]:
    return rng.sample(range(blocks), -(-tokens // geometry.block_tokens))


# ---- the stream over real process groups ---------------------------------------------------


class PrefillRanks:
    """All prefill ranks of a worker, and the engine's calls to them."""

    def __init__(self, geometry: KvGeometry, blocks: int, options: dict[str, Any]) -> None:
        self.caches = [RankCaches(rank, blocks) for rank in ranks_of(geometry)]
        own = replace(OPTIONS, incarnation="p1", **options)
        self.servers = [PrefillServer(c.kv_caches, c.geometry, own) for c in self.caches]
        self._released: list[set[str]] = [set() for _ in self.servers]

    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self.servers)

    def compute(
        self,
        transfer_id: str,
        blocks: list[int],
        start: int,
        end: int,
        tokens: int,
        cached: int = 0,
    ) -> None:
        """Run one engine step. The first ``cached`` tokens of a new request are prefix hits."""
        for caches in self.caches:
            caches.fill(transfer_id, blocks, 0, cached, tokens)
        first = max(start, cached)
        chunk = StepChunk(
            transfer_id=transfer_id,
            request_id=transfer_id,
            block_ids=tuple(blocks),
            token_start=first,
            token_end=end,
            num_tokens=tokens,
        )
        for server in self.servers:
            server.begin_step([chunk])
        for layer in range(self.caches[0].geometry.num_layers):
            for caches, server in zip(self.caches, self.servers, strict=True):
                caches.fill_layer(layer, transfer_id, blocks, first, end, tokens)
                server.layer_done(layer + 1)
        for server in self.servers:
            server.end_step()

    def finish(self, transfer_id: str) -> None:
        for server in self.servers:
            server.request_finished(transfer_id, 42, computed=True)

    def preempt(self, transfer_id: str, rank: int) -> None:
        self.servers[rank].preempt([transfer_id])

    def released(self) -> list[set[str]]:
        """Return all released requests of each rank. Check that none is released twice."""
        for seen, server in zip(self._released, self.servers, strict=True):
            released = server.take_released()
            assert not seen & released, f"released twice: {seen & released}"
            seen |= released
        return self._released

    def waiting(self) -> list[int]:
        """Return for each rank how many reservations wait for their prefill."""
        return [sum(map(len, server.transfers.waiting.values())) for server in self.servers]

    def peers(self) -> list[int]:
        """Return for each rank how many decode ranks are paired with it."""
        return [len(server.transfers.peers) for server in self.servers]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        _wait_for_threads()


def _serve(pipe: Connection) -> None:
    """Main function of the other process: serve calls of PrefillRanks' methods until EOF."""
    torch.set_num_threads(1)
    ranks: PrefillRanks | None = None
    while True:
        try:
            method, *args = pipe.recv()
        except EOFError:
            return
        try:
            if method == "open":
                ranks = PrefillRanks(*args)
                method, args = "addresses", []
            pipe.send((getattr(ranks, method)(*args), None))
        except Exception:  # noqa: BLE001 - passed to the caller
            pipe.send((None, traceback.format_exc()))


class PrefillProcess:
    """A process that runs PrefillRanks. Each call of "open" makes new ranks."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, *args))
        assert self._pipe.poll(30), f"no answer to {method}"
        result, error = self._pipe.recv()
        assert error is None, error
        return result

    def wait_released(self, *transfer_ids: str) -> None:
        """Wait until every rank has released the blocks of these transfers."""
        wait_until(
            lambda: all(released >= set(transfer_ids) for released in self.call("released")),
            what=f"all ranks release {transfer_ids}",
        )

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        assert self._process.exitcode == 0, f"exit code {self._process.exitcode}"


class DecodeRanks:
    """All decode ranks of a worker, in this process."""

    def __init__(self, geometry: KvGeometry, blocks: int, options: dict[str, Any]) -> None:
        self.geometry = geometry
        self.caches = [RankCaches(rank, blocks) for rank in ranks_of(geometry)]
        own = replace(OPTIONS, incarnation="d1", **options)
        self.clients = [DecodeClient(c.kv_caches, c.geometry, own) for c in self.caches]
        self._results: list[dict[str, TransferResult]] = [{} for _ in self.clients]

    def reserve(
        self, rank: int, addresses: tuple[str, ...], transfer_id: str, blocks: list[int],
        start: int, end: int,
    ) -> None:  # fmt: skip
        self.clients[rank].reserve(
            Reservation(
                transfer_id=transfer_id,
                request_id=transfer_id,
                addresses=addresses,
                incarnation="p1",
                block_ids=tuple(blocks),
                token_start=start,
                token_end=end,
            )
        )

    def take_results(self) -> list[dict[str, TransferResult]]:
        """Return all results so far of each rank. Check that none is reported twice."""
        for seen, client in zip(self._results, self.clients, strict=True):
            for result in client.take_results():
                assert result.transfer_id not in seen, f"{result.transfer_id} was reported twice"
                seen[result.transfer_id] = result
        return self._results

    def result(self, transfer_id: str, rank: int) -> TransferResult:
        wait_until(
            lambda: transfer_id in self.take_results()[rank],
            what=f"transfer {transfer_id} ends on rank {rank}",
        )
        return self._results[rank][transfer_id]

    def results(self, transfer_id: str) -> list[TransferResult]:
        return [self.result(transfer_id, rank) for rank in range(len(self.clients))]

    def stop(self) -> None:
        for client in self.clients:
            client.stop()
        _wait_for_threads()


def _wait_for_threads() -> None:
    """Wait until the stream's threads end: an abort during interpreter exit crashes the process."""
    wait_until(
        lambda: not any(thread.name.startswith("kv-") for thread in threading.enumerate()),
        what="all threads of the stream have ended",
    )


@contextmanager
def shapes(
    process: PrefillProcess, prefill: KvGeometry, decode: KvGeometry, blocks: int, **options: Any
) -> Iterator[tuple[tuple[str, ...], DecodeRanks]]:
    """Run prefill ranks in ``process`` and decode ranks in this process.

    At the end, check that decode holds no transfer and that nothing is reported or released twice.
    """
    addresses = process.call("open", prefill, blocks, options)
    ranks = DecodeRanks(decode, blocks, options)
    try:
        yield addresses, ranks
        assert not any(client.transfers.by_id for client in ranks.clients)
    finally:
        ranks.stop()
        process.call("stop")
    ranks.take_results()
    process.call("released")
