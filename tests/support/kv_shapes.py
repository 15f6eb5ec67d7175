"""Ranks whose KV caches are of unlike shapes, for tests; also prefill ranks in a process apart.

What is in the caches is known for each token, head and layer (``kv_of``), and is written and read
by plain indexing: nothing here knows of pages.
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
from kv_transfer.kv_caches import KvPages
from kv_transfer.receive.client import DecodeClient, Reservation, TransferResult
from kv_transfer.send.server import PrefillServer, StepChunk
from tests.support.kv_stream import OPTIONS
from tests.support.waiting import wait_until


def geometry_of(
    heads: int, tp: int, block_tokens: int, layout: str = "HNC", *, layers: int = 2,
    content: int = 4, dtype: str = "float32", by_token: bool = True,
) -> KvGeometry:  # fmt: skip
    """Rank 0's. Layouts: "HNC", "NHC", or "HNC/7": a kernel packs a head's part of a block."""
    item_bytes = getattr(torch, dtype).itemsize
    return KvGeometry(
        "tiny", dtype, layers, heads, content, item_bytes, block_tokens, layout, by_token, tp, 0
    )


def ranks_of(geometry: KvGeometry) -> list[KvGeometry]:
    return [replace(geometry, tp_rank=rank) for rank in range(geometry.tp_size)]


def random_kv(seed: int | str, dtype: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(str(seed).encode()))
    return torch.randint(-128, 128, shape, generator=generator).to(getattr(torch, dtype))


def kv_of(key: str, geometry: KvGeometry, tokens: int) -> torch.Tensor:
    """What a model computes for a prompt: ``[layers, heads of the model, tokens, content]``."""
    shape = (geometry.num_layers, geometry.total_kv_heads, tokens, geometry.content)
    return random_kv(key, geometry.dtype, *shape)


class RankCaches:
    """One rank's caches; they hold noise at first.

    Args:
        interleaved: the layers of a block lie side by side, else the blocks of a layer.
        offset: elements before the first block.
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
        self.pages = KvPages(self.layers, self._packing if geometry.by_token else None)

    def write(
        self, layer: int, blocks: Sequence[int], start: int, end: int, kv: torch.Tensor
    ) -> None:
        """Tokens ``[start, end)`` of a request; ``kv`` ``[heads of the rank, tokens, content]``."""
        cache, at = self._at(layer, blocks, start, end)
        cache[at] = kv.transpose(0, 1)

    def read(self, layer: int, blocks: Sequence[int], start: int, end: int) -> torch.Tensor:
        cache, at = self._at(layer, blocks, start, end)
        return cache[at].transpose(0, 1)

    def fill(self, key: str, blocks: Sequence[int], start: int, end: int, tokens: int) -> None:
        """What a model computes for ``[start, end)`` of a prompt, all layers."""
        for layer in range(self.geometry.num_layers):
            self.fill_layer(layer, key, blocks, start, end, tokens)

    def fill_layer(
        self, layer: int, key: str, blocks: Sequence[int], start: int, end: int, tokens: int
    ) -> None:
        held = self.geometry.heads
        kv = kv_of(key, self.geometry, tokens)[layer, held.start : held.end, start:end]
        self.write(layer, blocks, start, end, kv)

    def _at(
        self, layer: int, blocks: Sequence[int], start: int, end: int
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """A view of the layer, and the index that gives ``[tokens, heads, content]`` of it."""
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
    """All prefill ranks of a worker, and the engine's calls around them."""

    def __init__(self, geometry: KvGeometry, blocks: int, options: dict[str, Any]) -> None:
        self.caches = [RankCaches(rank, blocks) for rank in ranks_of(geometry)]
        own = replace(OPTIONS, incarnation="p1", **options)
        self.servers = [PrefillServer(c.pages, c.geometry, own) for c in self.caches]
        self._released: list[set[str]] = [set() for _ in self.servers]

    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self.servers)

    def compute(
        self, key: str, blocks: list[int], start: int, end: int, tokens: int, cached: int = 0
    ) -> None:
        """One engine step. A new request's first ``cached`` tokens are prefix hits."""
        for caches in self.caches:
            caches.fill(key, blocks, 0, cached, tokens)
        first = max(start, cached)
        for server in self.servers:
            server.begin_step([StepChunk(key, key, tuple(blocks), first, end, tokens)])
        for layer in range(self.caches[0].geometry.num_layers):
            for caches, server in zip(self.caches, self.servers, strict=True):
                caches.fill_layer(layer, key, blocks, first, end, tokens)
                server.layer_done(layer + 1)
        for server in self.servers:
            server.end_step()

    def finish(self, key: str) -> None:
        for server in self.servers:
            server.finish(key, 42, computed=True)

    def preempt(self, key: str, rank: int) -> None:
        self.servers[rank].preempt([key])

    def released(self) -> list[set[str]]:
        """By rank: all keys whose blocks it has freed; raises if it frees some twice."""
        for seen, server in zip(self._released, self.servers, strict=True):
            released = server.take_released()
            assert not seen & released, f"released twice: {seen & released}"
            seen |= released
        return self._released

    def waiting(self) -> list[int]:
        """By rank: reservations that wait for their prefill."""
        return [sum(map(len, server._waiting.values())) for server in self.servers]

    def peers(self) -> list[int]:
        """By rank: decode ranks that are known."""
        return [len(server._peers) for server in self.servers]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        _wait_for_threads()


def _serve(pipe: Connection) -> None:
    """Main of the process: calls of PrefillRanks' methods, each answered; ends at EOF."""
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
        except Exception:  # noqa: BLE001 - raised on the other side
            pipe.send((None, traceback.format_exc()))


class PrefillProcess:
    """PrefillRanks in another process; one set of ranks after the other."""

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

    def wait_released(self, *keys: str) -> None:
        """Every rank has freed the blocks of these."""
        wait_until(
            lambda: all(released >= set(keys) for released in self.call("released")),
            what=f"all ranks release {keys}",
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
        self.clients = [DecodeClient(c.pages, c.geometry, own) for c in self.caches]
        self._results: list[dict[str, TransferResult]] = [{} for _ in self.clients]

    def reserve(
        self, rank: int, addresses: tuple[str, ...], key: str, blocks: list[int], start: int,
        end: int,
    ) -> None:  # fmt: skip
        own = tuple(blocks)
        self.clients[rank].reserve(Reservation(key, key, addresses, "p1", own, start, end))

    def take_results(self) -> list[dict[str, TransferResult]]:
        """By rank: all results up to now; raises if there are two for one key."""
        for seen, client in zip(self._results, self.clients, strict=True):
            for result in client.take_results():
                assert result.key not in seen, f"{result.key} was reported twice"
                seen[result.key] = result
        return self._results

    def result(self, key: str, rank: int) -> TransferResult:
        wait_until(
            lambda: key in self.take_results()[rank], what=f"transfer {key} ends on rank {rank}"
        )
        return self._results[rank][key]

    def results(self, key: str) -> list[TransferResult]:
        return [self.result(key, rank) for rank in range(len(self.clients))]

    def stop(self) -> None:
        for client in self.clients:
            client.stop()
        _wait_for_threads()


def _wait_for_threads() -> None:
    """Threads that still end a process group when the interpreter does would bring it down."""
    wait_until(
        lambda: not any(thread.name.startswith("kv-") for thread in threading.enumerate()),
        what="all threads of the stream have ended",
    )


@contextmanager
def shapes(
    process: PrefillProcess, prefill: KvGeometry, decode: KvGeometry, blocks: int, **options: Any
) -> Iterator[tuple[tuple[str, ...], DecodeRanks]]:
    """Prefill ranks in the process and decode ranks here; nothing is held by either afterwards."""
    addresses = process.call("open", prefill, blocks, options)
    ranks = DecodeRanks(decode, blocks, options)
    try:
        yield addresses, ranks
        assert not any(client.transfers for client in ranks.clients)
    finally:
        ranks.stop()
        process.call("stop")
    ranks.take_results()
    process.call("released")
